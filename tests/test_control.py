"""Replies in every shape that was seen, and anything else without a crash."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradecore.feed.control import ControlError, Reply, parse_reply

SHAPES = [
    (b'{"result":null,"id":1}', Reply(1)),
    (b'{"id":1,"result":null}', Reply(1)),
    (b'{ "result" : null , "id" : -9223372036854775808 }', Reply(-(2**63))),
    (b'{"result":null,"id":"ab12"}', Reply("ab12")),
    (b'{"result":null,"id":null}', Reply(None)),
    (b'{"result":null}', Reply(None)),
    (b'{"result":true,"id":5}', Reply(5, result=True)),
    (b'{"result":["btcusdt@trade"],"id":3}', Reply(3, result=["btcusdt@trade"])),
    (b'{"result":null,"error":null,"id":3}', Reply(3)),
    (
        b'{"code":2,"msg":"Invalid request: bad","id":7}',
        Reply(7, error=ControlError(2, "Invalid request: bad")),
    ),
    (
        b'{"code":3,"msg":"Invalid JSON: eof","id":null}',
        Reply(None, error=ControlError(3, "Invalid JSON: eof")),
    ),
    (
        b'{"error":{"code":2,"msg":"Invalid request: invalid stream"},"id":1}',
        Reply(1, error=ControlError(2, "Invalid request: invalid stream")),
    ),
    (
        b'{"error":{"msg":"Too many subscriptions","code":4}}',
        Reply(None, error=ControlError(4, "Too many subscriptions")),
    ),
    (b'{"id":1,"error":"no"}', Reply(1, error=ControlError(None, "no"))),
    (b'{"id":true,"error":{}}', Reply(None, error=ControlError(None, "no message"))),
    (
        b'{"id":1.5,"error":{"code":true,"msg":{"a":1}}}',
        Reply(None, error=ControlError(None, "no message")),
    ),
]


@pytest.mark.parametrize(("payload", "reply"), SHAPES)
def test_known_shapes(payload: bytes, reply: Reply) -> None:
    assert parse_reply(payload) == reply


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"null", b"[]", b'"result"', b"{}", b'{"id":1}', b"\xff\xfe", b'{"result":'],
)
def test_anything_else_is_no_reply(payload: bytes) -> None:
    assert parse_reply(payload) is None


def test_deep_nesting_is_no_crash() -> None:
    for depth in (900, 5000):
        parse_reply(b'{"error":{"msg":' + b"[" * depth + b"]" * depth + b"}}")


def test_a_long_message_is_cut() -> None:
    reply = parse_reply(orjson.dumps({"code": 2, "msg": "x" * 10_000, "id": 1}))
    assert reply is not None and reply.error is not None
    assert len(reply.error.message) == 200


def test_streams_of_a_listing() -> None:
    assert Reply(1, result=["a@trade", 7, None, "b@trade"]).streams == ("a@trade", "b@trade")
    assert Reply(1, result=True).streams == ()


@given(st.binary(max_size=200))
def test_never_raises_on_bytes(payload: bytes) -> None:
    parse_reply(payload)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("id", "result", "error", "code", "msg", "x")), inner, max_size=4
        )
    ),
)


@given(JSON)
def test_never_raises_on_json(body: object) -> None:
    reply = parse_reply(orjson.dumps(body))
    if reply is not None:
        assert reply.id is None or type(reply.id) in (int, str)
        str(reply.error)
