"""A real Prometheus on loopback, with a port and a folder of its own."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.daemon import free_port

ROOT = Path(__file__).parents[1]
RULES = ROOT / "deploy" / "prometheus" / "rules"

WAIT_LIMIT_S = 40.0

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (apt: prometheus) is absent"
)
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus (apt) is absent"
)

_CONFIG = """\
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: [{folder}/rules/*.yml]
scrape_configs:
  - job_name: tradecore
    static_configs: [{{targets: ["{target}"]}}]
"""


def promtool(*arguments: str | Path) -> None:
    """Run promtool; what it finds fails the test."""
    result = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


def metric_names(text: str) -> set[str]:
    """Return the metrics of ours that a text names; those of histograms without their suffix."""
    names = set(re.findall(r"(?<![\w:])tradecore_\w+", text))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


class Prometheus:
    """A running server; its log is in `log_file`."""

    def __init__(self, url: str, log_file: Path) -> None:
        self.url = url
        self.log_file = log_file

    async def get(self, path: str, **parameters: str) -> Any:
        """Return `data` of an answer of its API; None while it does not answer."""
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{self.url}/api/v1/{path}", params=parameters) as response,
            ):
                body = json.loads(await response.read())
        except (aiohttp.ClientError, json.JSONDecodeError):  # it is starting
            return None
        assert body["status"] == "success", (path, parameters, body)
        return body["data"]

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an expression at this moment."""
        data = await self.get("query", query=expression) or {"resultType": "vector", "result": []}
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        found: list[dict[str, Any]] = data["result"]
        return found

    async def firing(self) -> dict[str, dict[str, Any]]:
        """Return the alerts that fire: name and scope, as "Name scope", to the alert."""
        alerts = (await self.get("alerts") or {"alerts": []})["alerts"]
        return {
            " ".join(filter(None, (one["labels"]["alertname"], one["labels"].get("scope")))): one
            for one in alerts
            if one["state"] == "firing"
        }

    async def until_firing(self, wanted: Iterable[str], seen: dict[str, Any]) -> None:
        """Wait until exactly these alerts fire; note in `seen` all that fired meanwhile."""

        async def exactly() -> bool:
            firing = await self.firing()
            seen.update(firing)
            return firing.keys() == set(wanted)

        await self.until(exactly, lambda: f"fired: {sorted(seen)}")

    async def until(self, condition: Callable[[], Any], tell: Callable[[], object] = str) -> None:
        """Wait until the awaitable that `condition` returns gives true."""
        try:
            async with asyncio.timeout(WAIT_LIMIT_S):
                while not await condition():
                    await asyncio.sleep(0.2)
        except TimeoutError:
            log = self.log_file.read_text()[-2000:]
            raise AssertionError(f"waited in vain; {tell()}\n{log}") from None


@asynccontextmanager
async def prometheus(
    folder: Path, target: str, edit_rules: Callable[[str], str]
) -> AsyncIterator[Prometheus]:
    """Scrape `target` each second and evaluate our rules as `edit_rules` returns them."""
    (folder / "rules").mkdir(parents=True)
    for path in RULES.glob("*.yml"):
        (folder / "rules" / path.name).write_text(edit_rules(path.read_text()))
    config = folder / "prometheus.yml"
    config.write_text(_CONFIG.format(folder=folder, target=target))
    promtool("check", "config", config)
    address = f"127.0.0.1:{free_port()}"
    log_file = folder / "prometheus.log"
    with log_file.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
            stdout=log,
            stderr=log,
        )
    try:
        yield Prometheus(f"http://{address}", log_file)
    finally:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()
