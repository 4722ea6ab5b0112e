"""The venue's REST paths and our own, through a real server and a real database."""

import asyncio
import gzip
import json
from typing import Any

import market_oracle as oracle
import pytest
from market_desk import CAPTURED, FRESH, PAGE, Client, serving
from market_desk import client as client
from market_desk import desk as desk
from market_desk import small as small
from market_oracle import DAY_US, MINUTE_US
from snapshots import HEALTHY
from store_desk import Database, trades
from test_queries import BUSY, FIRST_US, ONCE, RARE, Desk, market

from tradecore.clock import wall_ns
from tradecore.http import weights
from tradecore.http.instruments import assets
from tradecore.store.reader import Reader

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
