// Numbers, ages and times as people read them. Prices and quantities never come here: they are
// shown with the digits that the daemon sends.

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const NOTHING = "–";

export function count(value) {
  return value == null ? NOTHING : grouped.format(value);
}

export function many(value, one, more = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : more}`;
}

export function rate(value) {
  if (value == null) return NOTHING;
  return value < 10 ? value.toFixed(1) : grouped.format(value);
}

export function duration(s) {
  if (s == null) return NOTHING;
  if (s < 9.95) return `${Math.max(0, s).toFixed(1)} s`;
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${Math.round(s / 3600)} h`;
  return `${count(s / 86400)} d`;
}

/** Time of the day, with the date where it is not that of `now`. */
export function utc(date, now = new Date()) {
  const [day, time] = date.toISOString().split("T");
  return now.toISOString().startsWith(day) ? time.slice(0, 8) : `${day} ${time.slice(0, 5)}`;
}

export function utcMillis(ms) {
  return new Date(ms).toISOString().slice(11, 23);
}

export function local(date) {
  return `${date.toLocaleString()} local time`;
}

export function byId(id) {
  return document.getElementById(id);
}

/** Set a text; what has not changed is not touched, so nothing is read aloud or drawn again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show the time of `iso`, null for none, in a <time>. */
export function setTime(element, iso) {
  if (element.dateTime !== (iso ?? "")) {
    element.dateTime = iso ?? "";
    element.title = iso === null ? "" : local(new Date(iso));
  }
  setText(element, iso === null ? NOTHING : utc(new Date(iso)));
}

/** Return a new element with these texts, or elements, in it. */
export function make(tag, ...inside) {
  const element = document.createElement(tag);
  element.append(...inside);
  return element;
}
