"""Byte streams between hosts that neither of them dialled, as relays and punched holes give."""

from __future__ import annotations

from typing import Any

import trio

from swarmpy.abc import Address, ByteStream
from swarmpy.errors import ConnectionLost
from swarmpy.net.connection import NativeConnection
from swarmpy.net.host import NativeHost

CAPACITY_BYTES = 64 * 1024


class MemoryStream(ByteStream):
    """One end of a pair: what one sends lies in the other's buffer."""

    def __init__(self, local: str, remote: str) -> None:
        self.local_address = Address(local)
        self.remote_address = Address(remote)
        self.is_open = True
        self._received = bytearray()
        self._changed = trio.lowlevel.ParkingLot()
        self._wakes = 0
        self._other: MemoryStream

    def connect(self, other: MemoryStream) -> None:
        self._other, other._other = other, self

    def send_nowait(self, data: memoryview) -> int:
        if not self.is_open or not self._other.is_open:
            raise ConnectionLost("the pair is closed")
        taken = min(len(data), CAPACITY_BYTES - len(self._other._received))
        self._other._received += data[:taken]
        self._other._changed.unpark_all()
        return taken

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while self._is_whole and len(self._other._received) >= CAPACITY_BYTES:
            await self._changed.park()

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        if not self.is_open:
            raise ConnectionLost("closed here")
        size = min(len(buffer), len(self._received))
        if not size:
            return None if self._other.is_open else 0
        buffer[:size] = self._received[:size]
        del self._received[:size]
        self._other._changed.unpark_all()
        return size

    async def wait_readable(self) -> None:
        await trio.lowlevel.checkpoint()
        wakes = self._wakes
        while self._is_whole and not self._received and wakes == self._wakes:
            await self._changed.park()

    def wake_reader(self) -> None:
        self._wakes += 1
        self._changed.unpark_all()

    def close(self) -> None:
        self.is_open = False
        self._changed.unpark_all()
        self._other._changed.unpark_all()

    @property
    def _is_whole(self) -> bool:
        return self.is_open and self._other.is_open


def memory_pair() -> tuple[MemoryStream, MemoryStream]:
    """Return both ends of a byte stream in memory."""
    near = MemoryStream("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/2")
    far = MemoryStream("/ip4/192.0.2.2/tcp/2", "/ip4/192.0.2.1/tcp/1")
    near.connect(far)
    return near, far


async def joined(
    near: NativeHost,
    far: NativeHost,
    *,
    ends: tuple[ByteStream, ByteStream] | None = None,
    **options: Any,
) -> tuple[NativeConnection, NativeConnection]:
    """Make a connection of a byte stream: `near` is initiator; options are those of `adopt`."""
    near_end, far_end = ends or memory_pair()
    made: list[NativeConnection] = []

    async def respond() -> None:
        made.append(await far.adopt(far_end, role="responder", **options))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(respond)
        peer = far.identity.peer_id
        made.insert(0, await near.adopt(near_end, role="initiator", expected_peer=peer, **options))
    near_connection = next(item for item in made if item.direction == "outbound")
    far_connection = next(item for item in made if item.direction == "inbound")
    return near_connection, far_connection
