"""Machine-wide locks: one holder among all processes that share the cache folder.

The operating system holds the lock, so it ends with its process, however that ended. Lock files are
never deleted: deleting one would let two processes each lock "the" file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from swarmpy.errors import DownloadFailed

POLL_INTERVAL_S = 0.1
"""Pause between two tries; a blocking wait could not be cancelled."""


@asynccontextmanager
async def hold_lock(path: Path, *, waiting: Callable[[], None]) -> AsyncIterator[None]:
    """Hold the lock file at `path`, waiting without blocking other tasks.

    Args:
        waiting: Called once when another holder must be waited for.

    Raises:
        DownloadFailed: The lock file cannot be created.
    """
    descriptor = _open(path)
    try:
        has_told = False
        while not _try_lock(descriptor):
            if not has_told:
                waiting()
                has_told = True
            await trio.sleep(POLL_INTERVAL_S)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def hold_lock_blocking(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; for changes of a few milliseconds, from a worker thread.

    Raises:
        DownloadFailed: The lock file cannot be created.
    """
    descriptor = _open(path)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DownloadFailed(f"cannot write {path}: {error.strerror}") from error


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _lock(descriptor: int) -> None:
        while not _try_lock(descriptor):
            try:
                msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # Gives up after ten seconds.
                return
            except OSError:
                continue

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
