"""One seed, one run: real nodes on a virtual clock, with a seeded scheduler and a recorded trace.

`run_simulation` runs any scenario; `Simulation.swarm` gives it machines with nodes on them, faults
and invariants. `swarmpy.testing.simulate` makes a pytest test of it.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

from swarmpy.abc import Host, ProtocolId, WallSeconds
from swarmpy.environment import Environment
from swarmpy.identity import PeerId
from swarmpy.testing.calendar import WALL_START_S, Calendar, SimClock
from swarmpy.testing.determinism import deterministic
from swarmpy.testing.network import SimNetwork
from swarmpy.testing.paths import Link

if TYPE_CHECKING:
    from swarmpy.testing.checkers import Checker
    from swarmpy.testing.faults import Faults
    from swarmpy.testing.nodes import NodeSettings, SimNode

T = TypeVar("T")

LINES_MAX = 10_000
"""First lines of a trace kept to look at; the digest covers all of them."""

TAIL_LINES_MAX = 40
"""Last lines kept: what led to a failure."""

CHECK_INTERVAL_S = 1.0
"""Invariants are checked this often in virtual time, at every fault, and at the end."""

RAM_DISK = Path("/dev/shm")
"""Where simulated machines have their disks, if it is there: a commit costs 0.02 ms."""


class InvariantBroken(AssertionError):
    """Something was seen that must never be."""


class LivenessFailed(AssertionError):
    """Something that must happen did not happen within its time."""


class Trace:
    """What happened, in order: all traffic, and what the test records itself."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.lines: list[str] = []
        """The first `LINES_MAX` lines, bytes shown by their count."""
        self.tail: deque[str] = deque(maxlen=TAIL_LINES_MAX)
        """The last lines."""

    @property
    def digest(self) -> str:
        """Hash over every line and every byte so far: equal for equal runs."""
        return self._hash.hexdigest()

    def record(self, text: str, data: bytes = b"") -> None:
        """Add a line, with the virtual time before it."""
        line = f"{trio.current_time():.9f} {text} {len(data)}\n"
        self._hash.update(line.encode())
        if data:
            self._hash.update(data)
        self.tail.append(line)
        if len(self.lines) < LINES_MAX:
            self.lines.append(line.rstrip() if data else line[:-3])


class Simulation:
    """A world with its clock, its randomness and its trace; after `swarm`, its nodes."""

    def __init__(
        self,
        seed: int,
        link: Link | None = None,
        *,
        tick_s: float = 0.0,
        is_traced: bool = True,
    ) -> None:
        """Make an empty world.

        Args:
            link: Between any two machines; at once and unlimited by default.
            tick_s: See `Calendar`.
            is_traced: Whether all traffic is recorded; a benchmark does without.
        """
        self.seed = seed
        self.clock = SimClock()
        self.random = random.Random(seed)
        """For the test's own choices."""
        self.trace = Trace()
        self.world = SimNetwork(
            link=link,
            observe=self._observe if is_traced else None,
            chance=self.random_for("the network"),
            tick_s=tick_s,
        )
        # Apart from the network's: who writes to a simulated socket makes due deliveries first, and
        # must not be called back by a node in the midst of that.
        self._timers = Calendar(tick_s=tick_s)
        self.nodes: list[SimNode] = []
        """The machines of the swarm, by index."""
        self.checkers: list[Checker] = []
        """Invariants, checked all along."""
        self.fault_log: list[str] = []
        """What the seed did to the swarm, in words, with times."""
        self.redeemed: dict[str, set[int]] = {}
        """By invite code, the nodes that joined with it."""
        self.violation: str | None = None
        self._scope: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._stranger_count = 0
        self._faults_scope: trio.CancelScope | None = None

    # Time, chance, machines ------------------------------------------------------------

    def wall_time(self) -> WallSeconds:
        """Return Unix seconds, which pass with the virtual clock."""
        return WallSeconds(WALL_START_S + self.clock.now_s)

    def environment(self, host: str, folder: Path) -> Environment:
        """Return what a node on the machine `host` (an IP) touches, with its disk in `folder`."""
        return Environment(
            network=self.world.network(host),
            folder=folder,
            cache_folder=folder.parent / "cache",
            random=self.random_for(host),
            wall_time=self.wall_time,
            mdns=False,
            call_at=self._timers.post,
        )

    def random_for(self, name: str) -> random.Random:
        """Return a generator that depends on the seed and the name alone."""
        return random.Random(f"{self.seed} {name}")

    # The swarm -------------------------------------------------------------------------

    @asynccontextmanager
    async def swarm(
        self, count: int, settings: NodeSettings, *, faults: Faults | None = None
    ) -> AsyncIterator[None]:
        """Run `count` nodes on machines of their own, while invariants hold and faults happen.

        Raises:
            InvariantBroken: Inside the block: whatever ran there is cancelled first.
        """
        from swarmpy.testing.nodes import SimNode, form_network

        with _temporary_folder() as folder, self._watching():
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                with trio.CancelScope() as self._scope:
                    self.nodes += [
                        SimNode(self, index, folder, settings, nursery) for index in range(count)
                    ]
                    if settings.is_joined:
                        form_network(self, self.nodes)
                    await self._start_all(settings.start_within_s)
                    nursery.start_soon(self._check_forever)
                    if faults is not None:
                        nursery.start_soon(self._inject, faults)
                    yield
                    self.check()
                nursery.cancel_scope.cancel()
            if self.violation is not None:
                raise InvariantBroken(self.violation)

    async def _start_all(self, within_s: float) -> None:
        """Start all nodes, in a drawn order where that takes time; the first at once."""
        if not within_s:
            for node in self.nodes:
                await node.start()
            return
        later = self.random.sample(self.nodes[1:], len(self.nodes) - 1)
        await self.nodes[0].start()
        for number, node in enumerate(later, 1):
            await trio.sleep_until(number * within_s / len(self.nodes))
            await node.start()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        for checker in self.checkers:
            checker.begin()
        try:
            yield
        finally:
            for checker in self.checkers:
                checker.end()

    @property
    def up(self) -> Sequence[SimNode]:
        """The nodes that run now."""
        return [node for node in self.nodes if node.is_up]

    async def heal(self) -> None:
        """End all faults: no new ones, paths open, links plain, every machine up."""
        if self._faults_scope is not None:
            self._faults_scope.cancel()
        self.world.heal()
        self.log_fault("healed")
        for node in self.nodes:
            if not node.is_up:
                await node.restart()

    async def pause(self, seconds: float) -> None:
        """Let virtual time pass."""
        await trio.sleep(seconds)

    @contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """Fail unless the block ends within so much virtual time.

        Raises:
            LivenessFailed: It did not; `what` says what was waited for.
        """
        try:
            with trio.fail_after(seconds):
                yield
        except trio.TooSlowError:
            raise LivenessFailed(f"within {seconds:g} s: {what}") from None

    async def until(
        self, condition: Callable[[], bool], *, within_s: float, what: str = ""
    ) -> None:
        """Wait for a condition that no event tells of.

        Raises:
            LivenessFailed: It did not come true within `within_s` seconds.
        """
        with self.within(within_s, what or condition.__name__):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await trio.sleep(0.1)

    async def stranger(self, name: str) -> Host:
        """Start a host that is nobody's node, to say to nodes whatever a test wants.

        It has a machine of its own and ends with the swarm.
        """
        from swarmpy.testing.nodes import start_stranger

        assert self._nursery is not None, "a stranger needs a swarm"
        self._stranger_count += 1
        return await start_stranger(self, name, self._stranger_count, self._nursery)

    async def reply(self, node: SimNode, prompt: Sequence[int], count: int) -> list[int]:
        """Let a node answer with `ECHO_MODEL`, and hold every token against the oracle.

        Raises:
            SwarmError: The reply broke off; the tokens before it were right.
        """
        from swarmpy.proto.pipeline import Sampling
        from swarmpy.testing.engine import reply
        from swarmpy.testing.nodes import ECHO_MODEL

        expected = reply(ECHO_MODEL, prompt, count)
        tokens: list[int] = []
        generation = await node.node.generate("echo", prompt, Sampling(), max_tokens=count)
        async with generation:
            async for token in generation:
                tokens.append(token.id)
                if tokens != expected[: len(tokens)]:
                    self.violate(f"token {len(tokens) - 1} of a reply of {node.name} is another")
                    await trio.lowlevel.checkpoint()
        return tokens

    def joined_by(self, code: str, node: SimNode) -> None:
        """A node has redeemed an invite."""
        self.redeemed.setdefault(code, set()).add(node.index)
        self.check()

    def served(self, node: SimNode, peer: PeerId, protocol: ProtocolId) -> None:
        """A node serves a peer's stream: checkers may object."""
        for checker in self.checkers:
            broken = checker.served(self, node, peer, protocol)
            if broken:
                self.violate(f"{checker.name}: {broken}")

    # Invariants and faults -------------------------------------------------------------

    def check(self) -> None:
        """Check all invariants now."""
        for checker in self.checkers:
            broken = checker.check(self)
            if broken:
                self.violate(f"{checker.name}: {broken}")

    def violate(self, what: str) -> None:
        """Say that an invariant is broken: the first time ends the run."""
        if self.violation is None:
            self.violation = f"{what}, at {trio.current_time():.3f} s"
            if self._scope is not None:
                self._scope.cancel()

    def log_fault(self, what: str) -> None:
        """Remember a fault, and check that it broke nothing."""
        self.fault_log.append(f"{trio.current_time():.3f} s {what}")
        self.trace.record(f"fault {what}")
        self.check()

    async def _check_forever(self) -> None:
        while True:
            await trio.sleep(CHECK_INTERVAL_S)
            self.check()

    async def _inject(self, faults: Faults) -> None:
        from swarmpy.testing.faults import inject

        with trio.CancelScope() as self._faults_scope:
            await inject(self, faults)

    def _observe(self, kind: str, source: str, target: str, data: bytes) -> None:
        self.trace.record(f"{kind} {source} {target}", data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Generic[T]):
    """What a simulation gave."""

    result: T
    trace: Trace
    simulation: Simulation


def run_simulation(
    scenario: Callable[[Simulation], Awaitable[T]],
    *,
    seed: int,
    link: Link | None = None,
    simulation: Simulation | None = None,
) -> Run[T]:
    """Run a scenario to its end on a virtual clock that jumps over all waiting.

    Args:
        scenario: Builds its nodes in `simulation.world`; must not use threads or real sockets.
        seed: Decides scheduling and all randomness: one seed gives one trace.
        link: Between any two machines; at once and unlimited by default.
        simulation: Made for this seed, by who wants it even if the scenario fails.
    """
    made = simulation or Simulation(seed, link)
    with deterministic(seed):
        result = trio.run(scenario, made, clock=made.clock)
    return Run(result=result, trace=made.trace, simulation=made)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    where = RAM_DISK if RAM_DISK.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="swarmpy-sim-", dir=where) as folder:
        yield Path(folder)
