"""A send that is cancelled, at whatever byte, costs its own stream and nothing else."""

from __future__ import annotations

from contextlib import suppress

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from net_hosts import ECHO, echo, exchange, receive_all
from test_upgrade import byte_streams, upgraded_end

from swarmpy.abc import ByteStream, Priority, ProtocolId
from swarmpy.errors import NetworkError
from swarmpy.net.connection import NativeConnection
from swarmpy.net.stream import NativeStream

SINK = ProtocolId("/swarmpy-test/sink/1")
SENT_BYTES = 200_000
"""Several frames, less than a window: the wire alone decides where the sender stands."""

WIRE_BYTES = SENT_BYTES + 1000
"""What that is at most on the wire, headers and tags included."""


class Tap(ByteStream):
    """A byte stream that passes so many bytes on and then none, until it is opened again."""

    def __init__(self, byte_stream: ByteStream) -> None:
        self._byte_stream = byte_stream
        self.local_address = byte_stream.local_address
        self.remote_address = byte_stream.remote_address
        self._left: int | None = None
        self._opened = trio.Event()

    def shut_after(self, size: int) -> None:
        self._left = size
        self._opened = trio.Event()

    def open(self) -> None:
        self._left = None
        self._opened.set()

    def send_nowait(self, data: memoryview) -> int:
        if self._left is None:
            return self._byte_stream.send_nowait(data)
        count = self._byte_stream.send_nowait(data[: self._left]) if self._left else 0
        self._left -= count
        return count

    async def wait_writable(self) -> None:
        if self._left == 0:
            await self._opened.wait()
        await self._byte_stream.wait_writable()

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        return self._byte_stream.receive_into_nowait(buffer)

    async def wait_readable(self) -> None:
        await self._byte_stream.wait_readable()

    def wake_reader(self) -> None:
        self._byte_stream.wake_reader()

    def close(self) -> None:
        self._opened.set()
        self._byte_stream.close()


async def cancel_at(cut: int) -> None:
    """Cancel a send when `cut` of its bytes are on the wire; then use the other streams."""
    ends = await byte_streams()
    tap = Tap(ends[0])
    made: dict[str, NativeConnection] = {}

    async def make(role: str, end: ByteStream) -> None:
        made[role] = await upgraded_end(role, end)  # type: ignore[arg-type]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make, "initiator", tap)
        nursery.start_soon(make, "responder", ends[1])
    near, far = made["initiator"], made["responder"]

    async def serve(stream: NativeStream) -> None:
        with suppress(NetworkError):
            await echo(stream)
            await stream.close_write()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.run, serve)
        nursery.start_soon(far.run, serve)
        other = near.open_stream(ECHO, Priority.DECODE)
        assert await exchange(other, b"before") == b"before"

        tap.shut_after(cut)
        victim = near.open_stream(SINK, Priority.BULK)
        async with trio.open_nursery() as sending:
            sending.start_soon(victim.send_all, bytes(SENT_BYTES))
            await trio.testing.wait_all_tasks_blocked()
            sending.cancel_scope.cancel()
        tap.open()

        assert await exchange(other, b"after") == b"after"
        fresh = near.open_stream(ECHO, Priority.DECODE)
        await fresh.send_all(bytes(100_000))
        await fresh.close_write()
        assert await receive_all(fresh) == bytes(100_000)
        assert near.is_open
        assert far.is_open
        near.close()
        far.close()


def run(cut: int) -> None:
    trio.run(cancel_at, cut, clock=trio.testing.MockClock(autojump_threshold=0.0))


def test_a_send_cancelled_at_any_byte_of_its_first_frames_head_costs_its_stream_alone() -> None:
    """Every byte of the first lengths, tags and headers, one after the other."""
    for cut in range(100):
        run(cut)


@given(st.integers(0, WIRE_BYTES))
@settings(max_examples=60, deadline=None)
def test_a_send_cancelled_at_any_byte_costs_its_stream_alone(cut: int) -> None:
    run(cut)
