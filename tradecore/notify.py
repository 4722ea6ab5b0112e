"""Words for systemd: a few lines in one datagram (sd_notify), for which no library is needed."""

import logging
import os
import socket
from collections.abc import MutableMapping

from tradecore.log import once_per

log = logging.getLogger(__name__)


class Notifier:
    """The service manager that started us; without one (no NOTIFY_SOCKET) nothing is sent."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take what it told us out of `environ`: our own children must not speak for us."""
        address = environ.pop("NOTIFY_SOCKET", "")
        # An abstract address is written with "@" for its first byte, which is 0.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watchdog_us = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "")
        is_ours = not pid or pid == str(os.getpid())
        self.watchdog_s = int(watchdog_us) / 1e6 if is_ours and watchdog_us.isdecimal() else None
        """It kills us when it has heard nothing for so long; None: it does not."""

    @property
    def listens(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self._address)

    def send(self, *lines: str) -> bool:
        """Send lines such as "READY=1"; never waits. False when it did not take them."""
        if not self._address:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            try:
                sender.sendto("\n".join(lines).encode(), self._address)
            except OSError as error:
                once_per(log, "notify").warning(
                    "systemd does not take what it is told; it is told again",
                    extra={"error": str(error)},
                )
                return False
        return True
