// PaliGemma in a browser: the four graphs that `paligemma-nb export` writes, and greedy
// decoding with their cache (nbs/11_generation.ipynb).
import * as ort from "./built/ort.wasm.bundle.min.mjs"
import {Tokenizer} from "./built/tokenizers.min.mjs"

export const FILES = {
  wasm: "built/ort-wasm-simd-threaded.wasm",
  config: "built/config.json", tokenizer: "built/tokenizer.json",
  embed: "built/embed_tokens.onnx", vision: "built/vision_encoder.onnx",
  decoder: "built/decoder_model_merged.onnx", masks: "built/mask_decoder.onnx",
}

const floats = (data, shape) => new ort.Tensor("float32", data, shape)
const int64 = (values, shape) =>
  new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape)
const equal = (a, b) => a?.length === b.length && a.every((x, i) => x === b[i])

function softmax(logits) {
  const top = logits.reduce((a, b) => Math.max(a, b))
  const raised = logits.map(x => Math.exp(x - top))
  const sum = raised.reduce((a, b) => a + b, 0)
  return raised.map(x => x / sum)
}

function largest(values, count) { // their places, the largest first
  return [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, count)
}

export class Model {
  static async open(bytes) { // an ArrayBuffer for each name in FILES
    ort.env.wasm.numThreads = 1 // more would need a server that sends special headers
    ort.env.wasm.wasmBinary = bytes.wasm
    const json = name => JSON.parse(new TextDecoder().decode(bytes[name]))
    const graphs = {}
    for (const name of ["embed", "vision", "decoder", "masks"])
      graphs[name] = await ort.InferenceSession.create(bytes[name])
    return new Model(json("config"), new Tokenizer(json("tokenizer"), {}), graphs)
  }

  constructor(config, tokenizer, graphs) {
    Object.assign(this, {config, tokenizer, graphs})
    this.size = config.vision_config.image_size // side of its pictures in pixels
    this.side = Math.floor(this.size / config.vision_config.patch_size) // the same in patches
    this.layers = config.text_config.num_hidden_layers
    this.heads = config.text_config.num_attention_heads
    this.loc = tokenizer.token_to_id("<loc0000>")
  }

  encode(prompt) { // ids of pictures, <bos>, prompt and newline
    const {image_token_index: image, bos_token_id: bos, text_config: text} = this.config
    if (!prompt.trim()) throw new Error("Type a prompt: “caption en”, for example.")
    const words = this.tokenizer.encode(prompt.trim() + "\n", {add_special_tokens: false}).ids
    if (words.includes(image))
      throw new Error("The picture stands in front already: leave out <image>.")
    const ids = [...Array(this.side ** 2).fill(image), bos, ...words]
    const room = text.max_position_embeddings - 100 // an answer's longest
    if (ids.length > room)
      throw new Error(`The prompt is ${ids.length - room} tokens too long.`)
    return ids
  }

  decode(ids) { return this.tokenizer.decode(ids, {skip_special_tokens: true}) }

  async see(pixels) { // [3, s, s] float32 -> features, kept for the next question
    if (!equal(this.seen, pixels)) {
      const inputs = {pixel_values: floats(pixels, [1, 3, this.size, this.size])}
      this.features = (await this.graphs.vision.run(inputs)).image_features.data
      this.seen = pixels
    }
    return this.features
  }

  async embed(ids) {
    const inputs = {input_ids: int64(ids, [1, ids.length])}
    return (await this.graphs.embed.run(inputs)).inputs_embeds
  }

  emptyCache() {
    const {num_key_value_heads: heads, head_dim: dim} = this.config.text_config
    const cache = {}
    for (let i = 0; i < this.layers; i++) for (const part of ["key", "value"])
      cache[`past_key_values.${i}.${part}`] = floats(new Float32Array(0), [1, heads, 0, dim])
    return cache
  }

  // Each token of the greedy answer as it comes, and what chose it. With `said`, ids of a
  // known answer, it is read and not written: how likely was each of its tokens?
  async *answer(pixels, prompt, {said = null, longest = 100} = {}) {
    const ids = this.encode(prompt), features = await this.see(pixels)
    const {image_token_index: image, eos_token_id: eos} = this.config
    let embeds = await this.embed(ids), cache = this.emptyCache(), length = ids.length
    embeds.data.set(features) // the picture's places come first
    for (let step = 0; step < (said?.length ?? longest); step++) {
      const output = await this.graphs.decoder.run({
        inputs_embeds: embeds, attention_mask: int64(Array(length).fill(1), [1, length]),
        num_logits_to_keep: int64([1], []), ...cache})
      const logits = output.logits.data
      logits[image] = -Infinity // no answer is a picture
      const probs = softmax(logits), id = said?.[step] ?? largest(logits, 1)[0]
      yield this.#describe(id, probs, output)
      if ([eos].flat().includes(id)) return
      for (const name of Object.keys(cache))
        cache[name] = output[name.replace("past_key_values", "present")]
      embeds = await this.embed([id])
      length++
    }
  }

  #describe(id, probs, output) {
    const isLoc = id >= this.loc && id < this.loc + 1024, area = this.side ** 2
    const attention = new Float32Array(this.layers * this.heads * area)
    for (let layer = 0; layer < this.layers; layer++) {
      const {data, dims: [, , queries, keys]} = output[`attentions.${layer}`]
      for (let head = 0; head < this.heads; head++) { // the last token's, on the picture
        const start = ((head + 1) * queries - 1) * keys
        attention.set(data.subarray(start, start + area), (layer * this.heads + head) * area)
      }
    }
    return {
      id, name: this.nameOf(id), prob: probs[id],
      top: largest(probs, 5).map(i => [this.nameOf(i), probs[i]]),
      bins: isLoc ? probs.slice(this.loc, this.loc + 1024) : null,
      attention, // [layers, heads, patches]
    }
  }

  nameOf(id) { return this.tokenizer.id_to_token(id)?.replaceAll("▁", " ") ?? `#${id}` }

  async mask(codes) { // 16 numbers -> [64, 64] float32, positive inside
    return (await this.graphs.masks.run({codes: int64(codes, [1, 16])})).masks.data
  }
}
