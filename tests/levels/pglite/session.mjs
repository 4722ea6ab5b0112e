// The one session of PGlite, lent to one client at a time.

import * as wire from './wire.mjs'

// What PGlite sets for its own use and a server does not.
const SERVER = {
  allow_system_table_mods: 'off',
  client_min_messages: 'notice',
  enable_seqscan: 'on',
  log_min_messages: 'fatal',
  search_path: '"$user", public',
}
const WAIT_MS = 10_000
const BUFFER = 8192 // bytes that PGlite reads at once (PQ_RECV_BUFFER_SIZE)
const literal = s => `'${s.replaceAll("'", "''")}'`

// PGlite takes its buffer empty after a message for the end of the request and drops the rest, so a
// request is cut where that happens. A COPY is not: it reads its data past the end of the buffer.
function pieces(request) {
  if (wire.type(request) === 'Q') return [request]
  const found = []
  let begin = 0
  let end = 0
  for (const m of wire.messages(request)) {
    end += m.length
    if ((end - begin) % BUFFER && end < request.length) continue
    found.push(request.subarray(begin, end))
    begin = end
  }
  return found
}

export class SqlError extends Error {
  constructor(fields) {
    super(fields.M)
    this.sqlstate = fields.C
  }
}

export class Session {
  constructor(db) {
    this.db = db
    this.holder = null // who is in a transaction, or in the middle of a request
    this.last = null // whose settings the session has
    this.waiting = []
    this.prepared = new Set() // names of the statements that it has
    this.status = 'I'
    this.over = false // the database is another one now, its clients are gone
  }

  // Run `work` when no other client is in a transaction, with the settings of this one. The client
  // keeps the session while it is in a transaction, or has a request to end.
  async lend(client, work, ends = true) {
    if (this.holder !== client && this.holder !== null) await this.#turn(client)
    if (client.gone || this.over) throw new SqlError({ C: '57P01', M: 'the client has gone' })
    this.holder = client
    try {
      if (this.last !== client) this.#enter(client)
      return work()
    } finally {
      if (ends && this.status === 'I') this.#release()
    }
  }

  #turn(client) {
    return new Promise((resolve, reject) => {
      const waiter = { client, resolve, reject }
      waiter.timer = setTimeout(() => this.giveUp(client, '55P03',
        'another connection is in a transaction, and this server has one session for all:'
        + ' a test that needs two is to be marked two_sessions'), WAIT_MS)
      this.waiting.push(waiter)
    })
  }

  // Let a client that waits go on without its turn.
  giveUp(client, sqlstate, words) {
    const at = this.waiting.findIndex(waiter => waiter.client === client)
    if (at < 0) return
    const [waiter] = this.waiting.splice(at, 1)
    clearTimeout(waiter.timer)
    waiter.reject(new SqlError({ C: sqlstate, M: words }))
  }

  #release() {
    const next = this.waiting.shift()
    this.holder = next?.client ?? null
    clearTimeout(next?.timer)
    next?.resolve()
  }

  // Send a request as it is and return the reply.
  raw(request) {
    const reply = Buffer.concat(pieces(request)
      .map(piece => Buffer.from(this.db.execProtocolRawSync(new Uint8Array(piece)))))
    for (const m of wire.messages(reply)) if (wire.type(m) === 'Z') this.status = String.fromCharCode(m[5])
    return reply
  }

  // Run a query of our own and return its rows.
  ask(sql) {
    const rows = []
    let failed
    for (const m of wire.messages(this.raw(wire.query(sql)))) {
      if (wire.type(m) === 'D') rows.push(wire.columns(m))
      if (wire.type(m) === 'E') failed = new SqlError(wire.fields(m))
    }
    if (failed) throw failed
    return rows
  }

  #enter(client) {
    if (this.last?.touched) this.#keep(this.last)
    this.last = null
    this.#configure(client)
    this.last = client
  }

  // Do what RESET ALL means for a client: go back to the settings of its start.
  reset(client) {
    this.#noteRole(client)
    client.settings = client.initial
    this.#configure(client)
  }

  #configure({ settings, user, role }) {
    const values = Object.entries({ ...SERVER, ...settings })
      .map(([name, value]) => `set_config(${literal(name)}, ${literal(value)}, false)`)
    // To RESET the authorization does nothing in a backend that nobody logged in to.
    this.ask(`RESET ROLE; SET SESSION AUTHORIZATION postgres; RESET ALL; SELECT ${values.join(', ')}`
      + (user === 'postgres' ? '' : `; SET SESSION AUTHORIZATION ${literal(user)}`)
      + (role === 'none' ? '' : `; SET ROLE ${literal(role)}`))
  }

  #noteRole(client) {
    const [[role, user]] = this.ask("SELECT current_setting('role'), session_user")
    Object.assign(client, { role, user })
  }

  // Note what a client has set, to give it back at its next turn.
  #keep(client) {
    client.touched = false
    this.#noteRole(client)
    client.settings = Object.fromEntries(
      this.ask("SELECT name, setting FROM pg_settings WHERE source = 'session'"))
  }

  // Learn which prepared statements are left after DEALLOCATE or DISCARD.
  recount() {
    this.prepared = new Set(this.ask('SELECT name FROM pg_prepared_statements').flat())
  }

  end() {
    this.over = true
    for (const { client } of [...this.waiting]) this.giveUp(client, '57P01', 'the database is gone')
  }

  // Undo what a client that has gone left behind.
  forget(client) {
    client.gone = true
    if (this.over) return
    this.giveUp(client, '57P01', 'the client has gone')
    if (this.last === client) this.last = null
    if (this.holder === client) {
      this.raw(wire.sync) // it may have ended in the middle of a request
      if (this.status !== 'I') this.raw(wire.query('ROLLBACK'))
    }
    const names = [...client.statements.keys()].map(name => client.rename(name))
    const left = names.filter(name => this.prepared.delete(name))
    if (left.length && this.status === 'I') {
      this.raw(Buffer.concat([...left.map(wire.closeStatement), wire.sync]))
    }
    if (this.holder === client) this.#release()
  }
}
