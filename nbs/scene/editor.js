// Shapes that are dragged, or moved by keys: a button over each object of the scene.
import {COLORS, SHAPES, halfSides, nameOf} from "./scenes.js"

const STEP = 1 / 56 // two pixels of the model's
const clip = (x, low, high) => Math.min(Math.max(x, low), high)
const KEYS = { // what each does to an object
  ArrowLeft: o => { o.x -= STEP }, ArrowRight: o => { o.x += STEP },
  ArrowUp: o => { o.y -= STEP }, ArrowDown: o => { o.y += STEP },
  "+": o => { o.radius *= 1.1 }, "=": o => { o.radius *= 1.1 }, "-": o => { o.radius /= 1.1 },
  "[": o => { o.angle -= Math.PI / 30 }, "]": o => { o.angle += Math.PI / 30 },
}

function keepInside(o) {
  o.radius = clip(o.radius, 0.05, 0.4)
  const [w, h] = halfSides(o)
  o.x = clip(o.x, w, 1 - w)
  o.y = clip(o.y, h, 1 - h)
}

export class Editor {
  // `changed` is called when a shape is, `chose` when another one is touched
  constructor(element, {changed, chose}) {
    Object.assign(this, {element, changed, chose, scene: null, chosen: null})
  }

  show(scene) { // null: a picture without shapes
    this.scene = scene
    this.chosen = null
    this.element.replaceChildren(...(scene?.objects ?? []).map(o => this.#button(o)))
    this.choose(null)
  }

  choose(o) {
    this.chosen = o
    for (const button of this.element.children)
      button.setAttribute("aria-pressed", button.object === o)
    this.chose(o)
  }

  add(shape, color) {
    const o = {shape, color, rgb: COLORS[color], radius: 0.15, angle: 0, x: 0.5, y: 0.5}
    const free = this.#freePlace(o)
    Object.assign(o, free)
    this.scene.objects.push(o)
    this.element.append(this.#button(o))
    this.choose(o)
    this.changed()
  }

  recolor(color) {
    Object.assign(this.chosen, {color, rgb: COLORS[color]})
    this.#place(this.#buttonOf(this.chosen))
    this.changed()
  }

  press(key, o = this.chosen) { // true if the key means something here
    if (!o) return false
    if (key === "Delete" || key === "Backspace") this.#remove(o)
    else if (KEYS[key]) {
      KEYS[key](o)
      keepInside(o)
      this.#place(this.#buttonOf(o))
    } else return false
    this.changed()
    return true
  }

  #freePlace(o) { // the place farthest from the others, of a coarse grid
    const grid = [0.2, 0.35, 0.5, 0.65, 0.8], others = this.scene.objects
    const places = grid.flatMap(y => grid.map(x => ({x, y})))
    const room = ({x, y}) => Math.min(1, ...others.map(p =>
      Math.hypot(x - p.x, y - p.y) - p.radius - o.radius))
    return places.reduce((a, b) => room(b) > room(a) ? b : a)
  }

  #buttonOf(o) { return [...this.element.children].find(button => button.object === o) }

  #remove(o) {
    this.#buttonOf(o).remove()
    this.scene.objects.splice(this.scene.objects.indexOf(o), 1)
    this.choose(null)
  }

  #place(button) {
    const o = button.object, [w, h] = halfSides(o), percent = v => `${100 * v}%`
    Object.assign(button.style, {left: percent(o.x - w), top: percent(o.y - h),
      width: percent(2 * w), height: percent(2 * h)})
    button.setAttribute("aria-label", `${nameOf(o)}: arrow keys move it, + and − change ` +
      "its size, [ and ] turn it, Delete removes it")
  }

  #button(o) {
    const button = document.createElement("button")
    button.object = o
    this.#place(button)
    button.onfocus = () => this.chosen === o || this.choose(o)
    button.onkeydown = event => { if (this.press(event.key, o)) event.preventDefault() }
    button.onpointerdown = event => {
      const area = this.element.getBoundingClientRect()
      const dx = event.clientX / area.width - o.x, dy = event.clientY / area.height - o.y
      button.setPointerCapture(event.pointerId)
      if (this.chosen !== o) this.choose(o)
      button.onpointermove = ({clientX, clientY}) => {
        o.x = clientX / area.width - dx
        o.y = clientY / area.height - dy
        keepInside(o)
        this.#place(button)
        this.changed()
      }
    }
    button.onpointerup = button.onpointercancel = () => { button.onpointermove = null }
    button.onwheel = event => {
      if (this.chosen !== o) return
      event.preventDefault()
      this.press(event.deltaY < 0 ? "+" : "-", o)
    }
    return button
  }
}

export function untrained(scene) { // why a scene is unlike those of the training, or ""
  const {objects} = scene
  if (objects.length < 1 || objects.length > 4) return "one to four shapes"
  const boxes = objects.map(o => ({...o, sides: halfSides(o)}))
  const touch = boxes.some((a, i) => boxes.slice(i + 1).some(b =>
    Math.abs(a.x - b.x) < a.sides[0] + b.sides[0] &&
    Math.abs(a.y - b.y) < a.sides[1] + b.sides[1]))
  if (touch) return "shapes that do not touch"
  if (objects.some(o => o.radius < 0.1 || o.radius > 0.22)) return "shapes of other sizes"
  const isTurned = objects.some(o => Math.abs(o.angle) > Math.PI / 15)
  return isTurned ? "shapes that are hardly turned" : ""
}

// an SVG path of each shape in the circle of radius 1, for the buttons
export function icon(shape, polygons) {
  const path = polygons[shape]
    ? `M${polygons[shape].map(point => point.join(" ")).join("L")}Z`
    : "M1 0A1 1 0 1 1 -1 0A1 1 0 1 1 1 0Z" +
      (shape === "ring" ? "M.45 0A.45 .45 0 1 0 -.45 0A.45 .45 0 1 0 .45 0Z" : "")
  return `<svg viewBox="-1.1 -1.1 2.2 2.2" aria-hidden="true"><path d="${path}"/></svg>`
}

export {SHAPES, COLORS}
