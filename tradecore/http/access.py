"""Who may ask the side server for what: by which Host names, and with which token.

Probes and metrics are open: a supervisor or a scraper has no secret. All else is open on a loopback
address, needs the token where there is one, and is closed on any other address without one, unless
HTTP_AUTH=off says that the network is private.
"""

import base64
import binascii
import hashlib
import ipaddress
import logging
import math
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass
from hmac import compare_digest
from typing import NamedTuple

from aiohttp import HttpVersion10, hdrs, web

from tradecore.http.peers import RateLimiter, peer_of
from tradecore.log import once_per
from tradecore.settings import Settings
from tradecore.values import Secret, is_loopback

log = logging.getLogger(__name__)

PROBE_PATHS = frozenset({"/live", "/ready", "/metrics", "/health", "/health/db", "/health/binance"})
"""What asks how the daemon is."""

FAILURES_PER_S = 1.0
FAILURES_BURST = 10
"""So many wrong tokens of one peer are told that they are; more have to wait."""

BASIC = 'Basic realm="tradecore", charset="UTF-8"'
"""Makes browsers ask for the token, as a password; the name does not matter."""
BEARER = 'Bearer realm="tradecore"'


_SEES_INSIDE = web.RequestKey("sees_inside", bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the operator allows; as it stands, everything to everyone who reaches the address."""

    token: Secret | None = None
    is_token_asked: bool = False
    """Whether an address that is not loopback is closed without a token."""
    hosts: Collection[str] = ()
    cors_origins: Collection[str] = ()

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        """Return what the settings say."""
        return cls(
            token=settings.http_token,
            is_token_asked=settings.http_auth == "token",
            hosts=settings.http_hosts,
            cors_origins=settings.cors_origins,
        )

    def advice(self, bind_host: str) -> str:
        """Return what is wrong with serving at this address, and how to mend it; "" if nothing."""
        if is_loopback(bind_host) or self.token is not None:
            return ""
        if self.is_token_asked:
            return (
                f"HTTP_HOST {bind_host} is reached from outside and HTTP_TOKEN is not set: only"
                " probes and /metrics are served; set HTTP_TOKEN, or HTTP_AUTH=off where all who"
                " reach it may read everything"
            )
        return f"HTTP_HOST {bind_host} serves everything to everyone who reaches it (HTTP_AUTH=off)"


class Refusal(NamedTuple):
    """Why a request is not answered."""

    reason: str
    """One of `counts.REFUSALS`."""
    status: int
    text: str = ""
    wait_s: float = 0.0


class HostNames:
    """The names by which the server may be called.

    A page in the operator's browser could read the answers by pointing its own name to our address
    (DNS rebinding); that needs a name, so addresses are fine.
    """

    def __init__(self, bind_host: str, more: Collection[str] = ()) -> None:
        self._is_local = is_loopback(bind_host)
        own = set() if self._is_local else {socket.gethostname().lower()}
        addresses = {"127.0.0.1", "::1"} if self._is_local else set()
        self._names = {"localhost", bind_host.lower(), *addresses, *own, *more}

    def refuse(self, request: web.Request) -> Refusal | None:
        """Refuse a request that names another host; that there is one name, aiohttp sees to."""
        if request.version < HttpVersion10:
            return Refusal("malformed", 400)
        given = request.headers.get(hdrs.HOST)
        if given is None:
            return None
        # A target with a host of its own overrides the header. (Without a header aiohttp would
        # ask a name server who we are.)
        if self._knows(given) and self._knows(request.host):
            return None
        use = "use localhost" if self._is_local else "use the address"
        return Refusal("host", 421, f"This Host name is not in HTTP_HOSTS; {use}.")

    def _knows(self, host: str) -> bool:
        name = _host_name(host)
        return name in self._names or (not self._is_local and _is_address(name))


class Access:
    """Decides who may see what; `refuse` is asked before every answer."""

    def __init__(self, bind_host: str, policy: Policy) -> None:
        self._digest = None if policy.token is None else _digest(policy.token.reveal())
        self._is_closed = (
            policy.token is None and policy.is_token_asked and not is_loopback(bind_host)
        )
        self._failures = RateLimiter(FAILURES_PER_S, FAILURES_BURST)

    def refuse(self, request: web.Request) -> Refusal | None:
        """Refuse a request that may not see what it asks for."""
        is_open = request.path in PROBE_PATHS
        refusal = self._judge(request)
        # An open path tells those with the token more.
        request[_SEES_INSIDE] = refusal is None
        return None if is_open else refusal

    def _judge(self, request: web.Request) -> Refusal | None:
        if self._is_closed:
            return Refusal(
                "closed",
                403,
                "Only probes and /metrics are served to other hosts until HTTP_TOKEN is set, or"
                " HTTP_AUTH=off.",
            )
        if self._digest is None:
            return None
        header = request.headers.get(hdrs.AUTHORIZATION)
        if header is None:
            return Refusal("token_missing", 401, "Show the token of HTTP_TOKEN.")
        # However many wrong ones came before: all clients of a proxy are one peer, and none of them
        # must keep the others out. A token of 16 characters is long enough to be guessed by nobody.
        if compare_digest(_digest(_shown(header)), self._digest):
            return None
        peer = peer_of(request.remote)
        if wait_s := self._failures.take(peer):
            return Refusal("token_rate", 429, "Too many wrong tokens.", wait_s)
        once_per(log, "token").warning("HTTP token is wrong", extra={"peer": peer})
        return Refusal("token_wrong", 401, "This is not the token of HTTP_TOKEN.")


def sees_inside(request: web.Request) -> bool:
    """Tell whether an answer may hold texts of errors, which name hosts and roles."""
    return bool(request.get(_SEES_INSIDE))


def add_reply_headers(request: web.Request, refusal: Refusal, response: web.StreamResponse) -> None:
    """Say when to come again, what may be asked instead, and how to show a token."""
    if refusal.wait_s:
        response.headers[hdrs.RETRY_AFTER] = str(math.ceil(refusal.wait_s))
    if refusal.status == 405:
        response.headers[hdrs.ALLOW] = "GET, HEAD"
    if refusal.status == 401:
        # For Basic a browser asks its user: once, when it opens a page, and not for its scripts.
        if request.headers.get("Sec-Fetch-Dest") not in ("empty", "websocket"):
            response.headers.add(hdrs.WWW_AUTHENTICATE, BASIC)
        response.headers.add(hdrs.WWW_AUTHENTICATE, BEARER)


def _digest(token: str) -> bytes:
    # Of one length, so that a comparison tells nothing of the token's.
    return hashlib.blake2b(token.encode(errors="surrogateescape"), digest_size=32).digest()


def _shown(header: str) -> str:
    """Return the token that an Authorization header shows, "" when it shows none."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        pair = base64.b64decode(value.strip(), validate=True)
    except (binascii.Error, ValueError):
        return ""
    return pair.partition(b":")[2].decode(errors="surrogateescape")


# The dot behind a name is that of the DNS root.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+?)\.?)(?::[0-9]{1,5})?")


def _host_name(host: str) -> str:
    if _is_address(host):  # as the target's own host has it, without the brackets
        return host
    match = _HOST.fullmatch(host.lower())
    return (match[1] or match[2]) if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
