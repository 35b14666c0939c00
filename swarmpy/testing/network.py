"""A simulated network: byte streams in memory, with latency and bandwidth on trio's clock.

One `SimNetwork` is a world; each simulated machine gets its own `Network` from it. Nothing here
draws a random number: with a seeded scheduler and a virtual clock one program gives one run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from swarmpy.abc import Address, ByteStream, Listener, Network
from swarmpy.errors import BadMessage, ConfigError, ConnectionLost, DialFailed
from swarmpy.proto.multiaddr import format_tcp, parse_tcp

SEGMENT_BYTES = 16 * 1024
"""Bytes that travel as one; a link's bandwidth shows at this grain."""

UNSENT_BYTES_MAX = 64 * 1024
"""Bytes a sender may have waiting for a slow link, as the TCP host sets it."""

IN_FLIGHT_BYTES_MAX = 4 * 1024 * 1024
"""Bytes sent and not yet read, over the way and both ends' buffers."""

_FIRST_PORT = 10_000
_LOOPBACK = ("127.0.0.1", "::1")
_ANY = ("0.0.0.0", "::")

Observe = Callable[[str, str, str, bytes], None]
"""Told of what happens: kind ("dial", "data", "end"), from, to, bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction between two machines."""

    latency_s: float = 0.0
    bytes_per_s: float = math.inf


class SimNetwork:
    """A world of machines that reach each other by IP address."""

    def __init__(self, *, link: Link | None = None, observe: Observe | None = None) -> None:
        """Make an empty world.

        Args:
            link: Between any two machines for which `set_link` says nothing else.
            observe: Told of all traffic, in order.
        """
        self._link = link or Link()
        self._links: dict[tuple[str, str], Link] = {}
        self._listeners: dict[tuple[str, int], _SimListener] = {}
        self._ports: dict[str, int] = {}
        self._observe = observe or _ignore

    def network(self, host: str) -> Network:
        """Return the network as the machine with this IP address sees it."""
        return _SimView(self, host)

    def set_link(self, source: str, target: str, link: Link) -> None:
        """Set one direction between two machines from now on; what is on its way is not touched."""
        self._links[source, target] = link

    def link(self, source: str, target: str) -> Link:
        """Return one direction between two machines; a machine reaches itself at once."""
        if source == target:
            return Link()
        return self._links.get((source, target), self._link)

    def next_port(self, host: str) -> int:
        """Return a port of a machine that was not used yet."""
        port = self._ports[host] = self._ports.get(host, _FIRST_PORT) + 1
        return port

    def bind(self, host: str, port: int, listener: _SimListener) -> None:
        """Listen on a port.

        Raises:
            ConfigError: It is taken.
        """
        if (host, port) in self._listeners:
            raise ConfigError(f"cannot listen on {listener.address}: the port is taken")
        self._listeners[host, port] = listener

    def release(self, host: str, port: int) -> None:
        """Stop listening on a port."""
        self._listeners.pop((host, port), None)

    async def connect(self, source: str, target: str, port: int) -> ByteStream:
        """Connect two machines; takes one round trip.

        Raises:
            DialFailed: Nobody listens there.
        """
        await trio.sleep(self.link(source, target).latency_s + self.link(target, source).latency_s)
        listener = self._listeners.get((target, port))
        if listener is None:
            raise DialFailed(f"cannot dial {format_tcp(target, port)}: connection refused")
        near = Address(format_tcp(source, self.next_port(source)))
        far = Address(format_tcp(target, port))
        self._observe("dial", near, far, b"")
        outward = _Pipe(near, far, partial(self.link, source, target), self._observe)
        homeward = _Pipe(far, near, partial(self.link, target, source), self._observe)
        listener.arrive(SimStream(far, near, sending=homeward, receiving=outward))
        return SimStream(near, far, sending=outward, receiving=homeward)


class _Pipe:
    """One direction of a byte stream."""

    def __init__(
        self, source: Address, target: Address, link: Callable[[], Link], observe: Observe
    ) -> None:
        self._names = (source, target)
        self._link = link
        self._observe = observe
        self._segments: deque[tuple[float, bytes]] = deque()  # with their times of arrival
        self._in_flight = 0
        self._sent_s = -math.inf  # when the link has sent all it was given
        self._arrived_s = -math.inf  # when all of that has arrived
        self._end_s: float | None = None  # when the end arrives at the reader
        self._gone_s: float | None = None  # when the writer learns that the reader is gone
        self.readers = trio.lowlevel.ParkingLot()
        self.writers = trio.lowlevel.ParkingLot()

    def write(self, data: memoryview) -> int:
        now_s = trio.current_time()
        if self._gone_s is not None and now_s >= self._gone_s:
            raise ConnectionLost("the simulated connection was reset")
        taken = 0
        while taken < len(data) and self._room_at_s() <= now_s:
            segment = bytes(data[taken : taken + SEGMENT_BYTES])
            taken += len(segment)
            self._in_flight += len(segment)
            self._sent_s = max(now_s, self._sent_s) + len(segment) / self._link().bytes_per_s
            self._segments.append((self._arrival_s(), segment))
            self._observe("data", *self._names, segment)
        if taken:
            self.readers.unpark_all()
        return taken

    def read_into(self, buffer: memoryview) -> int | None:
        now_s = trio.current_time()
        taken = 0
        while self._segments and self._segments[0][0] <= now_s and taken < len(buffer):
            arrival_s, segment = self._segments.popleft()
            size = min(len(segment), len(buffer) - taken)
            buffer[taken : taken + size] = segment[:size]
            if size < len(segment):
                self._segments.appendleft((arrival_s, segment[size:]))
            taken += size
        if taken:
            self._in_flight -= taken
            self.writers.unpark_all()
            return taken
        if self._end_s is not None and not self._segments and now_s >= self._end_s:
            return 0
        return None

    def end(self) -> None:
        """The writer closed: the reader finds the end behind the data."""
        self._sent_s = max(trio.current_time(), self._sent_s)
        self._end_s = self._arrival_s()
        self._observe("end", *self._names, b"")
        self.readers.unpark_all()
        self.writers.unpark_all()

    def abandon(self) -> None:
        """The reader closed: the writer finds the stream broken once the news has come."""
        self._gone_s = trio.current_time() + self._link().latency_s
        self._segments.clear()
        self.readers.unpark_all()
        self.writers.unpark_all()

    async def wait_readable(self) -> None:
        await trio.lowlevel.checkpoint()
        while self._gone_s is None:
            due_s = self._end_s if not self._segments else self._segments[0][0]
            if due_s is not None and due_s <= trio.current_time():
                return
            with trio.move_on_at(math.inf if due_s is None else due_s):
                await self.readers.park()

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while self._end_s is None and self._gone_s is None:
            room_at_s = self._room_at_s()
            if room_at_s <= trio.current_time():
                return
            with trio.move_on_at(room_at_s):
                await self.writers.park()
        if self._gone_s is not None:
            await trio.sleep_until(self._gone_s)

    def _room_at_s(self) -> float:
        """When one more segment is taken; inf if that needs the reader to read."""
        if self._in_flight >= IN_FLIGHT_BYTES_MAX:
            return math.inf
        return self._sent_s - UNSENT_BYTES_MAX / self._link().bytes_per_s

    def _arrival_s(self) -> float:
        """When what is sent now arrives: never before what was sent earlier."""
        self._arrived_s = max(self._arrived_s, self._sent_s + self._link().latency_s)
        return self._arrived_s


class SimStream(ByteStream):
    """One end of a simulated byte stream."""

    def __init__(
        self, local: Address, remote: Address, *, sending: _Pipe, receiving: _Pipe
    ) -> None:
        self.local_address = local
        self.remote_address = remote
        self._sending = sending
        self._receiving = receiving
        self._is_open = True

    def send_nowait(self, data: memoryview) -> int:
        self._check()
        return self._sending.write(data)

    async def wait_writable(self) -> None:
        await self._sending.wait_writable()

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        self._check()
        return self._receiving.read_into(buffer)

    async def wait_readable(self) -> None:
        await self._receiving.wait_readable()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._sending.end()
            self._receiving.abandon()

    def _check(self) -> None:
        if not self._is_open:
            raise ConnectionLost("the simulated connection was closed here")


class _SimListener(Listener):
    def __init__(self, world: SimNetwork, host: str, port: int, address: Address) -> None:
        self.address = address
        self._world = world
        self._place = (host, port)
        self._arrived: deque[SimStream] = deque()
        self._waiting = trio.lowlevel.ParkingLot()
        self._is_open = True

    def arrive(self, stream: SimStream) -> None:
        self._arrived.append(stream)
        self._waiting.unpark()

    async def accept(self) -> ByteStream:
        await trio.lowlevel.checkpoint()
        while self._is_open and not self._arrived:
            await self._waiting.park()
        if not self._is_open:
            raise ConnectionLost(f"no longer listening on {self.address}")
        return self._arrived.popleft()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._world.release(*self._place)
            for stream in self._arrived:
                stream.close()
            self._waiting.unpark_all()


class _SimView(Network):
    """The world as one machine sees it."""

    def __init__(self, world: SimNetwork, host: str) -> None:
        self._world = world
        self._host = host

    async def listen(self, address: Address) -> Listener:
        try:
            host, port = parse_tcp(address)
        except BadMessage as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from error
        if host not in (self._host, *_LOOPBACK, *_ANY):
            raise ConfigError(f"cannot listen on {address}: not an address of this machine")
        await trio.lowlevel.checkpoint()
        port = port or self._world.next_port(self._host)
        bound = Address(format_tcp(host, port))
        listener = _SimListener(self._world, self._host, port, bound)
        self._world.bind(self._host, port, listener)
        return listener

    async def dial(self, address: Address) -> ByteStream:
        try:
            host, port = parse_tcp(address)
        except BadMessage as error:
            raise DialFailed(f"cannot dial {address}: {error}") from error
        target = self._host if host in _LOOPBACK else host
        return await self._world.connect(self._host, target, port)

    def interface_addresses(self) -> Sequence[str]:
        return [self._host]


def _ignore(kind: str, source: str, target: str, data: bytes) -> None:
    pass
