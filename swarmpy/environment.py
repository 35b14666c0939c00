"""The one door to the world: network, clocks, randomness and the folders a node may touch.

Production and simulation differ in this value only. Nothing else in swarmpy reads a clock, draws a
random number or opens a socket (ruff's banned-api holds this true).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from swarmpy.abc import Network, WallSeconds

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
"""Where Linux shows control groups, a container's limits among them, and which one is ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a node touches. Monotonic time is `trio.current_time`, which a simulation drives."""

    network: Network
    folder: Path
    """The node's data folder: keys, records, peer cache."""
    cache_folder: Path
    """The machine-wide folder of model files, shared by all nodes of one user."""
    random: random.Random = field(default_factory=random.SystemRandom)
    wall_time: Callable[[], WallSeconds] = lambda: WallSeconds(time.time())
    mdns: bool = True
    """Whether the network has a real link on which multicast DNS makes sense."""
    call_at: Callable[[float, Callable[[], None]], None] | None = None
    """Calls back at a time of trio's clock without a task, as a simulation can; None: nobody does,
    and who wants to be called sleeps in a task."""


def system_random() -> random.Random:
    """Return the operating system's randomness, for commands that talk to a node from outside."""
    return random.SystemRandom()


# Memory -----------------------------------------------------------------------


def available_memory_bytes() -> int:
    """Return the memory that new processes could be given now, in bytes: measured, else guessed."""
    measured = measured_memory_bytes()
    if measured is not None:
        return measured
    try:
        # macOS and the BSDs count no "available" memory; half of all is a fair guess.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30


def measured_memory_bytes() -> int | None:
    """Return what the machine and this process's control groups have left, None if unknown."""
    limits = [limit for limit in (_machine_bytes(), *_group_bytes()) if limit is not None]
    return min(limits, default=None)


def _machine_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None


def _group_bytes() -> list[int | None]:
    """Return what is left in our control group (version 2) and in each of those around it."""
    try:
        name = OWN_GROUP.read_text("utf-8").rpartition("::")[2].strip()
    except (OSError, UnicodeDecodeError):
        return []
    group = GROUPS / name.lstrip("/")
    return [_left_in(item) for item in (group, *group.parents) if item.is_relative_to(GROUPS)]


def _left_in(group: Path) -> int | None:
    try:
        limit = int((group / "memory.max").read_text("ascii"))
        used = int((group / "memory.current").read_text("ascii"))
        statistics = (group / "memory.stat").read_text("ascii")
    except (OSError, ValueError):
        return None  # No such group, or "max": no limit.
    # Pages of files that were read count as used, and are given back as soon as memory is short.
    pages = dict(line.split() for line in statistics.splitlines())
    return max(0, limit - used + int(pages.get("inactive_file", 0)))
