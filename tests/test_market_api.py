"""The venue's REST paths and our own, through a real server and a real database."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import asyncpg
import market_oracle as oracle
import pytest
from market_oracle import DAY_US, MINUTE_US
from snapshots import HEALTHY
from store_desk import Database, trades
from test_queries import BUSY, FIRST_US, ONCE, RARE, Desk, make_candles, market

from tradecore.clock import wall_ns
from tradecore.errors import TransientStoreError
from tradecore.http import answers, parameters, venue_errors, weights
from tradecore.http.access import Policy
from tradecore.http.api import Api
from tradecore.http.instruments import assets
from tradecore.http.market import NOT_RECORDED
from tradecore.http.server import SideServer
from tradecore.store import reader
from tradecore.store.embedded import EmbeddedPostgres
from tradecore.store.migrate import migrate
from tradecore.store.reader import Reader

FRESH = "NEWUSDT"
"""Captured, and nothing of it is stored yet."""
CAPTURED = (BUSY, RARE, ONCE, FRESH)
PAGE = "https://page.example:8443"


class Client:
    """Asks one server."""

    def __init__(self, server: SideServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    async def get(self, path: str, method: str = "GET", **headers: str) -> tuple[Any, bytes]:
        """Return response and body; `path` goes out as it is, `a_b` is the header a-b."""
        from yarl import URL

        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        url = URL(f"http://127.0.0.1:{self.server.port}{path}", encoded=True)
        async with self.session.request(method, url, headers=sent) as response:
            return response, await response.read()

    async def json(self, path: str, **headers: str) -> Any:
        response, body = await self.get(path, **headers)
        assert response.status == 200, body
        assert response.content_type == "application/json"
        return json.loads(body)

    async def refused(self, path: str, **headers: str) -> tuple[int, int, str]:
        response, body = await self.get(path, **headers)
        error = json.loads(body)
        assert set(error) == {"code", "msg"}, error
        return response.status, error["code"], error["msg"]


@asynccontextmanager
async def serving(dsn: Any, origins: tuple[str, ...] = ()) -> AsyncIterator[Client]:
    api = Api(dsn, lambda: CAPTURED, lambda: HEALTHY)
    server = SideServer(
        "127.0.0.1", 0, lambda: HEALTHY, api=api, policy=Policy(cors_origins=origins)
    )
    await server.start()
    try:
        async with aiohttp.ClientSession(
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
            connector=aiohttp.TCPConnector(limit=24),
        ) as session:
            yield Client(server, session)
    finally:
        await server.stop()


@pytest.fixture
async def desk(db: Database) -> AsyncIterator[Desk]:
    await db.sink.write_trades(trades(*market()))
    read = Reader(lambda: db.dsn)
    one = Desk(db, read)
    await make_candles(one)
    yield one
    await read.close()


@pytest.fixture
async def client(desk: Desk) -> AsyncIterator[Client]:
    async with serving(lambda: desk.db.dsn, (PAGE,)) as client:
        yield client


@pytest.fixture
async def small(db: Database) -> AsyncIterator[Client]:
    """A server with one trade."""
    await db.sink.write_trades(trades(market()[0]))
    async with serving(lambda: db.dsn) as client:
        yield client


# --- what is right ----------------------------------------------------------------------------


async def test_ping_and_time(client: Client) -> None:
    assert await client.json("/api/v3/ping") == {}
    for unit, divisor in (("", 10**6), ("MICROSECOND", 10**3), ("microsecond", 10**3)):
        headers = {"X_MBX_TIME_UNIT": unit} if unit else {}
        now = (await client.json("/api/v3/time", **headers))["serverTime"]
        assert abs(now - wall_ns() // divisor) < 5 * 10**9 // divisor


async def test_klines(client: Client, desk: Desk) -> None:
    rows = await desk.rows(BUSY)
    for path in ("klines", "uiKlines"):
        url = f"/api/v3/{path}?symbol={BUSY}&interval=1m"
        assert await client.json(url) == oracle.klines(rows, "1m", limit=500)
        assert await client.json(f"{url}&limit=5") == oracle.klines(rows, "1m", limit=5)
        assert await client.json(f"{url}&limit=99999") == oracle.klines(rows, "1m", limit=1000)
    url = f"/api/v3/klines?symbol={BUSY}&interval=12h&limit=1000"
    assert await client.json(url, X_MBX_TIME_UNIT="MICROSECOND") == oracle.klines(
        rows, "12h", limit=1000, micro=True
    )
    start_us, end_us = FIRST_US + 3 * DAY_US + 1, FIRST_US + 20 * DAY_US
    wanted = oracle.klines(rows, "12h", start_us=start_us, end_us=end_us)
    for unit in (1, 1000):
        bounds = f"&startTime={-(-start_us // unit)}&endTime={end_us // unit}"
        assert await client.json(url + bounds) == wanted
    for zone, minutes in (("8", 480), ("-1:00", -60), ("05:45", 345), ("%2B14:00", 840), ("0", 0)):
        wanted = oracle.klines(rows, "12h", limit=1000, zone_us=minutes * MINUTE_US)
        assert await client.json(f"{url}&timeZone={zone}") == wanted
    assert await client.json(f"{url}&startTime=99999999999999") == []
    assert await client.json(f"{url}&endTime=0") == []


@pytest.mark.parametrize("interval", ["1m", "3m", "1d", "1w", "1M"])
async def test_absurd_ranges_are_empty(small: Client, interval: str) -> None:
    url = f"/api/v3/klines?symbol={BUSY}&interval={interval}"
    far = str(2**63 // 1000 - 1)
    for bounds in (f"startTime={far}", f"startTime={far}&endTime={far}", "startTime=0&endTime=0"):
        for zone in ("0", "14:00", "-12:00"):
            assert await small.json(f"{url}&{bounds}&timeZone={zone}") == []
    everything = await small.json(f"{url}&startTime=0&endTime={far}")
    assert len(everything) == len(await small.json(f"{url}&endTime={far}"))


async def test_trades(client: Client, desk: Desk) -> None:
    wanted = oracle.trades(await desk.rows(BUSY))
    url = f"/api/v3/trades?symbol={BUSY}"
    assert await client.json(url) == wanted[-500:]
    assert await client.json(f"{url}&limit=7") == wanted[-7:]
    assert await client.json(f"{url}&limit=5000") == wanted[-1000:]
    url = f"/api/v3/historicalTrades?symbol={BUSY}"
    assert await client.json(url) == wanted[-500:]
    assert await client.json(f"{url}&fromId=5100&limit=3") == wanted[100:103]
    assert await client.json(f"{url}&fromId=1&limit=3") == wanted[:3]
    assert await client.json(f"{url}&fromId=9999999") == []
    micro = await client.json(f"{url}&limit=2", X_MBX_TIME_UNIT="MICROSECOND")
    assert micro == oracle.trades((await desk.rows(BUSY))[-2:], micro=True)


async def test_pages_of_history_are_the_whole_history(client: Client, desk: Desk) -> None:
    wanted = oracle.trades(await desk.rows(BUSY))
    found: list[Any] = []
    while page := await client.json(
        f"/api/v3/historicalTrades?symbol={BUSY}&limit=400&fromId="
        f"{found[-1]['id'] + 1 if found else 0}"
    ):
        found += page
    assert found == wanted
    klines: list[Any] = []
    url = f"/api/v3/klines?symbol={BUSY}&interval=5m&limit=100&startTime="
    while page := await client.json(f"{url}{klines[-1][6] + 1 if klines else 0}"):
        klines += page
    assert klines == oracle.klines(await desk.rows(BUSY), "5m", limit=10_000)


async def test_prices(client: Client, desk: Desk) -> None:
    last = {one: oracle.eight((await desk.rows(one))[-1]["price"]) for one in (BUSY, RARE, ONCE)}
    listed = [{"symbol": symbol, "price": price} for symbol, price in last.items()]
    assert await client.json("/api/v3/ticker/price") == listed
    assert await client.json(f"/api/v3/ticker/price?symbol={BUSY}") == listed[0]
    quoted = f"%5B%22{RARE}%22%2C%22{BUSY}%22%5D"
    for symbols in (f'["{RARE}","{BUSY}"]', quoted, f"%5b%22{RARE}%22,%22{BUSY}%22%5d"):
        assert await client.json(f"/api/v3/ticker/price?symbols={symbols}") == [
            listed[1],
            listed[0],
        ]


async def test_tickers(client: Client, desk: Desk) -> None:
    from test_queries import at

    from tradecore.store.partitions import Partitions

    now_us = wall_ns() // 1000
    await Partitions().ensure(desk.db.conn, "tickers", [at(now_us).date()])
    await desk.db.conn.execute(
        "INSERT INTO tickers (timestamp, symbol, event_time, last_price, open_time, close_time,"
        " first_id, last_id, trade_count) VALUES ($1, $2, $1, 7.5, $1, $1, 1, 2, 2)",
        *(at(now_us), BUSY),
    )
    one = await client.json(f"/api/v3/ticker/24hr?symbol={BUSY}")
    assert (one["symbol"], one["lastPrice"], one["count"]) == (BUSY, "7.50000000", 2)
    assert one["closeTime"] == now_us // 1000
    assert await client.json("/api/v3/ticker/24hr") == [one]
    mini = await client.json(f'/api/v3/ticker/24hr?symbols=["{BUSY}"]&type=MINI')
    assert [set(one) - set(mini[0]), set(mini[0]) - set(one)] == [
        {
            *("priceChange", "priceChangePercent", "weightedAvgPrice", "prevClosePrice"),
            *("lastQty", "bidPrice", "bidQty", "askPrice", "askQty"),
        },
        set(),
    ]
    assert await client.refused(f"/api/v3/ticker/24hr?symbol={RARE}") == (
        400,
        -1020,
        "This operation is not supported."
        f" No ticker of {RARE} was captured within a day; see /api/v3/ticker.",
    )
    assert await client.json("/api/v3/ticker/24hr?symbolStatus=BREAK") == []


async def test_windows(db: Database) -> None:
    """The venue's page "Rolling window": minutes, open at a minute, closed now."""
    now_us = wall_ns() // 1000
    rows = [row for row in market() if row["symbol_id"] == 0]
    moved = now_us - rows[-1]["trade_us"] - MINUTE_US
    rows = [{**row, "trade_us": row["trade_us"] + moved} for row in rows]
    await db.sink.write_trades(trades(*rows))
    read = Reader(lambda: db.dsn)
    desk = Desk(db, read)
    from test_queries import at

    from tradecore.store.candles import CandleKind, refresh

    await refresh(db.conn, CandleKind(False), at(rows[0]["trade_us"]), at(now_us + MINUTE_US))
    stored = await desk.rows(BUSY)
    async with serving(lambda: db.dsn) as client:
        for size, minutes in (("1m", 1), ("59m", 59), ("2h", 120), ("", 1440), ("7d", 10080)):
            wanted_size = f"&windowSize={size}" if size else ""
            one = await client.json(f"/api/v3/ticker?symbol={BUSY}{wanted_size}")
            begin_us = one["openTime"] * 1000
            assert begin_us % MINUTE_US == 0
            shift_us = one["closeTime"] * 1000 - minutes * MINUTE_US - begin_us
            assert 0 <= shift_us < MINUTE_US
            inside = [row for row in stored if oracle.us_of(row["timestamp"]) >= begin_us]
            assert one["count"] == len(inside)
            assert one["firstId"] == inside[0]["trade_id"]
            volume = sum(row["quantity"] for row in inside)
            assert one["volume"] == oracle.eight(volume)
        day = await client.json(f"/api/v3/ticker/tradingDay?symbol={BUSY}&timeZone=-3:00")
        assert day["openTime"] * 1000 % DAY_US == 3 * 60 * MINUTE_US
        assert day["closeTime"] - day["openTime"] == DAY_US // 1000 - 1
        assert await client.json(f'/api/v3/ticker?symbols=["{BUSY}","{FRESH}"]&type=MINI') != []
        assert (await client.refused(f"/api/v3/ticker?symbol={FRESH}"))[1] == -2016
    await read.close()


async def test_exchange_info(client: Client) -> None:
    everything = await client.json("/api/v3/exchangeInfo")
    assert [one["symbol"] for one in everything["symbols"]] == list(CAPTURED)
    assert everything["rateLimits"][0]["limit"] == weights.LIMIT
    one = (await client.json(f"/api/v3/exchangeInfo?symbol={BUSY}"))["symbols"]
    assert one == everything["symbols"][:1]
    assert (one[0]["baseAsset"], one[0]["quoteAsset"]) == ("BTC", "USDT")
    assert one[0]["permissionSets"] == [["SPOT"]]
    bare = await client.json("/api/v3/exchangeInfo?showPermissionSets=false&permissions=SPOT")
    assert bare["symbols"][0]["permissionSets"] == []
    for none in ("permissions=MARGIN", 'permissions=["MARGIN","LEVERAGED"]', "symbolStatus=HALT"):
        assert (await client.json(f"/api/v3/exchangeInfo?{none}"))["symbols"] == []


@pytest.mark.parametrize(
    ("symbol", "base", "quote"),
    [
        ("BTCUSDT", "BTC", "USDT"),
        ("ETHBTC", "ETH", "BTC"),
        ("BTCFDUSD", "BTC", "FDUSD"),
        ("USDCUSDT", "USDC", "USDT"),
        ("1000SATSTRY", "1000SATS", "TRY"),
        ("币安人生USDT", "币安人生", "USDT"),
        ("XYZ", "XYZ", ""),
        ("USDT", "USDT", ""),
    ],
)
def test_assets(symbol: str, base: str, quote: str) -> None:
    assert assets(symbol) == (base, quote)


async def test_symbols_that_are_not_ascii(client: Client, desk: Desk) -> None:
    rows = await desk.rows(ONCE)
    encoded = "%E5%B8%81%E5%AE%89%E4%BA%BA%E7%94%9FUSDT"
    found = await client.json(f"/api/v3/klines?symbol={encoded}&interval=1m")
    assert found == oracle.klines(rows, "1m")
    assert await client.json(f"/api/v3/trades?symbol={encoded}") == oracle.trades(rows)


async def test_nothing_is_stored_of_a_captured_symbol_yet(client: Client) -> None:
    assert await client.json(f"/api/v3/klines?symbol={FRESH}&interval=1m") == []
    assert await client.json(f"/api/v3/trades?symbol={FRESH}") == []


async def test_coverage_and_statistics(client: Client, desk: Desk) -> None:
    everything = await client.json("/api/coverage")
    assert [one["symbol"] for one in everything["symbols"]] == sorted((BUSY, RARE, ONCE))
    one = await client.json(f"/api/coverage?symbol={BUSY}&limit=5")
    assert one["ranges"][0]["first_id"] == 5_000
    assert one["ranges"][0]["first_us"] == oracle.us_of((await desk.rows(BUSY))[0]["timestamp"])
    assert (one["holes"], one["next_id"], one["hole_count"]) == ([], None, 0)
    stats = await client.json("/api/stats")
    assert stats["trades"] == len(market())
    assert stats["tables"]["raw_trades"]["bytes"] > 0
    assert stats["lag_s"] == round(HEALTHY.ring.oldest_age_s, 3)


# --- headers ----------------------------------------------------------------------------------


async def test_head_has_the_headers_and_no_body(client: Client) -> None:
    url = f"/api/v3/klines?symbol={BUSY}&interval=1m&limit=10"
    got, body = await client.get(url)
    head, nothing = await client.get(url, "HEAD")
    assert (head.status, nothing) == (200, b"")
    assert head.headers["Content-Length"] == str(len(body))
    assert head.headers["ETag"] == got.headers["ETag"]


async def test_closed_candles_are_revalidated(client: Client, desk: Desk) -> None:
    url = f"/api/v3/klines?symbol={BUSY}&interval=1h&limit=20"
    first, _ = await client.get(url)
    tag = first.headers["ETag"]
    assert first.headers["Cache-Control"] == "no-cache"
    for sent in (tag, tag.removeprefix("W/"), f'"x", {tag}', "*"):
        again, body = await client.get(url, If_None_Match=sent)
        assert (again.status, body, again.headers["ETag"]) == (304, b"", tag)
    await desk.db.conn.execute("UPDATE candles_1h SET volume = volume + 1")
    changed, _ = await client.get(url, If_None_Match=tag)
    assert changed.status == 200
    assert changed.headers["ETag"] != tag


async def test_candles_that_are_behind_say_so(client: Client, desk: Desk) -> None:
    from test_queries import FIRST_US, at, timedelta

    url = f"/api/v3/klines?symbol={BUSY}&interval=1h&startTime={FIRST_US // 1000}"
    assert "X-Tradecore-Candles" not in (await client.get(url))[0].headers
    late = at(FIRST_US) + timedelta(minutes=90)
    await desk.db.conn.execute(
        "INSERT INTO candle_windows (minutes)"
        " VALUES (tstzmultirange(tstzrange($1, $1::timestamptz + interval '1 minute')))",
        late,
    )
    assert (await client.get(url))[0].headers["X-Tradecore-Candles"] == "behind"
    before = f"{url}&endTime={FIRST_US // 1000 + 60_000}"
    assert "X-Tradecore-Candles" not in (await client.get(before))[0].headers


async def test_answers_that_go_on_changing_are_not_kept(client: Client, desk: Desk) -> None:
    now = wall_ns() // 1000
    from test_queries import at, made

    await desk.db.sink.write_trades(trades(made(0, 10**6, now)))
    from tradecore.store.candles import CandleKind, refresh

    await refresh(desk.db.conn, CandleKind(False), at(now), at(now + 1))
    for path in ("klines?interval=1d&symbol=", "trades?symbol=", "ticker/price?symbol="):
        response, _ = await client.get(f"/api/v3/{path}{BUSY}")
        assert response.headers["Cache-Control"] == "no-store"
        assert "ETag" not in response.headers


async def test_large_answers_are_compressed(client: Client) -> None:
    url = f"/api/v3/trades?symbol={BUSY}&limit=1000"
    plain, body = await client.get(url, Accept_Encoding="identity")
    assert "Content-Encoding" not in plain.headers
    for accepted in ("gzip", "gzip, deflate, br", "br;q=1, GZIP;q=0.5", "gzip; q=0.0001", "gzip;"):
        packed, small = await client.get(url, Accept_Encoding=accepted)
        assert packed.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(small) == body
        assert len(small) < len(body) / 3
    for refused in ("identity", "deflate", "gzip;q=0", "gzip;Q = 0.0000", "gzip;q=x"):
        same, body_again = await client.get(url, Accept_Encoding=refused)
        assert "Content-Encoding" not in same.headers
        assert body_again == body
    tiny, _ = await client.get("/api/v3/ping", Accept_Encoding="gzip")
    assert "Content-Encoding" not in tiny.headers


async def test_used_weight_is_told_and_limited(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _early_in_a_minute()
    response, _ = await client.get("/api/v3/ping")
    before = int(response.headers["X-MBX-USED-WEIGHT-1M"])
    for path, weight in (
        ("/api/v3/time", 1),
        (f"/api/v3/klines?symbol={BUSY}&interval=1m", 2),
        (f"/api/v3/trades?symbol={BUSY}&limit=1", 25),
        ("/api/v3/exchangeInfo", 20),
        ("/api/v3/ticker/24hr", 80),
        (f"/api/v3/ticker/24hr?symbol={BUSY}", 2),
        ("/api/v3/ticker/price", 4),
        ("/api/v3/klines", 2),
        ("/api/v3/nothing", 1),
    ):
        response, _ = await client.get(path)
        used = int(response.headers["X-MBX-USED-WEIGHT-1M"])
        assert used - before == weight, path
        before = used
    limited = weights.Weights(limit=3, now_ns=lambda: 30 * 10**9)
    assert [limited.use("a", 2), limited.use("a", 1), limited.use("a", 1)] == [
        (2, 0),
        (3, 0),
        (4, 30),
    ]
    assert limited.use("b", 1) == (1, 0)
    monkeypatch.setattr(weights.Weights, "use", lambda *_: (300_001, 17))
    response, body = await client.get("/api/v3/ping")
    assert (response.status, response.headers["Retry-After"]) == (429, "17")
    assert json.loads(body)["code"] == -1003


def test_weights_start_anew_each_minute() -> None:
    now_s = [59]
    one = weights.Weights(limit=5, now_ns=lambda: now_s[0] * 10**9)
    assert one.use("a", 6) == (6, 1)
    now_s[0] = 60
    assert one.use("a", 5) == (5, 0)


async def _early_in_a_minute() -> None:
    """The weights of a minute are forgotten at its end."""
    left_s = 60 - wall_ns() / 1e9 % 60
    if left_s < 5:
        await asyncio.sleep(left_s + 0.1)


async def test_pages_of_named_origins_may_read(client: Client) -> None:
    url = f"/api/v3/klines?symbol={BUSY}&interval=1m&limit=1"
    for path in (url, "/api/v3/klines", "/api/stats"):
        response, _ = await client.get(path, Origin=PAGE)
        assert response.headers["Access-Control-Allow-Origin"] == PAGE
        assert "X-MBX-USED-WEIGHT-1M" in response.headers["Access-Control-Expose-Headers"]
        assert "Origin" in ",".join(response.headers.getall("Vary"))
    for origin in ("https://page.example", f"{PAGE}0", "null", "https://evil.example"):
        response, _ = await client.get(url, Origin=origin)
        assert "Access-Control-Allow-Origin" not in response.headers
        assert "Origin" in ",".join(response.headers.getall("Vary"))
    response, _ = await client.get("/health", Origin=PAGE)
    assert "Access-Control-Allow-Origin" not in response.headers


async def test_preflight(client: Client) -> None:
    asked = {
        "Access_Control_Request_Method": "GET",
        "Access_Control_Request_Headers": "x-mbx-time-unit",
    }
    response, body = await client.get("/api/v3/klines", "OPTIONS", Origin=PAGE, **asked)
    assert (response.status, body) == (204, b"")
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert response.headers["Access-Control-Allow-Methods"] == "GET, HEAD"
    assert "X-MBX-TIME-UNIT" in response.headers["Access-Control-Allow-Headers"]
    for path, headers in (
        ("/api/v3/klines", {"Origin": "https://evil.example", **asked}),
        ("/api/v3/klines", {"Origin": PAGE}),
        ("/health", {"Origin": PAGE, **asked}),
    ):
        response, _ = await client.get(path, "OPTIONS", **headers)
        assert response.status == 405
        assert "Access-Control-Allow-Methods" not in response.headers


async def test_without_origins_no_page_may_read(desk: Desk) -> None:
    async with serving(lambda: desk.db.dsn) as client:
        response, _ = await client.get("/api/v3/ping", Origin=PAGE)
        assert "Access-Control-Allow-Origin" not in response.headers
        response, _ = await client.get(
            "/api/v3/ping", "OPTIONS", Origin=PAGE, Access_Control_Request_Method="GET"
        )
        assert response.status == 405


# --- what is wrong ----------------------------------------------------------------------------

K = f"klines?symbol={BUSY}&interval=1m"
NUMBER = venue_errors.NUMBER
_MISSING = "Mandatory parameter '{}' was not sent, was empty/null, or malformed."
_ILLEGAL = "Illegal characters found in parameter '{}'; legal range is '{}'."
_COMBINATION = "Combination of optional parameters invalid."


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("klines", -1102, _MISSING.format("symbol")),
        (f"klines?symbol={BUSY}", -1102, _MISSING.format("interval")),
        ("klines?fromId=1", -1102, _MISSING.format("symbol")),
        ("trades?limit=5", -1102, _MISSING.format("symbol")),
        ("historicalTrades", -1102, _MISSING.format("symbol")),
        ("ticker", -1102, "Param 'symbol' or 'symbols' must be sent, but both were empty/null!"),
        ("ticker?windowSize=1h", -1102, None),
        ("klines?symbol=&interval=1m", -1105, "Parameter 'symbol' was empty."),
        (f"{K}&startTime=", -1105, "Parameter 'startTime' was empty."),
        (f"{K}&limit=", -1105, "Parameter 'limit' was empty."),
        (f"{K}&fromId=1", -1104, None),
        (
            f"klines?fromId=1&symbol={BUSY}&interval=1h",
            -1104,
            "Not all sent parameters were read; read '2' parameter(s) but was sent '3'.",
        ),
        (
            "ticker/24hr?limit=1",
            -1104,
            "Not all sent parameters were read; read '0' parameter(s) but was sent '1'.",
        ),
        (
            "ping?x=1",
            -1101,
            "Too many parameters; expected '0' and received '1'.",
        ),
        (
            f"trades?symbol={BUSY}&limit=1&fromId=5",
            -1101,
            "Too many parameters; expected '2' and received '3'.",
        ),
        (f"{K}&symbol={BUSY}", -1101, "Duplicate values for a parameter detected."),
        (f"{K}&limit=1&limit=2", -1101, "Duplicate values for a parameter detected."),
        ("klines?symbol=NOPE&interval=1m", -1121, "Invalid symbol."),
        ("trades?symbol=NOPE", -1121, "Invalid symbol."),
        ("historicalTrades?symbol=NOPE&fromId=1", -1121, "Invalid symbol."),
        ("ticker/price?symbol=NOPE", -1121, "Invalid symbol."),
        (f'ticker/price?symbols=["{BUSY}","NOPE"]', -1121, "Invalid symbol."),
        ("ticker/24hr?symbol=NOPE", -1121, "Invalid symbol."),
        ("ticker?symbol=NOPE", -1121, "Invalid symbol."),
        ("ticker/tradingDay?symbol=NOPE", -1121, "Invalid symbol."),
        ("exchangeInfo?symbol=NOPE", -1121, "Invalid symbol."),
        ("klines?symbol=btcusdt&interval=1m", -1100, _ILLEGAL.format("symbol", "")[:-3]),
        ("klines?symbol=BTC%2FUSDT&interval=1m", -1100, None),
        ("klines?symbol=" + "A" * 51 + "&interval=1m", -1100, None),
        ("klines?symbol=BTCUSDT%27%3B%20DROP%20TABLE%20raw_trades%3B--&interval=1m", -1100, None),
        ("trades?symbol=BTCUSDT%0d%0aX-Evil:%201", -1100, None),
        ("klines?symbol=%00&interval=1m", -1100, None),
        ("klines?symbol=%FF%FE&interval=1m", -1100, None),
        (f"klines?symbol={BUSY}&interval=1s", -1020, None),
        (f"klines?symbol={BUSY}&interval=3d", -1020, None),
        (f"{K}&timeZone=0:01", -1130, None),
        (f"klines?symbol={BUSY}&interval=1M%27", -1120, "Invalid interval."),
        (f"klines?symbol={BUSY}&interval=1H", -1120, "Invalid interval."),
        (f"{K}&limit=0", -1102, _MISSING.format("limit")),
        (f"{K}&limit=-1", -1100, _ILLEGAL.format("limit", NUMBER)),
        (f"{K}&limit=abc", -1100, _ILLEGAL.format("limit", NUMBER)),
        (f"{K}&limit=1.5", -1100, _ILLEGAL.format("limit", NUMBER)),
        (f"{K}&limit=1e3", -1100, _ILLEGAL.format("limit", NUMBER)),
        (f"{K}&limit=%D9%A1", -1100, _ILLEGAL.format("limit", NUMBER)),
        (f"{K}&limit=" + "9" * 21, -1100, _ILLEGAL.format("limit", NUMBER)),
        (f"{K}&startTime=None", -1100, _ILLEGAL.format("startTime", NUMBER)),
        (f"{K}&startTime=-5", -1100, _ILLEGAL.format("startTime", NUMBER)),
        (f"{K}&endTime=1%20OR%201=1", -1100, _ILLEGAL.format("endTime", NUMBER)),
        (f"{K}&endTime=" + "9" * 20, -1130, "Data sent for parameter 'endTime' is not valid."),
        (f"{K}&startTime=2&endTime=1", -1128, _COMBINATION),
        (f"{K}&startTime=1700000000000&endTime=1600000000000", -1128, _COMBINATION),
        (f"{K}&timeZone=15", -1130, "Data sent for parameter 'timeZone' is not valid."),
        (f"{K}&timeZone=-12:01", -1130, "Data sent for parameter 'timeZone' is not valid."),
        (f"{K}&timeZone=1:60", -1130, "Data sent for parameter 'timeZone' is not valid."),
        (f"{K}&timeZone=UTC", -1130, "Data sent for parameter 'timeZone' is not valid."),
        (f"historicalTrades?symbol={BUSY}&fromId=-1", -1100, _ILLEGAL.format("fromId", NUMBER)),
        (
            f"historicalTrades?symbol={BUSY}&fromId=9223372036854775808",
            -1130,
            "Data sent for parameter 'fromId' is not valid.",
        ),
        (f'ticker/price?symbol={BUSY}&symbols=["{BUSY}"]', -1128, _COMBINATION),
        ("ticker/price?symbols=BTCUSDT", -1100, None),
        ("ticker/price?symbols=[BTCUSDT]", -1100, None),
        ('ticker/price?symbols=["btcusdt"]', -1100, None),
        ("ticker/price?symbols=[1]", -1100, None),
        ('ticker/price?symbols={"a":1}', -1100, None),
        ("ticker/price?symbols=[[[[[[", -1100, None),
        ("ticker/price?symbols=[]", -1102, _MISSING.format("symbols")),
        (f'ticker/price?symbols=["{BUSY}","{BUSY}"]', -1151, None),
        ("ticker/24hr?type=HUGE", -1139, "Invalid ticker type."),
        ("ticker/24hr?symbolStatus=x", -1122, "Invalid symbolStatus."),
        (f"ticker/price?symbol={BUSY}&symbolStatus=HALT", -1220, None),
        (f"ticker?symbol={BUSY}&windowSize=60m", -1130, None),
        (f"ticker?symbol={BUSY}&windowSize=8d", -1130, None),
        (f"ticker?symbol={BUSY}&windowSize=0h", -1130, None),
        (f"ticker?symbol={BUSY}&windowSize=1d2h", -1130, None),
        (f"ticker?symbol={BUSY}&windowSize=h", -1130, None),
        (f"ticker/price?symbol={FRESH}", -1020, None),
        (f"exchangeInfo?symbol={BUSY}&permissions=SPOT", -1128, _COMBINATION),
        ("exchangeInfo?showPermissionSets=maybe", -1130, None),
        *((f"{path}?symbol={BUSY}", -1020, None) for path in NOT_RECORDED),
    ],
)
async def test_every_mistake_has_its_code(
    small: Client, path: str, code: int, message: str | None
) -> None:
    status, found, text = await small.refused(f"/api/v3/{path}")
    assert (status, found) == (400, code), text
    assert message is None or text.startswith(message)
    for inside in ("Traceback", "SELECT", "asyncpg", "tradecore/"):
        assert inside not in text


async def test_mistakes_of_our_own_paths(client: Client) -> None:
    assert await client.refused("/api/coverage?symbol=NOPE") == (400, -1121, "Invalid symbol.")
    assert (await client.refused("/api/coverage?limit=5"))[1] == -1128
    assert (await client.refused("/api/stats?x=1"))[1] == -1101
    for path in ("/api/", "/api/v3", "/api/v3/order", "/api/v3/../stats", "/api/v1/klines"):
        status, code, _ = await client.refused(path)
        assert (status, code) in ((404, -1020), (400, -1020)) or path.endswith("stats")


async def test_units_and_encodings_that_are_not_served(client: Client) -> None:
    assert await client.refused("/api/v3/time", X_MBX_TIME_UNIT="NANOSECOND") == (
        400,
        -1194,
        "Invalid value for time unit; expected either MICROSECOND or MILLISECOND.",
    )
    assert (await client.refused("/api/v3/time", X_MBX_SBE="3:1"))[:2] == (400, -1155)


async def test_other_methods_and_bodies(client: Client) -> None:
    response, body = await client.get("/api/v3/order", "POST")
    assert response.status == 405
    assert json.loads(body) == {"code": -1000, "msg": "Only GET and HEAD are served."}


async def test_long_lists_of_symbols_fit(client: Client) -> None:
    names = ",".join(f"%22SYMBOL{n}USDT%22" for n in range(300))
    status, code, _ = await client.refused(f"/api/v3/ticker/price?symbols=%5B{names}%5D")
    assert (status, code) == (400, -1121)
    response, _ = await client.get("/api/v3/ticker/price?symbols=" + "A" * 9000)
    assert response.status == 400


async def test_the_market_is_not_limited_like_health(client: Client) -> None:
    answers_ = await asyncio.gather(*(client.get("/api/v3/ping") for _ in range(300)))
    assert {response.status for response, _ in answers_} == {200}


# --- when the database does not do ------------------------------------------------------------


async def test_a_database_that_is_away() -> None:
    def nowhere() -> str:
        raise TransientStoreError("down", "postgresql://u:secret@h/d is not open")

    for dsn in (nowhere, lambda: "postgresql://x@127.0.0.1:1/x"):
        async with serving(dsn) as client:
            assert await client.json("/api/v3/ping") == {}
            assert (await client.json("/api/v3/exchangeInfo"))["symbols"]
            for path in ("/api/v3/klines?symbol=BTCUSDT&interval=1m", "/api/coverage"):
                response, body = await client.get(path)
                assert (response.status, response.headers["Retry-After"]) == (503, "1")
                assert json.loads(body) == {
                    "code": -1001,
                    "msg": "Internal error; unable to process your request. Please try again.",
                }


async def test_a_database_that_goes_and_comes_back(pg_server: EmbeddedPostgres) -> None:
    conn = await asyncpg.connect(pg_server.dsn)
    await migrate(conn)
    await conn.close()
    url = f"/api/v3/klines?symbol={FRESH}&interval=1m"
    async with serving(lambda: pg_server.dsn) as client:
        assert await client.json(url) == []
        await pg_server.stop()
        assert (await client.refused(url))[:2] == (503, -1001)
        assert await client.json("/api/v3/ping") == {}
        await pg_server.start()
        assert await client.json(url) == []


async def test_a_database_that_hangs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "ANSWER_LIMIT_S", 0.5)
    url = f"/api/v3/klines?symbol={BUSY}&interval=1m"
    async with serving(lambda: desk.db.dsn) as client:
        await client.json(url)
        async with desk.db.conn.transaction():
            await desk.db.conn.execute("LOCK candles_1m, trade_coverage IN ACCESS EXCLUSIVE MODE")
            assert (await client.refused(url))[:2] == (503, -1007)
        assert await client.json(url)


async def test_too_many_at_once_are_told_so(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "WAITING_MAX", 2)
    monkeypatch.setattr(answers, "ANSWER_LIMIT_S", 1.0)
    url = f"/api/v3/klines?symbol={BUSY}&interval=1m"
    async with serving(lambda: desk.db.dsn) as client:
        await client.json(url)
        async with desk.db.conn.transaction():
            await desk.db.conn.execute("LOCK trade_coverage IN ACCESS EXCLUSIVE MODE")
            asked = await asyncio.gather(*(client.refused(url) for _ in range(20)))
        assert [one[:2] for one in asked].count((503, -1008)) == 20 - reader.READERS - 2
        assert await client.json(url)


async def test_an_error_of_ours_tells_nothing(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(parameters.Query, "limit", broken)
    response, body = await client.get(f"/api/v3/trades?symbol={BUSY}")
    assert response.status == 500
    assert json.loads(body)["code"] == -1000
    assert b"secret" not in body
