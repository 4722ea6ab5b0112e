"""The commands `backfill` and `import` as an operator calls them, against a simulated exchange."""

import asyncio
import fcntl
import hashlib
import json
import os
import sys
import termios
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from aiohttp import web
from fill_desk import Desk, desk, rows_of, today_us
from rest_desk import odd_server

from tradecore.backfill.plan import DAY_US
from tradecore.datadir import DataDir
from tradecore.simulate.market import Market
from tradecore.store.embedded import EmbeddedPostgres

BTC, ETH = "BTCUSDT", "ETHUSDT"
DAYS = {"epoch": -3 * 86_400, "rate": 0.2, "first_id": 1000}
LIMIT_S = 100.0


class Result(NamedTuple):
    code: int
    lines: list[dict[str, Any]]
    error: str

    @property
    def summary(self) -> dict[str, Any]:
        return self.lines[-1]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]


async def tradecore(environ: dict[str, str], *arguments: str) -> Result:
    """Run a command as a process; its output lines are JSON, since it is no terminal."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "DATA_DIR")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tradecore",
        *arguments,
        env={**inherited, **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(LIMIT_S):
        out, error = await process.communicate()
    assert process.returncode is not None
    lines = [json.loads(line) for line in out.decode().splitlines()]
    return Result(process.returncode, lines, error.decode())


def iso(time_us: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us)).isoformat()


def csv_of(market: Market, symbol: str, first_id: int, last_id: int) -> str:
    """Trades as the venue's dumps have them, written here without its code."""
    lines = []
    for t in market.trades(symbol, first_id, last_id + 1):
        price, quantity = (f"{v // 10**8}.{v % 10**8:08}" for v in (t.price_e8, t.quantity_e8))
        lines.append(f"{t.trade_id},{price},{quantity},0,{t.trade_us},{t.buyer_is_maker},True\n")
    return "".join(lines)


def zip_of(path: Path, text: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(path.with_suffix(".csv").name, text)
    return path


def with_checksum(path: Path, digest: str | None = None) -> Path:
    digest = digest or hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(f"{path.name}.CHECKSUM").write_text(f"{digest}  {path.name}\n")
    return path


# ---- backfill --------------------------------------------------------------------------------


async def test_backfill_fills_all_holes(migrated_database: str, tmp_path: Path) -> None:
    options = {**DAYS, "rest_keep": 3000, "absent": f"{BTC}=1110-1111"}
    async with desk(migrated_database, tmp_path, **options) as d:
        end = d.market.next_id(BTC, today_us() - 7_200_000_000)
        await d.capture(BTC, (1000, 1100), (1200, 1300), (end, end))
        await d.capture(ETH, (1000, 1000), (1010, 1010))
        result = await tradecore(d.environ, "backfill")
        assert result.code == 0, result
        await d.prove(BTC, 1000, end)
        await d.prove(ETH, 1000, 1010)
        summary = result.summary
        assert summary["event"] == "backfilled"
        assert summary["stored"] == end - 1000 - 101 - 101 - 2 + 9
        assert summary["ids_absent"] == 2
        assert summary["holes_left"] == 0
        again = await tradecore(d.environ, "backfill")
        assert (again.code, again.summary["stored"]) == (0, 0)


async def test_backfill_keeps_to_symbol_and_window(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        for symbol in (BTC, ETH):
            await d.capture(symbol, (1000, 1010), (1100, 1110), (1200, 1210), (1300, 1310))
        low, high = iso(d.market.trade_us(BTC, 1100) + 1), iso(d.market.trade_us(BTC, 1210) - 1)
        result = await tradecore(
            d.environ, "backfill", "--symbol", "btcusdt", "--from", low, "--to", high
        )
        assert result.code == 0, result
        holes = [(h.symbol, h.first_id) for h in await d.store.open_holes()]
        expected = [(BTC, 1011), (BTC, 1211), (ETH, 1011), (ETH, 1111), (ETH, 1211)]
        assert sorted(holes) == expected


async def test_history_page_by_page(migrated_database: str, tmp_path: Path) -> None:
    """Down to the time given, adjoining: no hole opens; then to the first trade of all."""
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, (9000, 9010))
        at_us = d.market.trade_us(BTC, 4321)
        first = d.market.next_id(BTC, at_us - 1)
        arguments = ("backfill", "--symbol", BTC, "--from")
        result = await tradecore(d.environ, *arguments, iso(at_us))
        assert result.code == 0, result
        await d.prove(BTC, first, 9010)
        result = await tradecore(d.environ, *arguments, "1d")
        assert result.code == 0, result
        await d.prove(BTC, 1000, 9010)
        assert await d.gaps(BTC) == []
        (note,) = result.of("note")
        assert "begins at 1000" in note["text"]


async def test_history_by_dumps(migrated_database: str, tmp_path: Path) -> None:
    """A day of many pages comes as one dump; so do days that REST no longer has."""
    options = {**DAYS, "rate": 2, "rest_keep": 100_000, "symbols": BTC}
    async with desk(migrated_database, tmp_path, **options) as d:
        # The first of today: at any hour, all below are of days that are over.
        last = d.market.next_id(BTC, today_us())
        await d.capture(BTC, (last, last + 3))
        result = await tradecore(d.environ, "backfill", "--from", "20d")
        assert result.code == 0, result
        await d.prove(BTC, 1000, last + 3)
        assert await d.gaps(BTC) == []
        assert result.summary["by"]["dump"] > 200_000
        assert result.summary["stored"] == last - 1000


async def test_history_goes_past_days_without_a_dump(
    migrated_database: str, tmp_path: Path
) -> None:
    """As once all dumps of eight days: a hole is shown, and what lies below is fetched."""
    options = {**DAYS, "epoch": -6 * 86_400, "rest_keep": 100, "symbols": BTC}
    async with desk(migrated_database, tmp_path, **options) as d:
        missing = {date_of(today_us() - days * DAY_US) for days in (2, 3, 4)}
        async with dumps_without(d, missing) as url:
            newest = d.market.next_id(BTC, today_us() - DAY_US // 2)
            await d.capture(BTC, (newest, newest + 3))
            environ = {**d.environ, "BINANCE_DUMP_URL": url}
            result = await tradecore(environ, "backfill", "--from", "20d")
        assert result.code == 5, result
        (left,) = result.of("left")
        (hole,) = await d.store.open_holes()
        assert hole.cause == "history"
        assert hole.above_us // DAY_US - hole.below_us // DAY_US == 4
        assert (await d.store.bounds())[BTC].first_id == 1000
        assert left["first_id"] == hole.first_id
        again = await tradecore(d.environ, "backfill", "--from", "20d")
        assert again.code == 0, again
        await d.prove(BTC, 1000, newest + 3)


@pytest.mark.parametrize("source", ["auto", "rest", "dump"])
async def test_a_history_that_ends_too_early_is_told(
    migrated_database: str, tmp_path: Path, source: str
) -> None:
    """The venue's klines count trades before it, or nothing shows that there are none."""
    options = {**DAYS, "rest_keep": 100, "symbols": BTC, "dump_until": "2020-01-01"}
    async with desk(migrated_database, tmp_path, **options) as d:
        newest = d.market.next_id(BTC, today_us())
        await d.capture(BTC, (newest, newest + 3))
        result = await tradecore(d.environ, "backfill", "--from", "2d", "--source", source)
        assert result.code == 5, result
        (note,) = result.of("note")
        assert "nothing older" in note["text"] or "has anything older" in note["text"]


def date_of(time_us: int) -> str:
    return iso(time_us)[:10]


@asynccontextmanager
async def dumps_without(d: Desk, missing: set[str]) -> AsyncIterator[str]:
    """Serve the dumps of the exchange, but not those of some days."""

    async def answer(request: web.Request) -> web.Response:
        if any(day in request.path for day in missing):
            return web.Response(status=404)
        async with (
            aiohttp.ClientSession() as session,
            session.get(d.exchange.rest + request.path) as found,
        ):
            return web.Response(status=found.status, body=await found.read())

    async with odd_server(answer) as odd:
        yield odd.url


async def test_history_with_absent_ids(migrated_database: str, tmp_path: Path) -> None:
    absent = [f"{BTC}=1500-1510", f"{BTC}=2000-2000"]
    async with desk(migrated_database, tmp_path, first_id=1000, absent=absent) as d:
        await d.capture(BTC, (3000, 3010))
        result = await tradecore(d.environ, "backfill", "--from", "1d")
        assert result.code == 0, result
        await d.prove(BTC, 1000, 3010)
        assert [row[:3] for row in await d.gaps(BTC)] == [
            (1500, 1510, "absent"),
            (2000, 2000, "absent"),
        ]


async def test_history_of_another_time_is_not_stored(
    migrated_database: str, tmp_path: Path
) -> None:
    """REST and dumps have later trades under lesser ids: another venue, or a listing anew."""
    async with desk(migrated_database, tmp_path, **{**DAYS, "symbols": BTC}) as d:
        rows = rows_of(d.market, BTC, 6000, 6010, d.symbols.add(BTC))
        rows["trade_us"] -= 10 * DAY_US
        await d.store.write_trades(rows)
        for source, word in (("rest", "BINANCE_REST_URL"), ("dump", "has anything older")):
            result = await tradecore(d.environ, "backfill", "--from", "15d", "--source", source)
            assert result.code == 5, result
            assert word in result.of("note")[0]["text"]
            assert result.summary["stored"] == 0


async def test_what_killed_commands_have_left_is_taken_away(
    migrated_database: str, tmp_path: Path
) -> None:
    """Not what a living one holds, nor what the daemon or an operator has."""
    names = ("backfill-run-dead", "backfill-run-alive", "backfill-run-fresh", "backfill-dumps")
    for name in names:
        (tmp_path / name / "backfill-dumps").mkdir(parents=True)
        (tmp_path / name / "backfill-dumps" / "x.zip").write_bytes(b"x")
        if name != "backfill-run-fresh":
            os.utime(tmp_path / name, (1, 1))
    held = os.open(tmp_path / "backfill-run-alive", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, (1000, 1010))
        assert (await tradecore(d.environ, "backfill")).code == 0
    os.close(held)
    assert sorted(path.name for path in tmp_path.glob("backfill-*")) == sorted(names[1:])


async def test_what_is_left_is_told(migrated_database: str, tmp_path: Path) -> None:
    options = {**DAYS, "rest_keep": 100, "dump_until": "2020-01-01"}
    async with desk(migrated_database, tmp_path, **options) as d:
        await d.capture(BTC, (1000, 1100), (1200, 1300))
        result = await tradecore(d.environ, "backfill")
        assert result.code == 5, result
        (left,) = result.of("left")
        assert (left["symbol"], left["first_id"], left["last_id"]) == (BTC, 1101, 1199)
        assert "nothing older" in left["why"]
        assert "dump" in left["why"]
        only = await tradecore(d.environ, "backfill", "--source", "rest")
        assert only.code == 5
        assert "nothing older" in only.of("left")[0]["why"]


async def test_source_dump_asks_rest_nothing(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, **DAYS) as d:
        await d.capture(BTC, (1000, 1100), (1200, 1300))
        result = await tradecore(d.environ, "backfill", "--source", "dump")
        assert result.code == 0, result
        await d.prove(BTC, 1000, 1300)
        assert result.summary["by"] == {"rest": 0, "dump": 99}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--symbol", "NOPEUSDT"], "NOPEUSDT"),
        (["--symbol", "b@d"], "no symbol"),
        (["--from", "yesterday-ish"], "no time"),
        (["--from", "2026-13-01"], "no time"),
        (["--to", "1969-01-01"], "out of range"),
        (["--from", "2999-01-01"], "out of range"),
        (["--from", "1d", "--to", "2d"], "not before"),
        (["--source", "tape"], "invalid choice"),
    ],
)
async def test_backfill_refuses(
    migrated_database: str, tmp_path: Path, arguments: list[str], word: str
) -> None:
    environ = {"DATABASE_URL": migrated_database, "DATA_DIR": str(tmp_path)}
    result = await tradecore(environ, "backfill", *arguments)
    assert result.code == 2, result
    assert word in result.error
    assert "Traceback" not in result.error


async def test_backfill_without_a_database(tmp_path: Path) -> None:
    result = await tradecore({"DATA_DIR": str(tmp_path)}, "backfill")
    assert result.code == 3
    assert "holds no database" in result.error


async def test_backfill_without_a_venue(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, (1000, 1010), (1100, 1110))
        environ = {**d.environ, "BINANCE_REST_URL": "http://127.0.0.1:9"}
        result = await tradecore(environ, "backfill")
        assert result.code == 5, result
        assert "does not answer" in result.of("left")[0]["why"]


async def test_a_ban_is_remembered_without_a_data_dir(
    migrated_database: str, tmp_path: Path
) -> None:
    """A cron job that asked inside a ban would prolong it."""
    banned = (418, {"Retry-After": "7200"}, b"{}")
    async with (
        desk(migrated_database, tmp_path, first_id=1000) as d,
        odd_server(banned) as odd,
    ):
        await d.capture(BTC, (1000, 1010), (1100, 1110))
        environ = {
            **d.environ,
            "BINANCE_REST_URL": odd.url,
            "DATA_DIR": str(tmp_path / "none" / "yet"),
        }
        for _ in range(2):
            result = await tradecore(environ, "backfill")
            assert result.code == 5, result
            assert "banned" in result.of("left")[0]["why"]
        assert len(odd.asked) == 1


# ---- import ----------------------------------------------------------------------------------


async def imported(d: Desk, *arguments: str | Path) -> Result:
    return await tradecore(d.environ, "import", *map(str, arguments))


async def test_import_of_a_folder(migrated_database: str, tmp_path: Path) -> None:
    """Zips and csvs at any depth, the venue's names only; twice is the same as once."""
    async with desk(migrated_database, tmp_path / "data", first_id=1000) as d:
        folder = tmp_path / "dumps"
        (folder / BTC).mkdir(parents=True)
        text = csv_of(d.market, BTC, 1000, 1999)
        with_checksum(zip_of(folder / BTC / f"{BTC}-trades-2026-01-01.zip", text))
        (folder / f"{BTC}-trades-2026-01-02.csv").write_text(csv_of(d.market, BTC, 2000, 20_000))
        (folder / f"{ETH}-trades-2026-01-02.csv").write_text(csv_of(d.market, ETH, 1500, 1600))
        (folder / f"{BTC}-1m-2026-01-02.csv").write_text("1,2,3\n")
        (folder / "notes.txt").write_text("x")
        result = await imported(d, folder)
        assert result.code == 0, result
        assert len(result.of("file")) == 3
        await d.prove(BTC, 1000, 20_000)
        await d.prove(ETH, 1500, 1600)
        assert await d.gaps(BTC) == []
        assert result.summary["stored"] == 19_001 + 101
        again = await imported(d, folder / BTC, folder)
        assert again.code == 0
        assert (again.summary["stored"], again.summary["duplicate"]) == (0, 19_001 + 101)
        assert len(again.of("file")) == 3, "each file once"


async def test_import_fills_and_opens_holes(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, (1000, 1010), (1100, 1110))
        path = tmp_path / "x.csv"
        path.write_text(csv_of(d.market, BTC, 1005, 1100))
        result = await imported(d, "--symbol", BTC, path)
        assert result.code == 0, result
        await d.prove(BTC, 1000, 1110)
        assert await d.gaps(BTC) == [(1011, 1099, "filled", "dump")]
        path.write_text(csv_of(d.market, BTC, 2000, 2001))
        assert (await imported(d, "--symbol", BTC, path)).code == 0
        (hole,) = await d.store.open_holes()
        assert hole[1:4] == (1111, 1999, "import")


async def test_a_bad_file_does_not_stop_the_others(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path / "data", first_id=1000) as d:
        folder = tmp_path / "dumps"
        folder.mkdir()
        good = csv_of(d.market, BTC, 1000, 1099)
        torn = zip_of(folder / f"{BTC}-trades-2026-01-01.zip", good)
        torn.write_bytes(torn.read_bytes()[:-40])
        wrong = zip_of(folder / f"{BTC}-trades-2026-01-02.zip", good)
        with_checksum(wrong, "0" * 64)
        mute = zip_of(folder / f"{BTC}-trades-2026-01-03.zip", good)
        mute.with_name(f"{mute.name}.CHECKSUM").write_text("what?\n")
        (folder / f"{BTC}-trades-2026-01-04.csv").write_text("1,2\n")
        with_checksum(zip_of(folder / f"{BTC}-trades-2026-01-05.zip", good))
        result = await imported(d, folder)
        assert result.code == 5, result
        errors = [line["error"] for line in result.of("file")]
        assert all(errors[:4])
        assert "SHA-256" in errors[1]
        assert "SHA-256" in errors[2]
        assert errors[4] == ""
        assert (result.summary["failed"], result.summary["stored"]) == (4, 100)
        await d.prove(BTC, 1000, 1099)


async def test_import_refuses(migrated_database: str, tmp_path: Path) -> None:
    environ = {"DATABASE_URL": migrated_database, "DATA_DIR": str(tmp_path / "data")}
    empty = tmp_path / "empty"
    empty.mkdir()
    nameless = tmp_path / "trades.csv"
    nameless.write_text("")
    for arguments, code, word in (
        (["import"], 2, "PATH"),
        (["import", str(tmp_path / "nowhere.zip")], 2, "nowhere.zip"),
        (["import", str(empty)], 2, "no dump in"),
        (["import", "--symbol", "b@d", str(nameless)], 2, "--symbol"),
    ):
        result = await tradecore(environ, *arguments)
        assert result.code == code, result
        assert word in result.error
        assert "Traceback" not in result.error
    result = await tradecore(environ, "import", str(nameless))
    assert result.code == 5, result
    assert "--symbol" in result.of("file")[0]["error"]


# ---- where it is called ----------------------------------------------------------------------


async def test_beside_a_running_daemon(tmp_path: Path, short_dir: Path) -> None:
    """The daemon's own database and DATA_DIR are shared; its server is left running."""
    data_dir = DataDir(short_dir / "data")  # what a daemon holds
    server = EmbeddedPostgres(short_dir / "data")
    dsn = str(await server.start())
    try:
        async with desk(dsn, short_dir / "data", first_id=1000) as d:
            await d.store.open()
            await d.capture(BTC, (3000, 3010), (4000, 4010))
            environ = {name: text for name, text in d.environ.items() if name != "DATABASE_URL"}
            result = await tradecore(environ, "backfill", "--from", "1h")
            assert result.code == 0, result
            await d.prove(BTC, 1000, 4010)
            path = tmp_path / "x.csv"
            path.write_text(csv_of(d.market, BTC, 3000, 5000))
            result = await tradecore(environ, "import", "--symbol", BTC, str(path))
            assert (result.code, result.summary["duplicate"]) == (0, 1011), result
            await d.prove(BTC, 1000, 5000)
            assert server.running
    finally:
        await server.stop()
        data_dir.close()


async def test_import_makes_its_own_database(short_dir: Path) -> None:
    """Without a daemon, a DATABASE_URL and a database: one is made, and stopped again."""
    path = short_dir / f"{BTC}-trades-2026-01-02.csv"
    path.write_text(csv_of(Market(first_id={"*": 1000}), BTC, 1000, 2000))
    environ = {"DATA_DIR": str(short_dir / "data")}
    assert (await tradecore(environ, "import", str(path))).summary["stored"] == 1001
    assert not (short_dir / "data/postgres/cluster/postmaster.pid").exists()
    assert (await tradecore(environ, "import", str(path))).summary["duplicate"] == 1001


async def test_a_terminal_shows_a_bar_and_lines(
    migrated_database: str, tmp_path: Path, terminal: tuple[int, int]
) -> None:
    ours, theirs = terminal
    termios.tcsetwinsize(theirs, (24, 120))
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, (1000, 1010), (3000, 3010))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tradecore", "backfill", env={**os.environ, **d.environ},
            stdout=theirs,
        )  # fmt: skip
        code = await asyncio.wait_for(process.wait(), LIMIT_S)
        text = os.read(ours, 1 << 16).decode()
        assert code == 0, text
        assert "filling" in text
        assert "1,989 trades stored (1,989 by REST, 0 from dumps), 1 holes filled" in text
        os.close(ours)
        os.close(theirs)
