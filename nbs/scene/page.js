// "Draw a scene, ask the model": what happens when something is drawn, chosen or typed.
import {PARAMETERS, PATCHES, POLYGONS, SIZE} from "./built/world.js"
import {readAddress, writeAddress} from "./address.js"
import {RemoteModel} from "./client.js"
import {Cover} from "./cover.js"
import {Editor, icon, untrained} from "./editor.js"
import {parseBoxes} from "./answers.js"
import {openPicture, resize, toTensor} from "./pixels.js"
import {COLORS, HELD_OUT, SHAPES, makeScene, nameOf, paintScene} from "./scenes.js"
import {SIDE, corners, drawAnswer, drawBins, drawZoom, makeMaps, mapOf, meanAttention,
  showMaps, showProbs, showTokens} from "./views.js"

const $ = id => document.getElementById(id)
const isSmall = new URLSearchParams(location.search).has("small")
document.documentElement.classList.toggle("small", isSmall)

const state = {
  scene: null, picture: null,      // one of the two: a scene, or {rgba, size}
  edited: false,                   // is the scene another than its seed's?
  task: "detect", target: null,    // and the object that it is about; task null: typed
  color: "red", question: 0,
  asked: null,                     // the prompt of the answer that is shown
  tokens: [], masks: new Map(),    // of the answer; masks by their codes
  after: null,                     // their probabilities with the cover on
  selected: null, pinned: false,   // a token
  map: null,                       // layer and head as one number; null: the mean of all
}

// --- the picture

function pixels(size) { // RGBA; the model's have SIZE, the visitor's SIDE
  const {scene, picture} = state
  return scene ? paintScene(scene, size)
    : resize(picture.rgba, picture.size, [size, size], "bicubic")
}

function paintPicture() {
  const canvas = $("pixels")
  canvas.width = canvas.height = SIDE
  const image = new ImageData(cover.fill(pixels(SIDE), SIDE), SIDE, SIDE)
  canvas.getContext("2d").putImageData(image, 0, 0)
}

function showScene(scene, edited = false) {
  Object.assign(state, {scene, picture: null, edited, target: scene.objects[0]})
  $("seed").value = scene.seed
  showAnew()
}

function showPicture(picture) {
  Object.assign(state, {scene: null, picture, target: null})
  if (state.task) state.task = "caption"
  showAnew()
}

function showAnew() {
  editor.show(state.scene)
  cover.clear()
  writePrompt()
}

// --- the prompt

function questions() { // about the scene, in the words of the training
  const [a, b] = state.scene?.objects ?? []
  const asked = ["how many objects are there?"]
  if (a) asked.push(`what color is the ${a.shape}?`, `how many ${a.color} objects are there?`)
  if (b) asked.push(`is the ${nameOf(a)} left of the ${nameOf(b)}?`)
  return asked.map(question => `answer en ${question}`)
}

function promptsFor(target) { // of each task
  const asked = questions(), name = target ? nameOf(target) : "red circle"
  return {caption: "caption en", detect: `detect ${name}`, segment: `segment ${name}`,
          answer: asked[state.question % asked.length]}
}

function writePrompt() { // for the task and its target
  const objects = state.scene?.objects ?? []
  if (!objects.includes(state.target)) state.target = objects[0]
  const prompts = promptsFor(state.target)
  if (state.task) $("prompt").value = prompts[state.task]
  for (const button of $("tasks").children)
    button.setAttribute("aria-pressed", button.dataset.task === state.task)
  $("prompts").replaceChildren(...Object.values(prompts).concat(questions())
    .map(prompt => new Option(prompt)))
}

function readPrompt(prompt) { // of an address; perhaps it is one of a task
  const [task, target] = state.scene.objects.flatMap(o => Object.entries(promptsFor(o))
    .filter(([, text]) => text === prompt).map(([task]) => [task, o]))[0] ?? [null, null]
  $("prompt").value = prompt
  Object.assign(state, {task, target})
  writePrompt()
}

// --- asking

let model, asking = false, again = false, framed = false

async function fetchMasks(text) { // squares for the codes in it
  for (const {codes} of parseBoxes(text)) {
    if (!codes || state.masks.has(String(codes))) continue
    if (state.masks.size > 50) state.masks.clear()
    state.masks.set(String(codes), await model.mask(codes))
  }
}

async function askAbout(prompt) {
  const start = performance.now(), fresh = [], isNew = prompt !== state.asked
  if (isNew || !cover.patches.size) state.after = null
  state.asked = prompt
  const answer = await model.ask(toTensor(pixels(SIZE)), prompt, token => {
    fresh.push(token) // while a shape is dragged the last answer stays until there is another
    if (isNew || fresh.length >= state.tokens.length) show(fresh)
  })
  if (!answer) return
  const seconds = (performance.now() - start) / 1000
  await fetchMasks(answer.text)
  show(fresh)
  $("said").textContent = inWords(answer.text)
  $("more").textContent = `${fresh.length} tokens in ${seconds.toFixed(2)} s`
  if (cover.patches.size) await compare(prompt, answer)
}

function inWords(text) { // boxes in the model's pixels
  const objects = parseBoxes(text).map(({label, box}) => {
    const [x1, y1, x2, y2] = box.map(v => Math.round(v * SIZE))
    return `${label} from ${x1}, ${y1} to ${x2}, ${y2}`
  })
  return objects.join("; ") || text || "Nothing: to the model, it is not there."
}

async function compare(prompt, {ids, text}) { // the same answer, read with the cover on
  const covered = toTensor(cover.fill(pixels(SIZE), SIZE)), after = []
  if (!await model.read(covered, prompt, ids, ({prob}) => after.push(prob))) return
  const now = await model.ask(covered, prompt)
  if (!now) return
  Object.assign(state, {after})
  show(state.tokens)
  const times = after.reduce((ratio, p, i) => ratio * p / state.tokens[i].prob, 1)
  const likely = times > 1.5 ? `${times.toPrecision(2)} times likelier`
    : times > 0.67 ? "about as likely"
    : times > 1e-6 ? `${Number((1 / times).toPrecision(2)).toLocaleString()} times less likely`
    : "over a million times less likely"
  const same = now.text === text ? "It would still be written."
    : `Instead of it: ${now.text ? inWords(now.text) : "nothing, as if it were not there"}`
  $("more").textContent = `With the cover on, this answer is ${likely}. ${same}`
}

async function ask() { // one at a time; what comes meanwhile is asked about afterwards
  if (!model) return
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
  if (!framed) $("talk").setAttribute("aria-busy", false)
}

function changed() { // the picture, the cover or the prompt
  playing++
  if (state.pinned) select(null)
  $("talk").setAttribute("aria-busy", true)
  if (framed) return
  framed = true
  requestAnimationFrame(() => {
    framed = false
    paintPicture()
    if (state.scene && !isSmall) writeAddress(state.scene, state.edited, $("prompt").value)
    const why = state.scene && untrained(state.scene)
    $("note").textContent = state.picture
      ? "It was trained on drawn scenes alone: to it, a photograph is foreign."
      : why ? `It was trained on ${why}: here it may err.` : ""
    $("uncover").hidden = !cover.patches.size
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
  drawAnswer($("marks"), tokens, count, state.masks,
    token && mapOf(token.attention, state.map, PATCHES ** 2), PATCHES)
  drawBins($("bins-x"), $("bins-y"), tokens, selected, strong)
  drawZoom($("zoom"), $("zoom-text"), token, corners(tokens)[selected], SIZE, {strong, weak})
  showProbs($("probs"), token)
  $("hint").hidden = Boolean(token)
  if (tokens.length)
    showMaps($("maps"), token?.attention ?? meanAttention(tokens), state.map, PATCHES, strong)
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

// --- buttons and keys

const cover = new Cover($("patches"), () => changed())
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
    button.setAttribute("aria-label", name)
    button.setAttribute("aria-pressed", name === state.color)
    button.title = name
    button.style.setProperty("--rgb", rgb(name))
    button.onclick = () => {
      state.color = name
      if (editor.chosen) editor.recolor(name)
      showColors()
      $("colors").querySelector("[aria-pressed=true]").focus()
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
$("tokens").addEventListener("focusin", event => { // there is no onfocusin
  if (!event.target.matches(":focus-visible")) return
  playing++
  select(tokenAt(event), true)
})
$("tokens").onclick = event => {
  const index = tokenAt(event), same = state.pinned && index === state.selected
  playing++
  if (index !== null) select(same ? null : index, !same)
}
$("slowly").onclick = () => slowly(600)
document.addEventListener("keydown", ({key}) => {
  if (key !== "Escape") return
  playing++
  select(null)
})

// --- covering

$("cover").onclick = () => {
  const on = $("patches").hidden
  $("patches").hidden = !on
  $("cover").setAttribute("aria-pressed", on)
  if (on) $("patches").focus()
}
$("uncover").onclick = () => cover.clear()

// --- start

function showProgress(loaded, total) {
  const mega = bytes => (bytes / 1e6).toFixed(1)
  Object.assign($("progress"), {value: loaded, max: total})
  $("progress-text").textContent = `Loading the model: ${mega(loaded)} of ${mega(total)} MB`
}

async function loadModel() {
  $("load").hidden = true
  $("progress").hidden = false
  try {
    const remote = new RemoteModel(showProgress), shape = await remote.ready
    makeMaps($("maps"), shape, index => {
      state.map = index
      show(state.tokens)
    })
    model = remote
    $("loading").hidden = true
    await ask()
    if (!matchMedia("(prefers-reduced-motion)").matches) slowly(300) // once, as a beginning
    navigator.serviceWorker?.register("sw.js", {updateViaCache: "none"})
  } catch (error) {
    $("progress-text").textContent = `The model could not be loaded: ${error.message}`
    $("progress").hidden = true
  }
}

$("millions").textContent = (PARAMETERS / 1e6).toFixed(1)
showColors()
const {scene, edited, prompt} = readAddress()
showScene(scene, edited)
if (prompt) readPrompt(prompt)
$("load").onclick = loadModel
if (isSmall || !navigator.connection?.saveData) loadModel() // the small one was asked for
if (isSmall) new ResizeObserver(() => // the page around it gives it the height that it needs
  parent.postMessage({sceneHeight: document.body.scrollHeight}, "*")).observe(document.body)
