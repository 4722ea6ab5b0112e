// Messages of the PostgreSQL protocol, version 3, as buffers.

export const text = s => Buffer.from(`${s}\0`)

export function message(type, ...parts) {
  const body = Buffer.concat(parts)
  const head = Buffer.alloc(5)
  head.write(type, 'latin1')
  head.writeInt32BE(body.length + 4, 1)
  return Buffer.concat([head, body])
}

export const query = sql => message('Q', text(sql))
export const sync = message('S')
export const closeStatement = name => message('C', Buffer.from('S'), text(name))
export const ready = status => message('Z', Buffer.from(status))
export const parameter = (name, value) => message('S', text(name), text(value))

export function key(number) {
  const body = Buffer.alloc(8)
  body.writeInt32BE(number, 0)
  body.writeInt32BE(number, 4)
  return message('K', body)
}

export const error = (severity, sqlstate, words) =>
  message('E', ...Object.entries({ S: severity, V: severity, C: sqlstate, M: words })
    .map(([field, value]) => text(field + value)), Buffer.alloc(1))

export const type = m => String.fromCharCode(m[0])

export function* messages(buffer) {
  for (let at = 0; at < buffer.length;) {
    const end = at + 1 + buffer.readInt32BE(at + 1)
    yield buffer.subarray(at, end)
    at = end
  }
}

// The strings that a message begins with, and where what follows them begins.
export function strings(m, count, at = 5) {
  const found = []
  while (found.length < count) {
    const end = m.indexOf(0, at)
    found.push(m.toString('utf8', at, end))
    at = end + 1
  }
  return [...found, at]
}

// The fields of an ErrorResponse or NoticeResponse by their letters.
export function fields(m) {
  const found = {}
  for (let at = 5; m[at];) {
    const [field, end] = strings(m, 1, at)
    found[field[0]] = field.slice(1)
    at = end
  }
  return found
}

// The columns of a DataRow, as strings.
export function columns(m) {
  const found = []
  for (let at = 7, left = m.readInt16BE(5); left > 0; left -= 1) {
    const size = m.readInt32BE(at)
    found.push(size < 0 ? null : m.toString('utf8', at + 4, at + 4 + size))
    at += 4 + Math.max(size, 0)
  }
  return found
}

// "a=b" pairs of a startup message; "options" is taken apart: -c name=value, --name=value.
export function startup(m) {
  const found = {}
  for (let at = 8; m[at];) {
    const [name, value, end] = strings(m, 2, at)
    found[name] = value
    at = end
  }
  const words = (found.options ?? '').match(/(\\.|\S)+/g) ?? []
  delete found.options
  for (const word of words.map(w => w.replace(/\\(.)/g, '$1'))) {
    const pair = /^(?:-c|--)?([\w.-]+)=(.*)$/s.exec(word)
    if (pair) found[pair[1].replaceAll('-', '_')] = pair[2]
  }
  return found
}
