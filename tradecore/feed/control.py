"""The venue's replies to control requests, in every shape seen on the wire.

Documented: `{"result":null,"id":1}`, `{"result":[...],"id":3}`, `{"code":2,"msg":"..","id":1}`.
Observed as well: `{"error":{"code":2,"msg":".."},"id":1}`, with `id` null or absent when the
request could not be read.
"""

from dataclasses import dataclass

import orjson

INVALID_REQUEST = 2
"""The venue's code for a request it understands and refuses, such as an unknown stream."""

_MAX_MESSAGE_CHARS = 200


@dataclass(frozen=True, slots=True)
class ControlError:
    """What the venue did not like; `code` is None when it gave none."""

    code: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.message} (code {self.code})"


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply: an error, or a result (None for SUBSCRIBE). `id` None answers nobody by name."""

    id: int | str | None
    result: object = None
    error: ControlError | None = None

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that LIST_SUBSCRIPTIONS named; empty for any other result."""
        if not isinstance(self.result, list):
            return ()
        return tuple(name for name in self.result if isinstance(name, str))


def parse_reply(payload: bytes) -> Reply | None:
    """Read a control reply; None for anything that is none. Never raises."""
    try:
        body = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(body, dict):
        return None
    request_id = body.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, int | str):
        request_id = None
    if body.get("error") is not None:
        return Reply(request_id, error=_error(body["error"]))
    if "code" in body or "msg" in body:
        return Reply(request_id, error=_error(body))
    if "result" in body:
        return Reply(request_id, result=body["result"])
    return None


def _error(body: object) -> ControlError:
    fields = body if isinstance(body, dict) else {"msg": body}
    code, message = fields.get("code"), fields.get("msg")
    return ControlError(
        code if isinstance(code, int) and not isinstance(code, bool) else None,
        message[:_MAX_MESSAGE_CHARS] if isinstance(message, str) else "no message",
    )
