// The course's scenes (nbs/01_scenes.ipynb): made from a seed and painted, pixel for pixel as
// in Python. Places and lengths are parts of the picture's side, so that a scene has any size.
import {Random, list} from "./random.js"
import {SHAPES, COLORS, POLYGONS, GAUSSIAN} from "./built/world.js" // Python's own numbers

export {SHAPES, COLORS}
export const HELD_OUT = 10 ** 9 // seeds from here on were never trained on

const round32 = Math.fround // numpy paints in float32
const clip = (x, low, high) => Math.min(Math.max(x, low), high)
const radians = degrees => degrees * (Math.PI / 180)

function outline(shape, angle) { // corners [x, y] in a circle of radius 1, box centred
  if (!POLYGONS[shape]) return null // round
  const cos = Math.cos(angle), sin = Math.sin(angle)
  const turned = POLYGONS[shape].map(([x, y]) => [x * cos - y * sin, x * sin + y * cos])
  const middle = [0, 1].map(axis => {
    const values = turned.map(corner => corner[axis])
    return (Math.max(...values) + Math.min(...values)) / 2
  })
  return turned.map(([x, y]) => [x - middle[0], y - middle[1]])
}

export function halfSides({shape, radius, angle}) { // of the box: [w, h]
  const corners = outline(shape, angle)
  if (!corners) return [radius, radius]
  return [0, 1].map(axis => radius * Math.max(...corners.map(corner => corner[axis])))
}

function place(random, shapes) { // for each {x, y, radius, angle}; boxes do not touch
  for (;;) { // from the start again when one finds no room in 24 tries
    const placed = []
    for (const shape of shapes) {
      const o = {radius: random.uniform(0.10, 0.22), angle: radians(random.uniform(-12, 12))}
      const [w, h] = halfSides({shape, ...o})
      const along = half => 0.01 + half + random.double() * (0.98 - 2 * half)
      const places = list(24, () => ({x: along(w), y: along(h)}))
      const free = places.find(({x, y}) => placed.every(p => Math.abs(x - p.x) >= 0.06 &&
        (Math.abs(x - p.x) > w + p.w + 0.01 || Math.abs(y - p.y) > h + p.h + 0.01)))
      if (!free) break
      placed.push({...o, ...free, w, h})
    }
    if (placed.length === shapes.length) return placed
  }
}

export function makeScene(seed) { // an integer, 0 … 2**32 - 1
  const random = new Random(seed), count = 1 + random.below(4)
  const shapes = list(count, () => SHAPES[random.below(SHAPES.length)])
  const names = Object.keys(COLORS), colors = list(count, () => names[random.below(8)])
  if (count > 1 && random.double() < 0.06) { // now and then, two of the same name
    shapes[1] = shapes[0]
    colors[1] = colors[0]
  }
  const tints = list(count, () => list(3, () => random.uniform(-15, 15)))
  const objects = place(random, shapes).map(({x, y, radius, angle}, i) => ({
    shape: shapes[i], color: colors[i], x, y, radius, angle,
    rgb: COLORS[colors[i]].map((c, j) => clip(c + tints[i][j], 0, 255))}))
  objects.sort((a, b) => a.x - b.x)
  const grey = random.uniform(50, 215)
  const first = list(3, () => grey + random.uniform(-12, 12))
  const change = random.uniform(-45, 45)
  const second = first.map(c => clip(c + change, 35, 225))
  const background = {first, second, angle: random.uniform(0, 2 * Math.PI)}
  return {seed, objects, background, noise: random.uniform(2, 6)}
}

export const nameOf = o => `${o.color} ${o.shape}`

// --- painting

function edgeDistance(x, y, edges) { // signed: negative inside the polygon
  let nearest = Infinity, inside = false
  for (const {ax, ay, by, ux, uy, length} of edges) { // each edge points down
    const dx = x - ax, dy = y - ay, along = dx * ux + dy * uy, across = dx * uy - dy * ux
    if (across < 0 && dy >= 0 && y < by) inside = !inside
    const beyond = along - clip(along, 0, length)
    nearest = Math.min(nearest, across * across + beyond * beyond)
  }
  return inside ? -Math.sqrt(nearest) : Math.sqrt(nearest)
}

function distanceTo(o, size) { // a function of x and y in pixels from the object's middle
  const radius = o.radius * size
  if (o.shape === "circle") return (x, y) => Math.hypot(x, y) - radius
  if (o.shape === "ring")
    return (x, y) => Math.abs(Math.hypot(x, y) - 0.725 * radius) - 0.275 * radius
  const corners = outline(o.shape, o.angle).map(point => point.map(v => radius * v))
  const edges = corners.map((start, i) => {
    const end = corners[(i + 1) % corners.length]
    const [[ax, ay], [bx, by]] = start[1] <= end[1] ? [start, end] : [end, start]
    const length = Math.hypot(bx - ax, by - ay)
    return {ax, ay, by, length, ux: (bx - ax) / length, uy: (by - ay) / length}
  })
  return (x, y) => edgeDistance(x, y, edges)
}

function paint(canvas, o, size) {
  const [w, h] = halfSides(o).map(v => v * size), x = o.x * size, y = o.y * size
  const distance = distanceTo(o, size), area = size * size
  const start = v => Math.max(Math.floor(v) - 1, 0)
  const end = v => Math.min(Math.ceil(v) + 1, size)
  for (let row = start(y - h); row < end(y + h); row++)
    for (let column = start(x - w); column < end(x + w); column++) {
      const alpha = clip(0.5 - distance(column + 0.5 - x, row + 0.5 - y), 0, 1)
      for (let c = 0, i = row * size + column; c < 3; c++, i += area)
        canvas[i] += alpha * (o.rgb[c] - canvas[i])
    }
}

function backdrop({first, second, angle}, size) { // float32 [3, size, size]
  const canvas = new Float32Array(3 * size * size), root = round32(Math.SQRT2)
  const cos = round32(Math.cos(angle)), sin = round32(Math.sin(angle))
  const steps = list(size, i => round32((i + 0.5) / size - 0.5))
  const tones = [first, second].map(tone => tone.map(round32))
  for (let c = 0, i = 0; c < 3; c++) {
    const from = tones[0][c], change = round32(tones[1][c] - from)
    for (let row = 0; row < size; row++) for (let column = 0; column < size; column++) {
      const ramp = round32(round32(cos * steps[column]) + round32(sin * steps[row]))
      canvas[i++] = from + round32(round32(0.5 + round32(ramp / root)) * change)
    }
  }
  return canvas
}

const grains = new Map() // random bytes by seed and size: drawn once

function grain(seed, size) {
  const key = `${seed} ${size}`
  if (!grains.has(key)) {
    if (grains.size > 3) grains.clear()
    grains.set(key, new Random(seed, 1).bytes(3 * size * size))
  }
  return grains.get(key)
}

export function paintScene(scene, size) { // RGBA bytes [size, size, 4], as a canvas has them
  const canvas = backdrop(scene.background, size), picks = grain(scene.seed, size)
  for (const o of scene.objects) paint(canvas, o, size)
  const noise = round32(scene.noise), area = size * size
  const rgba = new Uint8ClampedArray(4 * area).fill(255) // it clips, and rounds as numpy does
  for (let c = 0, i = 0; c < 3; c++) for (let pixel = 0; pixel < area; pixel++, i++)
    rgba[4 * pixel + c] = round32(canvas[i] + round32(noise * GAUSSIAN[picks[i]]))
  return rgba
}
