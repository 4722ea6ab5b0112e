"""A REST server that answers as the test says, and records what it was asked and when."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class OddServer:
    """`answers` are given one after another, the last one for ever."""

    server: TestServer
    answers: list[Any] = field(default_factory=list)
    asked: list[web.Request] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            response: web.StreamResponse = await answer(request)
            return response
        if isinstance(answer, bytes):
            return web.Response(body=answer)
        status, headers, body = answer
        return web.Response(status=status, headers=headers, body=body)


@asynccontextmanager
async def odd_server(*answers: Any) -> AsyncIterator[OddServer]:
    """Serve `answers`: bytes (status 200), (status, headers, body), or a handler."""
    app = web.Application()
    odd = OddServer(TestServer(app), list(answers))
    app.router.add_get("/{tail:.*}", odd.handle)
    await odd.server.start_server()
    try:
        yield odd
    finally:
        await odd.server.close()
