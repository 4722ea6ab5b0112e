"""The words of the venue's stream protocol, as clients of ours use it: names, requests, replies.

Pure: what a request asks for is read here, who carries it out is in `streams`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import orjson

STREAMS_MAX = 1024
"""Of one client, as at the venue."""
REQUEST_MAX_BYTES = 64 << 10
"""1,024 names and more."""

ALL_HOLES = "!hole"
HOLE = "hole"

METHODS = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS", "SET_PROPERTY", "GET_PROPERTY")

TEXT, CLOSE, PING, PONG = 0x1, 0x8, 0x9, 0xA

UNKNOWN_PROPERTY, NOT_BOOLEAN, INVALID_REQUEST, INVALID_JSON, TOO_MANY = range(5)

_ID = re.compile(r"[0-9A-Za-z_-]{1,36}", re.ASCII)  # the venue's own library sends a UUID
_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}

RequestId = int | str | None


class RefusedError(Exception):
    """A request is not carried out; `code` is the venue's."""

    def __init__(self, code: int, message: str, request_id: RequestId = None) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id


class Request(NamedTuple):
    """A request that can be carried out. `names` is of (UN)SUBSCRIBE, `value` of SET_PROPERTY."""

    method: str
    request_id: RequestId
    names: tuple[str, ...] = ()
    value: bool = False


def lower(symbol: str) -> str:
    """Return a symbol as it is in stream names: only ASCII letters change."""
    return symbol.translate(_ASCII_LOWER)


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """Return a whole unmasked WebSocket frame."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, size))
    elif size < 65536:
        head = bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big")
    return head + payload


def read_request(text: str) -> Request:
    """Read a control request. Raises RefusedError, with its id where that could be read."""
    try:
        request = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise RefusedError(INVALID_JSON, f"Invalid JSON: expected value at {place}") from None
    if not isinstance(request, dict):
        raise RefusedError(INVALID_REQUEST, "Invalid request: request must be an object")
    request_id = _request_id(request)
    try:
        return _request(request, request_id)
    except RefusedError as error:
        error.request_id = request_id
        raise


def _request_id(request: dict[str, Any]) -> RequestId:
    value = request.get("id")
    if value is None or (isinstance(value, str) and _ID.fullmatch(value)):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    raise RefusedError(
        INVALID_REQUEST,
        "Invalid request: request ID must be a signed 64-bit integer, an alphanumeric string of at"
        " most 36 characters, or null",
    )


def _request(request: dict[str, Any], request_id: RequestId) -> Request:
    if "method" not in request:
        raise RefusedError(INVALID_REQUEST, "Invalid request: missing field `method`")
    method = request["method"]
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(f"`{name}`" for name in METHODS)
        shown = method[:40] if isinstance(method, str) else "method"
        raise RefusedError(
            INVALID_REQUEST,
            f"Invalid request: unknown variant `{shown}`, expected one of {known}",
        )
    params = request.get("params", [])
    if not isinstance(params, list):
        raise RefusedError(INVALID_REQUEST, "Invalid request: params must be an array")
    if method in ("SUBSCRIBE", "UNSUBSCRIBE"):
        if not all(isinstance(name, str) and name for name in params):
            raise RefusedError(INVALID_REQUEST, "Invalid request: invalid stream")
        return Request(method, request_id, tuple(params))
    if method == "LIST_SUBSCRIPTIONS":
        return Request(method, request_id)
    return Request(method, request_id, value=_property(method, params))


def _property(method: str, params: list[Any]) -> bool:
    """Return the value to set; False where one is asked for."""
    expected = 1 if method == "GET_PROPERTY" else 2
    if len(params) > expected:
        raise RefusedError(INVALID_REQUEST, "Invalid request: too many parameters")
    if not params or not isinstance(params[0], str):
        raise RefusedError(INVALID_REQUEST, "Invalid request: property name must be a string")
    if params[0] != "combined":
        raise RefusedError(UNKNOWN_PROPERTY, "Unknown property")
    if expected == 1:
        return False
    if len(params) < 2 or not isinstance(params[1], bool):
        raise RefusedError(NOT_BOOLEAN, "Invalid value type: expected Boolean")
    return params[1]


def result(value: object, request_id: RequestId) -> bytes:
    """Return the reply to a request that was carried out."""
    return orjson.dumps({"result": value, "id": request_id})


def error(refusal: RefusedError) -> bytes:
    """Return the reply to a request that was not, in the form that the venue has on the wire."""
    body = {"code": refusal.code, "msg": str(refusal)}
    return orjson.dumps({"error": body, "id": refusal.request_id})


def not_captured(names: Iterable[str]) -> RefusedError:
    """Return the refusal of streams that nothing comes of; the venue would stay silent."""
    first = next(iter(names))[:80]
    return RefusedError(INVALID_REQUEST, f"Invalid request: {first} is not captured")


def names_in_url(path: str, query: Mapping[str, str], listed: str) -> tuple[str, ...]:
    """Return the streams that a URL names: `/ws/<a>/<b>` or `/stream?streams=<a>/<b>`.

    A number is none: clients that subscribe later count their connections so (`/ws/0`), and the
    venue lets them.
    """
    if path == "/stream":
        listed = query.get("streams", "")
    names = (name for name in listed.split("/") if name and not name.isdecimal())
    return tuple(dict.fromkeys(names))


def is_micro(query: Mapping[str, str]) -> bool:
    """Tell whether a URL asks for microseconds. Raises ValueError for another unit."""
    unit = query.get("timeUnit", "MILLISECOND")
    if unit not in ("MILLISECOND", "MICROSECOND", "millisecond", "microsecond"):
        raise ValueError("timeUnit must be MILLISECOND or MICROSECOND")
    return unit.lower() == "microsecond"


def shutdown_event(time: int, combined: bool) -> bytes:
    """Return the event that tells a client to connect anew."""
    payload = b'{"e":"serverShutdown","E":%d}' % time
    return b'{"stream":"!serverShutdown","data":%s}' % payload if combined else payload


def hole_event(
    time: int, symbol: str, first_id: int, last_id: int, cause: str, state: str
) -> bytes:
    """Return the event of a hole in the stored ids that was opened, filled, or closed as absent."""
    return orjson.dumps(
        {"e": HOLE, "E": time, "s": symbol, "state": state, "f": first_id, "l": last_id, "c": cause}
    )
