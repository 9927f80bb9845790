// Boxes and masks in the model's text (nbs/15_detection.ipynb).

const LOC = "<loc(0[0-9]{3}|10[01][0-9]|102[0-3])>\\s*"
const SEG = "<seg(?:0[0-9]{2}|1[01][0-9]|12[0-7])>\\s*"
const OBJECT = new RegExp(`${LOC.repeat(4)}((?:${SEG})*)(.*?)(?=;|<loc|<seg|$)`, "gs")

// "<loc0294><loc0594><loc0563><loc0867> yellow cross" -> [{label, box, codes}]: box is
// [x1, y1, x2, y2] in parts of the side, codes are 16 numbers, or null without a whole mask
export function parseBoxes(text) {
  return [...text.matchAll(OBJECT)].map(([, ...found]) => {
    const [y1, x1, y2, x2] = found.slice(0, 4).map(bin => bin / 1023)
    const codes = (found[4].match(/[0-9]+/g) ?? []).map(Number)
    return {
      label: found[5].trim().replace(/\s+/g, " "),
      box: [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)],
      codes: codes.length === 16 ? codes : null,
    }
  })
}
