"""The one door to the world: network, clocks, randomness and the folders a node may touch.

Production and simulation differ in this value only. Nothing else in swarmpy reads a clock, draws a
random number or opens a socket (ruff's banned-api holds this true).
"""

from __future__ import annotations

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
