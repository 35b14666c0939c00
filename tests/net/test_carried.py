"""A byte stream inside a stream: what a byte stream promises, over a stream's own promises."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from net_hosts import ECHO, World, connect, receive_raw, send_raw

from swarmpy.abc import Stream
from swarmpy.errors import ConnectionLost
from swarmpy.net.carried import LINGER_S, UNSENT_BYTES_MAX, CarriedStream
from swarmpy.net.connection import NativeConnection

Pair = tuple[CarriedStream, CarriedStream]


@pytest.fixture
async def pair(sim: World, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> Pair:
    """Both ends of a byte stream inside a stream, the first one opened it."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    arrived: list[CarriedStream] = []
    has_arrived = trio.Event()

    async def carry(stream: Stream) -> None:
        arrived.append(CarriedStream(stream))
        has_arrived.set()
        await arrived[0].run()

    bob.set_handler(ECHO, carry)
    near = CarriedStream(await alice.open_stream(await connect(alice, bob), [ECHO]))
    nursery.start_soon(near.run)
    await send_raw(near, b"!")
    await has_arrived.wait()
    assert await receive_raw(arrived[0]) == b"!"
    return near, arrived[0]


async def receive_raw_exactly(end: CarriedStream, size: int) -> bytes:
    received = b""
    while len(received) < size:
        data = await receive_raw(end, 10_000)
        assert data
        received += data
    return received


async def receive_for_ever(end: CarriedStream) -> None:
    while await receive_raw(end):
        pass


async def test_bytes_cross_both_ways_whatever_their_count(pair: Pair) -> None:
    near, far = pair
    sent = random.Random(1).randbytes(1_000_000)
    for sender, receiver in ((near, far), (far, near)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_raw, sender, sent)
            assert await receive_raw_exactly(receiver, len(sent)) == sent


async def test_its_ends_are_those_of_the_carrying_connection_unless_told(pair: Pair) -> None:
    near, far = pair
    assert near.local_address == far.remote_address
    assert near.remote_address == far.local_address


async def test_nothing_there_is_none_and_an_end_is_nothing(pair: Pair) -> None:
    near, far = pair
    assert far.receive_into_nowait(memoryview(bytearray(10))) is None
    near.close()
    assert await receive_raw(far) == b""
    assert await receive_raw(far) == b""


async def test_what_was_taken_arrives_although_it_is_closed_at_once(pair: Pair) -> None:
    near, far = pair
    sent = random.Random(2).randbytes(UNSENT_BYTES_MAX)
    assert near.send_nowait(memoryview(sent)) == len(sent)
    near.close()
    assert await receive_raw_exactly(far, len(sent)) == sent
    assert await receive_raw(far) == b""


@pytest.mark.parametrize("beyond", [-1, 0, 1])
async def test_so_many_bytes_wait_and_no_more(pair: Pair, beyond: int) -> None:
    near, _ = pair
    taken = near.send_nowait(memoryview(bytes(UNSENT_BYTES_MAX + beyond)))
    assert taken == UNSENT_BYTES_MAX + min(beyond, 0)


async def test_a_peer_that_does_not_read_stops_the_sender_and_reading_lets_it_go_on(
    pair: Pair, autojump_clock: object
) -> None:
    near, far = pair
    sent = 0
    with trio.move_on_after(10):
        while True:
            sent += near.send_nowait(memoryview(bytes(1000)))
            if len(near._unsent) == UNSENT_BYTES_MAX:
                await near.wait_writable()
            else:
                await trio.lowlevel.checkpoint()
    # The stream's window, one piece at either end, and what waits here.
    assert sent < 1_000_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.wait_writable)
        await receive_raw_exactly(far, sent)


async def test_a_hint_makes_it_take_less(pair: Pair) -> None:
    near, _ = pair
    near.limit_unsent(100)
    assert near.send_nowait(memoryview(bytes(1000))) == 100
    assert near.send_nowait(memoryview(bytes(1000))) == 0
    await near.wait_writable()
    near.limit_unsent(2 * UNSENT_BYTES_MAX)
    assert near.send_nowait(memoryview(bytes(2 * UNSENT_BYTES_MAX))) == UNSENT_BYTES_MAX


@pytest.mark.parametrize("waiting", ["wait_readable", "wait_writable"])
async def test_closing_wakes_who_waits_at_once(
    pair: Pair, waiting: str, autojump_clock: object
) -> None:
    near, _ = pair
    for _ in range(20):
        near.send_nowait(memoryview(bytes(UNSENT_BYTES_MAX)))
        await trio.testing.wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(getattr(near, waiting))
        await trio.testing.wait_all_tasks_blocked()
        near.close()
        near.close()
    assert trio.current_time() == 0.0
    await getattr(near, waiting)()
    with pytest.raises(ConnectionLost):
        near.send_nowait(memoryview(b"x"))
    with pytest.raises(ConnectionLost):
        near.receive_into_nowait(memoryview(bytearray(1)))


async def test_a_cancelled_wait_loses_no_byte(pair: Pair) -> None:
    near, far = pair
    for _ in range(3):
        with trio.CancelScope() as scope:
            scope.cancel()
            await far.wait_readable()
        await send_raw(near, b"hello")
        assert await receive_raw(far) == b"hello"


async def test_a_reset_stream_is_a_broken_byte_stream(pair: Pair) -> None:
    near, far = pair
    far._stream.reset()
    with pytest.raises(ConnectionLost, match="carrying stream broke"):
        await receive_raw(near)
    with pytest.raises(ConnectionLost):
        near.send_nowait(memoryview(b"x"))
    await near.wait_writable()


async def test_a_lost_connection_is_a_broken_byte_stream(pair: Pair) -> None:
    pair[0]._stream.connection.close()
    for end in pair:
        with pytest.raises(ConnectionLost):
            await receive_raw(end)


async def test_what_came_before_the_break_can_still_be_read(pair: Pair) -> None:
    near, far = pair
    await send_raw(near, b"hello")
    await far.wait_readable()
    far._stream.connection.close()
    await trio.testing.wait_all_tasks_blocked()
    assert await receive_raw(far) == b"hello"
    with pytest.raises(ConnectionLost):
        await receive_raw(far)


async def test_closing_leaves_no_stream_even_where_the_peer_reads_nothing(
    pair: Pair, autojump_clock: object
) -> None:
    """Goal: bounded time and memory. Method: the peer never reads; look after `LINGER_S`."""
    near, far = pair
    for _ in range(20):
        near.send_nowait(memoryview(bytes(UNSENT_BYTES_MAX)))
        await trio.testing.wait_all_tasks_blocked()
    near.close()
    await trio.sleep(LINGER_S + 0.1)
    with pytest.raises(ConnectionLost):
        await receive_for_ever(far)


async def test_a_closed_pair_leaves_its_connection_at_rest(
    pair: Pair, autojump_clock: object
) -> None:
    near, far = pair
    connection = near._stream.connection
    near.close()
    assert await receive_raw(far) == b""
    far.close()
    await trio.sleep(0.1)
    assert isinstance(connection, NativeConnection)
    assert connection.stream_count == 0
    assert connection.is_open
