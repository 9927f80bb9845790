// The model in a thread of its own, so that the page never waits for it.
import {FILES, Model} from "./model.js"
import "./built/files.js" // sets self.BUILD: the files of the page with their sizes

const {version, files} = self.BUILD
const total = Object.values(FILES).reduce((sum, file) => sum + files[file], 0)
let loaded = 0, newest = 0, model

async function read(file, cache) { // bytes from the cache, else from the server, counted
  const kept = await cache?.match(file) // "no-cache": never the file of an older version
  const response = kept ?? await fetch(file, {cache: "no-cache"})
  if (!response.ok) throw new Error(`${file} could not be loaded (${response.status}).`)
  const bytes = new Uint8Array(files[file])
  let at = 0
  for (const reader = response.body.getReader(); ;) {
    const {done, value} = await reader.read()
    if (done) break
    bytes.set(value, at)
    at += value.length
    postMessage({loaded: loaded += value.length, total})
  }
  const type = response.headers.get("content-type")
  if (!kept) await cache?.put(file, new Response(bytes, {headers: {"content-type": type}}))
  return bytes
}

async function open() {
  const cache = await self.caches?.open(version) // absent on a page without https
  const names = Object.keys(FILES)
  const bytes = await Promise.all(names.map(name => read(FILES[name], cache)))
  model = await Model.open(Object.fromEntries(names.map((name, i) => [name, bytes[i]])))
  const {size, side, layers, heads} = model
  postMessage({ready: {size, side, layers, heads}})
}

const breathe = () => new Promise(resolve => { // let a newer message overtake
  const {port1, port2} = new MessageChannel()
  port1.onmessage = resolve
  port2.postMessage(null)
})

const opened = open().catch(error => postMessage({failed: error.message}))

async function ask({id, pixels, prompt, said}) {
  const ids = []
  for await (const token of model.answer(pixels, prompt, {said})) {
    ids.push(token.id)
    postMessage({id, token: {...token, text: model.decode(ids)}})
    await breathe()
    if (id < newest) return postMessage({id, result: null})
  }
  postMessage({id, result: {ids, text: model.decode(ids)}})
}

let queue = opened

self.onmessage = ({data}) => {
  if (data.prompt !== undefined) newest = data.id
  queue = queue.then(async () => {
    if (data.codes) return postMessage({id: data.id, result: await model.mask(data.codes)})
    if (data.id < newest) return postMessage({id: data.id, result: null})
    await ask(data)
  }).catch(error => postMessage({id: data.id, error: error.message}))
}
