// The table of symbols: sorted, filtered, and drawn a page at a time, whatever their number.

import { byId, count, duration, make, many, rate, setText, setTime } from "./words.js";

const ROWS = 20;

const COLUMNS = [
  // title, what is sorted by (prices of different symbols say nothing), 1 = least first, class
  ["Symbol", (one) => one.name, 1, ""],
  ["Last price", null, 1, "digits"],
  ["Trades/s", (one) => one.rate ?? -1, -1, "digits"],
  ["Last trade", (one) => one.last_trade_age_s ?? Infinity, 1, "digits wide"],
  ["Complete through", (one) => one.complete_through ?? "", 1, "digits wide"],
  ["Proven through", (one) => one.proven_through ?? "", 1, "digits wide"],
  ["Missing", (one) => one.ids_missing, -1, "digits"],
];

/** Those that something is wrong with first, then the busiest: an order that stays calm. */
function byAttention(one, other) {
  const trouble = (row) => row.ids_missing + (row.stale ? 1 : 0);
  return trouble(other) - trouble(one) || other.trades_received - one.trades_received;
}

export class SymbolTable {
  #all = [];
  #shown = [];
  #first = 0;
  #column = null;
  #sign = 1;
  #atMs = 0;
  #prices = new Map();
  #chosen = null;
  #rows = [];
  #heads = [];
  #choose;

  /** `choose` is called with the name of a symbol that was clicked. */
  constructor(choose) {
    this.#choose = choose;
    const head = byId("symbols").tHead.rows[0];
    for (const [index, [title, key, , style]] of COLUMNS.entries()) {
      const cell = make("th", key === null ? title : this.#sorter(index, title));
      cell.scope = "col";
      cell.className = style;
      this.#heads.push(cell);
      head.append(cell);
    }
    byId("filter").addEventListener("input", () => this.#turnTo(0));
    byId("before").addEventListener("click", () => this.#turnTo(this.#first - ROWS));
    byId("after").addEventListener("click", () => this.#turnTo(this.#first + ROWS));
  }

  get names() {
    return this.#all.map((one) => one.name);
  }

  /** The rows in view that have a price to ask for. */
  get priced() {
    return this.#shown.filter((one) => one.last_trade_id !== null).map((one) => one.name);
  }

  /** Take `symbols` of /health/binance. */
  update(symbols) {
    const nowMs = performance.now();
    const before = new Map(this.#all.map((one) => [one.name, one]));
    const elapsedS = (nowMs - this.#atMs) / 1000;
    this.#all = Object.entries(symbols).map(([name, one]) => {
      const grown = one.trades_received - (before.get(name)?.trades_received ?? Infinity);
      return { name, ...one, rate: grown >= 0 ? grown / elapsedS : null };
    });
    this.#atMs = nowMs;
    this.draw();
  }

  /** Take an answer of /api/v3/ticker/price. */
  setPrices(prices) {
    this.#prices = new Map(prices.map(({ symbol, price }) => [symbol, price]));
    this.draw();
  }

  setChosen(name) {
    this.#chosen = name;
    this.draw();
  }

  draw() {
    const wanted = byId("filter").value.trim().toLowerCase();
    const found = this.#all.filter((one) => one.name.toLowerCase().includes(wanted));
    found.sort(this.#order());
    this.#first = Math.max(0, Math.min(this.#first, Math.floor((found.length - 1) / ROWS) * ROWS));
    this.#shown = found.slice(this.#first, this.#first + ROWS);
    const body = byId("symbols").tBodies[0];
    while (this.#rows.length < this.#shown.length) this.#rows.push(this.#row(body));
    for (const [index, row] of this.#rows.entries()) this.#fill(row, this.#shown[index]);
    this.#label(found.length);
  }

  #turnTo(first) {
    this.#first = first;
    this.draw();
  }

  #order() {
    if (this.#column === null) return byAttention;
    const key = COLUMNS[this.#column][1];
    return (one, other) => {
      const [a, b] = [key(one), key(other)];
      return (a < b ? -this.#sign : a > b ? this.#sign : 0) || (one.name < other.name ? -1 : 1);
    };
  }

  /** A click sorts, a second one turns the order around, a third goes back to the first order. */
  #sorter(index, title) {
    const button = make("button", title);
    button.type = "button";
    button.addEventListener("click", () => {
      const first = COLUMNS[index][2];
      if (this.#column !== index) [this.#column, this.#sign] = [index, first];
      else if (this.#sign === first) this.#sign = -first;
      else this.#column = null;
      for (const cell of this.#heads) cell.removeAttribute("aria-sort");
      if (this.#column !== null) {
        this.#heads[index].ariaSort = this.#sign > 0 ? "ascending" : "descending";
      }
      this.#turnTo(0);
    });
    return button;
  }

  #row(body) {
    const button = make("button");
    button.type = "button";
    button.addEventListener("click", () => this.#choose(button.textContent));
    const times = [make("time"), make("time")];
    const inside = [button, "", "", "", ...times, ""];
    const cells = inside.map((one, index) => {
      const cell = make(index === 0 ? "th" : "td", one);
      cell.className = COLUMNS[index][3];
      return cell;
    });
    cells[0].scope = "row";
    const row = make("tr", ...cells);
    body.append(row);
    return { row, button, cells, times };
  }

  #fill({ row, button, cells, times }, one) {
    row.hidden = one === undefined;
    if (one === undefined) return;
    setText(button, one.name);
    button.ariaCurrent = String(one.name === this.#chosen);
    row.className = one.ids_missing || one.stale ? "trouble" : "";
    setText(cells[1], this.#prices.get(one.name) ?? "–");
    setText(cells[2], rate(one.rate));
    setText(cells[3], duration(one.last_trade_age_s));
    setTime(times[0], one.complete_through);
    setTime(times[1], one.proven_through);
    setText(cells[6], count(one.ids_missing));
    cells[6].title = one.holes ? `in ${many(one.holes, "hole")}` : "";
  }

  #label(found) {
    const last = this.#first + this.#shown.length;
    const place = found > ROWS ? `${this.#first + 1} to ${last} of ` : "";
    const all = found < this.#all.length ? ` of ${count(this.#all.length)}` : "";
    setText(byId("count"), place + count(found) + all);
    byId("pager").hidden = found <= ROWS;
    byId("before").disabled = this.#first === 0;
    byId("after").disabled = last >= found;
  }
}
