"""Answers in gzip, for those who say that they read it."""

import asyncio
import zlib

from aiohttp import hdrs, web

from tradecore.http.accept import choices

COMPRESS_FROM_BYTES = 1024
IN_THREAD_FROM_BYTES = 16_384
"""What takes longer than 0.2 ms is done beside the loop."""


async def compress(request: web.Request, response: web.StreamResponse) -> None:
    """Compress an answer that is worth it, if the client takes it and nobody has done so."""
    if not isinstance(response, web.Response) or hdrs.CONTENT_ENCODING in response.headers:
        return
    body = response.body
    if not isinstance(body, bytes) or len(body) < COMPRESS_FROM_BYTES:
        return
    if hdrs.ACCEPT_ENCODING not in response.headers.get(hdrs.VARY, ""):
        response.headers.add(hdrs.VARY, hdrs.ACCEPT_ENCODING)
    if takes_gzip(request):
        is_large = len(body) >= IN_THREAD_FROM_BYTES
        response.body = await asyncio.to_thread(gzip, body) if is_large else gzip(body)
        response.headers[hdrs.CONTENT_ENCODING] = "gzip"


def gzip(body: bytes, level: int = 1) -> bytes:
    """Return a body in gzip's frame; level 1 is the fastest."""
    # 16 more than the size of the window asks for gzip's frame.
    packer = zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS + 16)
    return packer.compress(body) + packer.flush()


def takes_gzip(request: web.Request) -> bool:
    """Tell whether the client reads gzip."""
    encodings = choices(request.headers.get(hdrs.ACCEPT_ENCODING, ""))
    return any(name == "gzip" and weight > 0.0 for name, _, weight in encodings)
