// The two ways to the daemon: questions asked again and again, and its live stream. Both end with
// stop(), may start() anew, and wait longer after each failure, at random, up to a limit.

const ANSWER_LIMIT_MS = 5000;
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 5000;
// An answer that took a while is asked for seldom: a page takes a fiftieth of a daemon at most.
const SHARE = 50;
// The daemon closes who sends more than five requests a second.
const BETWEEN_REQUESTS_MS = 250;

// Without the name and password that an address may carry: fetch refuses those.
const BASE = location.origin + location.pathname;

function waitMs(failures) {
  const longest = Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** failures);
  return longest * (0.5 + Math.random() / 2);
}

export class Poll {
  #path;
  #everyMs;
  #take;
  #stopped = null;

  /** `path` is called before each question and may return null for none; `take` gets
   *  what `ask` returns. */
  constructor(path, everyMs, take) {
    this.#path = path;
    this.#everyMs = everyMs;
    this.#take = take;
  }

  start() {
    if (this.#stopped !== null) return;
    this.#stopped = new AbortController();
    this.#run(this.#stopped.signal);
  }

  stop() {
    this.#stopped?.abort();
    this.#stopped = null;
  }

  /** Ask now. */
  hurry() {
    this.stop();
    this.start();
  }

  async #run(stopped) {
    for (let failures = 0; !stopped.aborted; ) {
      const path = this.#path();
      const answer = path === null ? null : await ask(path, stopped);
      if (stopped.aborted) return;
      if (answer !== null) this.#take(answer);
      failures = answer?.status === 0 ? failures + 1 : 0;
      const pauseMs = Math.max(this.#everyMs, (answer?.tookMs ?? 0) * SHARE);
      await pause(failures ? waitMs(failures) : Math.min(pauseMs, 60_000), stopped);
    }
  }
}

/** Ask once; {status, body, tookMs, headers}, with status 0 when nothing, or no JSON, answered. */
export async function ask(path, stopped) {
  const begun = performance.now();
  const limit = AbortSignal.timeout(ANSWER_LIMIT_MS);
  try {
    const response = await fetch(new URL(path, BASE), { signal: AbortSignal.any([stopped, limit]) });
    const body = await response.json();
    const { status, headers } = response;
    return { status, body, headers, tookMs: performance.now() - begun };
  } catch {
    return { status: 0, body: null, headers: null, tookMs: performance.now() - begun };
  }
}

function pause(ms, stopped) {
  return new Promise((resume) => {
    const end = () => {
      clearTimeout(timer);
      stopped.removeEventListener("abort", end);
      resume();
    };
    const timer = setTimeout(end, ms);
    stopped.addEventListener("abort", end);
  });
}

export class Stream {
  #wanted = new Set();
  #asked = new Set();
  #socket = null;
  #failures = 0;
  #number = 0;
  #timer = null;
  #again = null;
  #event;
  #state;

  /** `event(name, data)` gets what streams bring, `state("live" | "connecting" | "closed")` where
   *  the connection stands. */
  constructor(event, state) {
    this.#event = event;
    this.#state = state;
  }

  /** Have these streams from now on. One that is not captured is refused and left alone. */
  want(names) {
    this.#wanted = new Set(names);
  }

  start() {
    if (this.#timer !== null) return;
    this.#timer = setInterval(() => this.#request(), BETWEEN_REQUESTS_MS);
    this.#connect();
  }

  stop() {
    clearInterval(this.#timer);
    clearTimeout(this.#again);
    this.#timer = this.#again = null;
    this.#failures = 0;
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
    this.#state("closed");
  }

  #connect() {
    this.#state("connecting");
    const url = new URL("stream", BASE);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url);
    this.#socket = socket;
    socket.onopen = () => {
      this.#asked.clear();
      this.#state("live");
      this.#request();
    };
    socket.onmessage = ({ data }) => {
      const { stream, data: event } = JSON.parse(data);
      if (stream === undefined || socket !== this.#socket) return; // the reply to a request
      this.#failures = 0;
      this.#event(stream, event);
    };
    socket.onclose = () => {
      if (socket !== this.#socket) return;
      this.#socket = null;
      this.#state("connecting");
      this.#again = setTimeout(() => this.#connect(), waitMs(this.#failures++));
    };
  }

  /** Send the next request that is needed, one name each: a refusal is then of that name only. */
  #request() {
    if (this.#socket?.readyState !== WebSocket.OPEN) return;
    const surplus = [...this.#asked].filter((name) => !this.#wanted.has(name));
    const lacking = [...this.#wanted].find((name) => !this.#asked.has(name));
    if (surplus.length) {
      this.#send("UNSUBSCRIBE", surplus);
      for (const name of surplus) this.#asked.delete(name);
    } else if (lacking !== undefined) {
      this.#send("SUBSCRIBE", [lacking]);
      this.#asked.add(lacking);
    }
  }

  #send(method, params) {
    this.#socket.send(JSON.stringify({ method, params, id: ++this.#number }));
  }
}
