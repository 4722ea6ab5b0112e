// The chosen symbol: candles, last price and last trades. The history comes from the tables, the
// candle under way from the stream. Only the chart needs numbers; what is read are the daemon's
// own digits.

import { ask } from "./link.js";
import { byId, local, make, setText, utcMillis } from "./words.js";

const INTERVALS_S = { "1m": 60, "5m": 300, "15m": 900, "1h": 3600, "4h": 14400, "1d": 86400 };
const HISTORY = 500;
// So few candles fill the width.
const FEW = 100;
const TRADES = 24;
const DRAW_MS = 250;
const REFRESH_MS = 3000;
// Late trades change candles of the past.
const RELOAD_MS = 60_000;
const FIELDS = ["open", "high", "low", "close", "volume"];
const TAKER = { true: "sell", false: "buy" };

/** A symbol as it is in stream names: only ASCII letters change. */
function lower(symbol) {
  return symbol.replace(/[A-Z]/g, (letter) => letter.toLowerCase());
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A candle: numbers for the chart, `digits` as they came. */
function candle(timeS, open, high, low, close, volume) {
  const digits = { open, high, low, close, volume };
  return { time: timeS, open: +open, high: +high, low: +low, close: +close, volume: +volume, digits };
}

function ofRow([openMs, open, high, low, close, volume]) {
  return candle(openMs / 1000, open, high, low, close, volume);
}

export class Market {
  symbol = null;
  interval = "1m";
  /** Set by who asks the daemon: the history cannot be had then. */
  isDatabaseAway = false;
  /** Set by who holds the stream; without it trades are asked for. WebKit may not send the
   *  password with a WebSocket. */
  isStreaming = false;
  /** When the last trade of the symbol came, by performance.now(). */
  tradeMs = null;

  #chart;
  #candles;
  #volumes;
  #known = new Set();
  #last = null;
  #closeId = -1;
  #traded = false;
  #trades = [];
  #dirty = false;
  #decimals = 0;
  #loadedMs = -Infinity;
  #stopped = null;
  #timers = [];
  #rows = [];
  #changed;

  /** `changed` is called when the symbol or the interval is another one. */
  constructor(changed) {
    this.#changed = changed;
    const { createChart, CandlestickSeries, HistogramSeries } = LightweightCharts;
    this.#chart = createChart(byId("chart"), {
      autoSize: true,
      // The logo needs a <style> of its own, which our policy forbids; the link is in the foot.
      layout: { attributionLogo: false, fontFamily: color("--font"), fontSize: 12 },
      timeScale: { timeVisible: true, secondsVisible: false, rightOffset: 4, maxBarSpacing: 16 },
      rightPriceScale: { scaleMargins: { top: 0.06, bottom: 0.22 }, entireTextOnly: true },
    });
    this.#candles = this.#chart.addSeries(CandlestickSeries, { priceLineVisible: false });
    this.#volumes = this.#chart.addSeries(HistogramSeries, {
      priceScaleId: "volume",
      priceFormat: { type: "volume" },
      lastValueVisible: false,
      priceLineVisible: false,
    });
    this.#chart.priceScale("volume").applyOptions({ scaleMargins: { top: 0.84, bottom: 0 } });
    byId("legend").append(...FIELDS.map(() => make("span")));
    for (const interval of Object.keys(INTERVALS_S)) byId("intervals").append(this.#button(interval));
    for (let index = 0; index < TRADES; index += 1) this.#rows.push(this.#row());
    matchMedia("(prefers-color-scheme: light)").addEventListener("change", () => this.#paint());
    this.#paint();
  }

  /** The streams that are shown here. */
  get streams() {
    if (this.symbol === null) return [];
    return [`${lower(this.symbol)}@trade`, `${lower(this.symbol)}@kline_1m`];
  }

  show(symbol, interval = this.interval) {
    if (symbol === this.symbol && interval === this.interval) return;
    if (symbol !== this.symbol) {
      this.#trades = [];
      this.#closeId = -1;
      this.tradeMs = null;
      setText(byId("price"), "–");
    }
    this.symbol = symbol;
    this.interval = Object.hasOwn(INTERVALS_S, interval) ? interval : "1m";
    for (const button of byId("intervals").children) {
      button.ariaPressed = String(button.textContent === this.interval);
    }
    setText(byId("symbol"), symbol);
    this.#last = null;
    this.#candles.setData([]);
    this.#volumes.setData([]);
    this.#dirty = true;
    this.reload();
    this.#changed();
  }

  start() {
    if (this.#timers.length) return;
    this.#timers = [
      setInterval(() => this.#draw(), DRAW_MS),
      setInterval(() => this.#refresh(), REFRESH_MS),
    ];
    this.reload();
  }

  stop() {
    for (const timer of this.#timers) clearInterval(timer);
    this.#timers = [];
    this.#stopped?.abort();
  }

  /** Read the history anew, at once: the stream may have missed something. */
  reload() {
    this.#traded = false;
    this.#loadedMs = -Infinity;
    this.#stopped?.abort();
    this.#stopped = null;
    this.#refresh();
  }

  take(stream, event) {
    if (event.s !== this.symbol) return;
    if (event.e === "trade") this.#takeTrade(event);
    else if (event.e === "kline" && this.interval === "1m") this.#takeKline(event.k);
  }

  #takeTrade({ t: id, p: price, q: quantity, T: timeMs, m: isSell }) {
    const trade = { id, price, quantity, timeMs, isSell };
    this.tradeMs = performance.now();
    const isLate = id <= (this.#trades.at(-1)?.id ?? -1); // was missing, and came after all
    if (isLate && this.#trades.some((one) => one.id === id)) return;
    this.#trades.push(trade);
    if (isLate) this.#trades.sort((one, other) => one.id - other.id);
    if (this.#trades.length > 4 * TRADES) this.#trades = this.#trades.slice(-TRADES);
    this.#dirty = true;
    if (this.#last !== null) this.#extend(trade); // else the history comes first
  }

  #extend({ id, price, timeMs }) {
    const stepS = INTERVALS_S[this.interval];
    const timeS = Math.floor(timeMs / 1000 / stepS) * stepS;
    if (timeS > this.#last.time) this.#last = candle(timeS, price, price, price, price, "0");
    else if (timeS < this.#last.time) return; // came late, the next reload has it
    const last = this.#last;
    this.#traded = true;
    this.#widen(last, "high", price, +price > last.high);
    this.#widen(last, "low", price, +price < last.low);
    this.#widen(last, "close", price, id > this.#closeId);
    this.#closeId = Math.max(id, this.#closeId);
  }

  #widen(last, field, digits, isFurther) {
    if (isFurther) [last[field], last.digits[field]] = [+digits, digits];
  }

  #takeKline({ t: openMs, o, h, l, c, v }) {
    if (this.#last !== null) this.#merge(candle(openMs / 1000, o, h, l, c, v));
  }

  /** Take a candle of the tables or of the venue, which may be older than the last trade. */
  #merge(next) {
    if (next.time < this.#last.time) {
      if (!this.#known.has(next.time)) {
        this.#loadedMs = -Infinity; // came with the history before, so read that anew
        return;
      }
      this.#candles.update(next, true);
      this.#volumes.update(this.#volume(next), true);
      return;
    }
    this.#dirty = true;
    if (next.time > this.#last.time || !this.#traded) {
      this.#last = next;
      this.#traded = false;
      return;
    }
    const { digits } = next;
    this.#widen(this.#last, "open", digits.open, true);
    this.#widen(this.#last, "high", digits.high, next.high > this.#last.high);
    this.#widen(this.#last, "low", digits.low, next.low < this.#last.low);
    this.#widen(this.#last, "volume", digits.volume, next.volume > this.#last.volume);
  }

  async #refresh() {
    if (this.symbol === null || this.#stopped !== null) return;
    const stopped = new AbortController();
    this.#stopped = stopped;
    const isWhole = performance.now() - this.#loadedMs > RELOAD_MS;
    const symbol = encodeURIComponent(this.symbol);
    const limit = isWhole ? HISTORY : 2;
    const path = `api/v3/klines?symbol=${symbol}&interval=${this.interval}&limit=${limit}`;
    const [{ status, body, headers }, trades] = await Promise.all([
      ask(path, stopped.signal),
      this.isStreaming ? null : ask(`api/v3/trades?symbol=${symbol}&limit=${TRADES}`, stopped.signal),
    ]);
    if (stopped.signal.aborted) return;
    this.#stopped = null;
    if (trades?.status === 200) this.#setTrades(trades.body);
    setText(byId("chart-note"), this.#note(status, body, headers));
    if (status !== 200) return;
    const candles = body.map(ofRow);
    if (isWhole) this.#setHistory(candles);
    else if (this.#last !== null) for (const one of candles) this.#merge(one);
  }

  #setTrades(rows) {
    if (!(rows.at(-1)?.id > (this.#trades.at(-1)?.id ?? -1))) return;
    this.#trades = rows.map(({ id, price, qty, time, isBuyerMaker }) => {
      return { id, price, quantity: qty, timeMs: time, isSell: isBuyerMaker };
    });
    this.#dirty = true;
  }

  #note(status, body, headers) {
    if (status !== 200 && this.isDatabaseAway) {
      return "The database is away: only the last candle moves, and its volume stands still.";
    }
    if (status !== 200) return `Candles are not to be had now: ${body?.msg ?? "no answer"}`;
    if (headers.get("X-Tradecore-Candles") === "behind") {
      return "Late or many trades are not in all candles yet.";
    }
    return body.length ? "" : "No trade of this symbol is stored yet.";
  }

  #setHistory(candles) {
    const isFirst = this.#last === null;
    const before = this.#last;
    this.#loadedMs = performance.now();
    if (!candles.length) return (this.#loadedMs = -Infinity);
    this.#setDecimals(candles);
    this.#last = candles.at(-1);
    if (before !== null && before.time >= this.#last.time) {
      // Trades that came by the stream are ahead of the tables.
      [this.#last, candles[candles.length - 1]] = [before, candles.at(-1)];
      this.#merge(candles.at(-1));
      if (before.time === candles.at(-1).time) candles[candles.length - 1] = this.#last;
    } else {
      this.#traded = false;
      this.#closeId = -1;
      for (const trade of this.#trades) this.#extend(trade);
    }
    this.#known = new Set(candles.map((one) => one.time));
    this.#candles.setData(candles);
    this.#volumes.setData(candles.map((one) => this.#volume(one)));
    if (isFirst && candles.length < FEW) this.#chart.timeScale().fitContent();
    else if (isFirst) this.#chart.timeScale().resetTimeScale();
    this.#dirty = true;
  }

  #setDecimals(candles) {
    const decimals = ({ digits }) =>
      [digits.high, digits.low, digits.close].map((text) => text.replace(/\.?0+$/, "").split(".")[1]?.length ?? 0);
    this.#decimals = Math.max(0, ...candles.slice(-50).flatMap(decimals));
    this.#candles.applyOptions({
      priceFormat: { type: "price", precision: this.#decimals, minMove: 10 ** -this.#decimals },
    });
  }

  #volume({ time, open, close, volume }) {
    return { time, value: volume, color: color(close < open ? "--falls-faint" : "--rises-faint") };
  }

  #draw() {
    if (!this.#dirty) return;
    this.#dirty = false;
    if (this.#last !== null) {
      this.#known.add(this.#last.time);
      this.#candles.update({ ...this.#last });
      this.#volumes.update(this.#volume(this.#last));
    }
    for (const [index, field] of FIELDS.entries()) {
      const digits = this.#last?.digits[field];
      setText(byId("legend").children[index], digits ? `${field} ${digits}` : "");
    }
    const newest = this.#trades.slice(-TRADES).reverse();
    const last = newest[0]?.price ?? this.#last?.digits.close;
    if (last !== undefined) setText(byId("price"), last);
    for (const [index, row] of this.#rows.entries()) this.#fill(row, newest[index]);
  }

  #fill(cells, trade) {
    const row = cells[0].parentElement;
    row.hidden = trade === undefined;
    if (trade === undefined) return;
    const taker = TAKER[trade.isSell];
    row.className = taker;
    setText(cells[0], utcMillis(trade.timeMs));
    setText(cells[1], trade.price);
    setText(cells[2], trade.quantity);
    setText(cells[3], taker);
    cells[0].title = local(new Date(trade.timeMs));
  }

  #row() {
    const cells = [make("td"), make("td"), make("td"), make("td")];
    const row = make("tr", ...cells);
    row.hidden = true;
    byId("trades").tBodies[0].append(row);
    return cells;
  }

  #button(interval) {
    const button = make("button", interval);
    button.type = "button";
    button.addEventListener("click", () => this.symbol !== null && this.show(this.symbol, interval));
    return button;
  }

  #paint() {
    const grid = { color: color("--line") };
    this.#chart.applyOptions({
      layout: { background: { color: color("--panel") }, textColor: color("--muted") },
      grid: { vertLines: grid, horzLines: grid },
      timeScale: { borderColor: color("--line") },
      rightPriceScale: { borderColor: color("--line") },
    });
    const [rises, falls] = [color("--rises"), color("--falls")];
    this.#candles.applyOptions({
      upColor: rises, wickUpColor: rises, borderUpColor: rises,
      downColor: falls, wickDownColor: falls, borderDownColor: falls,
    });
  }
}
