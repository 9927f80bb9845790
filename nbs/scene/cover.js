// Patches of the picture that are hidden, by pointer or by keys.
import {PATCHES} from "./built/world.js" // patches a side

const KEYS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}
const clip = v => Math.min(Math.max(v, 0), PATCHES - 1)

export class Cover {
  patches = new Set()
  #x = 0 // the keys' place
  #y = 0

  constructor(element, changed) {
    Object.assign(this, {element, changed})
    element.style.setProperty("--patches", PATCHES)
    element.onpointerdown = event => {
      const hide = !this.patches.has(this.#patchAt(event))
      element.setPointerCapture(event.pointerId)
      element.onpointermove = event => this.#set(this.#patchAt(event), hide)
      element.onpointermove(event)
    }
    element.onpointerup = element.onpointercancel = () => { element.onpointermove = null }
    element.onkeydown = event => { if (this.#press(event.key)) event.preventDefault() }
  }

  clear() {
    this.patches.clear()
    this.changed()
  }

  fill(rgba, size) { // hides them in a picture, RGBA bytes [size, size, 4]
    const cell = size / PATCHES
    for (const patch of this.patches) {
      const x = patch % PATCHES * cell, y = Math.floor(patch / PATCHES) * cell
      for (let row = y; row < y + cell; row++)
        for (let i = 4 * (row * size + x); i < 4 * (row * size + x + cell); i += 4)
          rgba.fill(128, i, i + 3)
    }
    return rgba
  }

  #patchAt({clientX, clientY}) {
    const {left, top, width, height} = this.element.getBoundingClientRect()
    const place = part => clip(Math.floor(part * PATCHES))
    return place((clientY - top) / height) * PATCHES + place((clientX - left) / width)
  }

  #set(patch, hide) {
    if (hide === this.patches.has(patch)) return
    if (hide) this.patches.add(patch)
    else this.patches.delete(patch)
    this.changed()
  }

  #press(key) { // true if it means something here
    const patch = this.#y * PATCHES + this.#x
    if (key === " ") this.#set(patch, !this.patches.has(patch))
    else if (!KEYS[key]) return false
    else [this.#x, this.#y] = [clip(this.#x + KEYS[key][0]), clip(this.#y + KEYS[key][1])]
    this.element.style.setProperty("--x", this.#x)
    this.element.style.setProperty("--y", this.#y)
    return true
  }
}
