"""What faults of the simulated network do to native and to simulated hosts."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from sim_hosts import (
    ECHO,
    FAR,
    NEAR,
    Kind,
    identity,
    open_echo,
    receive_exactly,
    start_host,
    two_hosts,
    wait_closed,
)

from swarmpy import config
from swarmpy.abc import Address, Host
from swarmpy.errors import ConnectionLost, DialFailed, HandshakeFailed
from swarmpy.testing import Link, SimHost, SimNetwork
from swarmpy.testing.network import NAT_MAPPING_S
from swarmpy.testing.paths import RTO_S

LATENCY_S = 0.02
TIMEOUT_S = config.KEEPALIVE_TIMEOUT_S
INTERVAL_S = config.KEEPALIVE_INTERVAL_S


@pytest.fixture(params=["native", "sim"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each test runs with both kinds of hosts."""
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def world() -> SimNetwork:
    return SimNetwork(link=Link(latency_s=LATENCY_S))


async def round_trip_s(near: Host, far: Host) -> float:
    stream = await open_echo(near, far)
    started_s = trio.current_time()
    await stream.send_all(b"hello")
    await receive_exactly(stream, 5)
    return trio.current_time() - started_s


async def silence_s(host: Host) -> float:
    """Wait until the host gives a silent peer up; return how long after the last sign of life."""
    heard_s = host.connections[0].heard_s
    assert "nothing was heard" in await wait_closed(host)
    return trio.current_time() - heard_s


async def test_a_round_trip_takes_both_latencies(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with two_hosts(kind, world) as (near, far):
        assert await round_trip_s(near, far) == pytest.approx(2 * LATENCY_S)
        await trio.sleep(2 * INTERVAL_S)
        assert near.connections[0].rtt_s == pytest.approx(2 * LATENCY_S)


async def test_a_partition_ends_connections_when_the_peer_was_silent_too_long(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with two_hosts(kind, world) as (near, far):
        await trio.sleep(7)
        world.partition(NEAR, FAR)
        async with trio.open_nursery() as nursery:
            for host in (near, far):

                async def expect(host: Host = host) -> None:
                    assert await silence_s(host) == pytest.approx(TIMEOUT_S)

                nursery.start_soon(expect)


async def test_a_short_partition_costs_time_and_no_byte(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with two_hosts(kind, world) as (near, far):
        stream = await open_echo(near, far)
        world.partition(NEAR, FAR)
        await stream.send_all(b"hello")
        await trio.sleep(4)
        world.repair(NEAR, FAR)
        repaired_s = trio.current_time()
        assert await receive_exactly(stream, 5) == b"hello"
        assert trio.current_time() - repaired_s >= RTO_S
        assert near.connections
        await trio.sleep(60)
        assert near.connections


async def test_a_one_way_partition_is_noticed_where_nothing_comes(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    """The deaf end gives up; the other hears that, for its own way is open."""
    async with two_hosts(kind, world) as (near, far):
        world.partition(FAR, NEAR, one_way=True)
        async with trio.open_nursery() as nursery:

            async def expect_told() -> None:
                assert "without a goodbye" in await wait_closed(far)

            nursery.start_soon(expect_told)
            assert await silence_s(near) == pytest.approx(TIMEOUT_S)


async def test_what_is_held_arrives_in_order_on_release(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with two_hosts(kind, world) as (near, far):
        stream = await open_echo(near, far)
        await stream.send_all(b"0")
        world.hold(NEAR, FAR)
        for number in range(1, 10):
            await stream.send_all(str(number).encode())
            await trio.sleep(0.1)
        world.release(NEAR, FAR)
        assert await receive_exactly(stream, 10) == b"0123456789"


async def test_a_stall_passes_by_itself(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with two_hosts(kind, world) as (near, far):
        world.stall(NEAR, FAR, for_s=3.0)
        assert 3.0 <= await round_trip_s(near, far) < 3.2


async def test_a_crash_leaks_no_goodbye(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    """The far host is closed right after its machine crashed; the near one hears nothing of it."""
    async with two_hosts(kind, world) as (near, far):
        await trio.sleep(7)
        world.crash(FAR)
        far.close()
        assert await silence_s(near) == pytest.approx(TIMEOUT_S)


async def test_a_crashed_machine_does_not_answer_dials(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with two_hosts(kind, world) as (near, far):
        addresses = far.addresses
        near.connections[0].close()
        world.crash(FAR)
        started_s = trio.current_time()
        with pytest.raises(DialFailed, match="did not answer"):
            await near.dial(far.identity.peer_id, addresses)
        assert trio.current_time() - started_s == pytest.approx(config.DIAL_TIMEOUT_S)


async def test_a_restarted_machine_resets_what_it_does_not_know(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    """The next ping of the survivor is answered with a reset: no need to wait for the timeout."""
    async with two_hosts(kind, world) as (near, far):
        await trio.sleep(6)
        world.crash(FAR)
        far.close()
        world.restart(FAR)
        restarted_s = trio.current_time()
        assert "reset" in await wait_closed(near)
        assert trio.current_time() - restarted_s <= INTERVAL_S + 4 * LATENCY_S


async def test_a_restarted_machine_is_dialled_anew(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with trio.open_nursery() as nursery:
        near = await start_host(kind, world, NEAR, nursery)
        old = await start_host(kind, world, FAR, nursery)
        await near.dial(old.identity.peer_id, old.addresses)
        world.bounce(FAR)
        old.close()
        await wait_closed(near)
        new = await start_host(kind, world, FAR, nursery)
        await near.dial(new.identity.peer_id, new.addresses)
        assert await round_trip_s(near, new) == pytest.approx(2 * LATENCY_S)
        nursery.cancel_scope.cancel()


async def test_a_short_freeze_is_survived_and_a_long_one_is_not(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with two_hosts(kind, world) as (near, far):
        stream = await open_echo(near, far)
        world.freeze(FAR)
        await stream.send_all(b"hello")
        await trio.sleep(5)
        world.thaw(FAR)
        assert await receive_exactly(stream, 5) == b"hello"
        world.freeze(FAR)
        assert await silence_s(near) == pytest.approx(TIMEOUT_S)


async def test_a_reset_ends_both_ends_at_once(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with two_hosts(kind, world) as (near, far):
        stream = await open_echo(near, far)
        await stream.send_all(b"hello")
        await receive_exactly(stream, 5)
        reset_s = trio.current_time()
        world.reset(NEAR, FAR)
        await trio.testing.wait_all_tasks_blocked()
        assert not near.connections
        assert not far.connections
        with pytest.raises(ConnectionLost, match="reset"):
            await stream.receive_some()
        assert trio.current_time() == reset_s


async def test_a_nat_lets_in_whom_it_was_dialled_to(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with two_hosts(kind, world) as (near, far):
        near.connections[0].close()
        await trio.sleep(1)
        world.set_nat(NEAR)
        await far.dial(near.identity.peer_id, near.addresses)  # the first dial left a mapping
        far.connections[0].close()
        await trio.sleep(NAT_MAPPING_S + 1)
        with pytest.raises(DialFailed, match="refused"):
            await far.dial(near.identity.peer_id, near.addresses)
        assert await near.dial(far.identity.peer_id, far.addresses)


async def test_a_lossy_link_delays_and_keeps_the_order(autojump_clock: object, kind: Kind) -> None:
    world = SimNetwork(link=Link(latency_s=LATENCY_S, loss=0.3), chance=random.Random(1))
    async with two_hosts(kind, world) as (near, far):
        stream = await open_echo(near, far)
        started_s = trio.current_time()
        for number in range(100):
            await stream.send_all(bytes([number]))
        assert await receive_exactly(stream, 100) == bytes(range(100))
        assert trio.current_time() - started_s > RTO_S


async def test_jitter_delays_by_up_to_what_it_says(autojump_clock: object, kind: Kind) -> None:
    world = SimNetwork(link=Link(latency_s=0.01, jitter_s=0.05), chance=random.Random(1))
    async with two_hosts(kind, world) as (near, far):
        trips_s = [await round_trip_s(near, far) for _ in range(20)]
        assert min(trips_s) > 2 * 0.01
        assert max(trips_s) < 2 * (0.01 + 0.05) + 1e-6
        assert max(trips_s) - min(trips_s) > 0.02


async def test_connections_share_the_bandwidth_of_their_path(
    autojump_clock: object, kind: Kind
) -> None:
    world = SimNetwork(link=Link(bytes_per_s=1e6))
    async with two_hosts(kind, world) as (near, far):
        streams = [await open_echo(near, far) for _ in range(2)]
        started_s = trio.current_time()

        async def push(index: int) -> None:
            await streams[index].send_all(bytes(500_000))

        async with trio.open_nursery() as nursery:
            for index in range(2):
                nursery.start_soon(push, index)
                nursery.start_soon(receive_exactly, streams[index], 500_000)
        assert trio.current_time() - started_s == pytest.approx(1.0, rel=0.1)


async def test_torn_segments_are_whole_streams(autojump_clock: object) -> None:
    """Native hosts parse frames that arrive in pieces, cut at any byte."""
    world = SimNetwork(link=Link(jitter_s=0.01, torn=0.9), chance=random.Random(1))
    async with two_hosts("native", world) as (near, far):
        stream = await open_echo(near, far)
        sent = random.Random(2).randbytes(50_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, sent)
            assert await receive_exactly(stream, len(sent)) == sent


async def test_healing_ends_what_stops_paths(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with two_hosts(kind, world) as (near, far):
        world.partition(NEAR, FAR)
        world.hold(FAR, NEAR)
        world.freeze(FAR)
        world.heal()
        assert await round_trip_s(near, far) < 1


async def test_a_partition_stops_later_connections_too(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with trio.open_nursery() as nursery:
        near = await start_host(kind, world, NEAR, nursery)
        far = await start_host(kind, world, FAR, nursery)
        world.partition([NEAR], [FAR, "10.0.0.3"])
        with pytest.raises(DialFailed, match="did not answer"):
            await near.dial(far.identity.peer_id, far.addresses)
        other = await start_host(kind, world, "10.0.0.3", nursery)
        assert await far.dial(other.identity.peer_id, other.addresses)
        nursery.cancel_scope.cancel()


async def test_traffic_is_counted_where_it_is_sent(
    autojump_clock: object, kind: Kind, world: SimNetwork
) -> None:
    async with two_hosts(kind, world) as (near, far):
        stream = await open_echo(near, far)
        before = world.traffic(NEAR)
        await stream.send_all(bytes(1000))
        await receive_exactly(stream, 1000)
        sent = world.traffic(NEAR).bytes - before.bytes
        assert 1000 <= sent < 1200
        assert world.traffic().bytes == world.traffic(NEAR).bytes + world.traffic(FAR).bytes


async def test_a_native_host_and_a_simulated_one_do_not_understand_each_other(
    autojump_clock: object, world: SimNetwork
) -> None:
    async with trio.open_nursery() as nursery:
        native = await start_host("native", world, NEAR, nursery)
        simulated = await start_host("sim", world, FAR, nursery)
        with pytest.raises(DialFailed, match="takes no byte streams"):
            await native.dial(simulated.identity.peer_id, simulated.addresses)
        with pytest.raises(HandshakeFailed, match="no simulated host"):
            await simulated.dial(native.identity.peer_id, native.addresses)
        nursery.cancel_scope.cancel()


async def test_a_simulated_host_adopts_nothing(autojump_clock: object, world: SimNetwork) -> None:
    async with two_hosts("sim", world) as (near, _):
        listener = await world.network("10.0.0.3").listen(Address("/ip4/0.0.0.0/tcp/1"))
        byte_stream = await world.network(NEAR).dial(Address("/ip4/10.0.0.3/tcp/1"))
        with pytest.raises(DialFailed, match="adopts no byte streams"):
            await near.adopt(byte_stream, role="initiator")
        with pytest.raises(ConnectionLost):
            byte_stream.send_nowait(memoryview(b"x"))
        listener.close()


async def test_two_simulated_hosts_share_a_machine(
    autojump_clock: object, world: SimNetwork
) -> None:
    async with trio.open_nursery() as nursery:
        hosts = []
        for port in (1, 2):
            host = SimHost(identity(str(port)), world.network(NEAR))
            host.set_handler(ECHO, lambda stream: stream.send_all(b"hi"))
            await nursery.start(host.run)
            await host.listen(Address(f"/ip4/127.0.0.1/tcp/{port}"))
            hosts.append(host)
        await hosts[0].dial(hosts[1].identity.peer_id, hosts[1].addresses)
        stream = await hosts[0].open_stream(hosts[1].identity.peer_id, [ECHO])
        assert await stream.receive_some() == b"hi"
        assert trio.current_time() == 0
        nursery.cancel_scope.cancel()
