// What the page draws of an answer. A token is what model.js describes, `text` the answer up
// to it.
import {parseBoxes} from "./answers.js"
import {boxMask} from "./pixels.js"

export const SIDE = 448 // of the drawn picture, in pixels of its canvas
const INKS = ["#d55e00", "#0072b2", "#f0e442", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]

const percent = p => p > 0.9995 ? "100 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`
const binOf = token => token.bins && Number(token.name.slice(4, 8))
const shownName = name =>
  name === "<eos>" ? "end" : name.trim().replace(/[<>]/g, "") || "␣"

function context(canvas, width = SIDE, height = SIDE) { // cleared
  Object.assign(canvas, {width, height})
  return canvas.getContext("2d")
}

function inkOf(label, objects) { // equal labels have equal colors
  const labels = [...new Set(objects.map(o => o.label))]
  return INKS[labels.indexOf(label) % INKS.length]
}

// The place of each token in its box: 0 … 3 for y1, x1, y2, x2; null if it is no coordinate
export function corners(tokens) {
  let count = 0
  return tokens.map(token => {
    if (!token.bins) count = 0
    return token.bins ? count++ % 4 : null
  })
}

const codesIn = text => (text.split("<loc").at(-1).match(/<seg/g) ?? []).length

// --- over the picture

function spotlight(draw, attention, side) { // of patches: dark where it did not look
  const most = Math.max(...attention), cell = SIDE / side
  attention.forEach((weight, i) => {
    draw.fillStyle = `rgb(0 0 0 / ${0.6 * (1 - weight / most)})`
    draw.fillRect(i % side * cell, Math.floor(i / side) * cell, cell, cell)
  })
}

function outlined(draw, ink, path, width = 4) { // a line that shows on every background
  for (const [style, extra] of [["rgb(255 255 255 / .85)", 3], [ink, 0]]) {
    Object.assign(draw, {strokeStyle: style, lineWidth: width + extra, lineJoin: "round"})
    draw.beginPath()
    path()
    draw.stroke()
  }
}

function drawMask(draw, square, box, ink, cells) { // cells: how many of 4 x 4 are written
  const mask = boxMask(square, box.map(v => v * SIDE), [SIDE, SIDE])
  const [x1, y1, x2, y2] = box.map(v => v * SIDE), layer = new OffscreenCanvas(SIDE, SIDE)
  const image = new ImageData(SIDE, SIDE)
  const rgb = ink.match(/\w\w/g).map(hex => parseInt(hex, 16))
  mask.forEach((inside, i) => {
    if (!inside) return
    const column = Math.floor(4 * (i % SIDE - x1) / (x2 - x1))
    const row = Math.floor(4 * (Math.floor(i / SIDE) - y1) / (y2 - y1))
    if (4 * Math.max(row, 0) + Math.max(column, 0) >= cells) return
    const edge = !mask[i - 2] || !mask[i + 2] || !mask[i - 2 * SIDE] || !mask[i + 2 * SIDE]
    image.data.set([...rgb, edge ? 255 : 130], 4 * i)
  })
  layer.getContext("2d").putImageData(image, 0, 0)
  draw.drawImage(layer, 0, 0)
}

function drawLabel(draw, label, [x1, y1, , y2], ink) { // above the box, or below
  if (!label) return
  draw.font = "600 17px system-ui, sans-serif"
  const width = draw.measureText(label).width + 14, x = Math.min(x1, SIDE - width)
  const y = y1 > 32 ? y1 - 30 : Math.min(y2 + 5, SIDE - 26)
  draw.fillStyle = ink
  draw.beginPath()
  draw.roundRect(Math.max(x, 0), y, width, 25, 6)
  draw.fill()
  draw.fillStyle = ["#f0e442", "#56b4e9", "#e69f00", "#cc79a7"].includes(ink) ? "#111" : "#fff"
  draw.fillText(label, Math.max(x, 0) + 7, y + 18)
}

// The answer up to its token `count - 1`. masks: codes joined by "," -> square.
export function drawAnswer(canvas, tokens, count, masks, attention, side) {
  const draw = context(canvas), text = tokens[count - 1]?.text ?? ""
  const whole = parseBoxes(tokens.at(-1)?.text ?? ""), objects = parseBoxes(text)
  if (attention) spotlight(draw, attention, side)
  objects.forEach(({label, box}, i) => {
    const ink = inkOf(whole[i].label, whole), [x1, y1, x2, y2] = box.map(v => v * SIDE)
    const square = masks.get(String(whole[i].codes))
    const cells = i < objects.length - 1 ? 16 : codesIn(text)
    if (square) drawMask(draw, square, box, ink, cells)
    outlined(draw, ink, () => draw.rect(x1, y1, x2 - x1, y2 - y1))
    drawLabel(draw, label, [x1, y1, x2, y2], ink)
  })
  const places = corners(tokens.slice(0, count)), last = places.at(-1)
  if (last == null || last === 3) return
  for (let i = count - 1 - last; i < count; i++) { // a box of which some sides are known
    const at = binOf(tokens[i]) / 1023 * SIDE, isRow = places[i] % 2 === 0
    outlined(draw, "#d55e00", () => {
      draw.moveTo(isRow ? 0 : at, isRow ? at : 0)
      draw.lineTo(isRow ? SIDE : at, isRow ? at : SIDE)
    }, 2)
  }
}

// --- the 1,024 bins, along the picture's top and its left side

export function drawBins(across, down, tokens, selected, ink) {
  const draws = [context(down, 32, SIDE), context(across, SIDE, 32)]
  corners(tokens).forEach((place, i) => {
    if (place == null || selected != null && i !== selected) return
    const draw = draws[place % 2], {bins} = tokens[i], most = Math.max(...bins)
    draw.fillStyle = ink
    for (let pixel = 0; pixel < SIDE; pixel++) {
      const first = Math.floor(pixel / SIDE * 1024), end = Math.ceil((pixel + 1) / SIDE * 1024)
      const long = 30 * Math.max(...bins.subarray(first, end)) / most
      if (long < 1) continue
      if (place % 2) draw.fillRect(pixel, 32 - long, 1.5, long)
      else draw.fillRect(32 - long, pixel, long, 1.5)
    }
  })
}

export function drawZoom(canvas, caption, token, place, size, inks) { // around the chosen bin
  canvas.hidden = caption.hidden = !token?.bins
  if (!token?.bins) return
  const chosen = binOf(token), count = 65, width = 520, height = 96
  const first = Math.min(Math.max(chosen - 32, 0), 1024 - count)
  const draw = context(canvas, width, height), most = Math.max(...token.bins)
  for (let i = 0; i < count; i++) {
    const tall = Math.max(token.bins[first + i] / most * (height - 4), 1)
    draw.fillStyle = first + i === chosen ? inks.strong : inks.weak
    draw.fillRect(i * width / count + 1, height - tall, width / count - 2, tall)
  }
  const side = ["top", "left", "bottom", "right"][place]
  caption.textContent = `The ${side} edge, bins ${first} to ${first + count - 1} of 0 to ` +
    `1023: ${chosen} is pixel ${(chosen / 1023 * size).toFixed(1)} of ${size}.`
}

// --- the tokens

export function showTokens(list, tokens, after, selected) { // after: probabilities, covered
  while (list.children.length > tokens.length) list.lastChild.remove()
  while (list.children.length < tokens.length) {
    const item = document.createElement("li")
    item.append(document.createElement("button"))
    list.append(item)
  }
  tokens.forEach((token, i) => {
    const button = list.children[i].firstChild, name = shownName(token.name)
    const now = after?.[i], kind = token.name.match(/<(loc|seg|eos)/)?.[1] ?? "word"
    button.textContent = name
    button.className = `token ${kind}`
    button.style.setProperty("--p", token.prob)
    button.style.setProperty("--now", now ?? token.prob)
    button.classList.toggle("compared", now != null)
    button.setAttribute("aria-pressed", i === selected)
    const change = now == null ? "" : `, ${percent(now)} with the cover`
    button.title = `${name}: ${percent(token.prob)}${change}`
  })
}

export function showProbs(element, token) {
  element.replaceChildren(...(token?.top ?? []).map(([name, prob]) => {
    const row = document.createElement("div"), bar = document.createElement("i")
    bar.style.setProperty("--p", prob)
    row.append(Object.assign(document.createElement("b"), {textContent: shownName(name)}), bar,
      percent(prob))
    return row
  }))
}

// --- attention [layers, heads, patches] of a token

const sum = (maps, area) =>
  maps.reduce((a, b) => a.map((x, i) => x + b[i]), new Float32Array(area))

export function mapOf(attention, index, area) { // of one layer and head, or the mean of all
  const maps = Array.from({length: attention.length / area},
    (_, i) => attention.subarray(i * area, (i + 1) * area))
  return index === null ? sum(maps, area) : maps[index]
}

export function meanAttention(tokens) { // over a whole answer
  return sum(tokens.map(token => token.attention), tokens[0].attention.length)
}

export function makeMaps(element, {layers, heads}, choose) { // a button for each, and the mean
  element.style.setProperty("--heads", heads)
  for (let i = -1; i < layers * heads; i++) {
    const button = document.createElement("button"), index = i < 0 ? null : i
    const label = `layer ${Math.floor(i / heads) + 1}, head ${i % heads + 1}`
    Object.assign(button, {index, onclick: () => choose(index)})
    button.title = i < 0 ? "the mean of all" : label
    button.setAttribute("aria-label", button.title)
    button.append(document.createElement("canvas"))
    element.append(button)
  }
}

export function showMaps(element, attention, chosen, side, ink) {
  for (const button of element.children) {
    button.setAttribute("aria-pressed", button.index === chosen)
    drawMap(button.firstChild, mapOf(attention, button.index, side ** 2), side, ink)
  }
}

function drawMap(canvas, map, side, ink) {
  const draw = context(canvas, side, side), most = Math.max(...map)
  map.forEach((weight, i) => {
    draw.fillStyle = ink
    draw.globalAlpha = weight / most
    draw.fillRect(i % side, Math.floor(i / side), 1, 1)
  })
}
