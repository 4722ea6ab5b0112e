"""Answers in gzip, for those who say that they read it."""

import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from aiohttp import hdrs, web

from tradecore.http.accept import choices
from tradecore.http.ration import Making

COMPRESS_FROM_BYTES = 1024

PIECE_BYTES = 65_536
"""Of a large answer: takes half a millisecond to make and to compress."""


class Packed(NamedTuple):
    """A body that is compressed once for all who ask, if it is worth it; 16 KiB take 0.2 ms."""

    body: bytes
    gzipped: bytes | None

    def answer(
        self,
        request: web.Request,
        status: int = 200,
        content_type: str = "application/json",
        vary: str = hdrs.ACCEPT_ENCODING,
    ) -> web.Response:
        """Return what the client reads of the two."""
        headers = {hdrs.CONTENT_TYPE: content_type, hdrs.VARY: vary}
        if self.gzipped is None or not takes_gzip(request):
            return web.Response(body=self.body, status=status, headers=headers)
        headers[hdrs.CONTENT_ENCODING] = "gzip"
        return web.Response(body=self.gzipped, status=status, headers=headers)


def pack(pieces: Iterable[bytes]) -> Making[Packed]:
    """Put a body together and compress it, piece by piece."""
    packer = _gzip_packer(level=1)
    whole: list[bytes] = []
    gzipped: list[bytes] = []
    for piece in pieces:
        whole.append(piece)
        gzipped.append(packer.compress(piece))
        yield
    body = b"".join(whole)
    if len(body) < COMPRESS_FROM_BYTES:
        return Packed(body, None)
    return Packed(body, b"".join([*gzipped, packer.flush()]))


def cut(body: bytes) -> Iterator[bytes]:
    """Cut a body into pieces for `pack`."""
    for at in range(0, len(body), PIECE_BYTES):
        yield body[at : at + PIECE_BYTES]


def gzip(body: bytes, level: int = 1) -> bytes:
    """Return a body in gzip's frame; level 1 is the fastest."""
    packer = _gzip_packer(level)
    return packer.compress(body) + packer.flush()


def _gzip_packer(level: int) -> "zlib._Compress":
    # 16 more than the size of the window asks for gzip's frame.
    return zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS + 16)


def takes_gzip(request: web.Request) -> bool:
    """Tell whether the client reads gzip."""
    encodings = choices(request.headers.get(hdrs.ACCEPT_ENCODING, ""))
    return any(name == "gzip" and weight > 0.0 for name, _, weight in encodings)
