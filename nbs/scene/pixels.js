// Pictures as the processor sees them. A browser's resize is not Pillow's, so here is
// Pillow's: in bytes for pictures (bicubic), in floats for masks (bilinear).

const FILTERS = { // how far each reaches, and its weight at a distance
  bilinear: [1, x => Math.max(1 - Math.abs(x), 0)],
  bicubic: [2, x => {
    x = Math.abs(x)
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1
    return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0
  }],
}

function weights(from, to, filter) { // for each of `to` places: the first of `from`, weights
  const [reach, weight] = FILTERS[filter], scale = from / to, stretch = Math.max(scale, 1)
  return Array.from({length: to}, (_, i) => {
    const center = (i + 0.5) * scale, support = reach * stretch
    const first = Math.max(Math.trunc(center - support + 0.5), 0)
    const end = Math.min(Math.trunc(center + support + 0.5), from)
    const raw = Array.from({length: end - first},
      (_, j) => weight((j + first - center + 0.5) / stretch))
    const sum = raw.reduce((a, b) => a + b, 0)
    return [first, raw.map(w => w / sum)]
  })
}

// One axis of a picture [outer, from, inner] -> [outer, to, inner]. Bytes are weighted with
// whole numbers of 22 binary places, as in Pillow.
function resizeAxis(source, outer, from, to, inner, filter) {
  if (from === to) return source
  const bytes = !(source instanceof Float32Array), one = 2 ** 22
  const target = new source.constructor(outer * to * inner)
  const table = weights(from, to, filter).map(([first, ws]) =>
    [first, bytes ? ws.map(w => Math.trunc(w * one + (w < 0 ? -0.5 : 0.5))) : ws])
  for (let o = 0; o < outer; o++) table.forEach(([first, ws], i) => {
    for (let k = 0; k < inner; k++) {
      let sum = bytes ? one / 2 : 0
      for (let j = 0; j < ws.length; j++)
        sum += ws[j] * source[(o * from + first + j) * inner + k]
      target[(o * to + i) * inner + k] = bytes ? Math.floor(sum / one) : sum
    }
  })
  return target
}

export function resize(source, [width, height], [newWidth, newHeight], filter) {
  const channels = source.length / (width * height) // Uint8ClampedArray or Float32Array
  const columns = (s, rows) => resizeAxis(s, rows, width, newWidth, channels, filter)
  const rows = (s, columns) => resizeAxis(s, 1, height, newHeight, columns * channels, filter)
  // the order of the two is felt where bytes are rounded between them; since Pillow 13:
  const tall = height > newHeight && height - newHeight > 2 * (width - newWidth)
  if (tall) return columns(rows(source, width), newHeight)
  return rows(columns(source, height), newWidth)
}

// the model's numbers of each byte: (x / 255 - 0.5) / 0.5, rounded as in Python
const NORMALIZED = Float32Array.from({length: 256},
  (_, x) => Math.fround(Math.fround(x * (1 / 255)) - 0.5) / 0.5)

export function toTensor(rgba) { // [s, s, 4] bytes -> [3, s, s] float32
  const area = rgba.length / 4, pixels = new Float32Array(3 * area)
  for (let c = 0, i = 0; c < 3; c++)
    for (let j = c; j < rgba.length; j += 4) pixels[i++] = NORMALIZED[rgba[j]]
  return pixels
}

const LARGEST = 16 * 2 ** 20 // pixels: what a phone's canvas holds

export async function openPicture(file) { // a Blob -> {rgba, size: [width, height]}
  const bitmap = await createImageBitmap(file, {colorSpaceConversion: "none"}).catch(() => {
    throw new Error(`${file.name ?? "That"} is no picture that this browser can open.`)
  })
  const size = [bitmap.width, bitmap.height]
  if (bitmap.width * bitmap.height > LARGEST)
    throw new Error(`The picture has ${size.join(" × ")} pixels. It may have 16 million.`)
  const context = new OffscreenCanvas(...size).getContext("2d")
  context.fillStyle = "white" // behind what is transparent
  context.fillRect(0, 0, ...size)
  context.drawImage(bitmap, 0, 0)
  return {rgba: context.getImageData(0, 0, ...size).data, size}
}

// float32 [64, 64] -> bytes [height, width], 1 inside
export function boxMask(square, [x1, y1, x2, y2], [width, height]) {
  const mask = new Uint8Array(width * height)
  const [left, top, right, bottom] = [x1, y1, x2, y2].map(Math.round)
  if (left >= right || top >= bottom) return mask
  const part = resize(square, [64, 64], [right - left, bottom - top], "bilinear")
  for (let y = top, i = 0; y < bottom; y++)
    for (let x = left; x < right; x++) mask[y * width + x] = part[i++] > 0
  return mask
}
