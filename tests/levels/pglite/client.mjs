// A connection to the front: reads requests, and fits them into the session that all share.

import * as wire from './wire.mjs'
import { SqlError } from './session.mjs'

const [SSL, GSS, CANCEL] = [80877103, 80877104, 80877102]
const COPY_IN = /^\s*COPY\s[\s\S]*\sFROM\s+STDIN\b/i
const SETS = /\b(re)?set\b|set_config|discard/i
const RESETS = /\b(reset|discard)\s+all\b/i
const FORGETS = /\b(deallocate|discard)\b/i
const DEALLOCATE = /^(\s*DEALLOCATE\s+(?:PREPARE\s+)?)(?!ALL\b)("?)(\w+)\2(\s*;?\s*)$/i
const NOISE = /^# \d+: aborting transaction/ // a warning that PGlite alone has
const REPORTED = ['server_version', 'server_encoding', 'client_encoding', 'application_name',
  'is_superuser', 'session_authorization', 'DateStyle', 'IntervalStyle', 'TimeZone',
  'integer_datetimes', 'standard_conforming_strings', 'default_transaction_read_only']

let count = 0

export class Client {
  constructor(socket, front) {
    this.number = ++count
    this.socket = socket
    this.front = front // its `session` is the present one, its `clients` all of it
    this.session = front.session
    this.user = 'postgres'
    this.role = 'none'
    this.settings = {} // what it has set, given to the session at each of its turns
    this.initial = {} // what it asked for at its start: RESET goes back to it
    this.touched = false // whether it may have set something since
    this.statements = new Map() // its names of prepared statements, and the Parse messages
    this.unread = Buffer.alloc(0)
    this.started = false
    this.gone = false
    this.pending = [] // of the extended protocol, until Sync or Flush
    this.copy = null // COPY FROM STDIN: the query and the data so far
    this.work = Promise.resolve()
    socket.setNoDelay(true)
    socket.on('error', () => {})
    socket.on('data', data => {
      this.unread = Buffer.concat([this.unread, data])
      this.work = this.work.then(() => this.read()).catch(e => this.fail(e))
    })
    socket.on('close', () => {
      front.clients.delete(this)
      front.guard(() => this.session.forget(this))
    })
  }

  rename = name => `c${this.number}_${name}`

  fail(e) {
    const sqlstate = e instanceof SqlError ? e.sqlstate : 'XX000'
    this.socket.end(wire.error('FATAL', sqlstate, e.message))
    if (!(e instanceof SqlError)) this.front.broken = e
  }

  async read() {
    let at = 0
    const { unread } = this
    try {
      for (;;) {
        const head = this.started ? 1 : 0
        if (unread.length < at + head + 4) return
        if (this.gone) return
        const end = at + head + unread.readInt32BE(at + head)
        if (unread.length < end) return
        const m = unread.subarray(at, end)
        at = end
        if (this.started) await this.take(m)
        else await this.start(m)
      }
    } finally {
      this.unread = this.unread.subarray(at)
    }
  }

  async start(m) {
    const code = m.readInt32BE(4)
    if (code === SSL || code === GSS) return void this.socket.write('N')
    if (code === CANCEL) return this.front.cancel(m.readInt32BE(8), this.socket)
    const { user, database = user, ...settings } = wire.startup(m)
    delete settings.replication
    Object.assign(this, { user, settings, initial: settings })
    if (database !== this.front.database) {
      throw new SqlError({ C: '3D000', M: `database "${database}" does not exist` })
    }
    const rows = await this.session.lend(this, () =>
      this.session.ask(`SELECT ${REPORTED.map(name => `current_setting('${name}')`)}`))
    this.started = true
    this.socket.write(Buffer.concat([
      wire.message('R', Buffer.alloc(4)),
      ...REPORTED.map((name, i) => wire.parameter(name, rows[0][i])),
      wire.key(this.number),
      wire.ready('I'),
    ]))
  }

  async take(m) {
    const type = wire.type(m)
    if (this.copy) {
      if (type === 'd') return void this.copy.push(m)
      if (type === 'c' || type === 'f') {
        const request = Buffer.concat([...this.copy, m])
        this.copy = null
        // The client has its CopyInResponse already.
        return this.answer(request, reply => reply.filter(m => wire.type(m) !== 'G'))
      }
      if (type === 'H' || type === 'S') return
    }
    switch (type) {
      case 'Q': return this.query(m)
      case 'X': return void this.socket.end()
      case 'p': case 'd': case 'c': case 'f': return // of a password or COPY that nobody asked for
      default: this.pending.push(m)
    }
    if (type === 'S' || type === 'H') await this.extended(this.pending.splice(0))
  }

  // PGlite waits for no data, so they are held back until all have come.
  async query(m) {
    let [sql] = wire.strings(m, 1)
    if (COPY_IN.test(sql)) {
      this.copy = [m]
      const binary = /\bbinary\b/i.test(sql) ? 1 : 0
      return void this.socket.write(wire.message('G', Buffer.from([binary, 0, 0])))
    }
    sql = sql.replace(DEALLOCATE, (_, verb, quote, name, end) =>
      `${verb}"${this.rename(quote ? name : name.toLowerCase())}"${end}`)
    await this.answer(wire.query(sql), reply => reply, [sql])
  }

  // Names of prepared statements become the client's own; statements that another client's
  // DEALLOCATE ALL took away are prepared again. What the client did not ask for, it is not told.
  async extended(batch) {
    const flushes = wire.type(batch.at(-1)) === 'H'
    // asyncpg prepares a statement without Sync and may leave it at that. Nothing runs then, so the
    // session can be given back all the same.
    const prepares = flushes && !batch.some(m => 'BEF'.includes(wire.type(m)))
    if (prepares) batch.splice(-1, 1, wire.sync)
    const request = []
    const parses = [] // in the order of their ParseComplete: the client's name, null when ours
    const closes = [] // in the order of their CloseComplete: whether it is the client's
    const texts = []
    const own = name => {
      const real = this.rename(name)
      const known = this.statements.get(name)
      if (known && !this.session.prepared.has(real) && !parses.includes(name)) {
        request.push(known)
        parses.push(null)
        this.session.prepared.add(real)
      }
      return wire.text(real)
    }
    const rename = m => {
      const kind = Buffer.from([m[5]])
      switch (wire.type(m)) {
        case 'P': {
          const [name, sql, at] = wire.strings(m, 2)
          if (COPY_IN.test(sql)) throw new SqlError({ C: '0A000', M: 'COPY FROM STDIN is to be a simple query' })
          const real = this.rename(name)
          if (name === '') { // an unnamed statement may be replaced, one with a name may not
            request.push(wire.closeStatement(real))
            closes.push(false)
          }
          const renamed = wire.message('P', wire.text(real), wire.text(sql), m.subarray(at))
          if (!this.statements.has(name) || name === '') this.statements.set(name, renamed)
          parses.push(name)
          texts.push(sql)
          return renamed
        }
        case 'B': {
          const [portal, name, at] = wire.strings(m, 2)
          const real = own(name)
          return wire.message('B', wire.text(portal), real, m.subarray(at))
        }
        case 'D': {
          if (m[5] !== 0x53) return m
          const real = own(wire.strings(m, 1, 6)[0])
          return wire.message('D', kind, real)
        }
        case 'C': {
          closes.push(true)
          if (m[5] !== 0x53) return m
          const [name] = wire.strings(m, 1, 6)
          this.statements.delete(name)
          this.session.prepared.delete(this.rename(name))
          return wire.message('C', kind, wire.text(this.rename(name)))
        }
        default: return m
      }
    }
    const told = reply => {
      let parsed = 0
      let closed = 0
      const kept = reply.filter(m => {
        switch (wire.type(m)) {
          case '1': return parses[parsed++] !== null
          case '3': return closes[closed++]
          case 'Z': return !prepares
          default: return true
        }
      })
      parses.forEach((name, i) => {
        if (name === null) return
        const real = this.rename(name)
        if (i < parsed) this.session.prepared.add(real)
        else if (!this.session.prepared.has(real)) this.statements.delete(name)
      })
      return kept
    }
    // Renamed at its turn: which statements are there may change before.
    await this.answer(() => {
      batch.forEach(m => request.push(rename(m)))
      return Buffer.concat(request)
    }, told, texts, prepares || !flushes)
  }

  // Run a request at the client's turn and send what `told` leaves of the reply.
  async answer(request, told, texts = [], ends = true) {
    const { session } = this
    let reply
    try {
      reply = await session.lend(this, () => {
        const raw = session.raw(typeof request === 'function' ? request() : request)
        const kept = told([...wire.messages(raw)])
        if (texts.some(sql => SETS.test(sql))) this.touched = true
        if (texts.some(sql => FORGETS.test(sql)) && session.status !== 'E') this.recount()
        if (texts.some(sql => RESETS.test(sql)) && session.status !== 'E') session.reset(this)
        return kept.filter(m => wire.type(m) !== 'N' || !NOISE.test(wire.fields(m).M))
      }, ends)
    } catch (e) {
      if (!(e instanceof SqlError && ends)) throw e
      const status = session.holder === this ? session.status : 'I'
      reply = [wire.error('ERROR', e.sqlstate, e.message), wire.ready(status)]
    }
    this.socket.write(Buffer.concat(reply))
  }

  recount() {
    this.session.recount()
    for (const name of this.statements.keys()) {
      if (!this.session.prepared.has(this.rename(name))) this.statements.delete(name)
    }
  }
}
