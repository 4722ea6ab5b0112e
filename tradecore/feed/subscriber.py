"""Keep what one open socket is subscribed to in step with what is wanted."""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Literal, Protocol

from tradecore import clock
from tradecore.feed import control, subscriptions
from tradecore.feed.plan import Reason, SessionOver

log = logging.getLogger(__name__)

MAX_REFUSED_STREAMS = 16
"""When the venue refuses more single streams than this, the fault is not in the streams."""

RETRY_REFUSED_S = 60.0
"""When a refused stream is asked for again; doubled each time. It may have been a passing trouble
of the venue, or a symbol that is listed by now."""

_RETRY_CAP_S = 3600.0

Method = Literal["SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS"]


class Socket(Protocol):
    """What the subscriber needs of its session; both methods raise SessionOver at its end."""

    async def send_text(self, payload: bytes) -> None:
        """Send one frame, in pace."""

    async def wait_for_reply(self) -> None:
        """Wait until a reply has come, or for as long as one may take."""

    @property
    def data_came(self) -> bool:
        """Whether any data event has come."""


class Subscriber:
    """One request at a time; streams that the venue refuses are left out and told."""

    def __init__(self, name: str, socket: Socket, wanted: Sequence[str]) -> None:
        self.refused: list[str] = []
        """Streams that the venue does not know."""
        self.reply: control.Reply | None = None
        """The reply to the request that is under way."""
        self._name = name
        self._socket = socket
        self._wanted = dict.fromkeys(wanted)
        self._held: dict[str, None] = {}
        self._stuck: dict[str, None] = {}  # subscribed, not wanted, and the venue keeps sending
        self._told: set[str] = set()  # refused, and the operator knows
        self._retry_s = RETRY_REFUSED_S
        self._refused_ns = 0
        self._request_id = 0
        self._answers = True  # until the venue proves that it answers no request but sends data

    def want(self, streams: Sequence[str]) -> None:
        """Change what is wanted; it takes effect with the next reconcile()."""
        self._wanted = dict.fromkeys(streams)
        self.refused = [stream for stream in self.refused if stream in self._wanted]
        self._stuck = {stream: None for stream in self._stuck if stream not in self._wanted}

    @property
    def in_step(self) -> bool:
        """Whether there is nothing to ask for."""
        return not self._gone() and not self._missing()

    def retry_refused(self) -> None:
        """Want refused streams again when their time has come; the next reconcile() asks."""
        if self.refused and clock.mono_ns() - self._refused_ns > self._retry_s * 1e9:
            self._retry_s = min(2 * self._retry_s, _RETRY_CAP_S)
            self.refused = []

    def take(self, payload: bytes) -> bool:
        """Take a message that is no event; tell whether it answers the request. Never raises."""
        reply = control.parse_reply(payload)
        if reply is None or (reply.id != self._request_id and reply.id is not None):
            log.debug("message ignored", extra={"connection": self._name, "head": payload[:80]})
            return False
        if reply.id is None and reply.error is None:
            return False
        self.reply = reply
        return True

    async def reconcile(self) -> None:
        """Ask for what is missing and give up what is not wanted any more.

        Raises SessionOver (SUBSCRIBE_FAILED) when the venue does not do what it is asked.
        """
        while not self.in_step:
            # First what goes: the venue counts streams, and there may be no room for more.
            await self._unsubscribe()
            await self._subscribe()

    def _gone(self) -> list[str]:
        return [s for s in self._held if s not in self._wanted and s not in self._stuck]

    def _missing(self) -> list[str]:
        return [s for s in self._wanted if s not in self._held and s not in self.refused]

    async def _subscribe(self) -> None:
        todo = deque(subscriptions.batches(self._missing()))
        while todo:
            batch = todo.popleft()
            reply = await self._request("SUBSCRIBE", batch)
            if not self._answers or (reply is not None and reply.error is None):
                self._held |= dict.fromkeys(batch)
                continue
            if reply is not None and reply.error and reply.error.code == control.INVALID_REQUEST:
                if len(batch) > 1:  # one wrong stream spoils the batch: look for it
                    middle = len(batch) // 2
                    todo.extendleft((batch[middle:], batch[:middle]))
                    continue
                self._refuse(batch[0], str(reply.error))
                if len(self.refused) <= min(MAX_REFUSED_STREAMS, len(self._wanted) - 1):
                    continue
            await self._check(batch, None if reply is None else str(reply.error))
            self._held |= dict.fromkeys(batch)

    def _refuse(self, stream: str, cause: str) -> None:
        self.refused.append(stream)
        self._refused_ns = clock.mono_ns()
        if stream not in self._told:
            self._told.add(stream)
            log.error(
                "the venue refuses a stream; it is asked for again later; check SUPPORTED_SYMBOLS "
                "and STREAMS",
                extra={"connection": self._name, "stream": stream, "cause": cause},
            )

    async def _check(self, batch: tuple[str, ...], error: str | None) -> None:
        """Ask which streams of a doubtful batch are subscribed; the session ends unless all are.

        Where no request is answered at all but data come, they are the better proof.
        """
        cause = error or "no reply"
        listed = await self._request("LIST_SUBSCRIPTIONS")
        if error is None and listed is None and self._socket.data_came:
            self._answers = False
            log.warning(
                "the venue answers no request but sends data; carrying on without replies",
                extra={"connection": self._name, "streams": len(batch)},
            )
            return
        missing = set(batch) - set(listed.streams if listed is not None else ())
        log.warning(
            "SUBSCRIBE was not acknowledged" if missing else "a reply to SUBSCRIBE was lost",
            extra={
                "connection": self._name,
                "cause": cause,
                "symbols": sorted({stream.partition("@")[0] for stream in missing or batch}),
            },
        )
        if missing:
            raise SessionOver(Reason.SUBSCRIBE_FAILED, cause)

    async def _unsubscribe(self) -> None:
        for batch in subscriptions.batches(self._gone()):
            reply = await self._request("UNSUBSCRIBE", batch)
            stuck: set[str] = set()
            if self._answers and (reply is None or reply.error is not None):
                listed = await self._request("LIST_SUBSCRIPTIONS")
                stuck = set(batch) & set(listed.streams if listed is not None else batch)
            if stuck:  # its data are not wanted and do no harm
                self._stuck |= dict.fromkeys(stuck)
                log.warning(
                    "UNSUBSCRIBE was not acknowledged; the streams end with the session",
                    extra={
                        "connection": self._name,
                        "cause": str(reply.error) if reply is not None else "no reply",
                        "symbols": sorted({stream.partition("@")[0] for stream in stuck}),
                    },
                )
            for stream in batch:
                if stream not in stuck:
                    del self._held[stream]

    async def _request(
        self, method: Method, streams: Sequence[str] | None = None
    ) -> control.Reply | None:
        """Send one request and return its reply; None when none came in time."""
        self._request_id += 1
        payload = subscriptions.request(method, streams, self._request_id)
        self.reply = None
        await self._socket.send_text(payload)
        if self._answers:
            await self._socket.wait_for_reply()
        return self.reply
