"""The control protocol of a stream connection: requests in, replies out."""

import json
import re
from typing import Any, Protocol

METHODS = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS", "SET_PROPERTY", "GET_PROPERTY")
MAX_STREAMS = 1024
MAX_REQUEST_BYTES = 4088

_ID = re.compile(r"[0-9A-Za-z]{1,36}", re.ASCII)


class Controlled(Protocol):
    """What control requests read and change."""

    streams: dict[str, None]
    combined: bool


class TooManyStreams(Exception):
    """More than 1,024 streams: the venue closes the connection."""


class _Refused(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def answer(connection: Controlled, text: str, nested_errors: bool) -> str | None:
    """Carry out a request and return the reply; None if the venue would stay silent.

    Raises TooManyStreams when a SUBSCRIBE goes over the limit.
    """
    if len(text.encode("utf-8")) > MAX_REQUEST_BYTES:
        return None
    request_id: Any = None
    try:
        request = _parsed(text)
        request_id = _request_id(request)
        reply: dict[str, Any] = {"result": _carry_out(connection, request), "id": request_id}
    except _Refused as refusal:
        error = {"code": refusal.code, "msg": str(refusal)}
        reply = {"error": error, "id": request_id} if nested_errors else {**error, "id": request_id}
    return json.dumps(reply, separators=(",", ":"), ensure_ascii=False)


def _parsed(text: str) -> dict[str, Any]:
    try:
        request = json.loads(text)
    except json.JSONDecodeError as exc:
        at = f"line {exc.lineno} column {exc.colno}"
        raise _Refused(3, f"Invalid JSON: expected value at {at}") from None
    if not isinstance(request, dict):
        raise _Refused(2, "Invalid request: request must be an object")
    return request


def _request_id(request: dict[str, Any]) -> int | str | None:
    value = request.get("id")
    if value is None or (isinstance(value, str) and _ID.fullmatch(value)):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    raise _Refused(
        2,
        "Invalid request: request ID must be a signed 64-bit integer, "
        "an alphanumeric string of at most 36 characters, or null",
    )


def _carry_out(connection: Controlled, request: dict[str, Any]) -> Any:
    if "method" not in request:
        raise _Refused(2, "Invalid request: missing field `method` at line 1 column 1")
    method = request["method"]
    if method not in METHODS:
        choices = ", ".join(f"`{name}`" for name in METHODS)
        raise _Refused(2, f"Invalid request: unknown variant `{method}`, expected one of {choices}")
    params = request.get("params", [])
    if not isinstance(params, list):
        raise _Refused(2, "Invalid request: params must be an array")
    if method == "LIST_SUBSCRIPTIONS":
        return list(connection.streams)
    if method in ("SUBSCRIBE", "UNSUBSCRIBE"):
        return _change(connection, method, params)
    return _property(connection, method, params)


def _change(connection: Controlled, method: str, params: list[Any]) -> None:
    for name in params:
        if not isinstance(name, str) or not is_stream_name(name):
            raise _Refused(2, "Invalid request: invalid stream")
    if method == "UNSUBSCRIBE":
        for name in params:
            connection.streams.pop(name, None)
        return
    if len(connection.streams.keys() | set(params)) > MAX_STREAMS:
        raise TooManyStreams
    connection.streams.update(dict.fromkeys(params))


def _property(connection: Controlled, method: str, params: list[Any]) -> bool | None:
    expected = 1 if method == "GET_PROPERTY" else 2
    if len(params) > expected:
        raise _Refused(2, "Invalid request: too many parameters")
    if not params or not isinstance(params[0], str):
        raise _Refused(2, "Invalid request: property name must be a string")
    if params[0] != "combined":
        raise _Refused(0, "Unknown property")
    if expected == 1:
        return connection.combined
    if len(params) < 2 or not isinstance(params[1], bool):
        raise _Refused(1, "Invalid value type: expected Boolean")
    connection.combined = params[1]
    return None


def is_stream_name(name: str) -> bool:
    """Tell whether a name has the shape `<symbol>@<kind>` or `!<kind>@arr`."""
    symbol, _, kind = name.partition("@")
    return bool(symbol and kind) and not any(c.isspace() or c in '"\\' for c in name)
