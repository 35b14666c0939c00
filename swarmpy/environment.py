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


def system_random() -> random.Random:
    """Return the operating system's randomness, for commands that talk to a node from outside."""
    return random.SystemRandom()


def available_memory_bytes() -> int:
    """Return the memory this machine could give to new processes now, in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        # macOS and the BSDs count no "available" memory; half of all is a fair guess.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30
