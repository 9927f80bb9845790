// "Draw a scene, ask the model": what happens when something is drawn, chosen or typed.
import {PARAMETERS, PATCHES, POLYGONS, SIZE} from "./built/world.js" // the last two: a side
import {RemoteModel} from "./client.js"
import {Editor, icon, untrained} from "./editor.js"
import {parseBoxes} from "./answers.js"
import {openPicture, resize, toTensor} from "./pixels.js"
import {COLORS, HELD_OUT, SHAPES, makeScene, nameOf, paintScene} from "./scenes.js"
import {SIDE, corners, drawAnswer, drawBins, drawZoom, showProbs, showTokens} from "./views.js"

const $ = id => document.getElementById(id)
const isSmall = new URLSearchParams(location.search).has("small")
document.documentElement.classList.toggle("small", isSmall)

const state = {
  scene: null, picture: null,      // one of the two: a scene, or {rgba, size}
  edited: false,                   // is the scene another than its seed's?
  cover: new Set(),                // patches that are hidden
  task: "detect", target: null,    // and the object that it is about; task null: typed
  color: "red", question: 0,
  tokens: [], masks: new Map(),    // of the answer; masks by their codes
  after: null,                     // their probabilities with the cover on
  selected: null, pinned: false,   // a token
}

// --- the picture

function pixels(withCover) { // the model's, RGBA
  const {scene, picture, cover} = state, cell = SIZE / PATCHES
  const rgba = scene ? paintScene(scene, SIZE)
    : resize(picture.rgba, picture.size, [SIZE, SIZE], "bicubic")
  for (const patch of withCover ? cover : []) {
    const x = patch % PATCHES * cell, y = Math.floor(patch / PATCHES) * cell
    for (let row = y; row < y + cell; row++)
      rgba.fill(128, 4 * (row * SIZE + x), 4 * (row * SIZE + x + cell))
  }
  return rgba
}

function paintPicture() {
  const {scene, picture, cover} = state, canvas = $("pixels"), draw = canvas.getContext("2d")
  const rgba = scene ? paintScene(scene, SIDE)
    : resize(picture.rgba, picture.size, [SIDE, SIDE], "bicubic")
  canvas.width = canvas.height = SIDE
  draw.putImageData(new ImageData(rgba, SIDE, SIDE), 0, 0)
  draw.fillStyle = "rgb(128 128 128)"
  const wide = SIDE / PATCHES
  for (const patch of cover)
    draw.fillRect(patch % PATCHES * wide, Math.floor(patch / PATCHES) * wide, wide, wide)
}

function showScene(scene, edited = false) {
  Object.assign(state, {scene, picture: null, edited, target: scene.objects[0]})
  $("seed").value = scene.seed
  editor.show(scene)
  uncover()
  writePrompt()
  changed()
}

function showPicture(picture) {
  Object.assign(state, {scene: null, picture, target: null})
  if (state.task) state.task = "caption"
  editor.show(null)
  uncover()
  writePrompt()
  changed()
}

function uncover() {
  state.cover.clear()
  changed()
}

// --- the prompt

function questions() { // about the scene, in the words of the training
  const [a, b] = state.scene?.objects ?? []
  const asked = ["how many objects are there?"]
  if (a) asked.push(`what color is the ${a.shape}?`, `how many ${a.color} objects are there?`)
  if (b) asked.push(`is the ${nameOf(a)} left of the ${nameOf(b)}?`, `is there a ${nameOf(b)}?`)
  return asked
}

function writePrompt() { // for the task and its target
  const {task, target, scene} = state, asked = questions()
  if (target && !scene?.objects.includes(target)) state.target = scene?.objects[0]
  const name = state.target ? nameOf(state.target) : "red circle"
  const prompts = {caption: "caption en", detect: `detect ${name}`, segment: `segment ${name}`,
                   answer: `answer en ${asked[state.question % asked.length]}`}
  if (task) $("prompt").value = prompts[task]
  for (const button of $("tasks").children)
    button.setAttribute("aria-pressed", button.dataset.task === task)
  $("prompts").replaceChildren(...Object.values(prompts).concat(
    asked.map(question => `answer en ${question}`)).map(value => new Option(value)))
}

// --- asking

const model = new RemoteModel((loaded, total) => {
  const mega = bytes => (bytes / 1e6).toFixed(1)
  Object.assign($("progress"), {value: loaded, max: total})
  $("progress-text").textContent = `Loading the model: ${mega(loaded)} of ${mega(total)} MB`
})
let isReady = false, asking = false, again = false

async function fetchMasks(text) { // squares for the codes in it
  for (const {codes} of parseBoxes(text)) {
    if (!codes || state.masks.has(String(codes))) continue
    if (state.masks.size > 50) state.masks.clear()
    state.masks.set(String(codes), await model.mask(codes))
  }
}

async function askAbout(prompt) {
  const start = performance.now(), fresh = []
  if (state.cover.size === 0) Object.assign(state, {after: null})
  const answer = await model.ask(toTensor(pixels(false)), prompt, token => {
    fresh.push(token)
    if (fresh.length >= state.tokens.length) show(fresh) // else the last answer stays a moment
  })
  if (!answer) return
  const seconds = (performance.now() - start) / 1000
  await fetchMasks(answer.text)
  show(fresh)
  $("said").textContent = inWords(answer.text)
  $("more").textContent = `${fresh.length} tokens in ${seconds.toFixed(2)} s`
  if (state.cover.size) await compare(prompt, answer)
}

function inWords(text) { // boxes in the model's pixels
  const objects = parseBoxes(text).map(({label, box}) => {
    const [x1, y1, x2, y2] = box.map(v => Math.round(v * SIZE))
    return `${label} from ${x1}, ${y1} to ${x2}, ${y2}`
  })
  return objects.join("; ") || text || "Nothing, which means: it is not there."
}

async function compare(prompt, {ids, text}) { // the same answer, read with the cover on
  const covered = toTensor(pixels(true)), after = []
  if (!await model.read(covered, prompt, ids, ({prob}) => after.push(prob))) return
  const now = await model.ask(covered, prompt)
  if (!now) return
  Object.assign(state, {after})
  show(state.tokens)
  const times = after.reduce((ratio, p, i) => ratio * p / state.tokens[i].prob, 1)
  const likely = times > 1.5 ? `${times.toPrecision(2)} times likelier`
    : times > 0.67 ? "about as likely"
    : times > 1e-6 ? `${Number((1 / times).toPrecision(2))} times less likely`
    : "over a million times less likely"
  const same = now.text === text ? "It would still be written." : `Written: ${inWords(now.text)}`
  $("more").textContent = `With the cover on, this answer is ${likely}. ${same}`
}

async function ask() { // one at a time; what comes meanwhile is asked about afterwards
  if (!isReady) return
  if (asking) { again = true; return }
  asking = true
  do {
    again = false
    try { await askAbout($("prompt").value) }
    catch (error) {
      show([])
      $("said").textContent = error.message
      $("more").textContent = ""
    }
  } while (again)
  asking = false
}

let framed = false

function changed() { // the picture, the cover or the prompt
  if (playing++ && state.pinned) select(null)
  if (framed) return
  framed = true
  requestAnimationFrame(() => {
    framed = false
    paintPicture()
    writeAddress()
    const why = state.scene && untrained(state.scene)
    $("note").textContent = state.picture
      ? "It was trained on drawn scenes alone: to it, a photograph is foreign."
      : why ? `It was trained on ${why}: here it may err.` : ""
    $("uncover").hidden = !state.cover.size
    ask()
  })
}

// --- the answer and what stands behind it

function show(tokens) {
  state.tokens = tokens
  if (state.selected >= tokens.length) state.selected = null
  showTokens($("tokens"), tokens, state.after, state.selected)
  $("key").hidden = !state.after
  const {selected} = state, token = tokens[selected]
  const count = selected == null ? tokens.length : selected + 1
  const style = getComputedStyle(document.documentElement)
  const strong = style.getPropertyValue("--accent"), weak = style.getPropertyValue("--bar")
  drawAnswer($("marks"), tokens, count, state.masks, token && attentionOf(token), PATCHES)
  drawBins($("bins-x"), $("bins-y"), tokens, selected, strong)
  drawZoom($("zoom"), $("zoom-text"), token, corners(tokens)[selected], SIZE, {strong, weak})
  showProbs($("probs"), token)
  $("hint").hidden = Boolean(token)
}

function attentionOf({attention}) { // [patches], the mean over what is chosen
  const chosen = id => [...$(id).options].map(({value}) => value).filter(Number)
  const pick = id => $(id).value === "mean" ? chosen(id) : [$(id).value]
  const area = PATCHES ** 2, sum = new Float32Array(area), heads = chosen("head").length
  for (const layer of pick("layer")) for (const head of pick("head")) {
    const start = ((layer - 1) * heads + (head - 1)) * area
    for (let i = 0; i < area; i++) sum[i] += attention[start + i]
  }
  return sum
}

function select(index, pinned = false) {
  Object.assign(state, {selected: index, pinned})
  show(state.tokens)
}

let playing = 0 // anything that is done stops it

async function slowly(pause) { // token after token
  const turn = ++playing
  for (let i = 0; i < state.tokens.length; i++) {
    if (turn !== playing) return
    select(i, true)
    await new Promise(resolve => setTimeout(resolve, pause))
  }
  if (turn === playing) select(null)
}

// --- the address says what is shown, so that it can be sent

function writeAddress() {
  if (isSmall || !state.scene) return
  const {scene, edited} = state, values = {seed: scene.seed, prompt: $("prompt").value}
  if (edited) values.objects = scene.objects.map(({shape, color, x, y, radius, angle}) =>
    [shape, color, ...[x, y, radius, angle].map(v => Number(v.toFixed(3)))].join()).join(";")
  history.replaceState(null, "", "#" + new URLSearchParams(values))
}

function readAddress() {
  const values = new URLSearchParams(location.hash.slice(1)), prompt = values.get("prompt")
  const seed = Number(values.get("seed") ?? HELD_OUT + 2738)
  const scene = makeScene(seed >= 0 && seed < 2 ** 32 ? Math.floor(seed) : HELD_OUT)
  const objects = (values.get("objects")?.split(";") ?? []).map(text => {
    const [shape, color, ...numbers] = text.split(","), [x, y, radius, angle] = numbers.map(Number)
    return {shape, color, rgb: COLORS[color], x, y, radius, angle}
  }).filter(o => SHAPES.includes(o.shape) && o.rgb && [o.x, o.y, o.radius, o.angle]
    .every(Number.isFinite))
  if (objects.length) scene.objects = objects
  showScene(scene, objects.length > 0)
  if (!prompt) return
  Object.assign(state, {task: null})
  $("prompt").value = prompt
  writePrompt()
}

// --- buttons and keys

const editor = new Editor($("objects"), {
  changed() {
    state.edited = true
    writePrompt()
    changed()
  },
  chose(o) {
    $("change").hidden = !o
    if (!o) return
    $("chosen").textContent = nameOf(o)
    state.target = o
    state.color = o.color
    showColors()
    if (state.task === "detect" || state.task === "segment") writePrompt()
    changed()
  },
})

function showColors() {
  const rgb = name => `rgb(${COLORS[name].join()})`
  $("colors").replaceChildren(...Object.keys(COLORS).map(name => {
    const button = document.createElement("button")
    button.setAttribute("role", "radio")
    button.setAttribute("aria-label", name)
    button.setAttribute("aria-checked", name === state.color)
    button.title = name
    button.style.setProperty("--rgb", rgb(name))
    button.onclick = () => {
      state.color = name
      if (editor.chosen) editor.recolor(name)
      showColors()
      $("colors").querySelector("[aria-checked=true]").focus()
    }
    return button
  }))
  $("add").style.setProperty("--rgb", rgb(state.color))
}

$("add").append(...SHAPES.map(shape => {
  const button = document.createElement("button")
  Object.assign(button, {innerHTML: icon(shape, POLYGONS), title: `Add a ${shape}`})
  button.setAttribute("aria-label", `Add a ${shape}`)
  button.onclick = () => {
    if (!state.scene) showScene({...makeScene(Number($("seed").value)), objects: []}, true)
    editor.add(shape, state.color)
  }
  return button
}))

$("new").onclick = () => showScene(makeScene(HELD_OUT + Math.floor(Math.random() * 1e9)))
$("seed").onchange = ({target}) => {
  const seed = Number(target.value)
  if (Number.isInteger(seed) && seed >= 0 && seed < 2 ** 32) showScene(makeScene(seed))
  else $("note").textContent = "A seed is a whole number, 0 to 4294967295."
}
$("file").onchange = async ({target}) => {
  try { if (target.files[0]) showPicture(await openPicture(target.files[0])) }
  catch (error) { $("note").textContent = error.message }
  target.value = ""
}
$("change").onclick = ({target}) => target.dataset.key && editor.press(target.dataset.key)

$("tasks").onclick = ({target}) => {
  if (!target.dataset.task) return
  if (target.dataset.task === state.task) state.question++
  state.task = target.dataset.task
  writePrompt()
  changed()
}
$("prompt").oninput = () => {
  state.task = null
  writePrompt()
}
$("ask").onsubmit = event => {
  event.preventDefault()
  changed()
}

function tokenAt(event) {
  const index = [...$("tokens").children].indexOf(event.target.closest("li"))
  return index < 0 ? null : index
}
$("tokens").onpointerover = event => {
  if (event.pointerType === "mouse" && !state.pinned) select(tokenAt(event))
}
$("tokens").onpointerleave = () => state.pinned || select(null)
$("tokens").onfocusin = event => event.target.matches(":focus-visible") &&
  select(tokenAt(event), true)
$("tokens").onclick = event => {
  const index = tokenAt(event), same = state.pinned && index === state.selected
  playing++
  if (index !== null) select(same ? null : index, !same)
}
$("slowly").onclick = () => slowly(600)
$("layer").onchange = $("head").onchange = () => show(state.tokens)
document.addEventListener("keydown", ({key}) => {
  if (key !== "Escape") return
  playing++
  select(null)
})

// --- covering

let cursor = 0
const patchAt = ({clientX, clientY}) => {
  const area = $("patches").getBoundingClientRect()
  const place = (v, start, long) => Math.floor(Math.min(Math.max((v - start) / long, 0), 0.999) * PATCHES)
  return place(clientY, area.top, area.height) * PATCHES + place(clientX, area.left, area.width)
}

function coverPatch(patch, hide) {
  if (hide === state.cover.has(patch)) return
  if (hide) state.cover.add(patch)
  else state.cover.delete(patch)
  changed()
}

function moveCursor(patch) {
  cursor = patch
  $("patches").style.setProperty("--x", patch % PATCHES)
  $("patches").style.setProperty("--y", Math.floor(patch / PATCHES))
}

$("patches").style.setProperty("--patches", PATCHES)
$("patches").onpointerdown = event => {
  const hide = !state.cover.has(patchAt(event))
  $("patches").setPointerCapture(event.pointerId)
  $("patches").onpointermove = event => coverPatch(patchAt(event), hide)
  $("patches").onpointermove(event)
}
$("patches").onpointerup = $("patches").onpointercancel = () => { $("patches").onpointermove = null }
$("patches").onkeydown = event => {
  const steps = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -PATCHES, ArrowDown: PATCHES}
  const next = cursor + (steps[event.key] ?? 0), isRow = Math.abs(steps[event.key]) === 1
  const stays = isRow && Math.floor(next / PATCHES) !== Math.floor(cursor / PATCHES)
  if (event.key === " ") coverPatch(cursor, !state.cover.has(cursor))
  else if (!steps[event.key]) return
  else if (next >= 0 && next < PATCHES ** 2 && !stays) moveCursor(next)
  event.preventDefault()
}
$("cover").onclick = () => {
  const on = $("patches").hidden
  $("patches").hidden = !on
  $("cover").setAttribute("aria-pressed", on)
  if (on) $("patches").focus()
}
$("uncover").onclick = uncover

// --- start

$("millions").textContent = (PARAMETERS / 1e6).toFixed(1)
showColors()
readAddress()
try {
  const {layers, heads} = await model.ready
  const options = count => [new Option("mean"), ...Array(count).keys()].map(i =>
    i instanceof Option ? i : new Option(String(i + 1)))
  $("layer").append(...options(layers))
  $("head").append(...options(heads))
  $("loading").hidden = true
  isReady = true
  await ask()
  if (!matchMedia("(prefers-reduced-motion)").matches) slowly(300) // once, as a beginning
  navigator.serviceWorker?.register("sw.js")
} catch (error) {
  $("progress-text").textContent = `The model could not be loaded: ${error.message}`
  $("progress").hidden = true
}
