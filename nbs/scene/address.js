// What is shown, as the part of the address behind "#": it can be sent to someone.
import {COLORS, HELD_OUT, SHAPES, makeScene} from "./scenes.js"

const FIRST = HELD_OUT + 2738 // a star, a circle and a cross

export function writeAddress({seed, objects}, edited, prompt) {
  const values = new URLSearchParams({seed, prompt})
  const write = ({shape, color, x, y, radius, angle}) =>
    [shape, color, ...[x, y, radius, angle].map(v => Number(v.toFixed(3)))].join()
  if (edited) values.set("objects", objects.map(write).join(";"))
  history.replaceState(null, "", `${location.search}#${values}`)
}

function readObject(text) { // null if there is a mistake in it
  const [shape, color, ...numbers] = text.split(",")
  const [x, y, radius, angle] = numbers.map(Number)
  const fine = SHAPES.includes(shape) && COLORS[color] && radius > 0 &&
    [x, y, radius, angle].every(Number.isFinite)
  return fine ? {shape, color, rgb: COLORS[color], x, y, radius, angle} : null
}

export function readAddress() { // -> scene, edited, prompt ("" without one)
  const values = new URLSearchParams(location.hash.slice(1))
  const seed = Number(values.get("seed") ?? FIRST)
  const scene = makeScene(Number.isInteger(seed) && seed >= 0 && seed < 2 ** 32 ? seed : FIRST)
  const objects = values.get("objects")?.split(";").map(readObject).filter(Boolean)
  if (objects) scene.objects = objects
  return {scene, edited: Boolean(objects), prompt: values.get("prompt") ?? ""}
}
