"""What the supervisor heeds while it starts."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tradecore import supervisor
from tradecore.flusher import FlushStats
from tradecore.settings import load


@pytest.mark.parametrize("ends", ["opened", "stopped", "neither"])
async def test_a_start_that_waits_for_the_database_heeds_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """A new cluster may take 20 s to make."""
    monkeypatch.setattr(supervisor, "_NEW_PATIENCE_S", 20.0 if ends != "neither" else 0.2)
    one: Any = supervisor.Supervisor(load({"DATA_DIR": str(tmp_path)}))
    stats = FlushStats()
    one._parts = SimpleNamespace(
        store=SimpleNamespace(is_new=True), flusher=SimpleNamespace(stats=stats)
    )
    opened = asyncio.Event()
    one._opening = asyncio.create_task(opened.wait())
    asyncio.get_running_loop().call_later(
        0.1, {"opened": opened, "stopped": one._stop, "neither": asyncio.Event()}[ends].set
    )
    async with asyncio.timeout(5):
        assert await one._is_soon_open() is (ends == "opened")
    assert bool(stats.away_since_ns) is (ends != "opened")
    assert not one._opening.cancelled()
    assert len(asyncio.all_tasks()) == (1 if ends == "opened" else 2), "nobody waits on"
    one._opening.cancel()
