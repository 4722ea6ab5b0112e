"""The venue's host names as addresses, also while the name service is down."""

import asyncio
import logging
import socket
from typing import Any

log = logging.getLogger(__name__)

MAX_HOSTS = 16
MAX_ADDRESSES = 16

_IMPATIENT_S = 0.2
"""How long an answer is waited for when an older one is at hand; it still serves the next time."""

AddressInfo = tuple[Any, Any, int, str, Any]
"""One row of getaddrinfo."""


class AddressBook:
    """Resolve names; what a name last stood for is kept for when it cannot be asked again."""

    def __init__(self) -> None:
        self._known: dict[str, list[AddressInfo]] = {}
        self._asking: dict[str, asyncio.Future[list[AddressInfo]]] = {}

    async def resolve(self, host: str, port: int, limit_s: float) -> list[AddressInfo]:
        """Return the addresses of a host, the remembered ones when resolving fails or is slow.

        Raises OSError (TimeoutError is one) when none are remembered either.
        """
        known = self._known.get(host)
        try:
            async with asyncio.timeout(min(limit_s, _IMPATIENT_S) if known else limit_s):
                # A lookup cannot be stopped and holds a thread: there is one for each name.
                found = await asyncio.shield(self._ask(host, port))
        except OSError as error:
            timed_out = isinstance(error, TimeoutError) and not error.args
            if not known:
                if timed_out:
                    raise TimeoutError(
                        f"name {host} was not resolved within {limit_s:g} s"
                    ) from None
                raise
            log.warning(
                "a name is not resolved now; using the addresses it had before",
                extra={
                    "host": host,
                    "cause": "no answer in time" if timed_out else str(error),
                    "addresses": [info[4][0] for info in known],
                },
            )
            found = known
        return [_at(info, port) for info in found]

    def _ask(self, host: str, port: int) -> "asyncio.Future[list[AddressInfo]]":
        asking = self._asking.get(host)
        if asking is None:
            asking = asyncio.ensure_future(
                asyncio.get_running_loop().getaddrinfo(
                    host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
                )
            )
            self._asking[host] = asking
            asking.add_done_callback(lambda done: self._answered(host, done))
        return asking

    def _answered(self, host: str, done: "asyncio.Future[list[AddressInfo]]") -> None:
        del self._asking[host]
        if done.cancelled() or done.exception() is not None or not done.result():
            return
        self._known.pop(host, None)
        self._known[host] = done.result()[:MAX_ADDRESSES]
        if len(self._known) > MAX_HOSTS:
            del self._known[next(iter(self._known))]


def _at(info: AddressInfo, port: int) -> AddressInfo:
    """Return the address with this port: a host is asked for once, whatever its ports."""
    return (*info[:4], (info[4][0], port, *info[4][2:]))
