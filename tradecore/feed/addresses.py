"""The venue's host names as addresses, also while the name service is down."""

import asyncio
import logging
import socket
from typing import Any

log = logging.getLogger(__name__)

MAX_HOSTS = 16
MAX_ADDRESSES = 16

_IMPATIENT_S = 2.0
"""How long an answer is waited for when an older one is at hand."""

AddressInfo = tuple[Any, Any, int, str, Any]
"""One row of getaddrinfo."""


class AddressBook:
    """Resolve names; what a name last stood for is kept for when it cannot be asked again."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], list[AddressInfo]] = {}
        self._asking: dict[tuple[str, int], asyncio.Future[list[AddressInfo]]] = {}

    async def resolve(self, host: str, port: int, limit_s: float) -> list[AddressInfo]:
        """Return the addresses of a host, the remembered ones when resolving fails or hangs.

        Raises OSError (TimeoutError is one) when none are remembered either.
        """
        key = host, port
        known = self._known.get(key)
        try:
            async with asyncio.timeout(min(limit_s, _IMPATIENT_S) if known else limit_s):
                # A lookup cannot be stopped and holds a thread: there is one for each name.
                found = await asyncio.shield(self._ask(key))
        except OSError as error:
            timed_out = isinstance(error, TimeoutError) and not error.args
            if not known:
                if timed_out:
                    raise TimeoutError(
                        f"name {host} was not resolved within {limit_s:g} s"
                    ) from None
                raise
            log.warning(
                "a name cannot be resolved; using the addresses it had before",
                extra={
                    "host": host,
                    "cause": "no answer in time" if timed_out else str(error),
                    "addresses": [info[4][0] for info in known],
                },
            )
            return known
        return found

    def _ask(self, key: tuple[str, int]) -> "asyncio.Future[list[AddressInfo]]":
        asking = self._asking.get(key)
        if asking is None:
            asking = asyncio.ensure_future(
                asyncio.get_running_loop().getaddrinfo(
                    *key, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
                )
            )
            self._asking[key] = asking
            asking.add_done_callback(lambda done: self._answered(key, done))
        return asking

    def _answered(self, key: tuple[str, int], done: "asyncio.Future[list[AddressInfo]]") -> None:
        del self._asking[key]
        if done.cancelled() or done.exception() is not None or not done.result():
            return
        self._known.pop(key, None)
        self._known[key] = done.result()[:MAX_ADDRESSES]
        if len(self._known) > MAX_HOSTS:
            del self._known[next(iter(self._known))]
