"""When the venue may be asked for a connection: its refusals, and its limit on attempts.

All connections of a feed share one, and what has to outlive the process is in DATA_DIR. A 418 is
taken as a ban of our address at all hosts of the venue; 429, 403 and 451 hold for the host that
said so, and the Retry-After of any other refusal (503, say) for that endpoint.
"""

import logging
import os
from contextlib import suppress
from math import ceil
from pathlib import Path

from tradecore import clock
from tradecore.backoff import AttemptBudget
from tradecore.block import LONGEST_S, MARGIN_S, Block, BlockFile, Memory, mono_s, sentence
from tradecore.datadir import open_owned
from tradecore.feed.endpoint import Endpoint, UpgradeRefusedError

STATE_NAME = "feed_bans.json"
ATTEMPTS_NAME = "feed_attempts"

_EVERYWHERE = "all hosts"
_LONGEST_WISH_S = 900.0
_ALONE_S = 5.0
"""How long the first attempt after a silence stays alone: its answer may be the same again."""
_PEACE_S = 86_400.0
"""The ban after a day without any is a first one."""

log = logging.getLogger(__name__)


class Gate:
    """Who asks for a connection takes an attempt here first, and tells what a refusal said.

    `folder` is DATA_DIR; None = nothing is remembered.
    """

    def __init__(self, folder: Path | None = None, budget: AttemptBudget | None = None) -> None:
        self._budget = budget or AttemptBudget()
        self._bans = folder and folder / STATE_NAME
        self._attempts = folder and folder / ATTEMPTS_NAME
        self._silences: dict[str, _Silence] = {}
        self._recall()

    def silent_s(self, endpoint: Endpoint) -> float:
        """For how many seconds nobody may ask there; 0 = now."""
        return max(silence.left_s for silence in self._over(endpoint))

    def take_s(self, endpoint: Endpoint, *, planned: bool = False) -> float:
        """Take an attempt and return 0.0, or take none and return the seconds to ask again after.

        `planned`: it can wait, and leaves the last attempts to those that cannot.
        """
        silences = self._over(endpoint)
        wait_s = max(silence.wait_s for silence in silences)
        wait_s = wait_s or self._budget.take_s(planned=planned)
        if not wait_s:
            self._save()
            for silence in silences:
                silence.try_out()
        return wait_s

    def refused(self, endpoint: Endpoint, refusal: UpgradeRefusedError) -> None:
        """Learn from a refusal; what forbids further attempts is on the disk on return."""
        status, told_s = refusal.status, refusal.retry_after_s
        if status in (418, 429, 403, 451):
            scope = _EVERYWHERE if status == 418 else endpoint.host
        elif told_s:
            scope, told_s = endpoint.address, min(told_s, _LONGEST_WISH_S)
        else:
            return
        silence = next(one for one in self._over(endpoint) if one.scope == scope)
        silence.begin(status, told_s)
        log.warning(
            "HTTP %d instead of a connection: %s not asked for one for %d s",
            *(status, f"{scope} {'are' if scope == _EVERYWHERE else 'is'}", ceil(silence.left_s)),
        )

    def _over(self, endpoint: Endpoint) -> "list[_Silence]":
        scopes = {
            _EVERYWHERE: self._bans,
            endpoint.host: self._bans,
            endpoint.address: None,  # overloaded, mostly: not worth a file
        }
        for scope, path in scopes.items():
            if scope not in self._silences:
                self._silences[scope] = _Silence(path, scope)
        return [self._silences[scope] for scope in scopes]

    def _recall(self) -> None:
        """Count the attempts of former runs; a file that says nothing clear says that all went."""
        if self._attempts is None:
            return
        full_ns = 1 << 62
        with suppress(ValueError):
            try:
                full_ns = int(self._attempts.read_bytes()) - clock.wall_ns() + clock.mono_ns()
            except OSError:
                return
        self._budget.recall(full_ns)

    def _save(self) -> None:
        """Leave to the next run when the attempts will be all there again, by the wall clock."""
        if self._attempts is not None:
            full_ns = self._budget.full_ns - clock.mono_ns() + clock.wall_ns()
            with suppress(OSError):  # it counts for this run in any case
                file = open_owned(self._attempts, os.O_WRONLY | os.O_TRUNC)
                try:
                    os.write(file, b"%d\n" % full_ns)
                finally:
                    os.close(file)


class _Silence:
    """For how long one scope is left alone; the file and its rules are those of the REST side."""

    def __init__(self, path: Path | None, scope: str) -> None:
        self.scope = scope
        self._file = BlockFile(path, scope)
        self._memory = self._file.read()
        self._begun_s = mono_s()
        self._alone_until_s = 0.0

    @property
    def left_s(self) -> float:
        """Seconds that are left of it."""
        if self._file.changed():
            told = self._file.read()
            blocks = [block for block in (self._memory.block, told.block) if block]
            strikes = max(self._memory.strikes, told.strikes)
            self._memory = Memory(max(blocks, default=None), strikes)
        block = self._memory.block
        return max(block.until_s - mono_s(), 0.0) if block else 0.0

    @property
    def wait_s(self) -> float:
        """Seconds until an attempt may be made, the trial of another included."""
        return max(self.left_s, self._alone_until_s - mono_s(), 0.0)

    def try_out(self) -> None:
        """Note an attempt: after a silence the first one goes alone."""
        if self._memory.block is not None:
            self._memory = self._memory._replace(block=None)
            self._alone_until_s = mono_s() + _ALONE_S

    def begin(self, status: int, told_s: float) -> None:
        """Leave it alone as the venue says; a refusal that comes meanwhile may prolong it only."""
        now_s, left_s = mono_s(), self.left_s
        strikes = self._memory.strikes
        if left_s and not told_s:
            return  # one of several attempts that were under way
        if now_s - self._begun_s > _PEACE_S:
            strikes = 0
        kind, length_s = sentence(status, told_s, strikes)
        length_s = min(length_s + MARGIN_S, LONGEST_S)
        block = Block(now_s + length_s, length_s, kind)
        if not left_s:
            self._begun_s = now_s
            strikes += status == 418
        self._alone_until_s = 0.0  # that was the answer
        ours = Memory(max(self._memory.block or block, block), min(strikes, 20))
        self._memory = self._file.write(ours, durable=True)
