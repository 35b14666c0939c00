"""Connections over slow, dead and busy links, on virtual time."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
import trio.testing
from net_hosts import (
    ECHO,
    World,
    connect,
    echo,
    exchange,
    identity,
    receive_all,
    wait_until_closed,
)

from swarmpy import config
from swarmpy.abc import Gate, Priority, ProtocolId, Stream
from swarmpy.errors import ConnectionLost, NetworkError, StreamReset
from swarmpy.identity import PeerId
from swarmpy.net.connection import NativeConnection
from swarmpy.net.pace import ROUND_TRIPS_KEPT
from swarmpy.net.table import ConnectionTable
from swarmpy.proto import noise
from swarmpy.testing import Link

SINK = ProtocolId("/swarmpy-test/sink/1")
UPLINK = Link(latency_s=0.03, bytes_per_s=125_000)
"""A home uplink: 1 Mbit/s."""


async def sink(stream: Stream) -> None:
    """Handler that reads everything and answers with how much it was."""
    size = len(await receive_all(stream))
    await stream.send_all(str(size).encode())


# Keepalive --------------------------------------------------------------------------------


async def test_an_idle_connection_lives_on(sim: World, autojump_clock: object) -> None:
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(ECHO, echo)
    peer = await connect(alice, bob)
    stream = await alice.open_stream(peer, [ECHO])
    await exchange(stream, b"hello")
    await trio.sleep(3600)
    assert await exchange(stream, b"an hour later") == b"an hour later"


async def test_a_frozen_peer_is_gone_within_fifteen_seconds(
    sim: World, autojump_clock: object
) -> None:
    """Goal: silence is noticed. Method: a proven peer that never answers a ping."""
    host = await sim.host("host")
    events = host.connection_events()
    await sim.raw_peer(host)
    await trio.sleep(0.1)
    frozen_s = trio.current_time()
    while (event := await anext(events)).kind != "closed":
        pass
    assert "nothing was heard" in event.reason
    assert config.KEEPALIVE_TIMEOUT_S - 1 < trio.current_time() - frozen_s < 15


async def test_who_waits_for_a_frozen_peer_is_told(sim: World, autojump_clock: object) -> None:
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(ECHO, echo)
    stream = await alice.open_stream(await connect(alice, bob), [ECHO])
    await exchange(stream, b"hello")
    for source, target in (("10.0.0.1", "10.0.0.2"), ("10.0.0.2", "10.0.0.1")):
        sim.sim.set_link(source, target, Link(latency_s=1e6))
    start_s = trio.current_time()
    with pytest.raises(ConnectionLost, match="nothing was heard"):
        await stream.receive_some()
    assert trio.current_time() - start_s < 15


async def test_a_peer_behind_a_slow_uplink_is_never_cut(sim: World, autojump_clock: object) -> None:
    """4 MiB through 1 Mbit/s take 34 s, much longer than the silence allowed."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(SINK, sink)
    sim.sim.set_link("10.0.0.1", "10.0.0.2", UPLINK)
    peer = await connect(alice, bob)
    stream = await alice.open_stream(peer, [SINK], priority=Priority.BULK)
    await stream.send_all(bytes(4 * 1024 * 1024))
    await stream.close_write()
    assert await receive_all(stream) == b"4194304"
    assert trio.current_time() > 33
    assert len(alice.connections) == len(bob.connections) == 1


async def test_the_round_trip_is_measured_and_smoothed(sim: World, autojump_clock: object) -> None:
    alice, bob = await sim.host("alice"), await sim.host("bob")
    for source, target in (("10.0.0.1", "10.0.0.2"), ("10.0.0.2", "10.0.0.1")):
        sim.sim.set_link(source, target, Link(latency_s=0.05))
    connection = await alice.dial(bob.identity.peer_id, bob.addresses)
    assert connection.rtt_s is None
    await trio.sleep(1)
    assert connection.rtt_s == pytest.approx(0.1)
    assert await alice.ping(bob.identity.peer_id) == pytest.approx(0.1)


async def test_the_shortest_of_the_last_round_trips_counts_for_the_windows(
    sim: World, autojump_clock: object
) -> None:
    """Goal: what stood in the way of a ping makes no window grow. Method: one short, then long."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    connection = await alice.dial(bob.identity.peer_id, bob.addresses)
    assert isinstance(connection, NativeConnection)

    counted = []
    for rtt_s in (0.3, 0.02, *(0.2 + index / 100 for index in range(ROUND_TRIPS_KEPT))):
        connection.measured(rtt_s)
        counted.append(connection._yamux.rtt_s)

    # When it is none of the last any more, the shortest of those counts.
    assert counted == [0.3, *[0.02] * ROUND_TRIPS_KEPT, 0.2]


# Priorities --------------------------------------------------------------------------------------


async def test_an_urgent_message_overtakes_a_bulk_transfer(
    sim: World, autojump_clock: object
) -> None:
    """Goal: a token waits for a frame, not for a prompt. Method: 1 MiB before it at 1 Mbit/s."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(ECHO, echo)
    bob.set_handler(SINK, sink)
    sim.sim.set_link("10.0.0.1", "10.0.0.2", UPLINK)
    peer = await connect(alice, bob)
    urgent = await alice.open_stream(peer, [ECHO], priority=Priority.DECODE)
    await exchange(urgent, b"hello")
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            bulk = await alice.open_stream(peer, [SINK], priority=Priority.BULK)
            nursery.start_soon(bulk.send_all, bytes(256 * 1024))
        await trio.testing.wait_all_tasks_blocked()
        start_s = trio.current_time()
        await exchange(urgent, b"token")
        # What the kernel holds (64 KiB), one frame under way (64 KiB), and the link.
        assert trio.current_time() - start_s < 1.3
        nursery.cancel_scope.cancel()


async def test_streams_of_one_class_take_turns(sim: World, autojump_clock: object) -> None:
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(SINK, sink)
    sim.sim.set_link("10.0.0.1", "10.0.0.2", UPLINK)
    peer = await connect(alice, bob)
    finished_s: list[float] = []

    async def send() -> None:
        stream = await alice.open_stream(peer, [SINK], priority=Priority.BULK)
        await stream.send_all(bytes(512 * 1024))
        await stream.close_write()
        await receive_all(stream)
        finished_s.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(send)
    # One after the other would finish at 4, 8 and 12 s.
    assert finished_s[0] > 10


async def test_a_cancelled_sender_hands_its_turn_on(sim: World, autojump_clock: object) -> None:
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(SINK, sink)
    sim.sim.set_link("10.0.0.1", "10.0.0.2", UPLINK)
    peer = await connect(alice, bob)
    survivor = await alice.open_stream(peer, [SINK], priority=Priority.BULK)
    async with trio.open_nursery() as nursery:
        for index in range(20):
            stream = await alice.open_stream(peer, [SINK], priority=Priority.DECODE)
            nursery.start_soon(send_for, stream, 0.07 * index)
        await survivor.send_all(bytes(300_000))
        await survivor.close_write()
        assert await receive_all(survivor) == b"300000"


async def test_a_sender_whose_stream_was_reset_hands_its_turn_on(
    sim: World, autojump_clock: object
) -> None:
    """It was given the turn and has nothing to send: the next one must not wait for ever."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(SINK, sink)
    sim.sim.set_link("10.0.0.1", "10.0.0.2", UPLINK)
    peer = await connect(alice, bob)
    first, second, third = [
        await alice.open_stream(peer, [SINK], priority=Priority.BULK) for _ in range(3)
    ]

    async def send(stream: Stream) -> None:
        with suppress(StreamReset):
            await stream.send_all(bytes(200_000))
            await stream.close_write()

    async with trio.open_nursery() as nursery:
        for stream in (first, second, third):
            nursery.start_soon(send, stream)
        await trio.testing.wait_all_tasks_blocked()
        second.reset()
        with trio.fail_after(10):
            assert await receive_all(first) == b"200000"
            assert await receive_all(third) == b"200000"


async def send_for(stream: Stream, time_s: float) -> None:
    with trio.move_on_after(time_s):
        await stream.send_all(bytes(1_000_000))


# Two connections to one peer ---------------------------------------------------------------------


async def test_after_a_simultaneous_dial_both_keep_the_same_connection(
    sim: World, autojump_clock: object
) -> None:
    """The one whose initiator has the smaller PeerId; the other goes once it is idle."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    sim.sim.set_link("10.0.0.1", "10.0.0.2", Link(latency_s=0.02))
    sim.sim.set_link("10.0.0.2", "10.0.0.1", Link(latency_s=0.02))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect, alice, bob)
        nursery.start_soon(connect, bob, alice)
    await trio.sleep(0.1)
    assert len(alice.connections) == len(bob.connections) == 2
    await trio.sleep(5)
    (near,), (far,) = alice.connections, bob.connections
    assert near.channel_binding == far.channel_binding
    smaller = min(alice.identity.peer_id, bob.identity.peer_id)
    assert near.direction == ("outbound" if smaller == alice.identity.peer_id else "inbound")


async def test_a_superseded_connection_stays_while_a_stream_is_on_it(
    sim: World, autojump_clock: object
) -> None:
    alice, bob = await sim.host("alice"), await sim.host("bob")
    for host in (alice, bob):
        host.set_handler(ECHO, echo)
    greater, smaller = sorted((alice, bob), key=lambda host: host.identity.peer_id, reverse=True)
    peer = await connect(greater, smaller)
    old = greater.connection_to(peer)
    stream = await greater.open_stream(peer, [ECHO])
    await exchange(stream, b"hello")
    # The other side has lost sight of the connection and dials too.
    await smaller._dials.dial(smaller._running(), greater.identity.peer_id, greater.addresses)
    await trio.sleep(60)
    assert greater.connection_to(peer) is not old
    assert await exchange(stream, b"still there") == b"still there"
    await stream.close_write()
    assert await receive_all(stream) == b""
    await trio.sleep(5)
    assert len(greater.connections) == len(smaller.connections) == 1


async def test_a_peer_has_so_many_connections_and_no_more(
    sim: World, autojump_clock: object
) -> None:
    host = await sim.host("host")
    peers = [await sim.raw_peer(host) for _ in range(config.CONNECTIONS_PER_PEER_MAX)]
    await trio.testing.wait_all_tasks_blocked()
    assert len(host.connections) == len(peers)
    refused = await sim.raw_peer(host)
    await refused.wait_closed()
    assert len(host.connections) == len(peers)
    assert trio.current_time() < 1


def test_a_table_without_connections_has_no_best() -> None:
    assert ConnectionTable(identity("alice").peer_id).best(identity("bob").peer_id) is None


# The end of a connection -----------------------------------------------------------------------


async def test_a_handler_outlives_its_connection_only_for_a_while(
    sim: World, autojump_clock: object
) -> None:
    """It may tidy up; one that hangs is cancelled, or a peer could pile handlers up."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    cancelled_s: list[float] = []

    async def hang(stream: Stream) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled_s.append(trio.current_time())

    bob.set_handler(SINK, hang)
    stream = await alice.open_stream(await connect(alice, bob), [SINK])
    await stream.send_all(b"x")
    await trio.sleep(1)
    alice.close()
    await trio.sleep(60)
    assert cancelled_s == [pytest.approx(6.0)]


async def test_a_handler_that_fails_while_it_is_cancelled_does_no_harm(
    sim: World, autojump_clock: object
) -> None:
    """Its error and the cancellation come in one group; only the cancellation goes further."""
    alice, bob = await sim.host("alice"), await sim.host("bob")

    async def fail_late() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("oops")

    async def hang(_: Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_late)
            nursery.start_soon(trio.sleep_forever)

    bob.set_handler(SINK, hang)
    bob.set_handler(ECHO, echo)
    stream = await alice.open_stream(await connect(alice, bob), [SINK])
    await stream.send_all(b"x")
    await trio.sleep(1)
    alice.close()
    await trio.sleep(60)
    carol = await sim.host("carol")
    stream = await carol.open_stream(await connect(carol, bob), [ECHO])
    assert await exchange(stream, b"hello") == b"hello"


async def test_an_end_that_was_received_stays_an_end(sim: World, autojump_clock: object) -> None:
    """All bytes and the end came before the connection was lost: nothing is missing."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(ECHO, echo)
    stream = await alice.open_stream(await connect(alice, bob), [ECHO])
    await stream.send_all(b"hello")
    await stream.close_write()
    await trio.sleep(1)
    bob.close()
    await trio.sleep(1)
    assert not alice.connections
    assert await receive_all(stream) == b"hello"


async def test_an_end_goes_out_though_the_peers_agreement_came_before_it_and_nobody_read(
    sim: World, autojump_clock: object
) -> None:
    """The end waits for the peer's answer to the proposal, which here lies unread already."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    received: list[bytes] = []

    async def keep(stream: Stream) -> None:
        received.append(await receive_all(stream))

    bob.set_handler(SINK, keep)
    stream = await alice.open_stream(await connect(alice, bob), [SINK])
    await stream.send_all(b"all there is")
    await trio.sleep(1)

    await stream.close_write()
    await trio.sleep(1)

    assert received == [b"all there is"]


async def test_a_stream_its_peer_never_ends_is_reset_after_the_handler(
    sim: World, autojump_clock: object
) -> None:
    """Else it would hold one of the peer's places for ever."""
    alice, bob = await sim.host("alice"), await sim.host("bob")

    async def greet(stream: Stream) -> None:
        await stream.send_all(b"hello")

    bob.set_handler(SINK, greet)
    stream = await alice.open_stream(await connect(alice, bob), [SINK])
    assert await receive_all(stream) == b"hello"
    await trio.sleep(1)
    assert bob.connections[0].stream_count == 1  # type: ignore[attr-defined]
    await trio.sleep(10)
    assert bob.connections[0].stream_count == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("left", [0, 1, 2])
async def test_a_connection_ends_before_its_nonces_do(
    sim: World, autojump_clock: object, left: int
) -> None:
    """Each side is told why; nothing is sent under the last nonce, which Noise reserves."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(ECHO, echo)
    stream = await alice.open_stream(await connect(alice, bob), [ECHO])
    await exchange(stream, b"hello")
    near, far = alice.connections[0], bob.connections[0]
    sealer = near._seal_into.__self__  # type: ignore[attr-defined]
    opener = far._open.__self__  # type: ignore[attr-defined]
    await trio.sleep(1)  # all that was under way has arrived
    assert sealer.nonce == opener.nonce
    sealer.nonce = opener.nonce = noise.NONCE_MAX - left
    for _ in range(left):
        assert await exchange(stream, b"x") == b"x"
    assert near.is_open
    await stream.send_all(b"x")
    with pytest.raises(ConnectionLost, match="nonces of this connection are used up"):
        await stream.receive_some()
    assert sealer.nonce == noise.NONCE_MAX
    await wait_until_closed(bob)


class Valued(Gate):
    """A gate that minds losing one peer only."""

    def __init__(self, peer: PeerId) -> None:
        self._peer = peer

    def may_drop(self, peer: PeerId) -> bool:
        return peer != self._peer


async def test_strangers_make_room_in_a_full_node_and_members_do_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "CONNECTIONS_MAX", 2)
    host = await world.host("full", gate=Valued(identity("member").peer_id))
    member, first, second, third = [
        await world.host(name) for name in ("member", "first", "second", "third")
    ]

    for peer in (member, first, second):
        await connect(peer, host)
    await wait_until_closed(first)

    assert member.connections
    assert second.connections
    host.gate = Gate()
    with pytest.raises(NetworkError):
        await connect(third, host)
