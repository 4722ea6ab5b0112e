"""`tradecore check` against a venue, a database and folders that are right or wrong."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.redis_desk import needs_redis, redis_server
from tradecore import check, clock, errors
from tradecore.check import Finding
from tradecore.checks.finding import judge_clock
from tradecore.datadir import DataDir
from tradecore.settings import Settings, load
from tradecore.values import Secret
from tradecore.venue_clock import Sample, offset_of

MS = 10**6


class Venue:
    """What the exchange says; tests change it."""

    def __init__(self) -> None:
        self.ahead_ms = 0
        self.asked = 0
        self.states = {"BTCUSDT": "TRADING", "ETHUSDT": "TRADING", "LUNAUSDT": "BREAK"}
        self.status = 200
        self.body = b""
        self.refuses = 0
        """HTTP status instead of a connection, 0 = none."""
        self.upgrades = 0
        self.server = TestServer(self._app())

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/v3/time", self._time)
        app.router.add_get("/api/v3/exchangeInfo", self._info)
        app.router.add_get("/stream", self._stream)
        return app

    async def _time(self, _: web.Request) -> web.Response:
        self.asked += 1
        if self.status != 200 or self.body:
            return web.Response(status=self.status, body=self.body)
        return web.json_response({"serverTime": clock.wall_ns() // MS + self.ahead_ms})

    async def _info(self, _: web.Request) -> web.Response:
        symbols = [{"symbol": name, "status": state} for name, state in self.states.items()]
        return web.json_response({"symbols": symbols})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        self.upgrades += 1
        if self.refuses:
            return web.Response(status=self.refuses)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for _ in socket:
            pass
        return socket


@pytest.fixture
async def venue() -> AsyncIterator[Venue]:
    venue = Venue()
    await venue.server.start_server()
    yield venue
    await venue.server.close()


@pytest.fixture
def settings(venue: Venue, tmp_path: Path) -> Settings:
    """Right in all, but that the database is the embedded one that nobody has made."""
    return load(
        {
            "BINANCE_REST_URL": f"http://{venue.address}",
            "BINANCE_WEBSOCKET_URL": f"ws://{venue.address}/ws",
            "SUPPORTED_SYMBOLS": "BTCUSDT,ETHUSDT",
            "DATA_DIR": str(tmp_path / "data"),
            "RING_CAPACITY": "1Ki",
            "HTTP_PORT": "0",
        }
    )


async def findings(settings: Settings) -> list[Finding]:
    return [finding async for finding in check.find(settings)]


def about(found: list[Finding], what: str) -> list[Finding]:
    return [finding for finding in found if finding.what == what]


async def test_all_is_well(
    settings: Settings, migrated_database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await check.run(replace(settings, database_url=Secret(migrated_database))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"ok"}
    whats = [line.split()[1] for line in lines]
    assert whats == [
        *("settings", "folder", "disk", "ring", "database", "schema", "retention", "clock"),
        *("venue", "clock", "symbols", "venue"),
    ]
    text = "\n".join(lines)
    assert "1 s at 1,000 trades/s" in text and "time zone UTC" in text and "edition plain" in text
    assert not settings.data_dir.exists(), "a check makes nothing"


def test_wrong_settings_are_told_like_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.SettingsError(["A is wrong", "B is wrong"])
    assert check.refuse(error) == errors.EXIT_USAGE
    assert capsys.readouterr().out == "fail  settings  A is wrong\nfail  settings  B is wrong\n"


async def test_who_may_ask_the_side_server(settings: Settings) -> None:
    token = Secret("x" * 20)
    for changes, words in (
        ({}, "HTTP_TOKEN is not set: only probes and /metrics are served; set HTTP_TOKEN, or"),
        ({"http_auth": "off"}, "serves everything to everyone who reaches it (HTTP_AUTH=off)"),
        ({"http_token": token}, None),
        ({"http_host": "127.0.0.9"}, None),
    ):
        found = await findings(replace(settings, **{"http_host": "0.0.0.0", **changes}))
        assert [(one.grade, words in one.text) for one in about(found, "http")] == (
            [("warn", True)] if words else []
        )


async def test_a_port_that_another_program_has(settings: Settings, venue: Venue) -> None:
    assert venue.server.port is not None
    taken = replace(settings, http_port=venue.server.port)
    (found,) = about(await findings(taken), "http")
    assert (found.grade, found.exit_code) == ("fail", errors.EXIT_USAGE)
    assert f"HTTP_PORT {venue.server.port} on 127.0.0.1 is taken" in found.text
    folder = DataDir(settings.data_dir)
    try:
        (found,) = about(await findings(taken), "http")
    finally:
        folder.close()
    assert (found.grade, found.exit_code) == ("warn", 0)


@needs_redis
async def test_redis(settings: Settings, short_dir: Path) -> None:
    async with redis_server(short_dir) as redis:
        for words, url, grade, says in (
            ("PING", redis.url, "ok", "takes values"),
            ("PING", redis.url.replace("//", "//:hunter2@"), "warn", "take it out of REDIS_URL"),
            ("CONFIG SET maxmemory 1", redis.url, "warn", "raise its maxmemory"),
            ("REPLICAOF 127.0.0.1 1", redis.url, "warn", "name the primary in REDIS_URL"),
        ):
            await redis.cli(*words.split())
            (found,) = about(await findings(replace(settings, redis_url=Secret(url))), "redis")
            assert found.grade == grade and says in found.text, found
            assert found.exit_code == 0 and "hunter2" not in found.text
    (found,) = about(await findings(replace(settings, redis_url=Secret(redis.url))), "redis")
    assert found.grade == "warn" and "takes no values" in found.text


# -- folder, disk, ring ---------------------------------------------------------------------------


async def test_a_folder_that_another_daemon_has(settings: Settings) -> None:
    folder = DataDir(settings.data_dir)
    try:
        (found,) = about(await findings(settings), "folder")
    finally:
        folder.close()
    assert found.grade == "warn" and "used by a running tradecore (process " in found.text
    (found,) = about(await findings(settings), "folder")
    assert found.grade == "ok" and "can be written" in found.text


async def test_a_folder_that_is_a_file(settings: Settings) -> None:
    settings.data_dir.write_text("")
    found = await findings(settings)
    assert about(found, "folder")[0].grade == "fail"
    assert about(found, "folder")[0].exit_code == errors.EXIT_DATA_DIR
    assert about(found, "disk") == []


async def test_a_disk_without_room_for_the_ring(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 300 << 20

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    (found,) = about(await findings(settings), "disk")
    assert found.grade == "warn", "the ring fits, the embedded database may not for long"
    (found,) = about(await findings(replace(settings, ring_capacity=1 << 23)), "disk")
    assert found.grade == "fail" and found.exit_code == errors.EXIT_DATA_DIR
    assert found.text == "0.3 GiB free" and "free 512 MiB" in found.mend


# -- database -------------------------------------------------------------------------------------


async def test_a_schema_that_is_behind(settings: Settings, database: str) -> None:
    found = await findings(replace(settings, database_url=Secret(database)))
    (schema,) = about(found, "schema")
    assert schema.grade == "warn" and "pending" in schema.text and "AUTO_MIGRATE" in schema.mend


async def test_a_schema_that_is_newer(
    settings: Settings, connection: asyncpg.Connection, migrated_database: str
) -> None:
    await connection.execute(
        "INSERT INTO schema_migrations (version, name, checksum) VALUES (999, '999_later', 'x')"
    )
    found = await findings(replace(settings, database_url=Secret(migrated_database)))
    (schema,) = about(found, "schema")
    assert schema.grade == "fail" and "run a newer tradecore" in schema.text
    assert schema.exit_code == errors.EXIT_DATABASE


async def test_a_missing_right(
    settings: Settings, connection: asyncpg.Connection, migrated_database: str
) -> None:
    await connection.execute("ALTER ROLE CURRENT_USER SET default_transaction_read_only = on")
    try:
        found = await findings(replace(settings, database_url=Secret(migrated_database)))
    finally:
        await connection.execute("ALTER ROLE CURRENT_USER RESET default_transaction_read_only")
    assert [f.exit_code for f in found if "read_only" in f.text] == [errors.EXIT_DATABASE]


async def test_a_database_that_is_down(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    down = replace(settings, database_url=Secret("postgresql://u:hunter2@127.0.0.1:1/d"))
    assert await check.run(down) == errors.EXIT_DATABASE
    out = capsys.readouterr().out
    assert "fail  database  the database cannot be reached" in out and "hunter2" not in out
    assert "ok    venue" in out, "the rest is tested all the same"


async def test_an_embedded_database_that_is_there(settings: Settings, short_dir: Path) -> None:
    from tradecore.store.embedded import EmbeddedPostgres

    server = EmbeddedPostgres(short_dir, settings={"fsync": "off"})
    await server.start()
    await server.stop()
    found = await findings(replace(settings, data_dir=short_dir))
    first, second = about(found, "database")
    assert "is there" in first.text and second.text.startswith("PostgreSQL ")
    assert not (short_dir / "postgres" / "cluster" / "postmaster.pid").exists()


# -- clock ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "grade", "text"),
    [
        ([(0, 0, 0)], "ok", "+0.0 ms against the venue's, give or take 0.0"),
        ([(100, -100, 100)], "ok", "+150.0 ms against the venue's, give or take 50.0"),
        ([(200, 400, 200)], "ok", "-300.0 ms against the venue's, give or take 100.0"),
        ([(0, 900, 0), (90, 0, 90)], "warn", "-900.0 ms"),
        ([(2, -300, 2)], "warn", "+301.0 ms against the venue's, give or take 1.0"),
    ],
)
def test_the_fastest_sample_tells_the_offset(
    samples: list[tuple[int, int, int]], grade: str, text: str
) -> None:
    """Samples in milliseconds: how long, their time, our time at the answer."""
    taken = [Sample(*(MS * number for number in one)) for one in samples]
    found = judge_clock("venue", offset_of(taken, 0.0))
    assert found.grade == grade and text in found.text


async def test_a_clock_that_is_wrong(settings: Settings, venue: Venue) -> None:
    venue.ahead_ms = 5000
    (found,) = about(await findings(settings), "clock")
    assert found.grade == "warn" and "NTP" in found.mend
    offset = float(found.text.split()[3])
    assert -5100 < offset < -4900


# -- venue ----------------------------------------------------------------------------------------


async def test_symbols(settings: Settings) -> None:
    wrong = replace(settings, symbols=("BTCUSDT", "ETHUSD", "LUNAUSDT", "币安人生USDT"))
    assert about(await findings(wrong), "symbols") == [
        Finding(
            "fail",
            "symbols",
            "ETHUSD is not listed at the venue",
            "correct SUPPORTED_SYMBOLS, did you mean ETHUSDT?",
            errors.EXIT_USAGE,
        ),
        Finding("warn", "symbols", "LUNAUSDT is not trading now (BREAK)"),
        Finding(
            "fail",
            "symbols",
            "币安人生USDT is not listed at the venue",
            "correct SUPPORTED_SYMBOLS",
            errors.EXIT_USAGE,
        ),
    ]


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (451, b"", "it does not serve this country"),
        (418, b"", "this address is banned"),
        (500, b"oops", "HTTP 500, oops"),
        (302, b"", "HTTP 302"),
        (200, b"<html>", "does not answer as the venue does"),
        (200, json.dumps({"time": 5}).encode(), "does not answer as the venue does"),
        (200, b"[]", "does not answer as the venue does"),
    ],
)
async def test_a_venue_that_refuses(
    settings: Settings, venue: Venue, status: int, body: bytes, text: str
) -> None:
    venue.status, venue.body = status, body
    rest, websocket = about(await findings(settings), "venue")
    assert rest.grade == "fail" and text in rest.text
    assert rest.exit_code == errors.EXIT_VENUE
    assert websocket.grade == "ok"


async def test_a_venue_that_is_not_there(settings: Settings, venue: Venue) -> None:
    await venue.server.close()
    found = about(await findings(settings), "venue")
    assert [finding.grade for finding in found] == ["fail", "fail"]
    assert "BINANCE_REST_URL" in found[0].text and "BINANCE_WEBSOCKET_URL" in found[1].mend


async def test_a_venue_that_has_banned_us_is_not_asked(settings: Settings, venue: Venue) -> None:
    venue.status = 418
    for text in ("this address is banned", "it is not asked for another"):
        rest, _ = about(await findings(settings), "venue")
        assert rest.grade == "fail" and text in rest.text
    assert venue.asked == 1


async def test_streams_that_have_banned_us_are_not_asked(settings: Settings, venue: Venue) -> None:
    venue.refuses = 418
    for text in ("HTTP 418", "is not asked for a connection for another 121 s"):
        _, websocket = about(await findings(settings), "venue")
        assert websocket.grade == "fail" and text in websocket.text
    assert venue.upgrades == 1


async def test_two_lines_over_one_host_are_hardly_two(settings: Settings, venue: Venue) -> None:
    (url,) = settings.websocket_urls
    two = replace(settings, feed_lines=2)
    assert about(await findings(two), "venue")[-1].text == (
        "both lines go over 127.0.0.1 and fail together"
    )
    other = url.replace("127.0.0.1", "localhost")
    for fine in (settings, replace(two, websocket_urls=(url, other))):
        assert "fail together" not in str(await findings(fine))


async def test_a_venue_without_streams(settings: Settings) -> None:
    wrong = replace(settings, websocket_urls=(settings.websocket_urls[0] + "/nothing",))
    found = about(await findings(wrong), "venue")
    assert [finding.grade for finding in found] == ["ok", "fail"]
    assert found[1].exit_code == errors.EXIT_VENUE


async def test_a_reader_that_goes_hears_no_more(
    settings: Settings, venue: Venue, migrated_database: str
) -> None:
    """As `tradecore check | head -4`: while the database is open."""
    process = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m tradecore check | head -4",
        env={
            **os.environ,
            "DATABASE_URL": migrated_database,
            "DATA_DIR": str(settings.data_dir),
            "HTTP_PORT": "0",
            "BINANCE_REST_URL": f"http://{venue.address}",
            "BINANCE_WEBSOCKET_URL": f"ws://{venue.address}/ws",
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors_ = await asyncio.wait_for(process.communicate(), 60)
    assert (len(output.splitlines()), errors_) == (4, b"")
