"""Byte streams of a simulated network, as the native host uses them in place of TCP."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import TYPE_CHECKING

import trio

from swarmpy.abc import Address, ByteStream, Listener
from swarmpy.errors import ConnectionLost
from swarmpy.testing.calendar import Calendar
from swarmpy.testing.paths import UNSENT_BYTES_MAX, Lane, Path

if TYPE_CHECKING:
    from swarmpy.testing.network import Observe, SimNetwork

SEGMENT_BYTES = 16 * 1024
"""Bytes that travel as one; a link's bandwidth shows at this grain."""

IN_FLIGHT_BYTES_MAX = 4 * 1024 * 1024
"""Bytes sent and not yet read, over the way and both ends' buffers."""


class Pipe:
    """One direction of a byte stream."""

    def __init__(
        self,
        source: Address,
        target: Address,
        path: Path,
        calendar: Calendar,
        chance: random.Random,
        observe: Observe,
    ) -> None:
        """Args: chance: Draws what the link does to each segment."""
        self._names = (source, target)
        self._path = path
        self.unsent_bytes_max = UNSENT_BYTES_MAX
        self._lane = Lane(path, calendar, chance)
        self._calendar = calendar
        self._chance = chance
        self._observe = observe
        self._arrived: deque[bytes] = deque()
        self._in_flight = 0
        self._is_ended = False  # the writer closed
        self._is_end_here = False  # and the reader has been told
        self._is_abandoned = False  # the reader closed
        self._is_broken = False  # and the writer has been told, or the connection was reset
        self._readers = trio.lowlevel.ParkingLot()
        self._wakes = 0  # of the reader, without anything to read
        self._writers = trio.lowlevel.ParkingLot()

    # The writer's end ----------------------------------------------------------------

    def write(self, data: memoryview) -> int:
        self._calendar.catch_up()
        self._raise_if_broken()
        taken = 0
        now_s = trio.current_time()
        while taken < len(data) and self._room_at_s() <= now_s:
            segment = bytes(data[taken : taken + self._segment_bytes(len(data) - taken)])
            taken += len(segment)
            self._in_flight += len(segment)
            self._observe("data", *self._names, segment)
            self._lane.post(len(segment), self._arrive, segment)
        return taken

    def end(self) -> None:
        """The writer closed: the reader finds the end behind the data."""
        self._is_ended = True
        self._observe("end", *self._names, b"")
        self._lane.post(0, self._arrive_end)
        self._writers.unpark_all()

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while not (self._is_ended or self._is_broken):
            room_at_s = self._room_at_s()
            if room_at_s <= trio.current_time():
                return
            if math.isfinite(room_at_s):
                self._calendar.post(room_at_s, self._writers.unpark_all)
            await self._writers.park()

    # The reader's end ----------------------------------------------------------------

    def read_into(self, buffer: memoryview) -> int | None:
        self._calendar.catch_up()
        if not self._arrived:
            self._raise_if_broken()
            return 0 if self._is_end_here else None
        taken = 0
        while self._arrived and taken < len(buffer):
            segment = self._arrived.popleft()
            size = min(len(segment), len(buffer) - taken)
            buffer[taken : taken + size] = segment[:size]
            taken += size
            if size < len(segment):
                self._arrived.appendleft(segment[size:])
            elif self._path.link.torn:
                break  # a cut shows only where reads end at it
        self._in_flight -= taken
        self._writers.unpark_all()
        return taken

    def abandon(self, news: Lane) -> None:
        """The reader closed: the writer finds the stream broken once the `news` has come."""
        self._is_abandoned = True
        self._arrived.clear()
        self._readers.unpark_all()
        news.post(0, self.break_up)

    async def wait_readable(self) -> None:
        await trio.lowlevel.checkpoint()
        wakes = self._wakes
        while not (self._arrived or self._is_end_here or self._is_abandoned or self._is_broken):
            if wakes != self._wakes:
                return
            await self._readers.park()

    def wake_reader(self) -> None:
        """Let who waits to read wait no longer."""
        self._wakes += 1
        self._readers.unpark_all()

    # Both ------------------------------------------------------------------------------

    @property
    def lane(self) -> Lane:
        """What carries this direction."""
        return self._lane

    def break_up(self) -> None:
        """The connection is gone: both who write and who read learn it."""
        self._is_broken = True
        self._readers.unpark_all()
        self._writers.unpark_all()

    def _arrive(self, segment: bytes) -> None:
        if not self._is_abandoned:
            self._arrived.append(segment)
            self._readers.unpark_all()

    def _arrive_end(self) -> None:
        self._is_end_here = True
        self._readers.unpark_all()

    def _raise_if_broken(self) -> None:
        if self._is_broken:
            raise ConnectionLost("the simulated connection was reset")

    def _segment_bytes(self, left: int) -> int:
        size = min(left, SEGMENT_BYTES)
        torn = self._path.link.torn
        if torn and size > 1 and self._chance.random() < torn:
            return self._chance.randrange(1, size)
        return size

    def _room_at_s(self) -> float:
        """When one more segment is taken; inf if that needs the reader to read."""
        if self._in_flight >= IN_FLIGHT_BYTES_MAX:
            return math.inf
        return self._path.room_at_s(self.unsent_bytes_max)


class SimStream(ByteStream):
    """One end of a simulated byte stream."""

    def __init__(self, local: Address, remote: Address, *, sending: Pipe, receiving: Pipe) -> None:
        self.local_address = local
        self.remote_address = remote
        self._sending = sending
        self._receiving = receiving
        self._is_open = True
        receiving.lane.path.ends[self] = None
        sending.lane.on_refused = self.was_reset

    def send_nowait(self, data: memoryview) -> int:
        self._check()
        return self._sending.write(data)

    async def wait_writable(self) -> None:
        await self._sending.wait_writable()

    def limit_unsent(self, bytes_max: int) -> None:
        self._sending.unsent_bytes_max = bytes_max

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        self._check()
        return self._receiving.read_into(buffer)

    async def wait_readable(self) -> None:
        await self._receiving.wait_readable()

    def wake_reader(self) -> None:
        self._receiving.wake_reader()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._receiving.lane.path.ends.pop(self, None)
            self._sending.end()
            self._receiving.abandon(self._sending.lane)

    def path_changed(self) -> None:
        """Nothing: who uses the stream keeps watch itself."""

    def was_reset(self) -> None:
        """Break both directions."""
        self._receiving.lane.path.ends.pop(self, None)
        self._sending.break_up()
        self._receiving.break_up()

    def _check(self) -> None:
        if not self._is_open:
            raise ConnectionLost("the simulated connection was closed here")


class SimListener(Listener):
    """A port of a simulated machine that byte streams arrive at."""

    def __init__(self, world: SimNetwork, machine: str, port: int, address: Address) -> None:
        self.address = address
        self._world = world
        self._place = (machine, port)
        self._arrived: deque[SimStream] = deque()
        self._waiting = trio.lowlevel.ParkingLot()
        self._is_open = True

    def arrive(self, stream: SimStream) -> None:
        """A connection was made."""
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
            self._world.release_port(*self._place, self)
            for stream in self._arrived:
                stream.close()
            self._waiting.unpark_all()
