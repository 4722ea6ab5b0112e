// The whole state of a PGlite instance between two requests: its memory, files and open files.
// To go back to it takes a tenth of what a new instance takes.

const PAGE = 1 << 16
const ZEROS = new Uint8Array(PAGE)

// What a snapshot cannot take back is a library that was loaded since, so those are counted.
let instances = 0
const { Instance } = WebAssembly
WebAssembly.Instance = class extends Instance {
  constructor(...args) {
    super(...args)
    instances += 1
  }
}

// A file grows by more than it needs, as bytes with a sign or without.
const bytes = ({ contents, usedBytes }) => new Uint8Array(contents.buffer, contents.byteOffset, usedBytes)
const equal = (a, b) => Buffer.compare(a, b) === 0

export class Snapshot {
  constructor({ Module }, name) {
    this.module = Module
    this.name = name
    this.instances = instances
    this.pages = new Map() // of the memory; the others are zeros
    const { FS, HEAPU8 } = Module
    for (let at = 0; at < HEAPU8.length; at += PAGE) {
      const page = HEAPU8.subarray(at, at + PAGE)
      if (!equal(page, ZEROS)) this.pages.set(at, page.slice())
    }
    this.names = FS.nameTable.slice() // heads of the chains of nodes
    this.nodes = new Map()
    for (let node of this.names) for (; node; node = node.name_next) this.#add(node)
    this.streams = FS.streams.map(stream => stream && [stream, stream.position, stream.flags])
    for (const stream of FS.streams) if (stream?.node) this.#add(stream.node)
  }

  #add(node) {
    const saved = { ...node }
    if (ArrayBuffer.isView(node.contents)) saved.contents = bytes(node).slice()
    else if (node.contents) saved.contents = { ...node.contents } // a folder
    this.nodes.set(node, saved)
  }

  // Whether it is possible to go back.
  get good() {
    return this.instances === instances
  }

  restore() {
    const { FS, HEAPU8 } = this.module
    for (let at = 0; at < HEAPU8.length; at += PAGE) {
      const page = HEAPU8.subarray(at, at + PAGE)
      const saved = this.pages.get(at) ?? ZEROS
      if (!equal(page, saved)) page.set(saved)
    }
    FS.nameTable.splice(0, Infinity, ...this.names)
    for (const [node, saved] of this.nodes) {
      const same = ArrayBuffer.isView(saved.contents) && ArrayBuffer.isView(node.contents)
        && node.usedBytes === saved.usedBytes && equal(bytes(node), saved.contents)
      const { contents } = node
      Object.assign(node, saved)
      if (same) node.contents = contents
      else if (ArrayBuffer.isView(saved.contents)) node.contents = saved.contents.slice()
      else if (saved.contents) node.contents = { ...saved.contents }
    }
    FS.streams.length = 0
    this.streams.forEach((saved, fd) => {
      if (!saved) return
      const [stream, position, flags] = saved
      Object.assign(stream, { fd, position, flags }) // a closed one has no number
      FS.streams[fd] = stream
    })
  }
}

