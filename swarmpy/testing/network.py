"""A simulated network: machines that reach each other by IP address, over paths with faults.

One `SimNetwork` is a world; each simulated machine gets its own `Network` from it, and what faults
do to a path they do to byte streams (`NativeHost`) and to simulated hosts (`SimHost`) alike. All
chance comes from the world's generator: with a seeded scheduler and a virtual clock one program
gives one run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from swarmpy.abc import Address, ByteStream, Listener, Network
from swarmpy.errors import BadMessage, ConfigError, DialFailed
from swarmpy.proto.multiaddr import format_tcp, parse_tcp
from swarmpy.testing.calendar import Calendar
from swarmpy.testing.paths import RTO_S, UNSENT_BYTES_MAX, Lane, Link, Machine, Path
from swarmpy.testing.streams import (
    IN_FLIGHT_BYTES_MAX,
    SEGMENT_BYTES,
    Pipe,
    SimListener,
    SimStream,
)

__all__ = [
    "IN_FLIGHT_BYTES_MAX",
    "SEGMENT_BYTES",
    "UNSENT_BYTES_MAX",
    "Link",
    "SimMachine",
    "SimNetwork",
    "SimStream",
    "Traffic",
]

PING_BYTES = 12
"""Payload of a Yamux ping, and of its answer."""

NAT_MAPPING_S = 120.0
"""A NAT lets a machine in for so long after the last dial to it; RFC 5382 asks for more, home
routers keep less."""

_FIRST_PORT = 10_000
_LOOPBACK = ("127.0.0.1", "::1")
_ANY = ("0.0.0.0", "::")

Observe = Callable[[str, str, str, bytes], None]
"""Told of what happens: kind ("dial", "data", "end", ...), from, to, bytes."""

Machines = str | Iterable[str]
"""One machine's IP, or several."""


class Bound(Protocol):
    """Whoever listens on a port: a byte-stream listener or a simulated host."""

    address: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What machines have sent: messages (segments of a byte stream) and the bytes in them.

    Keepalives of simulated hosts are counted once their connection has ended, and in `bytes` alone:
    nothing was sent, but a native host would have.
    """

    messages: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Rule:
    """From one set of machines to another: what stops, or no longer does."""

    sources: frozenset[str]
    targets: frozenset[str]
    is_cut: bool | None = None
    is_held: bool | None = None


class SimNetwork:
    """A world of machines that reach each other by IP address."""

    def __init__(
        self,
        *,
        link: Link | None = None,
        observe: Observe | None = None,
        chance: random.Random | None = None,
        tick_s: float = 0.0,
    ) -> None:
        """Make an empty world.

        Args:
            link: Between any two machines for which `set_link` says nothing else.
            observe: Told of all traffic, in order.
            chance: Draws jitter, losses and torn segments; the same in every world by default.
            tick_s: Arrivals are rounded up to its multiples (see `Calendar`); 0 for none.
        """
        self.calendar = Calendar(tick_s=tick_s)
        self.chance = chance or random.Random(0)
        self.observe = observe or _ignore
        self._link = link or Link()
        self._links: dict[tuple[str, str], Link] = {}
        self._rules: list[_Rule] = []
        self._machines: dict[str, Machine] = {}
        self._paths: dict[tuple[str, str], Path] = {}
        self._bound: dict[tuple[str, int], Bound] = {}
        self._ports: dict[str, int] = {}
        self._mapped_s: dict[tuple[str, str], float] = {}
        self._connection_count = 0

    def network(self, machine: str) -> SimMachine:
        """Return the network as the machine with this IP address sees it."""
        return SimMachine(self, machine)

    # Links -----------------------------------------------------------------------------

    def set_link(self, source: str, target: str, link: Link) -> None:
        """Set one direction between two machines from now on; what is on its way is not touched."""
        self._links[source, target] = link
        path = self._paths.get((source, target))
        if path is not None:
            path.link = link
            path.tell()
            self.path(target, source).tell()

    def link(self, source: str, target: str) -> Link:
        """Return one direction between two machines; a machine reaches itself at once."""
        if source == target:
            return Link()
        return self._links.get((source, target), self._link)

    def path(self, source: str, target: str) -> Path:
        """Return one direction between two machines, for those who send over it."""
        path = self._paths.get((source, target))
        if path is None:
            near, far = self._machine(source), self._machine(target)
            path = self._paths[source, target] = Path(near, far, self.link(source, target))
            near.paths.append(path)
            if near is not far:
                far.paths.append(path)
            path.is_blocked = self._is_blocked(path)
        return path

    def lane(self, path: Path, on_refused: Callable[[], None] | None = None) -> Lane:
        """Return a lane for one direction of a new connection."""
        return Lane(path, self.calendar, self.chance, on_refused)

    def traffic(self, machines: Machines | None = None) -> Traffic:
        """Return what machines (by default all) have sent to others so far."""
        wanted = None if machines is None else _set(machines)
        paths = [
            path
            for (source, target), path in self._paths.items()
            if source != target and (wanted is None or source in wanted)
        ]
        return Traffic(
            messages=sum(path.messages_sent for path in paths),
            bytes=sum(path.bytes_sent + path.pings_sent * PING_BYTES for path in paths),
        )

    # Faults ----------------------------------------------------------------------------

    def partition(self, sources: Machines, targets: Machines, *, one_way: bool = False) -> None:
        """Let nothing through between two sides: it is lost, and sent again once repaired."""
        self._add_rule(_Rule(_set(sources), _set(targets), is_cut=True), one_way=one_way)

    def repair(self, sources: Machines, targets: Machines, *, one_way: bool = False) -> None:
        """End a partition between two sides; what was lost comes a retransmission later."""
        self._add_rule(_Rule(_set(sources), _set(targets), is_cut=False), one_way=one_way)

    def hold(self, sources: Machines, targets: Machines, *, one_way: bool = False) -> None:
        """Keep what is sent between two sides on its way, until `release`."""
        self._add_rule(_Rule(_set(sources), _set(targets), is_held=True), one_way=one_way)

    def release(self, sources: Machines, targets: Machines, *, one_way: bool = False) -> None:
        """Let all that was held between two sides arrive now, in order."""
        self._add_rule(_Rule(_set(sources), _set(targets), is_held=False), one_way=one_way)

    def stall(self, sources: Machines, targets: Machines, *, for_s: float) -> None:
        """Hold what is sent between two sides for some seconds."""
        sides = _set(sources), _set(targets)
        self.hold(*sides)
        self.calendar.post(trio.current_time() + for_s, self.release, *sides)

    def reset(self, sources: Machines, targets: Machines) -> None:
        """Break all connections between two sides at once; both ends learn it."""
        near, far = _set(sources), _set(targets)
        for path in self._between(near, far) + self._between(far, near):
            for end in list(path.ends):
                end.was_reset()

    def freeze(self, machines: Machines) -> None:
        """Stop machines: nothing leaves or reaches them until `thaw`.

        Their connections stand still; their timers go on, as nobody else can tell.
        """
        self._set_frozen(machines, True)

    def thaw(self, machines: Machines) -> None:
        """Let frozen machines go on where they stood."""
        self._set_frozen(machines, False)

    def crash(self, machines: Machines) -> None:
        """Take machines off the network without a word; what is on its way to or from them is lost.

        Cancel what runs on them only after that: no goodbye leaks out.
        """
        for machine in self._sorted(machines):
            machine.is_up = False
            machine.crashes += 1
            for place in [place for place in self._bound if place[0] == machine.ip]:
                del self._bound[place]
            for path in machine.paths:
                path.life += 1
                path.holding.clear()
                path.sent_s = 0.0
            for path in machine.paths:
                path.tell()

    def restart(self, machines: Machines) -> None:
        """Put crashed machines back on the network; old connections to them are reset when used."""
        for machine in self._sorted(machines):
            machine.is_up = True
            for path in machine.paths:
                path.tell()

    def bounce(self, machines: Machines) -> None:
        """Crash machines and restart them at once."""
        names = _set(machines)
        self.crash(names)
        self.restart(names)

    def is_up(self, machine: str) -> bool:
        """Whether a machine has not crashed, or was restarted."""
        return self._machine(machine).is_up

    def set_nat(self, machine: str, *, has_nat: bool = True) -> None:
        """Put a machine behind a NAT: whom it has not dialled lately cannot dial it.

        It filters by address and translates nothing; `NAT_MAPPING_S` says how long it remembers.
        """
        self._machine(machine).has_nat = has_nat

    def heal(self) -> None:
        """End partitions, holds and freezes. Crashed machines stay down, links and NATs as set."""
        self._rules.clear()
        for machine in self._machines.values():
            machine.is_frozen = False
        for path in list(self._paths.values()):
            self._update(path)

    # Connecting ------------------------------------------------------------------------

    def next_port(self, machine: str) -> int:
        """Return a port of a machine that was not used yet."""
        port = self._ports[machine] = self._ports.get(machine, _FIRST_PORT) + 1
        return port

    def next_connection(self) -> int:
        """Return a number that no other connection of this world has."""
        self._connection_count += 1
        return self._connection_count

    def bind(self, machine: str, port: int, bound: Bound) -> None:
        """Listen on a port.

        Raises:
            ConfigError: It is taken.
        """
        if (machine, port) in self._bound:
            raise ConfigError(f"cannot listen on {bound.address}: the port is taken")
        self._bound[machine, port] = bound

    def release_port(self, machine: str, port: int, bound: Bound) -> None:
        """Stop listening on a port; nothing if somebody else listens there since."""
        if self._bound.get((machine, port)) is bound:
            del self._bound[machine, port]

    async def reach(self, source: str, target: str, port: int) -> Bound:
        """Connect to a port and return who listens; takes one round trip.

        Never returns while the target is down or the way to it or back is blocked.

        Raises:
            DialFailed: Nobody listens there, or a NAT is in the way.
        """
        self._mapped_s[source, target] = trio.current_time()
        await self.cross(source, target)
        bound = self._bound.get((target, port))
        if bound is None or not self._lets_in(source, target):
            raise DialFailed(f"cannot dial {format_tcp(target, port)}: connection refused")
        return bound

    async def cross(self, source: str, target: str) -> None:
        """Wait for one round trip between two machines, however long it takes."""
        answered = trio.Event()
        back = self.lane(self.path(target, source))
        self.lane(self.path(source, target)).post(0, back.post, 0, answered.set)
        await answered.wait()

    async def connect(self, source: str, target: str, port: int) -> ByteStream:
        """Connect two machines by a byte stream, as `reach` does."""
        listener = await self.reach(source, target, port)
        near = Address(format_tcp(source, self.next_port(source)))
        far = Address(format_tcp(target, port))
        self.observe("dial", near, far, b"")
        if not isinstance(listener, SimListener):
            raise DialFailed(f"{far} is a simulated host's: it takes no byte streams")
        outward, homeward = self.path(source, target), self.path(target, source)
        there = Pipe(near, far, outward, self.calendar, self.chance, self.observe)
        back = Pipe(far, near, homeward, self.calendar, self.chance, self.observe)
        listener.arrive(SimStream(far, near, sending=back, receiving=there))
        return SimStream(near, far, sending=there, receiving=back)

    # Below -----------------------------------------------------------------------------

    def _lets_in(self, source: str, target: str) -> bool:
        mapped_s = self._mapped_s.get((target, source))
        is_mapped = mapped_s is not None and trio.current_time() - mapped_s <= NAT_MAPPING_S
        return is_mapped or source == target or not self._machine(target).has_nat

    def _machine(self, ip: str) -> Machine:
        machine = self._machines.get(ip)
        if machine is None:
            machine = self._machines[ip] = Machine(ip)
        return machine

    def _sorted(self, machines: Machines) -> list[Machine]:
        return [self._machine(ip) for ip in sorted(_set(machines))]

    def _between(self, sources: frozenset[str], targets: frozenset[str]) -> list[Path]:
        return [
            path
            for (source, target), path in self._paths.items()
            if source in sources and target in targets
        ]

    def _set_frozen(self, machines: Machines, is_frozen: bool) -> None:
        for machine in self._sorted(machines):
            machine.is_frozen = is_frozen
            for path in list(machine.paths):
                self._update(path)

    def _add_rule(self, rule: _Rule, *, one_way: bool) -> None:
        self._rules.append(rule)
        paths = self._between(rule.sources, rule.targets)
        if not one_way:
            self._rules.append(
                _Rule(rule.targets, rule.sources, is_cut=rule.is_cut, is_held=rule.is_held)
            )
            paths += self._between(rule.targets, rule.sources)
        for path in paths:
            self._update(path)

    def _is_blocked(self, path: Path) -> bool:
        source, target = path.source.ip, path.target.ip
        if source == target:
            return False
        is_cut = is_held = False
        for rule in self._rules:
            if source in rule.sources and target in rule.targets:
                is_cut = is_cut if rule.is_cut is None else rule.is_cut
                is_held = is_held if rule.is_held is None else rule.is_held
        path.is_lossy = path.is_lossy or is_cut
        return is_cut or is_held or path.source.is_frozen or path.target.is_frozen

    def _update(self, path: Path) -> None:
        was_blocked, path.is_blocked = path.is_blocked, self._is_blocked(path)
        if was_blocked == path.is_blocked:
            return
        path.tell()
        if not path.is_blocked:
            late_s = RTO_S if path.is_lossy else 0.0
            path.is_lossy = False
            self.calendar.post(trio.current_time() + late_s, _flush, path)


class SimMachine(Network):
    """The world as one machine sees it."""

    def __init__(self, world: SimNetwork, ip: str) -> None:
        self.world = world
        self.ip = ip

    async def listen(self, address: Address) -> Listener:
        bound, port = self.place(address)
        await trio.lowlevel.checkpoint()
        listener = SimListener(self.world, self.ip, port, bound)
        self.world.bind(self.ip, port, listener)
        return listener

    async def dial(self, address: Address) -> ByteStream:
        return await self.world.connect(self.ip, *self.target(address))

    def interface_addresses(self) -> Sequence[str]:
        return [self.ip]

    def place(self, address: Address) -> tuple[Address, int]:
        """Return an address to listen on with its real port, and the port.

        Raises:
            ConfigError: It is malformed, or not this machine's.
        """
        try:
            host, port = parse_tcp(address)
        except BadMessage as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from error
        if host not in (self.ip, *_LOOPBACK, *_ANY):
            raise ConfigError(f"cannot listen on {address}: not an address of this machine")
        port = port or self.world.next_port(self.ip)
        return Address(format_tcp(host, port)), port

    def target(self, address: Address) -> tuple[str, int]:
        """Return the machine and port of an address to dial.

        Raises:
            DialFailed: It is malformed.
        """
        try:
            host, port = parse_tcp(address)
        except BadMessage as error:
            raise DialFailed(f"cannot dial {address}: {error}") from error
        return (self.ip if host in _LOOPBACK else host), port


def _flush(path: Path) -> None:
    for lane in list(path.holding):
        lane.flush()


def _set(machines: Machines) -> frozenset[str]:
    return frozenset([machines] if isinstance(machines, str) else machines)


def _ignore(kind: str, source: str, target: str, data: bytes) -> None:
    pass
