"""DATA_DIR: one daemon at a time, and room on its disk."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from tradecore.errors import DataDirError

LOCK_NAME = "tradecore.lock"


def open_owned(path: Path, flags: int) -> int:
    """Open a file, or make one for the owner of its folder and nobody else; return its descriptor.

    What root's commands leave beside a daemon of another user must be that user's too: a ban that
    the daemon cannot read it does not keep. Raises OSError.
    """
    descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        with suppress(PermissionError):  # a root that may not give away, as in some containers
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
    return descriptor


class DataDir:
    """The folder that one daemon owns while it runs; `close` gives it free.

    The lock is the kernel's, so it ends with the process however that ends.
    """

    def __init__(self, path: Path) -> None:
        """Make the folder if needed and lock it.

        Raises DataDirError when it cannot be written or another daemon has it.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._fd = open_owned(path / LOCK_NAME, os.O_RDWR)
        except OSError as exc:
            raise DataDirError(
                f"DATA_DIR {path} cannot be used: {exc.strerror}; "
                "give this user write access or set another DATA_DIR"
            ) from exc
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise DataDirError(
                f"DATA_DIR {path} is used by another tradecore (process {holder}): "
                "stop that one or set another DATA_DIR"
            ) from None
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)
        except OSError as exc:
            os.close(self._fd)
            raise DataDirError(
                f"DATA_DIR {path} cannot be written: {exc.strerror}; free disk room"
            ) from exc

    @property
    def ring_path(self) -> Path:
        """Where the ring's file lies."""
        return self.path / "ring"

    def close(self) -> None:
        """Let another daemon have the folder."""
        os.close(self._fd)
