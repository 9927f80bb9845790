// numpy's default_rng: the same seeds give the same numbers as in Python. SeedSequence makes
// 256 bits of a seed, PCG64 (pcg-random.org) makes the numbers.

const MULTIPLIER = (2549297995355413924n << 64n) + 4865540595714422341n
const MASK128 = (1n << 128n) - 1n, MASK64 = (1n << 64n) - 1n

function hasher(constant, multiplier) { // of 32-bit words, a little different at each call
  return word => {
    word ^= constant
    constant = Math.imul(constant, multiplier)
    word = Math.imul(word, constant)
    return word ^ (word >>> 16)
  }
}

function stateWords(seeds) { // up to four 32-bit words -> eight
  const hash = hasher(0x43b0d7e5, 0x931e8875)
  const pool = [0, 1, 2, 3].map(i => hash(seeds[i] ?? 0))
  for (let from = 0; from < 4; from++) for (let to = 0; to < 4; to++) {
    if (from === to) continue
    const mixed = Math.imul(0xca01f9dd, pool[to]) - Math.imul(0x4973f715, hash(pool[from])) | 0
    pool[to] = mixed ^ (mixed >>> 16)
  }
  const last = hasher(0x8b51f9dd, 0x58f38ded)
  return Array.from({length: 8}, (_, i) => BigInt(last(pool[i % 4]) >>> 0))
}

export class Random {
  constructor(...seeds) {
    const words = stateWords(seeds)
    const bits128 = i => [2, 3, 0, 1].reduceRight((high, j) => high << 32n | words[i + j], 0n)
    this.increment = (bits128(4) << 1n | 1n) & MASK128
    this.state = this.increment + bits128(0)
    this.#step()
    this.half = null // the upper 32 bits of a number of which only the lower were asked for
  }

  #step() { this.state = (this.state * MULTIPLIER + this.increment) & MASK128 }

  bits64() {
    this.#step()
    const x = (this.state >> 64n) ^ (this.state & MASK64), turn = this.state >> 122n
    return (x >> turn | x << (64n - turn)) & MASK64
  }

  bits32() {
    const half = this.half
    this.half = null
    if (half !== null) return half
    const x = this.bits64()
    this.half = Number(x >> 32n)
    return Number(x & 0xffffffffn)
  }

  double() { return Number(this.bits64() >> 11n) / 2 ** 53 } // in [0, 1)

  uniform(low, high) { return low + (high - low) * this.double() }

  below(n) { // 0 … n - 1, by Lemire's method
    while (true) {
      const product = this.bits32() * n, rest = product % 2 ** 32
      if (rest >= n || rest >= (2 ** 32 - n) % n) return Math.floor(product / 2 ** 32)
    }
  }

  bytes(n) {
    const words = Uint32Array.from({length: Math.ceil(n / 4)}, () => this.bits32())
    return new Uint8Array(words.buffer, 0, n)
  }
}

export const list = (n, make) => Array.from({length: n}, (_, i) => make(i))
