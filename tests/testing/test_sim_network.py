"""The simulated network: time, bandwidth, buffers and ends, as real links have them."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from swarmpy.abc import Address, ByteStream
from swarmpy.errors import ConfigError, ConnectionLost, DialFailed
from swarmpy.testing import Link, SimNetwork
from swarmpy.testing.network import IN_FLIGHT_BYTES_MAX, UNSENT_BYTES_MAX

ANY = Address("/ip4/0.0.0.0/tcp/0")


async def pair(world: SimNetwork) -> tuple[ByteStream, ByteStream]:
    """Return both ends of a stream between two machines."""
    listener = await world.network("10.0.0.2").listen(Address("/ip4/0.0.0.0/tcp/7"))
    near = await world.network("10.0.0.1").dial(Address("/ip4/10.0.0.2/tcp/7"))
    far = await listener.accept()
    listener.close()
    return near, far


async def send(stream: ByteStream, size: int) -> None:
    view = memoryview(bytes(size))
    while view:
        view = view[stream.send_nowait(view) :]
        if view:
            await stream.wait_writable()


async def receive(stream: ByteStream, size: int) -> None:
    buffer = memoryview(bytearray(1 << 20))
    while size:
        count = stream.receive_into_nowait(buffer)
        if count is None:
            await stream.wait_readable()
        else:
            assert count
            size -= count


async def test_a_dial_takes_a_round_trip(autojump_clock: object) -> None:
    await pair(SimNetwork(link=Link(latency_s=0.1)))
    assert trio.current_time() == pytest.approx(0.2)


async def test_bytes_take_the_latency_of_their_direction(autojump_clock: object) -> None:
    world = SimNetwork()
    near, far = await pair(world)
    world.set_link("10.0.0.1", "10.0.0.2", Link(latency_s=0.3))
    await send(near, 5)
    await receive(far, 5)
    assert trio.current_time() == pytest.approx(0.3)
    await send(far, 5)
    await receive(near, 5)
    assert trio.current_time() == pytest.approx(0.3)


async def test_bytes_take_the_time_their_link_needs(autojump_clock: object) -> None:
    near, far = await pair(SimNetwork(link=Link(bytes_per_s=1e6)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, near, 3_000_000)
        await receive(far, 3_000_000)
    assert trio.current_time() == pytest.approx(3.0)


async def test_a_slow_link_takes_only_so_much_ahead(autojump_clock: object) -> None:
    near, _ = await pair(SimNetwork(link=Link(bytes_per_s=1e6)))
    taken = near.send_nowait(memoryview(bytes(1 << 20)))
    assert UNSENT_BYTES_MAX <= taken <= 2 * UNSENT_BYTES_MAX


async def test_a_reader_that_does_not_read_stops_its_sender(autojump_clock: object) -> None:
    near, far = await pair(SimNetwork())
    with trio.move_on_after(10) as scope:
        await send(near, 2 * IN_FLIGHT_BYTES_MAX)
    assert scope.cancelled_caught
    await receive(far, IN_FLIGHT_BYTES_MAX)
    assert near.send_nowait(memoryview(b"more")) == 4


async def test_a_faster_link_does_not_reorder(autojump_clock: object) -> None:
    world = SimNetwork(link=Link(latency_s=1.0))
    near, far = await pair(world)
    near.send_nowait(memoryview(b"first"))
    world.set_link("10.0.0.1", "10.0.0.2", Link())
    near.send_nowait(memoryview(b"second"))
    buffer = bytearray(20)
    await far.wait_readable()
    assert far.receive_into_nowait(memoryview(buffer)) == 11
    assert buffer.startswith(b"firstsecond")


async def test_an_end_comes_behind_the_data(autojump_clock: object) -> None:
    near, far = await pair(SimNetwork(link=Link(latency_s=0.5)))
    await send(near, 5)
    near.close()
    near.close()
    await receive(far, 5)
    await far.wait_readable()
    assert far.receive_into_nowait(memoryview(bytearray(1))) == 0


async def test_who_sends_to_a_closed_end_learns_it_after_the_latency(
    autojump_clock: object,
) -> None:
    near, far = await pair(SimNetwork(link=Link(latency_s=0.5)))
    far.close()
    assert near.send_nowait(memoryview(b"x")) == 1
    await trio.sleep(0.5)
    with pytest.raises(ConnectionLost, match="reset"):
        near.send_nowait(memoryview(b"x"))


async def test_closing_wakes_who_waits_here(autojump_clock: object) -> None:
    near, _ = await pair(SimNetwork())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.wait_readable)
        await trio.testing.wait_all_tasks_blocked()
        near.close()
    with pytest.raises(ConnectionLost, match="closed here"):
        near.receive_into_nowait(memoryview(bytearray(1)))


async def test_nobody_there_is_a_failed_dial() -> None:
    network = SimNetwork().network("10.0.0.1")
    with pytest.raises(DialFailed, match="refused"):
        await network.dial(Address("/ip4/10.0.0.2/tcp/7"))
    with pytest.raises(DialFailed):
        await network.dial(Address("nonsense"))


async def test_a_machine_listens_on_its_own_addresses_once() -> None:
    network = SimNetwork().network("10.0.0.1")
    listener = await network.listen(ANY)
    assert network.interface_addresses() == ["10.0.0.1"]
    for address in (listener.address, "nonsense", "/ip4/10.0.0.2/tcp/0"):
        with pytest.raises(ConfigError, match="cannot listen"):
            await network.listen(Address(address))
    listener.close()
    listener.close()
    await network.listen(Address(listener.address))


async def test_a_machine_reaches_itself_by_loopback() -> None:
    network = SimNetwork(link=Link(latency_s=9.0)).network("10.0.0.1")
    listener = await network.listen(Address("/ip4/127.0.0.1/tcp/7"))
    near = await network.dial(Address("/ip4/127.0.0.1/tcp/7"))
    assert near.remote_address == "/ip4/10.0.0.1/tcp/7"
    await listener.accept()
