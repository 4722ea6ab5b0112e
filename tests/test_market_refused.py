"""What the REST paths refuse, and what they answer while the database does not do."""

import asyncio
import json

import asyncpg
import pytest
from market_desk import FRESH, Client, serving
from market_desk import client as client
from market_desk import desk as desk
from market_desk import small as small
from test_queries import BUSY, Desk

from tradecore.errors import TransientStoreError
from tradecore.http import answers, parameters, venue_errors
from tradecore.http.market import NOT_RECORDED
from tradecore.store import reader
from tradecore.store.embedded import EmbeddedPostgres
from tradecore.store.migrate import migrate

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
