"""One seed, one run: real nodes on a virtual clock, with a seeded scheduler and a recorded trace.

Seeding trio's scheduler uses two private names; one function holds them, and a test guards it.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import trio
import trio.testing

from swarmpy.abc import WallSeconds
from swarmpy.environment import Environment
from swarmpy.testing.network import Link, SimNetwork

T = TypeVar("T")

WALL_START_S = 1_800_000_000.0
"""Unix time at which every simulation starts."""

LINES_MAX = 10_000
"""Lines of a trace kept to look at; the digest covers all of them."""


class Trace:
    """What happened, in order: all traffic, and what the test records itself."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.lines: list[str] = []
        """The first `LINES_MAX` lines, bytes shown by their count."""

    @property
    def digest(self) -> str:
        """Hash over every line and every byte so far: equal for equal runs."""
        return self._hash.hexdigest()

    def record(self, text: str, data: bytes = b"") -> None:
        """Add a line, with the virtual time before it."""
        line = f"{trio.current_time():.9f} {text}"
        self._hash.update(f"{line} {len(data)}\n".encode())
        self._hash.update(data)
        if len(self.lines) < LINES_MAX:
            self.lines.append(f"{line} {len(data)}" if data else line)


class Simulation:
    """A world with its clock, its randomness and its trace."""

    def __init__(self, seed: int, link: Link | None) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        """For the test's own choices."""
        self.trace = Trace()
        self.world = SimNetwork(link=link, observe=self._observe)

    def wall_time(self) -> WallSeconds:
        """Return Unix seconds, which pass with the virtual clock."""
        return WallSeconds(WALL_START_S + trio.current_time())

    def environment(self, host: str, folder: Path) -> Environment:
        """Return what a node on the machine `host` (an IP) touches, with its disk in `folder`."""
        return Environment(
            network=self.world.network(host),
            folder=folder,
            cache_folder=folder.parent / "cache",
            random=self.random_for(host),
            wall_time=self.wall_time,
            mdns=False,
        )

    def random_for(self, name: str) -> random.Random:
        """Return a generator that depends on the seed and the name alone."""
        return random.Random(f"{self.seed} {name}")

    def _observe(self, kind: str, source: str, target: str, data: bytes) -> None:
        self.trace.record(f"{kind} {source} {target}", data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Generic[T]):
    """What a simulation gave."""

    result: T
    trace: Trace


def run_simulation(
    scenario: Callable[[Simulation], Awaitable[T]], *, seed: int, link: Link | None = None
) -> Run[T]:
    """Run a scenario to its end on a virtual clock that jumps over all waiting.

    Args:
        scenario: Builds its nodes in `simulation.world`; must not use threads or real sockets.
        seed: Decides scheduling and all randomness: one seed gives one trace.
        link: Between any two machines; at once and unlimited by default.
    """
    simulation = Simulation(seed, link)
    clock = trio.testing.MockClock(autojump_threshold=0.0)
    with _seeded_scheduler(seed):
        result = trio.run(scenario, simulation, clock=clock)
    return Run(result=result, trace=simulation.trace)


@contextmanager
def _seeded_scheduler(seed: int) -> Iterator[None]:
    """Make trio schedule by `seed`, and do without threads.

    `_r` shuffles the runnable tasks; without `_ALLOW_DETERMINISTIC_SCHEDULING` tasks whose timers
    share a deadline would still be ordered by their place in memory.
    """
    scheduler = importlib.import_module("trio._core._run")
    changes: list[tuple[object, str, object]] = [
        (scheduler, "_r", random.Random(seed)),
        (scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        (trio.to_thread, "run_sync", _run_inline),
        (trio.from_thread, "run_sync", _call),
        (trio.from_thread, "check_cancelled", _call),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _call(work: Callable[..., T] | None = None, *args: object) -> T | None:
    return None if work is None else work(*args)


async def _run_inline(work: Callable[..., T], *args: object, **_: object) -> T:
    """Run blocking work here and now: the clock would jump while a real thread is waited for."""
    await trio.lowlevel.checkpoint()
    return work(*args)
