"""What Redis does by itself, in one step each: take a batch, and sweep out what is old.

A script sees what every daemon has written before, so that no value ever goes back, whoever writes:
shards that change hands, two daemons with the same symbols, a restart, and what a connection that
we gave up long ago still had in its buffers.
"""

LAST = "tradecore:last"
"""The hash; its fields are names of streams, its values the venue's newest event of each."""

TRADES = "tradecore:trades"
"""The stream of all trades; of each entry the field `trades` is a JSON array of events."""

STATUS = "tradecore:status:"
"""Behind it stands the node; each daemon keeps its own alive."""

EXPIRE_S = 86400
"""What is older, or of a future farther than that, is swept out; the whole hash goes when nobody
has written for so long."""

_COMMON = (
    f"local EXPIRE_S = {EXPIRE_S}"
    + """
local function time_us(event)
    local time = tonumber(string.match(event, '"E":(%d+)') or 0)
    return time < 1e14 and time * 1000 or time
end
local function order(event)
    return tonumber(string.match(event, '"t":(%d+)')) or time_us(event)
end
"""
)

PUT = (
    _COMMON
    + """
local names, news, pairs = {}, {}, {}
for i = 1, #ARGV, 2 do names[#names + 1] = ARGV[i] end
if #names == 0 then return 0 end
local kept = redis.call('HMGET', KEYS[1], unpack(names))
for i = 1, #names do
    local event = ARGV[2 * i]
    if not kept[i] or order(event) > order(kept[i]) then
        news[#news + 1] = event
        pairs[#pairs + 1] = names[i]
        pairs[#pairs + 1] = event
    end
end
if #news > 0 then
    redis.call('HSET', KEYS[1], unpack(pairs))
    redis.call('EXPIRE', KEYS[1], EXPIRE_S)
    redis.call('PUBLISH', KEYS[2], '[' .. table.concat(news, ',') .. ']')
end
return #news
"""
)
"""KEYS: hash, channel; ARGV: stream and event, again and again. Keeps and publishes what is newer
than what is there (trades by id, tickers by event time), and returns how many."""

SWEEP = (
    _COMMON
    + """
local now, gone = tonumber(ARGV[1]), 0
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
    if math.abs(now - time_us(all[i + 1])) > EXPIRE_S * 1e6 then
        redis.call('HDEL', KEYS[1], all[i])
        gone = gone + 1
    end
end
return gone
"""
)
"""KEYS: hash; ARGV: our time in microseconds. Takes out what is older than a day, as are symbols
that nobody captures any more, and what came with an absurd time; returns how many."""
