"""Which OS user runs the embedded server, and how it gets through to its files.

PostgreSQL refuses to run as root. When the daemon is root (containers, first steps in /root), the
server runs as an unprivileged user that already exists, and gets exactly the right it lacks: to
cross the folders above its own. No user is made and no file of anyone is opened for others.
"""

import errno
import logging
import os
import pwd
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from tradecore.errors import DataDirError

_CANDIDATES = ("postgres", "nobody")

# The layout of the attribute: acl(5) and linux/posix_acl_xattr.h.
_ACL = "system.posix_acl_access"
_ACL_VERSION = 2
_ACL_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_NO_ID = 0xFFFFFFFF
_EXECUTE = 1

# systemd starts no service of a dynamic user while anyone but root may cross these.
_SYSTEMD_FOLDERS = (Path("/var/lib/private"), Path("/var/cache/private"))

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OsUser:
    """An OS user other than ours."""

    name: str
    uid: int
    gid: int


def server_user(cluster: Path) -> OsUser | None:
    """Return who has to run the server on `cluster`; None means the user that we are.

    An existing cluster keeps its owner. Raises DataDirError when that owner is out of reach.
    """
    try:
        found = cluster.stat()
    except FileNotFoundError:
        found = None
    except PermissionError:
        raise DataDirError(
            f"{cluster} belongs to another OS user: run tradecore as that one"
        ) from None
    if os.geteuid() != 0:
        if found is not None and found.st_uid != os.geteuid():
            raise DataDirError(
                f"{cluster} belongs to the OS user {_name(found.st_uid)}:"
                " run tradecore as that one, or as root"
            )
        return None
    if found is not None:
        if found.st_uid == 0:
            raise DataDirError(
                f"{cluster} belongs to root, whom PostgreSQL refuses:"
                f" give it away with chown -R {_unprivileged().name} {cluster}"
            )
        return OsUser(_name(found.st_uid), found.st_uid, found.st_gid)
    return _unprivileged()


def _unprivileged() -> OsUser:
    for name in _CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return OsUser(name, entry.pw_uid, entry.pw_gid)
    raise DataDirError(
        "PostgreSQL does not run as root, and there is neither a user postgres nor nobody:"
        " run tradecore as an ordinary user, or make one with useradd --system postgres"
    )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def let_through(path: Path, user: OsUser) -> None:
    """Let `user` cross every folder above `path`: by an access list, else by the x bit for all.

    Raises DataDirError, and changes nothing, when one of them belongs to systemd.
    """
    folders = sorted({*path.parents, *path.resolve().parents})
    if closed := next((folder for folder in folders if folder in _SYSTEMD_FOLDERS), None):
        raise DataDirError(
            f"PostgreSQL cannot run in {closed} but as part of its service:"
            " start that (systemctl start tradecore), its database is then used"
        )
    for folder in folders:
        found = folder.stat()
        if found.st_uid == user.uid:
            needed = stat.S_IXUSR
        elif found.st_gid == user.gid:
            needed = stat.S_IXGRP
        else:
            needed = stat.S_IXOTH
        if found.st_mode & needed:
            continue
        if found.st_uid == user.uid:
            folder.chmod(found.st_mode | stat.S_IXUSR)
            continue
        try:
            changed = _grant_crossing(folder, user.uid)
        except OSError as exc:
            if exc.errno not in (errno.ENOTSUP, errno.EPERM, errno.EINVAL):
                raise
            folder.chmod(found.st_mode | stat.S_IXOTH)
            log.warning("every OS user may now cross this folder", extra={"folder": str(folder)})
            continue
        if changed:
            log.warning(
                "the OS user of PostgreSQL may now cross this folder (not list it)",
                extra={"folder": str(folder), "user": user.name},
            )


def _grant_crossing(folder: Path, uid: int) -> bool:
    """Add `user:uid:--x` to the access list of `folder`; return whether that was new."""
    mode = folder.stat().st_mode
    entries = {
        (_USER_OBJ, _NO_ID): mode >> 6 & 7,
        (_GROUP_OBJ, _NO_ID): mode >> 3 & 7,
        (_OTHER, _NO_ID): mode & 7,
    }
    try:
        stored = os.getxattr(folder, _ACL)
    except OSError as exc:
        if exc.errno != errno.ENODATA:
            raise
    else:
        entries = {(t, i): perm for t, perm, i in _ACL_ENTRY.iter_unpack(stored[4:])}
    wanted = dict(entries)
    wanted[_USER, uid] = entries.get((_USER, uid), 0) | _EXECUTE
    mask = entries.get((_MASK, _NO_ID), entries[_GROUP_OBJ, _NO_ID])
    wanted[_MASK, _NO_ID] = mask | _EXECUTE
    if wanted == entries:
        return False
    packed = b"".join(_ACL_ENTRY.pack(t, perm, i) for (t, i), perm in sorted(wanted.items()))
    os.setxattr(folder, _ACL, struct.pack("<I", _ACL_VERSION) + packed)
    return True


def open_for_reading(tree: Path) -> None:
    """Let everyone read `tree` (public program files that a strict umask has closed)."""
    for path in (tree, *tree.rglob("*")):
        if path.exists() and not path.is_symlink():
            mode = path.stat().st_mode
            execute = stat.S_IXOTH if mode & stat.S_IXUSR else 0
            path.chmod(mode | stat.S_IROTH | execute)
