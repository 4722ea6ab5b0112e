"""The line that `run` keeps at the foot of a terminal: rate, lag, ring, holes, connections."""

import asyncio
import shutil
from collections.abc import Callable

from tradecore import log
from tradecore.snapshot import LIVE, Snapshot


async def show(read: Callable[[], Snapshot], interval_s: float = 1.0) -> None:
    """Draw a line from a fresh snapshot every `interval_s` until cancelled, then take it away."""
    try:
        while True:
            columns = shutil.get_terminal_size().columns
            log.show_status(status_line(read(), columns - 1))
            await asyncio.sleep(interval_s)
    finally:
        log.show_status("")


def status_line(snapshot: Snapshot, columns: int) -> str:
    """Return as much of the state as fits into `columns`, the most telling parts first."""
    ring = snapshot.ring
    live = sum(connection.state == LIVE for connection in snapshot.connections)
    parts = [
        f"{snapshot.received_per_s:,.0f} trades/s",
        f"lag {_duration(ring.oldest_age_s)}",
        f"ring {ring.rows / ring.capacity:.1%}",
        f"holes {snapshot.holes.open:,}",
        f"connections {live}/{len(snapshot.connections)}",
        f"streams {snapshot.live_streams}/{snapshot.streams_wanted}",
        f"stored {snapshot.counters.trades_stored:,}",
        f"room for {_duration(snapshot.absorbable_s)}",
    ]
    if snapshot.holes.ids_missing:
        parts[3] += f" ({snapshot.holes.ids_missing:,} ids, filling {snapshot.repair.under_way})"
    if snapshot.database.away_s is not None:
        parts.insert(1, f"database away {_duration(snapshot.database.away_s)}")
    line = ""
    for part in parts:
        longer = f"{line} | {part}" if line else part
        if len(longer) > columns:
            break
        line = longer
    return line


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds < 1000 * 86400 else "ever"
    return f"{seconds:.1f} s"
