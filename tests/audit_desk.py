"""A made-up market, what the venue's klines of it are, and a database to put both in."""

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, ROUND_UP, Context, Decimal
from typing import Any

from store_desk import NAMES, Database, at, trades

from tradecore.schema import FLAG_BUYER_IS_MAKER
from tradecore.store.audit import AuditReport, audit

MINUTE_US = 60_000_000
START_US = 1_790_000_040_000_000 // MINUTE_US * MINUTE_US
EXACT = Context(prec=200)
E8 = Decimal("1e-8")
SETTLE_S = 5.0


@dataclass(frozen=True)
class Trade:
    symbol_id: int
    trade_id: int
    us: int
    price_e8: int
    quantity_e8: int
    maker: bool

    @property
    def minute(self) -> int:
        return (self.us - START_US) // MINUTE_US

    def row(self) -> dict[str, int]:
        return {
            "symbol_id": self.symbol_id,
            "trade_id": self.trade_id,
            "trade_us": self.us,
            "price_e8": self.price_e8,
            "quantity_e8": self.quantity_e8,
            "recv_ns": self.us * 1000 + 5,
            "flags": FLAG_BUYER_IS_MAKER if self.maker else 0,
        }


def market(
    minutes: int, *, symbols: int = 2, a_minute: int = 12, seed: int = 1, first_id: int = 1000
) -> list[Trade]:
    """Ascending ids and times; some minutes of some symbols are quiet, not the first and last."""
    rng = random.Random(seed)
    found = []
    for symbol_id in range(symbols):
        trade_id = first_id
        for minute in range(minutes):
            count = rng.choice([0, 1, 2, a_minute] if 0 < minute < minutes - 1 else [1, 2])
            for us in sorted(rng.randrange(MINUTE_US) for _ in range(count)):
                price, quantity = rng.randrange(1, 10**15), rng.randrange(1, 10**13)
                when = START_US + minute * MINUTE_US + us
                maker = rng.random() < 0.5
                found.append(Trade(symbol_id, trade_id, when, price, quantity, maker))
                trade_id += 1
    return found


@dataclass(frozen=True)
class Candle:
    """A kline as the venue sends it, computed trade by trade."""

    symbol_id: int
    minute: int
    first_id: int | None
    last_id: int | None
    trades: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    quote_volume: Decimal
    taker_base: Decimal
    taker_quote: Decimal

    @property
    def symbol(self) -> str:
        return NAMES[self.symbol_id]

    @property
    def open_us(self) -> int:
        return START_US + self.minute * MINUTE_US

    def but(self, **changes: Any) -> "Candle":
        return replace(self, **changes)


def candle(symbol_id: int, minute: int, members: list[Trade], seed: int = 0) -> Candle:
    """The kline of these trades. Each product is rounded, by a rule that nobody knows."""
    rule = (ROUND_DOWN, ROUND_UP, ROUND_HALF_EVEN)[seed % 3]
    volume = quote = base = taker = Decimal(0)
    for item in members:
        price = EXACT.scaleb(Decimal(item.price_e8), -8)
        quantity = EXACT.scaleb(Decimal(item.quantity_e8), -8)
        product = EXACT.multiply(price, quantity).quantize(E8, rule, EXACT)
        volume, quote = EXACT.add(volume, quantity), EXACT.add(quote, product)
        if not item.maker:
            base, taker = EXACT.add(base, quantity), EXACT.add(taker, product)
    prices = [EXACT.scaleb(Decimal(item.price_e8), -8) for item in members] or [Decimal(7)]
    ids = [item.trade_id for item in members]
    return Candle(
        symbol_id,
        minute,
        ids[0] if ids else -1,
        ids[-1] if ids else -1,
        len(ids),
        prices[0],
        max(prices),
        min(prices),
        prices[-1],
        volume,
        quote,
        base,
        taker,
    )


def candles(items: Iterable[Trade], minutes: int, *, symbols: int = 2) -> list[Candle]:
    members = defaultdict(list)
    for item in items:
        members[item.symbol_id, item.minute].append(item)
    keys = [(s, m) for s in range(symbols) for m in range(minutes)]
    return [candle(s, m, members[s, m], seed=m) for s, m in keys]


class Desk:
    """A database, with the clock at the end of `minutes` minutes."""

    def __init__(self, db: Database, minutes: int) -> None:
        self.db = db
        self.now_us = START_US + minutes * MINUTE_US + int(SETTLE_S * 1e6)

    async def store(self, items: Iterable[Trade]) -> None:
        await self.db.sink.write_trades(trades(*(item.row() for item in items)))

    async def tell(self, items: Iterable[Candle], *, closed: bool = True) -> None:
        """Store klines as the stream does."""
        await self.db.conn.executemany(
            "INSERT INTO klines (timestamp, symbol, event_time, close_time, open, high, low, close,"
            " volume, quote_volume, taker_buy_base_volume, taker_buy_quote_volume, trade_count,"
            " first_id, last_id, is_closed, received_at)"
            " VALUES ($1, $2, $3, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $3)"
            " ON CONFLICT (timestamp, symbol) DO UPDATE SET trade_count = excluded.trade_count,"
            " volume = excluded.volume",
            [
                (
                    at(c.open_us),
                    c.symbol,
                    at(c.open_us + MINUTE_US - 1),
                    *(c.open, c.high, c.low, c.close),
                    *(c.volume, c.quote_volume, c.taker_base, c.taker_quote),
                    *(c.trades, c.first_id, c.last_id, closed),
                )
                for c in items
            ],
        )

    async def audit(self, symbols: int = 2, **options: Any) -> AuditReport:
        options = {"now_us": self.now_us, "settle_s": SETTLE_S} | options
        return await audit(self.db.pool, symbols=NAMES[:symbols], **options)

    async def open_minutes(self) -> dict[tuple[str, int], tuple[str, str]]:
        """What is not proven: (symbol, minute) to (state, reason)."""
        rows = await self.db.conn.fetch(
            "SELECT symbol, open_time, state, reason FROM trade_audits UNION ALL"
            " SELECT symbol, minute, 'waiting', 'kline' FROM audit_state, unnest(no_kline) AS gap,"
            " generate_series(lower(gap), upper(gap) - interval '1 minute', '1 minute') AS minute"
        )
        return {
            (r["symbol"], (r["open_time"] - at(START_US)).seconds // 60): (r["state"], r["reason"])
            for r in rows
        }

    async def fresh(self) -> "Desk":
        """Forget what was audited."""
        await self.run("TRUNCATE audit_state, trade_audits")
        return self

    async def run(self, statement: str, *arguments: Any) -> None:
        await self.db.conn.execute(statement, *arguments)
