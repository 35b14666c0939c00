"""How many threads an engine child gets: this machine's cores shared out among its children.

Two BLAS threads in each of three children on two cores are four times slower than one in each: idle
pools spin. So the children of one machine are counted, by one locked file a child in a folder that
all its nodes share, and the number is fixed at load. Spec: protocols/engine.md, section 5.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

CHILDREN_COUNTED_MAX = 1024
"""Lock files looked at; more than that are leftovers of something broken."""


class ChildLock:
    """One child's locked file: held as long as any process has `descriptor` open.

    The child inherits the descriptor and the node closes its own, so the lock lives exactly as long
    as the child, however it ends. `scratch` is the child's own folder (0700): where node and child
    are killed together, whoever next counts the children removes it.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Locked under a name nobody counts, then renamed: it never looks dead.
        self.path = folder / f"{uuid.uuid4().hex}.lock"
        hidden = self.path.with_suffix(".new")
        self.descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(hidden, self.path)
        self.scratch = _scratch(self.path)
        self.scratch.mkdir(mode=0o700)

    def hand_over(self) -> None:
        """Close this process's descriptor, once the child has inherited it."""
        os.close(self.descriptor)

    def remove(self) -> None:
        """Remove file and folder of a child that has ended."""
        _remove(self.path)


def count_children(folder: Path) -> int:
    """Count the engine children alive on this machine, and remove what dead ones left."""
    import fcntl

    alive = 0
    for path in sorted(folder.glob("*.lock"))[:CHILDREN_COUNTED_MAX]:
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            continue
        try:
            # Shared, so that two nodes counting at once do not take each other for a child.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            _remove(path)
        except BlockingIOError:
            alive += 1
        finally:
            os.close(descriptor)
    return alive


def _scratch(lock: Path) -> Path:
    return lock.with_suffix("")


def _remove(lock: Path) -> None:
    # The folder first: without its lock nobody would find it again.
    shutil.rmtree(_scratch(lock), ignore_errors=True)
    lock.unlink(missing_ok=True)


def threads_for(folder: Path, *, configured: int) -> int:
    """Threads for a child that loads now: `configured`, or its share of the cores where 0."""
    if configured > 0:
        return configured
    return max(1, (core_count() - 1) // max(1, count_children(folder)))


def core_count() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
