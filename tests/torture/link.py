"""A link between daemon and PostgreSQL that can be cut at the worst moments.

It listens on a unix socket beside the server's own and reads along with what the daemon says, far
enough to tell a COMMIT and COPY data.
"""

import asyncio
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

PORT = 5432
CUTS = ("before_commit", "after_commit", "in_copy")
"""Cut when the COMMIT came and nothing of it has passed on; when it was answered, and the answer
is thrown away; in the midst of COPY data."""
_READ_BYTES = 1 << 16


class Link:
    """Passes bytes between a folder's socket and the server's; cuts when told."""

    def __init__(self, folder: Path, server_dsn: str) -> None:
        self._folder = folder
        parts = urlsplit(server_dsn)
        self._server_socket = f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.{PORT}"
        query = f"host={quote(str(folder), safe='/')}&port={PORT}"
        self.dsn = parts._replace(query=query).geturl()
        """What the daemon connects to."""
        self.done = dict.fromkeys(CUTS, 0)
        """Cuts so far, by kind."""
        self._armed = dict.fromkeys(CUTS, 0)
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen."""
        self._folder.mkdir()
        path = f"{self._folder}/.s.PGSQL.{PORT}"
        self._server = await asyncio.start_unix_server(self._serve, path)

    async def close(self) -> None:
        """Stop listening and cut everything."""
        if self._server is not None:
            self._server.close()
        self.cut()
        self._flowing.set()

    def cut(self) -> None:
        """Cut all connections at once."""
        for writer in list(self._writers):
            writer.transport.abort()

    def arm(self, kind: str, times: int = 1) -> None:
        """Cut the next so many connections that come to this point."""
        self._armed[kind] += times

    def disarm(self) -> None:
        """Forget what is armed and has not happened."""
        self._armed = dict.fromkeys(CUTS, 0)

    def stall(self) -> None:
        """Let nothing pass in either direction, with all connections open."""
        self._flowing.clear()

    def flow(self) -> None:
        """End a stall."""
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to_server = await asyncio.open_unix_connection(self._server_socket)
        except OSError:
            writer.transport.abort()
            return
        talk = _Talk(self, (reader, writer), to_server)
        self._writers |= {writer, to_server[1]}
        try:
            await talk.run()
        finally:
            self._writers -= {writer, to_server[1]}
            for end in (writer, to_server[1]):
                end.transport.abort()

    def take(self, kind: str) -> bool:
        """Tell whether this connection is to be cut now, and count it."""
        if not self._armed[kind]:
            return False
        self._armed[kind] -= 1
        self.done[kind] += 1
        return True

    async def wait(self) -> None:
        """Wait while the link is stalled."""
        await self._flowing.wait()


_End = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _CutError(Exception):
    """This connection ends here."""


class _Talk:
    """One connection of the daemon with the server."""

    def __init__(self, link: Link, daemon: _End, server: _End) -> None:
        self._link = link
        self._daemon = daemon
        self._server = server
        self._pending = b""
        self._started = False
        self._swallow = False

    async def run(self) -> None:
        """Pass bytes until an end closes or a cut is due."""
        pumps = [asyncio.create_task(self._up()), asyncio.create_task(self._down())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*pumps, return_exceptions=True)

    async def _up(self) -> None:
        while data := await self._daemon[0].read(_READ_BYTES):
            await self._link.wait()
            for kind, text in self._messages(data):
                self._judge(kind, text)
            self._server[1].write(data)
            await self._server[1].drain()

    async def _down(self) -> None:
        while data := await self._server[0].read(_READ_BYTES):
            await self._link.wait()
            if self._swallow:
                raise _CutError
            self._daemon[1].write(data)
            await self._daemon[1].drain()

    def _judge(self, kind: bytes, text: bytes) -> None:
        link = self._link
        if kind == b"d" and link.take("in_copy"):
            raise _CutError
        if kind == b"Q" and text.startswith(b"COMMIT"):
            if link.take("before_commit"):
                raise _CutError
            self._swallow = self._swallow or link.take("after_commit")

    def _messages(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield type and first bytes of each whole message of the daemon."""
        pending = self._pending + data
        while len(pending) > 5:
            if not self._started:
                (size,) = struct.unpack_from("!I", pending)
                head = b""
            else:
                (size,) = struct.unpack_from("!I", pending, 1)
                size, head = size + 1, pending[:1]
            if len(pending) < size:
                break
            if self._started:
                yield head, pending[5:32]
            self._started = True
            pending = pending[size:]
        self._pending = pending
