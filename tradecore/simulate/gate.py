"""What stands before every REST answer: weights, bans, counts, and faults for a while."""

import asyncio
import json
from collections import Counter
from typing import Any

from aiohttp import web

from tradecore import clock
from tradecore.simulate.hub import Hub
from tradecore.simulate.limits import WeightLimit
from tradecore.simulate.options import Options

MODES = ("ok", "429", "418", "500", "hang", "lag", "garbage")
_LIMIT_MESSAGE = "Too much request weight used; please use WebSocket Streams for live updates."
_JUNK = 5


class Gate:
    """Lets REST requests through, or answers them itself."""

    def __init__(self, hub: Hub, options: Options) -> None:
        self._hub = hub
        self._options = options
        self.limit = WeightLimit(options.weight_limit, options.ban_seconds)
        self.requests: Counter[str] = Counter()
        """Requests by endpoint, refused ones too."""
        self._served = 0
        self._mode = "hang" if options.rest_hang else "ok"
        self._endpoint = ""
        self._until_s = clock.mono_ns() / 1e9 + options.rest_hang
        self._lag_s = 0.0
        self._turn = 0

    def set_mode(self, mode: str, seconds: float, endpoint: str = "", lag_s: float = 0.0) -> None:
        """Answer in one of MODES for so long; `endpoint` = the end of a path, empty = all.

        The weights know the mode 418: it is a ban of the whole host.
        """
        self._mode, self._endpoint, self._lag_s = mode, endpoint, lag_s
        self._until_s = clock.mono_ns() / 1e9 + seconds
        if mode == "418":
            self.limit.ban(seconds)

    @property
    def lag_s(self) -> float:
        """The age at which a trade shows up in historicalTrades."""
        if self._mode == "lag" and self._left_s > 0:
            return self._lag_s
        return self._options.rest_lag

    @property
    def _left_s(self) -> float:
        return self._until_s - clock.mono_ns() / 1e9

    def _mode_for(self, endpoint: str) -> str:
        fits = endpoint == self._endpoint or (not self._endpoint and endpoint != "dump")
        return self._mode if fits and self._left_s > 0 else "ok"

    async def enter(self, endpoint: str, weight: int) -> web.Response | dict[str, str]:
        """Book a request; return the headers of its answer, or the answer when it is refused."""
        self.requests[endpoint] += 1
        headers: dict[str, str] = {}
        if weight:
            verdict = self.limit.charge(weight)
            used = str(verdict.used)
            headers = {"X-MBX-USED-WEIGHT": used, "X-MBX-USED-WEIGHT-1M": used}
            if verdict.status != 200:
                headers["Retry-After"] = str(verdict.retry_after_s)
                return self.refusal(verdict.status, -1003, verdict.message, headers)
        mode = self._mode_for(endpoint)
        if mode == "429":
            retry_after_s = max(1, round(self._left_s))
            self.limit.answered(429, retry_after_s)
            headers["Retry-After"] = str(retry_after_s)
            return self.refusal(429, -1003, _LIMIT_MESSAGE, headers)
        if mode == "500":
            return self.refusal(500, -1000, "Internal error; unable to process.", headers)
        if mode == "hang":
            self._hub.counts["rest hang"] += 1
            await asyncio.sleep(self._left_s)
        self._served += 1
        every = self._options.rest_error_every
        if every and self._served % every == 0:
            message = "Unknown error, please check your request."
            return self.refusal(503, -1000, message, headers)
        return headers

    def refusal(
        self, status: int, code: int, message: str, headers: dict[str, str]
    ) -> web.Response:
        """Return and count an error answer with the venue's body."""
        self._hub.counts[f"rest {status}"] += 1
        return reply(status, {"code": code, "msg": message}, headers)

    def answer(self, endpoint: str, body: Any, headers: dict[str, str]) -> web.Response:
        """Return a good answer, or junk with status 200 while that is the fault."""
        if self._mode_for(endpoint) != "garbage":
            return reply(200, body, headers)
        self._hub.counts["rest garbage"] += 1
        self._turn += 1
        return web.Response(
            text=_junk(self._turn, body), headers=headers, content_type="application/json"
        )


def reply(status: int, body: Any, headers: dict[str, str]) -> web.Response:
    """Return a JSON answer."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
    return web.Response(status=status, text=text, headers=headers, content_type="application/json")


def _junk(turn: int, body: Any) -> str:
    """Spoil an answer, in another way each time."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
    rows = body if isinstance(body, list) and len(body) > 1 else None
    kind = turn % _JUNK
    if kind == 0:
        return "<html><body>502 Bad Gateway</body></html>"
    if kind == 1 or rows is None:
        return text[: len(text) // 2]
    if kind == 2:
        return json.dumps(rows[::-1])
    if kind == 3:
        return json.dumps([rows[0], *rows])
    return text.replace('"price":"', '"price":"x')
