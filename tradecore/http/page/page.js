// What stands where: asks the daemon, listens to its stream, and shows what they tell.

import { Poll, Stream } from "./link.js";
import { Market } from "./market.js";
import { SymbolTable } from "./symbols.js";
import { judge } from "./verdict.js";
import { byId, count, duration, local, make, many, rate, setText, setTime, utc, utcMillis } from "./words.js";

const HEALTH_MS = 1000;
const FEED_MS = 3000;
const STALE_S = 4;
// With very many symbols it is asked for once a minute at worst.
const FEED_STALE_S = 70;
const QUIET_S = 10;
const NEWS = 8;
// Names in one question: a URL has an end.
const PRICES_AT_ONCE = 20;

let answer = null;
let health = null;
let healthMs = 0;
let feed = null;
let feedMs = 0;
let offsetMs = 0;

const table = new SymbolTable((symbol) => market.show(symbol));
const market = new Market(() => {
  table.setChosen(market.symbol);
  history.replaceState(null, "", `#${encodeURIComponent(market.symbol)}/${market.interval}`);
  stream.want(["!hole", ...market.streams]);
});
const stream = new Stream(takeEvent, (state) => {
  document.body.dataset.stream = state;
  market.isStreaming = state === "live";
  showStream();
  if (state === "live") market.reload();
});
const polls = [
  new Poll(() => "health", HEALTH_MS, takeHealth),
  new Poll(() => "health/binance", FEED_MS, takeFeed),
  new Poll(pricesPath, FEED_MS, unlessRefused(takePrices)),
];

function takeHealth(next) {
  const wasGone = answer !== null && answer.status === 0;
  answer = next;
  if (next.body?.status !== undefined) {
    health = next.body;
    healthMs = performance.now();
    const theirMs = Date.parse(next.headers.get("Date") ?? "");
    // The header counts seconds only.
    offsetMs = Math.abs(theirMs - Date.now()) > 2000 ? theirMs - Date.now() : 0;
    showFigures();
    if (wasGone) {
      // Another daemon, perhaps; and a stream that died with its host is not noticed by itself.
      stream.stop();
      stream.start();
      polls[1].hurry();
    }
  }
  showVerdict();
}

/** Health is open to all: that a token is asked for shows at other paths. */
function unlessRefused(take) {
  return (next) => {
    if (next.status !== 401) return take(next);
    answer = next;
    showVerdict();
    for (const one of [...polls, stream, market]) one.stop();
  };
}

function takeFeed({ body }) {
  if (body?.symbols === undefined) return;
  feed = body;
  feedMs = performance.now();
  table.update(feed.symbols);
  if (market.symbol === null) {
    chooseFirst();
    polls[2].hurry();
  }
  showConnections();
}

function pricesPath() {
  const names = table.priced.slice(0, PRICES_AT_ONCE);
  return names.length ? `api/v3/ticker/price?symbols=${encodeURIComponent(JSON.stringify(names))}` : null;
}

function takePrices({ status, body }) {
  table.setPrices(status === 200 ? body : []);
}

/** Show the symbol that the address names, else the busiest. */
function chooseFirst() {
  const [symbol, interval] = location.hash.slice(1).split("/").map(decoded);
  const busiest = Object.entries(feed.symbols).sort(([, a], [, b]) => b.trades_received - a.trades_received);
  const chosen = Object.hasOwn(feed.symbols, symbol) ? symbol : busiest[0]?.[0];
  if (chosen !== undefined) market.show(chosen, interval);
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}

function takeEvent(name, event) {
  if (event.e === "hole") showNews(event);
  else market.take(name, event);
}

function showNews({ E: timeMs, s: symbol, state, f: first, l: last, c: cause }) {
  const time = make("time", utcMillis(timeMs).slice(0, 8));
  time.title = local(new Date(timeMs));
  const trades = many(last - first + 1, "trade");
  const what = {
    open: `${trades} missing${cause === "unknown" ? "" : `, ${cause}`}`,
    filled: `${trades} filled`,
    absent: `the venue has no such ${trades}`,
  }[state];
  const ids = `${first}–${last}`;
  const item = make("li", time, " ", make("b", symbol), ` ${what ?? state}, `, make("span", `ids ${ids}`));
  item.className = state;
  byId("news").prepend(item);
  byId("no-news").hidden = true;
  while (byId("news").children.length > NEWS) byId("news").lastElementChild.remove();
  if (symbol === market.symbol && state === "filled") market.reload();
}

function nowMs() {
  return Date.now() + offsetMs;
}

function ageS() {
  return health === null ? null : (performance.now() - healthMs) / 1000;
}

function showStream() {
  const state = document.body.dataset.stream;
  const quietS = market.tradeMs === null ? 0 : (performance.now() - market.tradeMs) / 1000;
  const live = quietS > QUIET_S ? `last trade ${duration(quietS)} ago` : "live";
  setText(byId("stream"), { live, connecting: "no live stream, asking every 3 s" }[state] ?? "");
  byId("stream").className = quietS > QUIET_S ? "" : "moves";
}

function showVerdict() {
  showAge();
  const { tone, state, title, reasons } = judge(answer, health, ageS(), feed?.shards, nowMs());
  const verdict = byId("verdict");
  verdict.dataset.tone = tone;
  verdict.dataset.state = state;
  setText(byId("title"), title);
  document.title = `${title} – tradecore`;
  const list = byId("reasons");
  while (list.children.length < reasons.length) list.append(make("li"));
  while (list.children.length > reasons.length) list.lastElementChild.remove();
  for (const [index, reason] of reasons.entries()) setText(list.children[index], reason);
}

function showFigures() {
  const { rates, ring, database, completeness, counts } = health;
  market.isDatabaseAway = !database.reachable;
  setText(byId("version"), health.version);
  setText(byId("rate"), rate(rates.trades_received_per_s));
  setText(byId("rate-note"), `${rate(rates.trades_stored_per_s)}/s stored, ${count(counts.trades_stored)} since the start`);
  setText(byId("lag"), duration(ring.oldest_age_s));
  setText(byId("lag-note"), `${many(ring.rows, "row")} not stored yet`);
  setText(byId("ring"), `${(100 * ring.fill_ratio).toFixed(1)} %`);
  byId("ring-meter").value = ring.fill_ratio;
  setText(byId("ring-note"), ring.absorbable_s === null ? "nothing comes in" : `room for ${duration(ring.absorbable_s)}`);
  setText(byId("database"), database.reachable ? "connected" : `away ${duration(database.away_s)}`);
  byId("database").className = database.reachable ? "" : "bad";
  setText(byId("database-note"), [database.server_version && `PostgreSQL ${database.server_version}`, database.level].filter(Boolean).join(", "));
  showHoles(completeness);
  setTime(byId("complete"), completeness.complete_through);
  setTime(byId("proven"), completeness.proven_through);
  setText(byId("proven-note"), `${ago(completeness.proven_through)}, ${many(completeness.audit.klines_proven, "minute")} proven`);
  setText(byId("complete-note"), ago(completeness.complete_through));
}

function showHoles({ holes, ids_missing, oldest_hole_age_s, backfill }) {
  setText(byId("holes"), count(holes));
  byId("holes").className = holes ? "busy" : "";
  const filling = backfill.under_way ? `, ${count(backfill.under_way)} being filled` : "";
  setText(byId("holes-note"), holes ? `${many(ids_missing, "trade")} missing, oldest ${duration(oldest_hole_age_s)}${filling}` : "no trade is missing");
}

function showConnections() {
  const { connections_live, connections_total, streams_live, streams_wanted, connections } = feed;
  setText(byId("connections"), `${connections_live} of ${connections_total}`);
  byId("connections").className = connections_live < connections_total ? "warn" : "";
  // Of many only those that are not live.
  const told = connections.length > 4 ? connections.filter((one) => one.state !== "live") : connections;
  const names = told.slice(0, 4).map((one) => `${one.name} ${one.state.replace("_", " ")}`);
  setText(byId("connections-note"), [...names, `${count(streams_live)} of ${count(streams_wanted)} streams`].join(", "));
}

function ago(iso) {
  return iso === null ? "not known yet" : `${duration((nowMs() - Date.parse(iso)) / 1000)} ago`;
}

/** Say how old everything is; what is old is greyed, so that it is not taken for the present. */
function showAge() {
  const isGone = answer !== null && answer.status !== 200 && answer.status !== 503;
  const isStale = health === null || isGone || ageS() > STALE_S;
  setText(byId("heard"), isStale && health !== null ? `heard ${duration(ageS())} ago` : "");
  document.body.classList.toggle("stale", isStale);
  const feedAgeS = (performance.now() - feedMs) / 1000;
  document.body.classList.toggle("stale-feed", isStale || feed === null || feedAgeS > FEED_STALE_S);
}

function tick() {
  const now = new Date(nowMs());
  setText(byId("clock"), `${utc(now, now)} UTC`);
  byId("clock").title = local(now);
  showAge();
  showStream();
  if (answer !== null && answer.status === 0) showVerdict();
}

/** A page that nobody sees asks for nothing. */
function followVisibility() {
  for (const one of [...polls, stream, market]) document.hidden ? one.stop() : one.start();
}

document.addEventListener("visibilitychange", followVisibility);
addEventListener("hashchange", () => feed !== null && chooseFirst());
setInterval(tick, 1000);
stream.want(["!hole"]);
tick();
followVisibility();
