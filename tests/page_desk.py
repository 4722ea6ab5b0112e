"""Headless Chromium by its DevTools protocol: opens pages, asks them, photographs them."""

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

WAIT_LIMIT_S = 30.0

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)

PHONE = (360, 740)
DESKTOP = (1280, 900)


class Tab:
    """One page in the browser."""

    def __init__(self, browser: "Browser", session_id: str) -> None:
        self._browser = browser
        self._session_id = session_id
        self.problems: list[str] = []
        """Errors of scripts, of the policy and of the console; not answers that failed."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self._browser.call(method, self._session_id, **parameters)

    async def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, or of the promise that it is."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, condition: str, limit_s: float = WAIT_LIMIT_S) -> Any:
        """Wait until an expression is true; return its value."""
        value = None
        try:
            async with asyncio.timeout(limit_s):
                while not (value := await self.run(condition)):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            shown = await self.run("document.body.innerText.slice(0, 1500)")
            raise AssertionError(f"in vain: {condition}\n{self.problems}\n{shown}") from None
        return value

    async def text(self, selector: str) -> str:
        return str(await self.run(f"document.querySelector({json.dumps(selector)}).textContent"))

    async def click(self, selector: str) -> None:
        await self.run(f"document.querySelector({json.dumps(selector)}).click()")

    async def look(self, size: tuple[int, int], scheme: str = "dark") -> None:
        """Take another size of the window, and another wish for colors."""
        width, height = size
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    async def photograph(self, path: Path) -> None:
        """Write the whole page as PNG."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(shot["data"]))

    def take(self, event: dict[str, Any]) -> None:
        """Keep what an event says of errors."""
        parameters = event["params"]
        match event["method"]:
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(parameters["exceptionDetails"])[:500])
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning"):
                self.problems.append(json.dumps(parameters["args"])[:500])
            case "Log.entryAdded":
                entry = parameters["entry"]
                # A daemon that is away, or not ready, makes such entries: the tests are about it.
                if entry["level"] in ("error", "warning") and entry["source"] != "network":
                    self.problems.append(f"{entry['source']}: {entry['text']}")


class Browser:
    """The protocol on one WebSocket."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self._ws = ws
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}

    async def read(self) -> None:
        async for message in self._ws:
            body = json.loads(message.data)
            if "id" in body:
                waiter = self._waiting.pop(body["id"])
                if not waiter.done():
                    waiter.set_result(body)
            elif (tab := self._tabs.get(body.get("sessionId", ""))) is not None:
                tab.take(body)

    async def call(
        self, method: str, session_id: str | None = None, **parameters: Any
    ) -> dict[str, Any]:
        number = next(self._numbers)
        request = {"id": number, "method": method, "params": parameters}
        if session_id is not None:
            request["sessionId"] = session_id
        waiter = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._ws.send_str(json.dumps(request))
        async with asyncio.timeout(WAIT_LIMIT_S):
            body = await waiter
        assert "error" not in body, (method, body["error"])
        result: dict[str, Any] = body["result"]
        return result

    async def open(self, url: str, size: tuple[int, int] = DESKTOP, scheme: str = "dark") -> Tab:
        """Open a page in a tab of its own."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        session_id = attached["sessionId"]
        tab = self._tabs[session_id] = Tab(self, session_id)
        for domain in ("Page", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        await tab.look(size, scheme)
        await tab.call("Page.navigate", url=url)
        await tab.until("location.href !== 'about:blank' && document.readyState === 'complete'")
        return tab


@asynccontextmanager
async def browsing(folder: Path) -> AsyncIterator[Browser]:
    """Run Chromium with a fresh profile below `folder`; skip the test where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium (apt: chromium) is absent")
    profile = folder / "chromium"
    process = await asyncio.create_subprocess_exec(
        *(program, *FLAGS, f"--user-data-dir={profile}", "about:blank"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin"},
        start_new_session=True,
    )
    try:
        port, path = await _address(process, profile / "DevToolsActivePort")
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://127.0.0.1:{port}{path}", max_msg_size=0) as ws,
        ):
            browser = Browser(ws)
            reading = asyncio.create_task(browser.read())
            try:
                yield browser
                with suppress(ConnectionError, aiohttp.ClientError):
                    await browser.call("Browser.close")
            finally:
                reading.cancel()
        async with asyncio.timeout(WAIT_LIMIT_S):
            await process.wait()
    finally:
        # Its helpers are in the same session.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _address(process: asyncio.subprocess.Process, file: Path) -> tuple[str, str]:
    async with asyncio.timeout(WAIT_LIMIT_S):
        while True:
            if file.exists() and len(lines := file.read_text().split()) == 2:
                return lines[0], lines[1]
            assert process.returncode is None, f"chromium ended with code {process.returncode}"
            await asyncio.sleep(0.02)
