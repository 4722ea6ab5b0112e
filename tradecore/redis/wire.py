"""One connection to Redis: commands out, their replies back, every wait with a limit.

An own writer of the protocol instead of a library: what is needed of it is this page, the values of
a batch come ready for the wire from C, and the library would add 7 MB to a daemon of 64.
"""

import asyncio
import ssl
from collections.abc import Sequence

from tradecore.redis.address import Address
from tradecore.tls import tls_context

OPEN_LIMIT_S = 3.0
ANSWER_LIMIT_S = 2.0
_REPLY_MAX_BYTES = 1 << 16

REASONS = (
    "unreachable",
    "tls",
    "timeout",
    "closed",
    "protocol",
    "auth",
    "readonly",
    "memory",
    "refused",
)
"""Why Redis could not be used, as a label for metrics."""

_REFUSALS = (
    ("NOAUTH", "auth", "give user and password in REDIS_URL"),
    ("WRONGPASS", "auth", "correct user and password in REDIS_URL"),
    ("AUTH", "auth", "it has no password: take it out of REDIS_URL"),
    ("NOPERM", "auth", "give the user ~tradecore:* &tradecore:* +@all -@dangerous"),
    ("READONLY", "readonly", "it is a replica: name the primary in REDIS_URL"),
    ("OOM", "memory", "raise its maxmemory, or set a smaller REDIS_TRADES"),
    ("MOVED", "refused", "it is a part of a cluster: name the node that the error names"),
    ("LOADING", "refused", "it is starting; wait"),
)
"""What an error of Redis has in it, the reason, and what to do; the first that fits."""

Reply = bytes | int | None


class RedisError(Exception):
    """Redis cannot be used at this moment; `reason` is one of REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


def bulk(text: bytes) -> bytes:
    """Return a text as a bulk string of the protocol."""
    return b"$%d\r\n%b\r\n" % (len(text), text)


def command(*words: bytes | str | int) -> bytes:
    """Return a command in the protocol."""
    texts = (word if isinstance(word, bytes) else str(word).encode() for word in words)
    return b"*%d\r\n%b" % (len(words), b"".join(map(bulk, texts)))


class Wire:
    """An open connection that is logged in; made by `open`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, address: Address) -> "Wire":
        """Connect and log in, for OPEN_LIMIT_S at most. Raises RedisError."""
        try:
            async with asyncio.timeout(OPEN_LIMIT_S):
                if address.path:
                    streams = await asyncio.open_unix_connection(
                        address.path, limit=_REPLY_MAX_BYTES
                    )
                else:
                    streams = await asyncio.open_connection(
                        address.host,
                        address.port,
                        limit=_REPLY_MAX_BYTES,
                        ssl=tls_context() if address.tls else None,
                    )
        except TimeoutError:
            raise RedisError("timeout", f"no connection within {OPEN_LIMIT_S:.0f} s") from None
        except ssl.SSLError as error:
            raise RedisError("tls", f"no TLS: {error}") from error
        except (OSError, UnicodeError) as error:
            raise RedisError("unreachable", str(error)) from error
        wire = cls(*streams)
        try:
            await wire._log_in(address)
        except BaseException:
            wire.close()
            raise
        return wire

    async def _log_in(self, address: Address) -> None:
        commands = []
        if address.password is not None:
            user = (address.user,) if address.user else ()
            commands.append(command("AUTH", *user, address.password.reveal()))
        commands.append(command("SELECT", address.database))
        await self.call(commands)

    async def call(self, commands: Sequence[bytes]) -> list[Reply]:
        """Send commands and return their replies, within ANSWER_LIMIT_S.

        Raises RedisError, also when Redis refuses one of them; the connection is of no use then.
        """
        if self._writer.is_closing():  # uvloop would call a write to it a bug of ours
            raise RedisError("closed", "the connection was closed")
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                self._writer.write(b"".join(commands))
                await self._writer.drain()
                return [await self._reply() for _ in commands]
        except TimeoutError:
            raise RedisError("timeout", f"no answer within {ANSWER_LIMIT_S:.0f} s") from None
        except (OSError, asyncio.IncompleteReadError) as error:
            raise RedisError("closed", f"the connection was closed: {error}") from error

    async def _reply(self) -> Reply:
        try:
            line = await self._reader.readline()
        except ValueError:  # longer than any line of the protocol that we ask for
            raise RedisError("protocol", "what answers is no Redis: a line without end") from None
        kind, text = line[:1], line[1:-2]
        if not line.endswith(b"\n") and kind in b"+-:$":  # or nothing at all
            raise RedisError("closed", "the connection was closed")
        if not line.endswith(b"\r\n"):
            raise _no_redis(line)
        if kind == b"+":
            return text
        if kind == b"-":
            raise _refusal(text.decode(errors="backslashreplace"))
        try:
            number = int(text)
        except ValueError:
            raise _no_redis(line) from None
        if kind == b":":
            return number
        if kind == b"$" and number == -1:
            return None
        if kind == b"$" and 0 <= number <= _REPLY_MAX_BYTES:
            return (await self._reader.readexactly(number + 2))[:-2]
        raise _no_redis(line)

    def close(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()


def _refusal(text: str) -> RedisError:
    for word, reason, mend in _REFUSALS:
        if word in text:
            return RedisError(reason, f"{text[:200]}; {mend}")
    return RedisError("refused", text[:200])


def _no_redis(line: bytes) -> RedisError:
    head = line[:60].decode(errors="backslashreplace")
    return RedisError("protocol", f"what answers is no Redis: {head!r}")
