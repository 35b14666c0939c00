"""One node per data folder: a lock that the system drops when its process ends, however it ends.

The pid in the file is only for the message; the lock itself decides, so a crashed node's file is
taken over without asking.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swarmpy.errors import ConfigError, SwarmError

LOCK_NAME = "node.lock"


class NodeRunning(SwarmError):
    """A node already runs in this data folder."""

    advice = "Use that node, stop it with Ctrl-C, or choose another folder with --data-dir."


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the data folder for this process, with its pid in the lock file.

    Raises:
        NodeRunning: Another living process holds it; the message has its pid.
        ConfigError: The folder cannot be written.
    """
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write the data folder {folder}: {error}") from error
    try:
        if not _try_lock(descriptor):
            raise NodeRunning(f"a node already runs in {folder} (pid {_read_pid(descriptor)})")
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, str(os.getpid()).encode())
        # The file stays behind: removing it would let two processes lock two files of one name.
        yield
    finally:
        os.close(descriptor)


def _read_pid(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"


if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 1 << 20
    """Past the pid: a locked range cannot be read by others on Windows."""

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
