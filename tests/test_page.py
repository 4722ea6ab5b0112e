"""The page at /, in Chromium: before a daemon as a process, and before a server with a snapshot."""

import asyncio
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from http_desk import assert_secure, fetch, serving
from page_desk import DESKTOP, PHONE, Tab, browsing
from scene import connected, metrics
from snapshots import HEALTHY, changed

from tests.daemon import WAIT_LIMIT_S, Daemon, daemon
from tests.fakes import simulated_exchange
from tests.test_nothing_lost import until_captured, venue
from tradecore.http import security
from tradecore.http.health import assess, overall_json
from tradecore.http.page import FOLDER, POLICY
from tradecore.snapshot import Holes, Shards, SymbolState, SymbolStates
from tradecore.store.embedded import EmbeddedPostgres

PAIR = ("BTCUSDT", "ETHUSDT")

NAMES = sorted(path.name for path in FOLDER.iterdir())

# -- files ----------------------------------------------------------------------------------------


async def test_every_file_is_served_with_its_type_and_policy():
    assert {"index.html", "page.js", "page.css", "lightweight-charts.NOTICE.txt"} <= {*NAMES}
    types = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    async with serving() as server:
        for name in NAMES:
            response, body = await fetch(server, f"/page/{name}")
            assert (response.status, body) == (200, (FOLDER / name).read_bytes())
            kind = types.get(name.rpartition(".")[2], "text/")
            assert response.content_type.startswith(kind)
            assert response.charset == "utf-8"
            assert response.headers["Content-Security-Policy"] == POLICY
            others = security.HEADERS.keys() - {"Content-Security-Policy", "Cache-Control"}
            assert {key: response.headers[key] for key in others} == {
                key: security.HEADERS[key] for key in others
            }
            head, nothing = await fetch(server, f"/page/{name}", "HEAD")
            assert (head.status, nothing) == (200, b"")
            assert head.headers["Content-Length"] == response.headers["Content-Length"]
        index, body = await fetch(server, "/")
        assert body == (FOLDER / "index.html").read_bytes()
        assert index.headers["Cache-Control"] == "no-cache"


async def test_what_has_not_changed_is_not_sent_again():
    name = next(name for name in NAMES if name.startswith("lightweight-charts-"))
    async with serving() as server:
        response, _ = await fetch(server, f"/page/{name}")
        assert response.headers["Cache-Control"] == "max-age=31536000, immutable"
        known = {"If-None-Match": response.headers["ETag"]}
        again, body = await fetch(server, f"/page/{name}", headers=known)
        assert (again.status, body) == (304, b"")
        assert again.headers["ETag"] == response.headers["ETag"]
        other, _ = await fetch(server, "/", headers=known)
        assert other.status == 200


async def test_files_are_sent_as_gzip_or_as_they_are():
    async with serving() as server:
        for wish, packed in (("gzip, br", True), ("gzip;q=0", False), ("identity", False)):
            response, body = await fetch(
                server, "/page/page.css", headers={"Accept-Encoding": wish}, auto_decompress=False
            )
            assert (response.headers.get("Content-Encoding") == "gzip") == packed
            assert response.headers["Vary"] == "Accept-Encoding"
            plain = gzip.decompress(body) if packed else body
            assert plain == (FOLDER / "page.css").read_bytes()


@pytest.mark.parametrize(
    "path", ["/page/", "/page/no.js", "/page/..%2Fpage.py", "/page/%00", "/page/page.js/x"]
)
async def test_there_are_no_other_files(path):
    async with serving() as server:
        response, body = await fetch(server, path)
        assert response.status == 404
        assert "error" in json.loads(body)
        assert_secure(response.headers)


def test_the_page_has_nothing_from_elsewhere_and_no_markup_from_data():
    own = [FOLDER / name for name in NAMES if not name.startswith("lightweight-charts")]
    for path in own:
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
        assert not re.search(r"(src|href)=\"(https?:)?//(?!www\.tradingview\.com)", text)
    for name in re.findall(r"(?:src|href)=\"page/([^\"]+)", (FOLDER / "index.html").read_text()):
        assert name in NAMES


# -- the verdict ----------------------------------------------------------------------------------

WHOLE = {"holes": Holes(), "audit__mismatches": {}, "counters__trades_far_below": 0}
ONE_HOLE = Holes(open=1, ids_missing=3, oldest_age_s=4.0)
DEAD = {"connections": (), "uptime_s": 3600.0}
NEW = {"connections": (), "symbols": HEALTHY.symbols[1:]}
AWAY = {"database__reachable": False, "database__last_error": "connection refused"}

VERDICTS = [
    ({}, "busy", "filling", "7 holes are being filled"),
    ({"repair__under_way": 0}, "busy", "filling", "7 holes are open"),
    (
        {"holes": Holes(open=1, ids_missing=3, oldest_age_s=4.0)},
        "busy",
        "filling",
        "A hole is being filled",
    ),
    ({**WHOLE, **AWAY, "database__away_s": 12.0}, "warn", "database_away", "trades wait"),
    ({**WHOLE, **AWAY, "database__away_s": 40.0}, "bad", "database_away", "Not ready"),
    ({**WHOLE, **DEAD}, "bad", "no_live_stream", "Not ready: no live stream"),
    ({**WHOLE, "connections": ()}, "bad", "no_live_stream", "Not ready: no live stream"),
    ({**WHOLE, **NEW}, "wait", "starting", "Starting"),
    ({**WHOLE, "ring__above_high_water": True}, "bad", "ring_above_high_water", "nearly full"),
    ({**WHOLE, "ring__oldest_age_s": 60.0}, "warn", "behind", "Behind"),
    ({**WHOLE, "streams_wanted": 9}, "warn", "streams_missing", "streams are missing"),
    ({**WHOLE, "database__parked_age_s": 9.0}, "warn", "rows_parked", "refuses rows"),
    ({**WHOLE, "ring__disk_free_bytes": 0}, "warn", "disk_full", "is full"),
    (
        {**WHOLE, **DEAD, "shards": Shards(held=0, total=4, settled=False), "streams_wanted": 0},
        "bad",
        "share_unknown",
        "which symbols are ours",
    ),
    ({**WHOLE, "lifecycle__trouble": {"drop": "why"}}, "warn", "degraded", "Degraded"),
    ({**WHOLE, "audit__mismatches": {"volume": 2}}, "warn", "mismatched", "differ"),
    ({**WHOLE, "symbols": HEALTHY.symbols[1:]}, "good", "captured", "nothing is missing"),
    (WHOLE, "warn", "unproven", "the proof is"),
]


async def test_every_state_has_its_words(tmp_path):
    async with serving() as server, browsing(tmp_path) as browser:
        tab = await browser.open(f"http://127.0.0.1:{server.port}/")

        healthy = overall_json(HEALTHY, assess(HEALTHY))

        async def judged(body, status=200, now="Date.now()", age=0.0):
            answer = json.dumps({"status": status, "body": body})
            health = json.dumps(body if "status" in body else healthy)
            return await tab.run(
                f"import('/page/verdict.js').then(({{ judge }}) =>"
                f" judge({answer}, {health}, {age}, {{held: 1, total: 1}}, {now}))"
            )

        for changes, tone, state, title in VERDICTS:
            snapshot = changed(**changes)
            body = overall_json(snapshot, assess(snapshot))
            found = await judged(body)
            assert (found["tone"], found["state"]) == (tone, state), (changes, found)
            assert title in found["title"]
            texts = " ".join(found["reasons"])
            for reason in body["reasons"]:
                assert reason["text"] in texts
        snapshot = changed(**WHOLE)
        proven_ms = HEALTHY.symbols[0].proven_through_us / 1000
        body = overall_json(snapshot, assess(snapshot))
        assert (await judged(body, now=str(proven_ms + 90_000)))["title"] == "Captured and proven"
        gone = await judged({}, status=0, age=75.0)
        assert (gone["tone"], gone["state"]) == ("bad", "gone")
        assert "75 s old" in gone["reasons"][0]
        assert (await judged({"error": "Unauthorized"}, status=401))["state"] == "token"
        limited = await judged({"error": "Too Many Requests", "text": "Wait."}, status=429)
        assert "Wait." in limited["reasons"][0]
        assert tab.problems == []


# -- many symbols, of any name --------------------------------------------------------------------


async def no_overflow(tab: Tab, size: tuple[int, int]) -> None:
    for scheme in ("dark", "light"):
        await tab.look(size, scheme)
        await tab.until(f"innerWidth === {size[0]}")
        width = await tab.run("document.documentElement.scrollWidth")
        assert width <= size[0], f"{width} pixels wide of {size[0]}"


async def test_1400_symbols_of_any_name_are_shown_a_page_at_a_time(tmp_path):
    hostile = '<img src=x onerror="document.title=1">'
    names = [hostile, "币安人生USDT", *(f"S{number:04}USDT" for number in range(1398))]
    symbols = SymbolStates(
        replace_symbol(name, 10_000 - number, holes=number == 700)
        for number, name in enumerate(names)
    )
    snapshot = replace(HEALTHY, symbols=symbols)
    async with serving(snapshot) as server, browsing(tmp_path) as browser:
        tab = await browser.open(f"http://127.0.0.1:{server.port}/")
        rows = "[...document.querySelectorAll('#symbols tbody tr:not([hidden]) button')]"
        first = f"{rows}[0].textContent"
        await tab.until(f"{rows}.length === 20")
        assert await tab.run(first) == names[700], "what is missing comes first"
        assert await tab.run(f"{rows}[1].textContent") == hostile
        assert await tab.text("#count") == "1 to 20 of 1,400"
        for _ in range(2):
            await tab.click("#after")
        assert await tab.text("#count") == "41 to 60 of 1,400"
        await tab.click("#symbols thead button")  # by name
        assert await tab.run(first) == hostile
        await tab.click("#symbols thead button")
        assert await tab.run(first) == "币安人生USDT"
        assert await tab.run("document.querySelectorAll('#symbols tbody tr').length") == 20
        await tab.run(
            "(box => { box.value = 's139'; box.dispatchEvent(new Event('input')) })"
            "(document.querySelector('#filter'))"
        )
        assert await tab.text("#count") == "8 of 1,400"
        await tab.run(f"{rows}[0].click()")
        assert await tab.text("#symbol") == "S1397USDT"
        assert await tab.run("location.hash") == "#S1397USDT/1m"
        await no_overflow(tab, PHONE)
        await no_overflow(tab, DESKTOP)
        assert tab.problems == []


async def test_an_address_of_nonsense_chooses_the_busiest_symbol(tmp_path):
    async with serving() as server, browsing(tmp_path) as browser:
        tab = await browser.open(f"http://127.0.0.1:{server.port}/#constructor/toString")
        await tab.until("document.querySelector('#symbol').textContent === 'BTCUSDT'")
        assert await tab.run("location.hash") == "#BTCUSDT/1m"
        assert tab.problems == []


def replace_symbol(name: str, trades: int, *, holes: bool) -> SymbolState:
    return SymbolState(
        name, trades, trades, 0.5, int(holes), 3 * holes, 1_700_000_001_250_000, None
    )


# -- before a daemon ------------------------------------------------------------------------------

FIELDS = ("open", "high", "low", "close", "volume")
PRICES = "document.querySelectorAll('#legend span, #price')"
SHOWN = "document.querySelector('#trades tbody tr:not([hidden])') !== null"


def state_is(*states: str) -> str:
    return f"{json.dumps(states)}.includes(document.querySelector('#verdict').dataset.state)"


async def assert_shows_the_api(tab: Tab, one: Daemon) -> None:
    """What hardly moves is equal; what moves is between what it was before and after."""
    before = await one.until(lambda health: health["completeness"]["complete_through"])
    await tab.until(f"document.querySelector('#rate-note').textContent !== '' && {SHOWN}")
    stored = await tab.until(
        f"(number => number >= {before['counts']['trades_stored']} && number)"
        "(+document.querySelector('#rate-note').textContent.split(', ')[1].replace(/\\D/g, ''))"
    )
    known = json.dumps(before["completeness"]["complete_through"])
    complete = await tab.until(
        f"(time => time >= {known} && time)(document.querySelector('#complete').dateTime)"
    )
    after = await one.health()
    assert stored <= after["counts"]["trades_stored"]
    assert complete <= after["completeness"]["complete_through"]
    assert await tab.text("#holes") == str(after["counts"]["holes"])
    await tab.until("document.querySelector('#connections').textContent === '2 of 2'")
    assert await tab.text("#database") == "connected"
    assert after["version"] == await tab.text("#version")
    # Both lines bring each trade, and one of them counts.
    await one.until(
        lambda health: (
            0
            < health["rates"]["trades_received_per_s"]
            < 1.3 * health["rates"]["trades_stored_per_s"]
        )
    )


async def shown_trades(tab: Tab) -> set[tuple[str, ...]]:
    rows = await tab.run(
        "[...document.querySelectorAll('#trades tbody tr:not([hidden])')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return {tuple(row) for row in rows}


async def stored_trades(dsn: str, symbol: str) -> set[tuple[str, ...]]:
    async with connected(dsn) as conn:
        rows = await conn.fetch(
            "SELECT to_char(timestamp AT TIME ZONE 'UTC', 'HH24:MI:SS.MS'), price::text,"
            " quantity::text, lower(side::text) FROM raw_trades WHERE symbol = $1"
            " ORDER BY trade_id DESC LIMIT 5000",
            symbol,
        )
    return {tuple(row) for row in rows}


async def assert_candles_are_those_of_the_tables(tab: Tab, one: Daemon, dsn: str) -> None:
    """While the market pauses; the trades as well."""
    for index, interval in ((2, "5m"), (6, "1d")):
        await tab.click(f"#intervals button:nth-child({index})")
        path = f"/api/v3/klines?symbol=BTCUSDT&interval={interval}"
        await one.until(lambda body: body["ring"]["rows"] == 0)
        wanted: list[str] = []
        shown: list[str] = []
        try:
            async with asyncio.timeout(WAIT_LIMIT_S):
                while not shown or shown != wanted:
                    shown = await tab.run(f"[...{PRICES}].map(one => one.textContent)")
                    _, candles = await one.get(path)
                    last = dict(zip(FIELDS, candles[-1][1:6], strict=True))
                    wanted = [last["close"], *(f"{name} {digits}" for name, digits in last.items())]
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{interval}: {shown}, not {wanted}; {tab.problems}") from None
    trades = await shown_trades(tab)
    assert trades and trades <= await stored_trades(dsn, "BTCUSDT")
    await tab.click("#intervals button")


def hide(value: str) -> str:
    return (
        f"Object.defineProperty(document, 'hidden', {{value: {value}, configurable: true}});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )


async def assert_asks_for_trades_without_a_stream(tab: Tab, dsn: str) -> None:
    """A browser that does not send its password with a WebSocket is refused for ever."""
    await tab.run(
        "window.Real = WebSocket; window.WebSocket = class { static OPEN = 1; close() {}"
        " constructor() { setTimeout(() => this.onclose?.(), 10) } };"
        f"{hide('true')}; {hide('false')}"
    )
    await tab.until("document.querySelector('#stream').textContent.includes('every 3 s')")
    before = await shown_trades(tab)
    async with asyncio.timeout(WAIT_LIMIT_S):
        while before & (shown := await shown_trades(tab)):
            await asyncio.sleep(0.05)
    assert len(shown) > 1 and shown <= await stored_trades(dsn, "BTCUSDT")
    await tab.run(f"window.WebSocket = Real; {hide('true')}; {hide('false')}")
    await tab.until("document.querySelector('#stream').textContent === 'live'")


async def assert_asks_nothing_while_hidden(tab: Tab, one: Daemon) -> None:
    async with asyncio.timeout(WAIT_LIMIT_S):
        assert (await metrics(one))["tradecore_stream_clients"] == 1
        await tab.run(hide("true"))
        while (await metrics(one))["tradecore_stream_clients"]:
            await asyncio.sleep(0.05)
    asked = "performance.getEntriesByType('resource').length"
    before = await tab.run(asked)
    await asyncio.sleep(1.5)  # longer than a page that is seen waits
    assert await tab.run(asked) == before
    await tab.run(hide("false"))
    await tab.until(f"{asked} > {before}")
    await tab.until("document.querySelector('#stream').textContent === 'live'")


async def test_the_page_follows_a_daemon_through_its_troubles(
    tmp_path: Path, pg_server: EmbeddedPostgres
) -> None:
    async with (
        simulated_exchange(symbols=",".join(PAIR), rate=300, epoch=-60) as exchange,
        daemon(tmp_path / "daemon", **venue(exchange, pg_server.dsn, PAIR, FEED_LINES=2)) as one,
        browsing(tmp_path) as browser,
    ):
        await until_captured(one, *PAIR)
        tab = await browser.open(f"http://127.0.0.1:{one.port}/")
        await assert_shows_the_api(tab, one)
        await exchange.fault("pause")
        await assert_candles_are_those_of_the_tables(tab, one, pg_server.dsn)
        await exchange.fault("resume")
        await no_overflow(tab, PHONE)
        await no_overflow(tab, DESKTOP)
        await assert_asks_nothing_while_hidden(tab, one)
        await assert_asks_for_trades_without_a_stream(tab, pg_server.dsn)

        await pg_server.stop()
        await tab.until(state_is("database_away"))
        await tab.until("document.querySelector('#database').textContent.startsWith('away ')")
        assert "trades wait" in await tab.text("#title")
        await pg_server.start()
        await tab.until(state_is("captured", "proven"))
        await tab.until("document.querySelector('#database').textContent === 'connected'")

        await exchange.fault("rest", mode="500", seconds=600)
        await exchange.fault("drop", n=25)
        await tab.until(state_is("filling"))
        await tab.until("document.querySelector('#news .open') !== null")
        missing = (await one.health())["completeness"]["ids_missing"]
        assert missing > 0
        reasons = "document.querySelector('#reasons').textContent"
        await tab.until(f"{reasons}.includes('{missing} trade')")
        await exchange.fault("rest", mode="ok", seconds=0)
        await tab.until("document.querySelector('#news .filled') !== null")
        await tab.until(state_is("captured", "proven"))
        assert await tab.text("#holes-note") == "no trade is missing"

        await one.kill()
        await tab.until(state_is("gone"))
        await tab.until("document.body.classList.contains('stale')")
        before = await shown_trades(tab)
        await one.start()
        await tab.until(state_is("captured", "proven"))
        await tab.until("!document.body.classList.contains('stale')")
        await tab.until("document.querySelector('#stream').textContent === 'live'")
        await tab.until(SHOWN)
        async with asyncio.timeout(WAIT_LIMIT_S):
            while before & await shown_trades(tab):
                await asyncio.sleep(0.05)
        assert tab.problems == []

        assert await one.terminate() == 0
        token = "0123456789abcdef" * 2
        one.environ["HTTP_TOKEN"] = token
        await one.start()
        await tab.until(state_is("token"))
        known = await browser.open(f"http://any:{token}@127.0.0.1:{one.port}/")
        await known.until(SHOWN)
        await known.until(state_is("captured", "proven"))
        assert known.problems == []
        assert await one.terminate() == 0
