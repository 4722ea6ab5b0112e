// What the answers of the daemon amount to, in words. Pure: no element is touched here.

import { count, duration, many } from "./words.js";

const STARTING_S = 60;
const BEHIND_S = 10;
const PROOF_LATE_S = 600;

const NOT_READY = {
  database_away: "Not ready: the database is away",
  no_live_stream: "Not ready: no live stream",
  ring_above_high_water: "Not ready: the ring is nearly full",
  share_unknown: "Not ready: which symbols are ours is not known",
};
const DEGRADED = {
  database_away: "Database away, trades wait in the ring",
  connection_not_live: "Degraded: a connection is not live",
  streams_missing: "Degraded: streams are missing",
  symbols_stale: "Degraded: trades do not come",
  rows_parked: "Degraded: the database refuses rows",
  disk_full: "Degraded: the disk of DATA_DIR is full",
};

/** Tones: good, busy (it mends itself), warn, bad, wait (nothing is known yet). */
function verdict(tone, state, title, ...reasons) {
  return { tone, state, title, reasons: reasons.filter(Boolean) };
}

/**
 * Judge the last answer of /health. `answer` is {status, body}, null before the first; `health` is
 * the last good body, `ageS` its age; `shards` is that part of /health/binance, if it came; `nowMs` is by the daemon's clock.
 */
export function judge(answer, health, ageS, shards, nowMs) {
  if (answer === null) return verdict("wait", "asking", "Asking the daemon …");
  if (answer.status === 401 || answer.status === 403) {
    const how = "Load the page anew: the browser then asks for a name and a password. Any name will"
      + " do, the password is HTTP_TOKEN.";
    return verdict("bad", "token", "A token is needed", how);
  }
  if (answer.status === 0 || answer.body?.status === undefined) {
    const age = health === null ? "" : `Everything below is ${duration(ageS)} old. `;
    const why = answer.body?.text ?? "This page goes on asking.";
    const title = answer.status === 0 ? "The daemon does not answer" : "The daemon refuses to answer";
    return verdict("bad", "gone", title, age + why);
  }
  return ofHealth(health, shards, nowMs);
}

function ofHealth(health, shards, nowMs) {
  const codes = health.reasons.map((reason) => reason.code);
  const told = health.reasons.map((reason) => reason.text);
  const notes = [...told, databaseNote(health), holeNote(health), auditNote(health)];
  if (health.status === "failed") {
    const isNew = health.uptime_s < STARTING_S && health.counts.trades_received === 0;
    if (isNew && codes.includes("no_live_stream")) {
      return verdict("wait", "starting", "Starting: connecting to the venue", ...notes);
    }
    const code = codes.find((one) => one in NOT_READY);
    return verdict("bad", code ?? "failed", NOT_READY[code] ?? "Not ready", ...notes);
  }
  if (health.status === "degraded") {
    const code = codes.find((one) => one in DEGRADED);
    return verdict("warn", code ?? "degraded", DEGRADED[code] ?? "Degraded", ...notes);
  }
  if (shards?.total && !shards.held) {
    return verdict("good", "standby", "Standing by", "Other daemons capture all symbols.");
  }
  if (health.ring.oldest_age_s > BEHIND_S) {
    const late = `The oldest trade that is not stored yet has waited ${duration(health.ring.oldest_age_s)}.`;
    return verdict("warn", "behind", "Behind", late, ...notes);
  }
  const { holes, backfill, audit, proven_through } = health.completeness;
  if (holes > 0) {
    const what = holes === 1 ? "A hole is" : `${count(holes)} holes are`;
    const title = backfill.under_way ? `${what} being filled` : `${what} open`;
    return verdict("busy", "filling", title, ...notes);
  }
  if (Object.values(audit.klines_mismatched).some(Boolean)) {
    return verdict("warn", "mismatched", "Captured; minutes differ from the venue's", ...notes);
  }
  if (proven_through === null) {
    return verdict("good", "captured", "Captured, nothing is missing", "No minute is proven yet.");
  }
  const proofAgeS = (nowMs - Date.parse(proven_through)) / 1000;
  if (proofAgeS > PROOF_LATE_S) {
    return verdict("warn", "unproven", `Captured; the proof is ${duration(proofAgeS)} old`, ...notes);
  }
  return verdict("good", "proven", "Captured and proven", ...notes);
}

function sentence(text) {
  return `${text.replace(/[.\s]+$/, "")}.`;
}

function databaseNote({ database, ring }) {
  if (database.reachable) return "";
  const room = ring.absorbable_s === null ? "" : ` The ring has room for ${duration(ring.absorbable_s)}.`;
  return database.last_error ? `It said: ${sentence(database.last_error)}${room}` : room.trim();
}

function holeNote({ completeness: { holes, ids_missing, oldest_hole_age_s, backfill, rest } }) {
  if (!holes) return "";
  const missing = `${many(ids_missing, "trade")} missing, the oldest hole is ${duration(oldest_hole_age_s)} old.`;
  const ban = rest.banned_s > 0 ? ` The venue may be asked again in ${duration(rest.banned_s)}.` : "";
  const error = backfill.last_error ? ` Last trouble: ${sentence(backfill.last_error)}` : "";
  return missing + ban + error;
}

function auditNote({ completeness: { audit } }) {
  const wrong = Object.entries(audit.klines_mismatched).filter(([, number]) => number);
  if (!wrong.length) return "";
  return `Since the start: ${wrong.map(([why, number]) => `${why} ${count(number)}`).join(", ")}.`;
}
