// The page's side of worker.js.

export class RemoteModel {
  #worker = new Worker(new URL("worker.js", import.meta.url), {type: "module"})
  #waiting = new Map()
  #sent = 0

  constructor(onProgress) { // called with loaded and total bytes
    this.ready = new Promise((resolve, reject) => { // size and side of its pictures, …
      this.#worker.onerror = event => reject(new Error(event.message ?? "It could not start."))
      this.#worker.onmessage = ({data: {id, loaded, total, ready, failed, ...answer}}) => {
        if (loaded) onProgress(loaded, total)
        if (ready) resolve(ready)
        if (failed) reject(new Error(failed))
        if (id) this.#receive(id, answer)
      }
    })
  }

  #receive(id, {token, error, result}) {
    const {onToken, resolve, reject} = this.#waiting.get(id)
    if (token) return onToken?.(token)
    this.#waiting.delete(id)
    if (error) reject(new Error(error))
    else resolve(result)
  }

  #send(message, onToken) {
    const id = ++this.#sent
    this.#worker.postMessage({id, ...message})
    return new Promise((resolve, reject) => this.#waiting.set(id, {onToken, resolve, reject}))
  }

  // -> {ids, text}, or null if a newer question has overtaken this one
  ask(pixels, prompt, onToken) { return this.#send({pixels, prompt}, onToken) }

  // the same of a known answer: onToken learns how likely each of its tokens was
  read(pixels, prompt, said, onToken) { return this.#send({pixels, prompt, said}, onToken) }

  mask(codes) { return this.#send({codes}) } // -> [64, 64] float32
}
