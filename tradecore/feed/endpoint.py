"""Where the venue is, and how a WebSocket to it is opened.

The socket is made here and not by picows, because the receive buffer has to be bounded before the
TCP handshake, and because name, address, TLS and upgrade then share one time limit.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from picows import WSHandshakeError, WSListener, WSTransport, ws_connect
from picows.url import WSParsedURL

from tradecore.block import retry_after_s, told_s
from tradecore.errors import SettingsError, VenueError
from tradecore.feed.addresses import AddressBook
from tradecore.tls import tls_context
from tradecore.values import is_loopback

RECEIVE_BUFFER_BYTES = 1 << 20
"""SO_RCVBUF: one socket read can carry all of it, so this bounds what a paused feed still gets."""

MAX_FRAME_BYTES = 8 << 20
"""Longer frames end the connection (1009). Far above what the listener accepts, so that a frame
that is merely too long is refused and counted without losing the connection."""

_READ_BUFFER_BYTES = 64 << 10
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)
"""A peer that vanished without a FIN is noticed after 30 s, even when no stream is busy."""

_HINTS = {
    403: "the venue's firewall refuses this address",
    404: "no WebSocket there; check BINANCE_WEBSOCKET_URL",
    418: "the venue has banned this address for a while",
    429: "too many connection attempts from this address",
    451: "the venue does not serve this country; wss://data-stream.binance.vision may",
}

_wire_log = logging.getLogger(f"{__name__}.wire")
_wire_log.setLevel(logging.CRITICAL)  # what picows tells there the session tells with its cause


class UpgradeRefusedError(VenueError):
    """The venue answered the upgrade with an HTTP status; `retry_after_s` is its own wish or 0."""

    def __init__(self, message: str, status: int, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The base address of the venue's streams, as parsed from BINANCE_WEBSOCKET_URL."""

    secure: bool
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, base_url: str) -> "Endpoint":
        """Take a base URL with or without a trailing `/`, `/ws` or `/stream`.

        Raises SettingsError when it is no WebSocket URL, or plain `ws` to another host.
        """

        def refuse(cause: str) -> SettingsError:
            return SettingsError([f"BINANCE_WEBSOCKET_URL: {cause}"])

        try:
            parts = urlsplit(base_url.strip())
            port = parts.port
        except ValueError as error:
            raise refuse(f"not a URL ({error}); use wss://stream.binance.com:9443") from None
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise refuse("has to look like wss://stream.binance.com:9443")
        if parts.username is not None or parts.query or parts.fragment:
            raise refuse("takes no user name, query or fragment")
        secure = parts.scheme == "wss"
        if not secure and not is_loopback(parts.hostname):
            raise refuse(f"plain ws:// is for this machine only; use wss://{parts.netloc}")
        path = parts.path.rstrip("/")
        for suffix in ("/ws", "/stream"):
            if path.endswith(suffix):
                path = path.removesuffix(suffix).rstrip("/")
                break
        return cls(secure, parts.hostname, port or (443 if secure else 80), path)

    @property
    def url(self) -> str:
        """The combined-mode URL to connect to; times are asked for in microseconds.

        One precision everywhere: the venue's dumps and REST rows have microseconds too.
        """
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme, default = ("wss", 443) if self.secure else ("ws", 80)
        netloc = host if self.port == default else f"{host}:{self.port}"
        return f"{scheme}://{netloc}{self.path}/stream?timeUnit=MICROSECOND"

    @property
    def address(self) -> str:
        """Host and port, for people."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    async def open(
        self,
        listener_factory: Callable[[], WSListener],
        limit_s: float,
        addresses: AddressBook | None = None,
    ) -> tuple[WSTransport, WSListener]:
        """Connect and upgrade; no extension is offered, so frames are never compressed.

        With `addresses` an attempt outlives a failure of the name service.

        Raises OSError (ssl.SSLError and TimeoutError are among them), UpgradeRefusedError, or
        another VenueError. When it raises or is cancelled, nothing stays open, and the factory is
        not called any more.
        """
        sockets: list[socket.socket] = []
        abandoned = False

        async def make_socket(_: WSParsedURL) -> socket.socket:
            sock = await self._connect_tcp(limit_s, addresses or AddressBook())
            sockets.append(sock)
            return sock

        def make_listener(_request: Any, _response: Any) -> WSListener:
            if abandoned:  # a reply that came after we gave up must not start a second life
                raise ConnectionAbortedError("connection attempt was given up")
            return listener_factory()

        tls: dict[str, Any] = {}
        if self.secure:
            tls = {
                "ssl_context": tls_context(),
                "ssl_handshake_timeout": limit_s,
                "ssl_shutdown_timeout": 2.0,
            }
        try:
            async with asyncio.timeout(limit_s):
                transport, listener = await ws_connect(
                    make_listener,
                    self.url,
                    websocket_handshake_timeout=limit_s,
                    logger_name=_wire_log,
                    # The listener answers pings: picows would hide a ping that ends a read, and
                    # with it the end of the read.
                    enable_auto_pong=False,
                    max_frame_size=MAX_FRAME_BYTES,
                    max_redirects=0,
                    read_buffer_init_size=_READ_BUFFER_BYTES,
                    # Its transports read once per poll event. uvloop stops polling a socket that
                    # was reset, so the rest of a burst and the end itself would go unnoticed.
                    use_aiofastnet=False,
                    socket_factory=make_socket,
                    **tls,
                )
            if listener is None:  # picows' way to say that the peer hung up before the upgrade
                raise ConnectionResetError(f"{self.host} closed the connection during the upgrade")
            if extensions := transport.response.headers.get("Sec-WebSocket-Extensions"):
                transport.disconnect(graceful=False)
                raise VenueError(f"{self.host} uses extensions nobody asked for: {extensions}")
        except BaseException as error:
            abandoned = True
            for sock in sockets:
                # The transport may still own it: end-of-file makes the transport close itself.
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            if isinstance(error, WSHandshakeError):
                raise _explain(self.host, error) from error
            if isinstance(error, TimeoutError) and not error.args:
                raise TimeoutError(f"{self.host} gave no answer within {limit_s:g} s") from error
            if isinstance(error, ConnectionResetError) and not error.args:
                raise ConnectionResetError(f"{self.host} hung up in the TLS handshake") from error
            raise
        return transport, listener

    async def _connect_tcp(self, limit_s: float, addresses: AddressBook) -> socket.socket:
        """Resolve the name and connect to the first address that answers."""
        loop = asyncio.get_running_loop()
        found = await addresses.resolve(self.host, self.port, limit_s / 2)
        failure: OSError = OSError(f"{self.host} has no address")
        for family, kind, protocol, _, address in found:
            if not self.secure and not is_loopback(str(address[0])):
                raise VenueError(f"plain ws:// is refused: {self.host} is {address[0]}, not here")
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for option in _KEEPALIVE:
                    sock.setsockopt(*option)
                # An address that swallows packets must leave time for the next one.
                async with asyncio.timeout(limit_s / min(len(found) + 1, 4)):
                    await loop.sock_connect(sock, address)
                return sock
            except OSError as error:
                sock.close()
                failure = error if error.args else TimeoutError(f"{address[0]} does not answer")
            except BaseException:
                sock.close()
                raise
        raise failure


def _explain(host: str, error: WSHandshakeError) -> VenueError:
    """Turn picows' error into a sentence for the operator."""
    if error.response is None:
        return VenueError(f"{host} does not speak WebSocket: {error}")
    status = int(error.response.status)
    if status == 101:
        return VenueError(f"{host} made a wrong WebSocket upgrade: {error}")
    hint = _HINTS.get(status, "no upgrade to WebSocket")
    headers, body = error.response.headers, error.raw_body or b""
    wish_s = max(retry_after_s(headers), told_s(headers, body))
    return UpgradeRefusedError(f"{host} answered HTTP {status}: {hint}", status, wish_s)
