"""Who waits for bytes reads them in the reader's place: that must hand over, whatever happens.

A task leads while it waits on the socket itself. These tests make one lead and then cancel, reset,
close or starve it; the other streams of its connection must notice nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from net_hosts import receive_all, receive_exactly
from test_upgrade import Role, upgraded_end

from swarmpy import config
from swarmpy.abc import Address, ByteStream, Priority, ProtocolId
from swarmpy.errors import ConnectionLost, LocalProtocolError, NetworkError, StreamReset
from swarmpy.net.connection import NativeConnection
from swarmpy.net.stream import NativeStream
from swarmpy.testing import Link, SimNetwork
from swarmpy.testing.determinism import deterministic

ANY = ProtocolId("/swarmpy-test/any/1")
LATENCY_S = 0.01
SOON_S = 0.001
"""Sooner than anything could have come over the link."""

TIDY_S = 1.0
"""What every handler here takes once it is cancelled."""

TRIES = 100
"""A fair scheduler lets a waiting task lead every other time."""


@pytest.fixture(autouse=True)
def order() -> Iterator[None]:
    """The scheduler's dice decide who leads: one order, so that a test does not now and then."""
    with deterministic(1):
        yield


class Tap(ByteStream):
    """A byte stream that tells of each time it is waited on or read."""

    def __init__(self, byte_stream: ByteStream) -> None:
        self._byte_stream = byte_stream
        self.local_address = byte_stream.local_address
        self.remote_address = byte_stream.remote_address
        self.on_use: Callable[[], None] = lambda: None
        self.error: NetworkError | None = None

    def send_nowait(self, data: memoryview) -> int:
        return self._byte_stream.send_nowait(data)

    async def wait_writable(self) -> None:
        await self._byte_stream.wait_writable()

    def wake_reader(self) -> None:
        self._byte_stream.wake_reader()

    def close(self) -> None:
        self._byte_stream.close()

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        self.on_use()
        if self.error is not None:
            raise self.error
        return self._byte_stream.receive_into_nowait(buffer)

    async def wait_readable(self) -> None:
        self.on_use()
        await self._byte_stream.wait_readable()


class Ends:
    """Both ends of a connection that runs, and the far ends of its streams."""

    def __init__(self, world: SimNetwork, tap: Tap) -> None:
        self.world = world
        self.tap = tap
        self.near: NativeConnection
        self.far: NativeConnection
        self.arrived: dict[int, NativeStream] = {}
        self.running = trio.CancelScope()
        """Of the near end."""

    async def run_near(self) -> None:
        with self.running:
            await self.near.run(self.keep)

    async def keep(self, stream: NativeStream) -> None:
        """Serve an inbound stream: the test does."""
        self.arrived[stream.stream_id] = stream
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(TIDY_S)

    async def stream(self) -> tuple[NativeStream, NativeStream]:
        """Return both ends of a new stream."""
        near = self.near.open_stream(ANY, Priority.CONTROL)
        await near.send_all(b"!")
        await trio.sleep(2 * LATENCY_S)
        far = self.arrived[near.stream_id]
        await receive_exactly(far, 1)
        return near, far

    async def led(
        self, nursery: trio.Nursery, read: Callable[..., Awaitable[None]], *args: object
    ) -> tuple[NativeStream, NativeStream]:
        """Return both ends of a new stream whose reader leads: `read(stream, *args)`."""
        near, far = await self.stream()
        nursery.start_soon(read, near, *args)
        await self.until_led(near, far)
        return near, far

    async def until_led(self, stream: NativeStream, far: NativeStream) -> None:
        """Send bytes to who receives from a stream, until that task leads."""
        for _ in range(TRIES):
            await far.send_all(b"x")
            await trio.sleep(3 * LATENCY_S)
            if stream._is_leading:
                assert self.near._is_led
                return
        raise AssertionError("it never led")


@asynccontextmanager
async def running() -> AsyncIterator[Ends]:
    """A connection over a simulated link whose ends both run."""
    world = SimNetwork(link=Link(latency_s=LATENCY_S))
    listener = await world.network("10.0.0.2").listen(Address("/ip4/10.0.0.2/tcp/7"))
    tap = Tap(await world.network("10.0.0.1").dial(listener.address))
    made: dict[str, NativeConnection] = {}

    async def make(role: Role, end: ByteStream) -> None:
        made[role] = await upgraded_end(role, end)

    far_end = await listener.accept()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make, "initiator", tap)
        nursery.start_soon(make, "responder", far_end)
    ends = Ends(world, tap)
    ends.near, ends.far = made["initiator"], made["responder"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends.run_near)
        nursery.start_soon(ends.far.run, ends.keep)
        yield ends
        ends.near.close()
        ends.far.close()
        nursery.cancel_scope.cancel()


async def drain(stream: NativeStream) -> None:
    """Read for ever."""
    while await stream.receive_some():
        pass


async def check_it_moves(ends: Ends) -> None:
    """Somebody reads the socket, even if nobody waits for bytes: streams reach their handler."""
    stream = ends.far.open_stream(ANY, Priority.CONTROL)
    await stream.send_all(b"!")
    await trio.sleep(2 * LATENCY_S)
    assert await receive_exactly(ends.arrived[stream.stream_id], 1) == b"!"
    stream.reset()
    with trio.fail_after(5 * LATENCY_S):
        near, far = await ends.stream()
        await far.send_all(b"hello")
        assert await receive_exactly(near, 5) == b"hello"


# Handing over ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", range(1, 25))
async def test_a_leader_cancelled_anywhere_hands_the_reading_back(
    autojump_clock: object, use: int
) -> None:
    """Goal: no byte is lost and nobody hangs. Method: cancel it at every use of the socket, before
    each wait and between reading and the next, while two streams carry data."""
    size = 100_000
    async with running() as ends:
        led, led_far = await ends.stream()
        other, other_far = await ends.stream()
        received = bytearray()
        scope = trio.CancelScope()
        uses = 0

        def count() -> None:
            nonlocal uses
            uses += led._is_leading
            if uses == use:
                scope.cancel()

        async def receive() -> None:
            while data := await led.receive_some():
                received.extend(data)

        async with trio.open_nursery() as nursery:

            async def lead() -> None:
                with scope:
                    await receive()

            nursery.start_soon(lead)
            await ends.until_led(led, led_far)
            before = len(received)
            ends.tap.on_use = count
            for far in (other_far, led_far):
                nursery.start_soon(far.send_all, bytes(size))
            with trio.fail_after(5):
                await receive_exactly(other, size)
        assert scope.cancelled_caught
        await check_it_moves(ends)
        await led_far.close_write()
        with trio.fail_after(5):
            await receive()
        assert len(received) == before + size
        assert ends.near.is_open


async def test_a_grant_is_sent_at_the_latest_when_its_reader_waits(
    autojump_clock: object,
) -> None:
    """It rides on what the reader sends; but one that only reads must not stop its peer."""
    async with running() as ends, trio.open_nursery() as nursery:
        near, far = await ends.stream()
        size = config.STREAM_WINDOW_BYTES // 2
        await far.send_all(bytes(size))
        await trio.sleep(1)
        await receive_exactly(near, size)
        await trio.sleep(LATENCY_S)
        assert ends.far.window(far.stream_id) == size
        nursery.start_soon(drain, near)
        await trio.sleep(1.5 * LATENCY_S)
        assert ends.far.window(far.stream_id) >= 2 * size
        nursery.cancel_scope.cancel()


async def test_a_grant_is_sent_at_once_while_more_is_there_to_read(
    autojump_clock: object,
) -> None:
    """Its reader may take long over what it has: the peer sends on meanwhile."""
    async with running() as ends:
        near, far = await ends.stream()
        size = config.STREAM_WINDOW_BYTES // 2
        await far.send_all(bytes(2 * size))
        await trio.sleep(1)
        await receive_exactly(near, size)
        await trio.sleep(1.5 * LATENCY_S)
        assert ends.far.window(far.stream_id) >= size


async def test_two_streams_lead_in_turn(autojump_clock: object) -> None:
    """Goal: never two on one socket, which trio forbids. Method: two readers that give up now and
    then, fed now together and now one after the other."""
    async with running() as ends:
        pairs = [await ends.stream() for _ in range(2)]
        received = [0, 0]
        leaders: set[tuple[bool, ...]] = set()

        async def read(index: int) -> None:
            while True:
                with trio.move_on_after((5 + 2 * index) * LATENCY_S):
                    while True:
                        received[index] += len(await pairs[index][0].receive_some())
                await trio.sleep(2 * LATENCY_S)

        def look() -> None:
            leaders.add(tuple(near._is_leading for near, _ in pairs))

        async with trio.open_nursery() as nursery:
            ends.tap.on_use = look
            for index in range(2):
                nursery.start_soon(read, index)
            for turn in range(TRIES):
                for _, far in pairs:
                    await far.send_all(b"x")
                    await trio.sleep(turn % 3 * LATENCY_S)
            await trio.sleep(3 * LATENCY_S)
            nursery.cancel_scope.cancel()
        assert received == [TRIES, TRIES]
        assert leaders == {(False, False), (True, False), (False, True)}
        await check_it_moves(ends)


async def test_a_leader_to_whom_nothing_comes_serves_the_others(autojump_clock: object) -> None:
    """Goal: their bytes are not held up by whose task read them. Method: one leads for a stream
    that is silent, while 4 MiB and an exchange go past it."""
    size = 4 * 1024 * 1024
    async with running() as ends, trio.open_nursery() as nursery:
        led, led_far = await ends.stream()
        bulk, bulk_far = await ends.stream()
        nursery.start_soon(drain, led)
        await ends.until_led(led, led_far)
        nursery.start_soon(bulk_far.send_all, bytes(size))
        nursery.start_soon(receive_exactly, bulk, size)
        for _ in range(5):
            await check_it_moves(ends)
        assert led._is_leading
        nursery.cancel_scope.cancel()


async def test_a_handler_of_a_stream_that_a_leader_received_runs(autojump_clock: object) -> None:
    async with running() as ends, trio.open_nursery() as nursery:
        await ends.led(nursery, drain)
        stream = ends.far.open_stream(ANY, Priority.CONTROL)
        await stream.send_all(b"hello")
        await trio.sleep(2 * LATENCY_S)
        assert await receive_exactly(ends.arrived[stream.stream_id], 5) == b"hello"
        nursery.cancel_scope.cancel()


async def test_a_second_reader_of_a_leading_stream_is_refused(autojump_clock: object) -> None:
    async with running() as ends, trio.open_nursery() as nursery:
        near, _ = await ends.led(nursery, drain)
        with pytest.raises(LocalProtocolError, match="two tasks"):
            await near.receive_some()
        nursery.cancel_scope.cancel()


# Ends while somebody leads -----------------------------------------------------------------------


@pytest.fixture
def told_s() -> list[float]:
    """When the leader was told."""
    return []


async def expect(
    stream: NativeStream, error: type[NetworkError], match: str, told_s: list[float]
) -> None:
    with pytest.raises(error, match=match):
        await drain(stream)
    told_s.append(trio.current_time())


async def test_a_leader_whose_stream_is_reset_here_learns_it_at_once(
    autojump_clock: object, told_s: list[float]
) -> None:
    """It waits for the socket, where nothing may ever come: a frozen peer sends no more."""
    async with running() as ends, trio.open_nursery() as nursery:
        near, _ = await ends.led(nursery, expect, StreamReset, "reset here", told_s)
        ends.world.freeze("10.0.0.2")
        await trio.sleep(2 * LATENCY_S)
        at_s = trio.current_time()
        near.reset()
        await trio.sleep(1)
        assert told_s
        assert told_s[0] - at_s < SOON_S
        ends.world.thaw("10.0.0.2")
        await trio.sleep(1)
        await check_it_moves(ends)


async def test_a_leader_whose_stream_is_shed_learns_it_at_once(
    autojump_clock: object, told_s: list[float]
) -> None:
    """The node's budget is one for all connections: another one's bytes may cost this stream."""
    async with running() as ends, trio.open_nursery() as nursery:
        near, _ = await ends.led(nursery, expect, StreamReset, "unread", told_s)
        at_s = trio.current_time()
        ends.near._yamux.reset(near.stream_id)
        ends.near._was_shed(near.stream_id)
        await trio.sleep(1)
        assert told_s[0] - at_s < SOON_S
        await check_it_moves(ends)


async def test_a_leader_whose_stream_the_peer_resets_is_told_and_hands_over(
    autojump_clock: object, told_s: list[float]
) -> None:
    async with running() as ends, trio.open_nursery() as nursery:
        _, far = await ends.led(nursery, expect, StreamReset, "the peer gave it up", told_s)
        far.reset()
        await trio.sleep(2 * LATENCY_S)
        assert told_s
        await check_it_moves(ends)


async def test_a_leader_reads_on_while_its_own_sending_side_is_closed(
    autojump_clock: object,
) -> None:
    async with running() as ends, trio.open_nursery() as nursery:
        near, far = await ends.led(nursery, drain)
        await near.close_write()
        assert await receive_all(far) == b""
        await check_it_moves(ends)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["closed here", "closed there", "broken", "failing", "cancelled"])
async def test_a_connection_that_ends_while_it_is_led_tells_everybody(
    autojump_clock: object, how: str
) -> None:
    """Goal: the leader and who waits behind it both see `ConnectionLost` at once, and nothing that
    is others': no foreign error, no cancellation. A handler that tidies up delays nobody."""
    async with running() as ends, trio.open_nursery() as nursery:
        led, far = await ends.stream()
        waiting, _ = await ends.stream()
        told_s: list[float] = []
        nursery.start_soon(expect, led, ConnectionLost, "connection to", told_s)
        await ends.until_led(led, far)
        nursery.start_soon(expect, waiting, ConnectionLost, "connection to", told_s)
        await ends.far.open_stream(ANY, Priority.CONTROL).send_all(b"tidy")
        await trio.sleep(2 * LATENCY_S)
        assert waiting._reader is not None
        at_s = trio.current_time()
        if how == "closed here":
            ends.near.close()
        elif how == "closed there":
            ends.far.close()
        elif how == "broken":
            ends.world.reset("10.0.0.1", "10.0.0.2")
        elif how == "failing":
            ends.tap.error = ConnectionLost("the socket broke")
            await far.send_all(b"x")
        else:
            ends.running.cancel()
        await trio.sleep(2 * LATENCY_S)
        assert len(told_s) == 2
        assert max(told_s) - at_s < LATENCY_S + SOON_S
        assert not ends.near.is_alive


async def test_a_wait_that_finds_the_connection_broken_does_not_begin(
    autojump_clock: object,
) -> None:
    """Goal: no hang. Method: who waits sends a grant first, and that shows the peer is gone."""
    async with running() as ends:
        near, far = await ends.stream()
        size = config.STREAM_WINDOW_BYTES // 2
        await far.send_all(bytes(size))
        await trio.sleep(1)
        await receive_exactly(near, size)
        assert ends.near._outbox
        ends.world.reset("10.0.0.1", "10.0.0.2")
        assert ends.near.is_alive
        with trio.fail_after(1), pytest.raises(ConnectionLost, match="reset"):
            await near.receive_some()


# Keepalive ---------------------------------------------------------------------------------------


async def test_a_led_connection_is_kept_alive_and_measured(autojump_clock: object) -> None:
    async with running() as ends, trio.open_nursery() as nursery:
        near, _ = await ends.led(nursery, drain)
        ends.near.rtt_s = None
        await trio.sleep(3600)
        assert near._is_leading
        assert ends.near.rtt_s == pytest.approx(2 * LATENCY_S)
        assert trio.current_time() - ends.near.heard_s < config.KEEPALIVE_TIMEOUT_S
        await check_it_moves(ends)
        nursery.cancel_scope.cancel()


async def test_a_peer_that_freezes_while_somebody_leads_is_given_up(
    autojump_clock: object, told_s: list[float]
) -> None:
    async with running() as ends, trio.open_nursery() as nursery:
        await ends.led(nursery, expect, ConnectionLost, "nothing was heard", told_s)
        at_s = trio.current_time()
        ends.world.freeze("10.0.0.2")
        await trio.sleep(60)
        assert config.KEEPALIVE_TIMEOUT_S - 1 < told_s[0] - at_s < 15
