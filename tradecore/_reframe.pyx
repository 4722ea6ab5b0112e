"""Turn a message of the venue into the WebSocket frame that a client of ours gets.

Two things change: the wrapper of combined mode, and the unit of the times, since our connections
run in microseconds and clients get milliseconds unless they ask for more. Every other byte stays
as it came. As with the codec, a fast path takes the documented form only and finds the times by
where they stand; any other spelling that the codec took is read as JSON and printed anew, which
keeps decimals as they are, because on the wire they are strings.
"""

import json
from math import isinf

import orjson

from libc.stdint cimport int64_t
from libc.string cimport memchr, memcmp, memcpy, memset

from tradecore._words cimport likely


KINDS = ("trade", "ticker", "kline_1m", "hole")
"""What stands behind the @ of a stream's name, by kind."""

COMBINED = MODE_COMBINED
MICRO = MODE_MICRO

cdef enum:
    MILLI_DIGITS = 13
    MICRO_DIGITS = 16

# From this on a time is in microseconds; in milliseconds it would be the year 5138.
cdef int64_t LEAST_MICRO = <int64_t>100000000000000


cdef inline bint _stands(const char *p, const char *end, const char *text, int size) noexcept nogil:
    return end - p >= size and likely(memcmp(p, text, size) == 0)


cdef inline const char *_time(
    payload_t *payload, const char *p, const char *end, bint is_end
) noexcept nogil:
    """Note the time that begins at `p`; return what is behind it, NULL when it is none."""
    cdef const char *start = p
    cdef time_t *found = &payload.times[payload.count]
    while p < end and b"0" <= p[0] <= b"9":
        p += 1
    if p - start != MILLI_DIGITS and p - start != MICRO_DIGITS:
        return NULL
    found.at = start - payload.data
    found.digits = <int>(p - start)
    found.is_end = is_end
    payload.count += 1
    return p


cdef inline const char *_integer(const char *p, const char *end) noexcept nogil:
    """Return what is behind an integer, NULL when there is none."""
    cdef const char *start
    if p < end and p[0] == b"-":
        p += 1
    start = p
    while p < end and b"0" <= p[0] <= b"9":
        p += 1
    return p if p > start else NULL


cdef inline const char *_bool(const char *p, const char *end) noexcept nogil:
    """Return what is behind `true` or `false`, NULL when there is none."""
    if _stands(p, end, b"true", 4):
        return p + 4
    return p + 5 if _stands(p, end, b"false", 5) else NULL


cdef inline const char *_last(
    const char *start, const char *end, const char *text, int size, int reach
) noexcept nogil:
    """Return where `text` last begins in the `reach` bytes before `end`, NULL if nowhere."""
    cdef const char *p = end - size
    cdef const char *least = end - reach if end - start > reach else start
    while p >= least:
        if p[0] == text[0] and memcmp(p, text, size) == 0:
            return p
        p -= 1
    return NULL


cdef inline bint _closes(const char *start, const char *end, int braces) noexcept nogil:
    """Tell whether the only closing braces are those at the end: no object stands in or behind the
    event that is not the documented one."""
    cdef const char *first = <const char *>memchr(start, b"}", end - start)
    return first != NULL and end - first == braces and (end - 1)[0] == b"}"


cdef bint _trade_times(payload_t *payload, const char *p, const char *end) noexcept nogil:
    """`p` is behind `E`. The tail is matched up to the brace that closes the event, so its `T` is
    the event's own."""
    if not _stands(p, end, b',"s":"', 6):
        return False
    p = _last(p, end, b',"T":', 5, 52)
    if p == NULL:
        return False
    p = _time(payload, p + 5, end, False)
    if p == NULL or not _stands(p, end, b',"m":', 5):
        return False
    p = _bool(p + 5, end)
    if p == NULL or not _stands(p, end, b',"M":', 5):
        return False
    p = _bool(p + 5, end)
    return p != NULL and end - p == 1 and p[0] == b"}"


cdef bint _ticker_times(payload_t *payload, const char *p, const char *end) noexcept nogil:
    cdef int i
    if not _stands(p, end, b',"s":"', 6):
        return False
    p = _last(p, end, b',"O":', 5, 128)
    if p == NULL:
        return False
    p = _time(payload, p + 5, end, False)
    if p == NULL or not _stands(p, end, b',"C":', 5):
        return False
    p = _time(payload, p + 5, end, False)
    for i in range(3):
        if p == NULL or end - p < 6 or p[0] != b"," or p[1] != b'"':
            return False
        if p[2] != (<const char *>b"FLn")[i] or p[3] != b'"' or p[4] != b":":
            return False
        p = _integer(p + 5, end)
    return p != NULL and end - p == 1 and p[0] == b"}"


cdef bint _kline_times(payload_t *payload, const char *p, const char *end) noexcept nogil:
    if not _stands(p, end, b',"s":"', 6):
        return False
    p = <const char *>memchr(p + 6, b'"', end - p - 6)
    if p == NULL or (p - 1)[0] == b"\\" or not _stands(p, end, b'","k":{"t":', 11):
        return False
    p = _time(payload, p + 11, end, False)
    if p == NULL or not _stands(p, end, b',"T":', 5):
        return False
    p = _time(payload, p + 5, end, True)
    return p != NULL and _stands(p, end, b',"s":"', 6)


cdef bint find_times(
    int kind, const char *data, Py_ssize_t size, payload_t *payload
) noexcept nogil:
    """Find the payload of a message that the codec took, and its times; False: it is of another
    form than the documented one."""
    cdef const char *p = data
    cdef const char *end = data + size
    payload.count = 0
    if _stands(p, end, b'{"stream":"', 11):
        p = <const char *>memchr(p + 11, b'"', end - p - 11)
        if p == NULL or not _stands(p, end, b'","data":{', 10) or (end - 1)[0] != b"}":
            return False
        p += 9
        end -= 1
    payload.data = p
    payload.size = end - p
    if not _closes(p, end, 2 if kind == KIND_KLINE else 1):
        return False
    if kind == KIND_TRADE:
        if not _stands(p, end, b'{"e":"trade","E":', 17):
            return False
        p = _time(payload, p + 17, end, False)
        return p != NULL and _trade_times(payload, p, end)
    if kind == KIND_TICKER:
        if not _stands(p, end, b'{"e":"24hrTicker","E":', 22):
            return False
        p = _time(payload, p + 22, end, False)
        return p != NULL and _ticker_times(payload, p, end)
    if not _stands(p, end, b'{"e":"kline","E":', 17):
        return False
    p = _time(payload, p + 17, end, False)
    return p != NULL and _kline_times(payload, p, end)


cdef inline char *_put(char *out, const char *data, Py_ssize_t size) noexcept nogil:
    memcpy(out, data, size)
    return out + size


cdef Py_ssize_t write_frame(
    char *out, const payload_t *payload, const char *name, Py_ssize_t name_size, int mode
) noexcept nogil:
    """Write a whole unmasked text frame to `out`, which has FRAME_SLACK bytes more room than
    payload and name; return its size."""
    cdef int wanted = MICRO_DIGITS if mode & MODE_MICRO else MILLI_DIGITS
    cdef const time_t *time
    cdef Py_ssize_t size = payload.size
    cdef Py_ssize_t done = 0
    cdef char *p = out
    cdef int i
    for i in range(payload.count):
        size += wanted - payload.times[i].digits
    if mode & MODE_COMBINED:
        size += name_size + 21
    p[0] = <char>0x81
    if size < 126:
        p[1] = <char>size
        p += 2
    elif size < 65536:
        p[1] = 126
        p[2] = <char>(size >> 8)
        p[3] = <char>size
        p += 4
    else:
        p[1] = 127
        for i in range(8):
            p[2 + i] = <char>(size >> 8 * (7 - i))
        p += 10
    if mode & MODE_COMBINED:
        p = _put(p, b'{"stream":"', 11)
        p = _put(p, name, name_size)
        p = _put(p, b'","data":', 9)
    for i in range(payload.count):
        time = &payload.times[i]
        p = _put(p, payload.data + done, time.at - done)
        p = _put(p, payload.data + time.at, min(time.digits, wanted))
        if time.digits < wanted:
            memset(p, b"9" if time.is_end else b"0", wanted - time.digits)
            p += wanted - time.digits
        done = time.at + time.digits
    p = _put(p, payload.data + done, payload.size - done)
    if mode & MODE_COMBINED:
        p[0] = b"}"
        p += 1
    return p - out


cdef bytes respell(int kind, bytes message, bint micro):
    """Return the payload of a message of unusual form, compact and in the wanted unit.

    Raises ValueError for what the codec would not have taken.
    """
    try:
        event = orjson.loads(message)
    except orjson.JSONDecodeError:
        # Half a character, escaped, or a number beyond doubles, where nobody needs them.
        event = json.loads(message, parse_int=_number, parse_float=_number)
        return json.dumps(_converted(event, kind, micro), separators=(",", ":")).encode()
    return orjson.dumps(_converted(event, kind, micro))


def _number(str text):
    """Read as orjson does: integers of 64 bits, else doubles; what is beyond them is null."""
    if len(text) < 19 and text.lstrip("-").isdecimal():
        return int(text)
    number = float(text)
    return None if isinf(number) else number


cdef dict _converted(dict event, int kind, bint micro):
    if "e" not in event:
        event = event["data"]
    _convert(event, "E", micro, False)
    if kind == KIND_TRADE:
        _convert(event, "T", micro, False)
    elif kind == KIND_TICKER:
        _convert(event, "O", micro, False)
        _convert(event, "C", micro, False)
    else:
        _convert(event["k"], "t", micro, False)
        _convert(event["k"], "T", micro, True)
    return event


cdef int _convert(dict event, str key, bint micro, bint is_end) except -1:
    cdef int64_t time = event[key]
    if micro and time < LEAST_MICRO:
        event[key] = time * 1000 + (999 if is_end else 0)
    elif not micro and time >= LEAST_MICRO:
        event[key] = time // 1000
    return 0


cdef bytes frame_of(bytes payload, bytes name, int mode):
    """Return the frame of a payload that is in the wanted unit already."""
    cdef payload_t whole
    cdef bytearray out = bytearray(len(payload) + len(name) + FRAME_SLACK)
    whole.data = payload
    whole.size = len(payload)
    whole.count = 0
    return bytes(out[:write_frame(out, &whole, name, len(name), mode)])


def reframe(int kind, bytes data not None, bytes name not None, int mode, str path="auto"):
    """Return the frame of one message, as the fan-out makes it (tests and tools).

    `path` is "auto", "fast" (ValueError when the form is not the documented one) or "slow".
    """
    cdef payload_t payload
    cdef bytearray out
    if path != "slow" and find_times(kind, data, len(data), &payload):
        out = bytearray(payload.size + len(name) + FRAME_SLACK)
        return bytes(out[:write_frame(out, &payload, name, len(name), mode)])
    if path == "fast":
        raise ValueError("not of the documented form")
    return frame_of(respell(kind, data, bool(mode & MODE_MICRO)), name, mode)
