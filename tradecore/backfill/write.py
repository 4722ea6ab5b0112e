"""Writes trades that were fetched: same encode, transaction and ledger as those of the feed."""

import asyncio
from collections import Counter
from typing import Any

import numpy.typing as npt

from tradecore._symbols import SymbolTable
from tradecore.backoff import Backoff
from tradecore.errors import TransientStoreError
from tradecore.store.sink import WriteResult
from tradecore.store.store import Store

_TRIES = 5


class Writer:
    """Gives rows the ids of a symbol table of its own, and stores them."""

    def __init__(self, store: Store, retries: Counter[str]) -> None:
        """`retries` counts writes that had to be made again, as "database"."""
        self._store = store
        self._retries = retries
        self._symbols = SymbolTable()

    async def __call__(
        self,
        symbol: str,
        rows: npt.NDArray[Any],
        source: str,
        hole_cause: str | None = None,
    ) -> WriteResult:
        """Store rows (TRADE_DTYPE) of one symbol, 16,384 at most.

        Tries again for some seconds, since the rows were not for free; raises TransientStoreError
        when the database stays away.
        """
        symbol_id = self._symbols.get(symbol)
        rows["symbol_id"] = self._symbols.add(symbol) if symbol_id is None else symbol_id
        pause = Backoff(0.1, 5.0)
        while True:
            try:
                return await self._store.write_trades(
                    rows, symbols=self._symbols, filled_by=source, hole_cause=hole_cause
                )
            except TransientStoreError:
                if pause.attempts >= _TRIES:
                    raise
                self._retries["database"] += 1
                await asyncio.sleep(max(pause.next_delay_s(), 0.05))
