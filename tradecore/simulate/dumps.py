"""The daily dumps of trades: zip files with one CSV and a checksum file beside them.

`/data/spot/daily/trades/<SYMBOL>/<SYMBOL>-trades-<YYYY-MM-DD>.zip` and the same name with
`.CHECKSUM`. No header line, times in microseconds from 2025 on and milliseconds before, like the
venue's own files. The market's pure function makes them, so a file never changes.
"""

import asyncio
import io
import zipfile
from collections.abc import Callable
from datetime import date, timedelta
from functools import lru_cache
from hashlib import sha256

from aiohttp import web

from tradecore.simulate.frames import decimal, stamp
from tradecore.simulate.gate import Gate
from tradecore.simulate.options import Options
from tradecore.simulate.summaries import Source

MAX_ROWS = 3_000_000
"""A day with more trades is not served: choose a smaller --rate."""
_MICRO_FROM = date(2025, 1, 1)
_CACHED = 4
_CHUNK = 65_536
_EPOCH = date(1970, 1, 1)


class Dumps:
    """Serves the days that are over."""

    def __init__(
        self, options: Options, source: Source, gate: Gate, now_us: Callable[[], int]
    ) -> None:
        self._options = options
        self._source = source
        self._gate = gate
        self._now_us = now_us
        self._archive = lru_cache(_CACHED)(self._make_archive)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Put the paths of the dumps on a router."""
        router.add_get("/data/spot/daily/trades/{symbol}/{name}", self._answer)

    async def _answer(self, request: web.Request) -> web.Response:
        refusal = await self._gate.enter("dump", 0)
        if isinstance(refusal, web.Response):
            return refusal
        symbol, name = request.match_info["symbol"], request.match_info["name"]
        archive_name = name.removesuffix(".CHECKSUM")
        day = _day_of(symbol, archive_name)
        if day is None or not self._has(symbol, day):
            return web.Response(status=404, text="NoSuchKey")
        first_id, end_id = self._ids(symbol, day)
        if first_id == end_id:
            return web.Response(status=404, text="NoSuchKey")
        if end_id - first_id > MAX_ROWS:
            text = f"{end_id - first_id} trades are too many for a dump: use a smaller --rate"
            return web.Response(status=500, text=text)
        data = await asyncio.to_thread(self._archive, symbol, day)
        if name == archive_name:
            return web.Response(body=data, content_type="application/zip")
        digest = sha256(data + b"x" * self._options.dump_broken_checksum).hexdigest()
        return web.Response(text=f"{digest}  {archive_name}\n")

    def _has(self, symbol: str, day: date) -> bool:
        options = self._options
        if options.strict_symbols and symbol not in options.symbol_list:
            return False
        if options.dump_until and day > date.fromisoformat(options.dump_until):
            return False
        return _start_us(day + timedelta(days=1)) <= self._now_us() and self._source.knows(symbol)

    def _ids(self, symbol: str, day: date) -> tuple[int, int]:
        """Return the first id of a day and the first of the next one."""
        ends = (_start_us(day) - 1, _start_us(day + timedelta(days=1)) - 1)
        first_id, end_id = (self._source.next_id(symbol, at_us) for at_us in ends)
        return first_id, end_id

    def _make_archive(self, symbol: str, day: date) -> bytes:
        micro = day >= _MICRO_FROM
        first_id, end_id = self._ids(symbol, day)
        packed = io.BytesIO()
        name = f"{symbol}-trades-{day}.csv"
        with (
            zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open(zipfile.ZipInfo(name), "w") as file,
        ):
            for start in range(first_id, end_id, _CHUNK):
                lines = [
                    f"{t.trade_id},{decimal(t.price_e8)},{decimal(t.quantity_e8)},"
                    f"{decimal(t.quote_e8)},{stamp(t.trade_us, micro)},{t.buyer_is_maker},True\n"
                    for t in self._source.trades(symbol, start, min(start + _CHUNK, end_id))
                ]
                file.write("".join(lines).encode())
        return packed.getvalue()


def _day_of(symbol: str, name: str) -> date | None:
    prefix, suffix = f"{symbol}-trades-", ".zip"
    if not (name.startswith(prefix) and name.endswith(suffix)):
        return None
    try:
        return date.fromisoformat(name.removeprefix(prefix).removesuffix(suffix))
    except ValueError:
        return None


def _start_us(day: date) -> int:
    return (day - _EPOCH).days * 86_400_000_000
