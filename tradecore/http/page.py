"""The page at /: what is captured now, for people to look at.

Its files are in the folder beside this one, as they are served: plain HTML, CSS and JavaScript
modules, and a chart library with its licence. They are read with the first request, so a daemon
that nobody looks at pays nothing.
"""

import asyncio
import hashlib
from pathlib import Path
from typing import NamedTuple

from aiohttp import hdrs, web

from tradecore.http.compression import gzip, takes_gzip

FOLDER = Path(__file__).parent / "page"

INDEX = "index.html"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Own files only, and no text ever becomes a script.

The chart library styles its elements by CSSOM, which style-src allows; what it would have needed
'unsafe-inline' and innerHTML for is its logo alone, which is off: the page's foot has the link that
its NOTICE asks for.
"""

_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
_NEVER_CHANGES = "lightweight-charts-"
"""Files whose name has their version: kept for a year and not asked for again."""


class _File(NamedTuple):
    body: bytes
    gzipped: bytes
    digest: str
    content_type: str
    cache_control: str


class Page:
    """Serves the page and its files; `index` and `accept` are the handlers."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._files: dict[str, _File] = {}
        self._reading = asyncio.Lock()

    async def index(self, request: web.Request) -> web.Response:
        """Answer /."""
        return await self._answer(request, INDEX)

    async def accept(self, request: web.Request) -> web.Response:
        """Answer /page/<name>."""
        return await self._answer(request, request.match_info["name"])

    async def _answer(self, request: web.Request, name: str) -> web.Response:
        async with self._reading:
            if not self._files:
                self._files = await asyncio.to_thread(_read, self._folder)
        file = self._files.get(name)
        if file is None:
            raise web.HTTPNotFound
        headers = {
            hdrs.CACHE_CONTROL: file.cache_control,
            hdrs.CONTENT_SECURITY_POLICY: POLICY,
            hdrs.ETAG: f'W/"{file.digest}"',
            hdrs.VARY: hdrs.ACCEPT_ENCODING,
        }
        if any(tag.value in ("*", file.digest) for tag in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        headers[hdrs.CONTENT_TYPE] = file.content_type
        body = file.body
        if takes_gzip(request):
            headers[hdrs.CONTENT_ENCODING] = "gzip"
            body = file.gzipped
        return web.Response(body=body, headers=headers)


def _read(folder: Path) -> dict[str, _File]:
    return {path.name: _file(path) for path in sorted(folder.iterdir()) if path.suffix in _TYPES}


def _file(path: Path) -> _File:
    body = path.read_bytes()
    settled = path.name.startswith(_NEVER_CHANGES)
    return _File(
        body,
        gzip(body, level=9),
        hashlib.blake2b(body, digest_size=16).hexdigest(),
        f"{_TYPES[path.suffix]}; charset=utf-8",
        "max-age=31536000, immutable" if settled else "no-cache",
    )
