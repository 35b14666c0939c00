"""Byte streams that came about elsewhere become connections: relayed, punched, or in memory."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from circuits import MemoryStream, joined, memory_pair
from net_hosts import ECHO, World, connect, echo, exchange, identity, receive_all, send_raw

from swarmpy import config
from swarmpy.abc import Address, ByteStream, ConnectionEvent, Gate, ProtocolId, Stream
from swarmpy.errors import (
    ConnectionLost,
    DialFailed,
    HandshakeFailed,
    LocalProtocolError,
    NetworkError,
    PeerTimeout,
)
from swarmpy.identity import PeerId
from swarmpy.net.carried import CarriedStream
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork
from swarmpy.proto.multistream import Dialer

CIRCUIT_ID = ProtocolId("/swarmpy-test/circuit/1")


async def hosts(world: World) -> tuple[NativeHost, NativeHost]:
    """Return two hosts that serve echo and do not know each other."""
    alice, bob = await world.host("alice"), await world.host("bob")
    for host in (alice, bob):
        host.set_handler(ECHO, echo)
    return alice, bob


async def check_both_ways(alice: NativeHost, bob: NativeHost) -> None:
    for near, far in ((alice, bob), (bob, alice)):
        stream = await near.open_stream(far.identity.peer_id, [ECHO])
        sent = random.Random(7).randbytes(300_000)
        assert await exchange(stream, sent) == sent
        await stream.close_write()
        assert await receive_all(stream) == b""


# What may be adopted ----------------------------------------------------------------


async def test_a_pair_in_memory_becomes_a_connection(sim: World) -> None:
    alice, bob = await hosts(sim)
    events = bob.connection_events()
    near, far = await joined(alice, bob)
    assert (near.peer, far.peer) == (bob.identity.peer_id, alice.identity.peer_id)
    assert near.channel_binding == far.channel_binding
    assert await anext(events) == ConnectionEvent(kind="opened", connection=far)
    assert alice.connection_to(near.peer) is near
    await check_both_ways(alice, bob)


@pytest.mark.parametrize("dialler_is", ["initiator", "responder"])
async def test_a_socket_becomes_a_connection_whoever_dialled_it(
    world: World, dialler_is: str
) -> None:
    """A punched socket may be responder although it dialled."""
    alice, bob = await hosts(world)
    network, other = world.network(), world.network()
    any_port = "/ip4/127.0.0.1/tcp/0" if world.kind == "tcp" else "/ip4/0.0.0.0/tcp/0"
    listener = await other.listen(Address(any_port))
    address = listener.address.replace("0.0.0.0", other.interface_addresses()[0])
    dialled = await network.dial(Address(address))
    accepted = await listener.accept()
    listener.close()
    ends: tuple[ByteStream, ByteStream] = (dialled, accepted)
    near, far = await joined(
        alice, bob, ends=ends if dialler_is == "initiator" else (ends[1], ends[0])
    )
    assert near.is_initiator
    assert not far.is_initiator
    assert near.local_address == ends[dialler_is == "responder"].local_address
    await check_both_ways(alice, bob)


async def test_a_stream_of_another_connection_becomes_a_connection(
    world: World, nursery: trio.Nursery
) -> None:
    """Noise inside Noise: the relay in the middle carries a circuit and cannot read it."""
    alice, bob = await hosts(world)
    relay = await world.host("relay")
    seen: list[bytes] = []

    async def bridge(stream: Stream) -> None:
        outward = await relay.open_stream(bob.identity.peer_id, [CIRCUIT_ID])

        async def copy(source: Stream, target: Stream) -> None:
            while data := await source.receive_some():
                seen.append(data)
                await target.send_all(data)
            await target.close_write()

        async with trio.open_nursery() as copies:
            copies.start_soon(copy, stream, outward)
            copies.start_soon(copy, outward, stream)

    async def answer(stream: Stream) -> None:
        end = CarriedStream(stream)
        async with trio.open_nursery() as carrying:
            carrying.start_soon(end.run)
            await bob.adopt(end, role="responder", path="relayed")

    relay.set_handler(CIRCUIT_ID, bridge)
    bob.set_handler(CIRCUIT_ID, answer)
    await connect(alice, relay)
    await connect(relay, bob)
    end = CarriedStream(await alice.open_stream(relay.identity.peer_id, [CIRCUIT_ID]))
    nursery.start_soon(end.run)
    near = await alice.adopt(
        end, role="initiator", expected_peer=bob.identity.peer_id, path="relayed"
    )

    assert (near.path, near.peer) == ("relayed", bob.identity.peer_id)
    stream = await alice.open_stream(bob.identity.peer_id, [ECHO])
    secret = random.Random(8).randbytes(200_000)
    assert await exchange(stream, secret) == secret
    assert secret[:64] not in b"".join(seen)
    near.close()
    await stream_is_lost(stream)
    assert alice.connection_to(relay.identity.peer_id) is not None


async def stream_is_lost(stream: Stream) -> None:
    with pytest.raises(ConnectionLost):
        await stream.receive_some()


async def test_a_circuit_may_have_addresses_in_protocols_unknown_here(sim: World) -> None:
    alice, bob = await hosts(sim)
    ends = memory_pair()
    for end in ends:
        end.remote_address = Address("/ip4/192.0.2.9/udp/4001/quic-v1/p2p-circuit")
    await joined(alice, bob, ends=ends, path="relayed")
    info = await alice.wait_identified(bob.identity.peer_id)
    assert info.observed_address == ""
    await check_both_ways(alice, bob)


# What is refused, and that nothing is left of it ------------------------------------------


async def test_another_peer_than_the_expected_one_is_refused(sim: World) -> None:
    alice, bob = await hosts(sim)
    near, far = memory_pair()
    stranger = identity("carol").peer_id

    async def respond() -> None:
        with pytest.raises(NetworkError):
            await bob.adopt(far, role="responder")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(respond)
        with pytest.raises(HandshakeFailed, match="expected peer"):
            await alice.adopt(near, role="initiator", expected_peer=stranger)
    assert not near.is_open
    assert not alice.connections


async def test_a_responder_may_expect_a_peer_too(sim: World) -> None:
    alice, bob = await hosts(sim)
    near, far = memory_pair()

    async def begin() -> None:
        await alice.adopt(near, role="initiator", expected_peer=bob.identity.peer_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(begin)
        with pytest.raises(HandshakeFailed, match="expected peer"):
            await bob.adopt(far, role="responder", expected_peer=identity("carol").peer_id)
    assert not far.is_open
    assert not bob.connections


class NoDials(Gate):
    def allow_dial(self, peer: PeerId, address: Address) -> bool:
        return False


class NoStrangers(Gate):
    def allow_address(self, address: Address) -> bool:
        return False


@pytest.mark.parametrize(("gate", "role"), [(NoDials(), "initiator"), (NoStrangers(), "responder")])
async def test_the_gate_is_asked_before_anything_is_said(sim: World, gate: Gate, role: str) -> None:
    alice, bob = await hosts(sim)
    alice.gate = gate
    near, far = memory_pair()
    expected = bob.identity.peer_id if role == "initiator" else None
    with pytest.raises(DialFailed, match="gate forbids"):
        await alice.adopt(near, role=role, expected_peer=expected)  # type: ignore[arg-type]
    assert far.receive_into_nowait(memoryview(bytearray(1))) == 0


async def test_the_gate_is_asked_about_the_proven_peer(sim: World) -> None:
    class NobodyInbound(Gate):
        def allow_peer(self, peer: PeerId, direction: str) -> bool:
            return direction == "outbound"

    alice, bob = await hosts(sim)
    bob.gate = NobodyInbound()
    near, far = memory_pair()

    async def respond() -> None:
        with pytest.raises(DialFailed, match="not allowed"):
            await bob.adopt(far, role="responder")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(respond)
        await alice.adopt(near, role="initiator", expected_peer=bob.identity.peer_id)
    assert not far.is_open
    assert not bob.connections


async def test_newer_handshakes_push_out_the_oldest_adopted_one(sim: World) -> None:
    """Adopted responders take the places of half-open connections like all others."""
    _, bob = await hosts(sim)
    pairs = [memory_pair() for _ in range(config.HANDSHAKES_PER_SUBNET_MAX + 1)]
    errors: list[Exception] = []

    async def respond(end: MemoryStream) -> None:
        try:
            await bob.adopt(end, role="responder")
        except DialFailed as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for _, far in pairs[:-1]:
            nursery.start_soon(respond, far)
            await trio.testing.wait_all_tasks_blocked()
        assert not errors
        nursery.start_soon(respond, pairs[-1][1])
        await trio.testing.wait_all_tasks_blocked()
        assert "newer handshakes" in str(errors[0])
        assert [far.is_open for _, far in pairs] == [False] + [True] * (len(pairs) - 1)
        nursery.cancel_scope.cancel()
    assert not any(far.is_open for _, far in pairs)


async def test_a_silent_other_side_is_given_up(
    sim: World, autojump_clock: trio.testing.MockClock
) -> None:
    alice, bob = await hosts(sim)
    near, far = memory_pair()
    with pytest.raises(PeerTimeout, match="no handshake"):
        await alice.adopt(near, role="initiator", expected_peer=bob.identity.peer_id)
    assert not near.is_open
    assert trio.current_time() == pytest.approx(config.HANDSHAKE_TIMEOUT_S)
    far.close()


async def test_an_other_side_that_ends_is_lost(sim: World) -> None:
    alice, bob = await hosts(sim)
    near, far = memory_pair()
    far.close()
    with pytest.raises(ConnectionLost):
        await alice.adopt(near, role="initiator", expected_peer=bob.identity.peer_id)
    assert not near.is_open


async def test_an_adoption_that_is_cancelled_anywhere_leaves_nothing(sim: World) -> None:
    """Method: cancel after one more step each time, until one adoption gets through."""
    alice, bob = await hosts(sim)
    steps = 0
    while True:
        near, far = memory_pair()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_after, steps, scope)
                await joined(alice, bob, ends=(near, far))
                nursery.cancel_scope.cancel()
        if not scope.cancelled_caught:
            break
        await trio.testing.wait_all_tasks_blocked()
        for host, end in ((alice, near), (bob, far)):
            assert end.is_open == bool(host.connections)
            for connection in host.connections:
                connection.close()
        steps += 1
    assert steps >= 3
    await check_both_ways(alice, bob)


async def cancel_after(steps: int, scope: trio.CancelScope) -> None:
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    scope.cancel()
    await trio.sleep_forever()


async def test_a_host_that_is_closed_adopts_nothing(sim: World) -> None:
    alice, bob = await hosts(sim)
    alice.close()
    near, _ = memory_pair()
    with pytest.raises(LocalProtocolError, match="not running"):
        await alice.adopt(near, role="initiator", expected_peer=bob.identity.peer_id)
    assert not near.is_open


async def test_a_host_closed_during_the_handshake_keeps_nothing(sim: World) -> None:
    alice, bob = await hosts(sim)
    near, far = memory_pair()

    async def begin() -> None:
        with pytest.raises(NetworkError):
            await alice.adopt(near, role="initiator", expected_peer=bob.identity.peer_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(begin)
        await trio.testing.wait_all_tasks_blocked()
        alice.close()
        await send_raw(far, Dialer(["/noise"]).start())
        far.close()
    assert not near.is_open
    assert not alice.connections


async def test_bytes_of_a_limited_path_are_counted(sim: World) -> None:
    """Whichever end counts the last byte first ends it, and says why."""
    alice, bob = await hosts(sim)
    bob.set_handler(CIRCUIT_ID, echo, allow_limited=True)
    near, _ = await joined(alice, bob, path="relayed", limit=100_000)
    events = [host.connection_events() for host in (alice, bob)]
    stream = await alice.open_stream(near.peer, [CIRCUIT_ID], allow_limited=True)
    with pytest.raises(ConnectionLost):
        await send_for_ever(stream)
    reasons = [(await anext(each)).reason for each in events]
    assert any("limit of 100000 bytes" in reason for reason in reasons)


async def send_for_ever(stream: Stream) -> None:
    while True:
        await stream.send_all(bytes(1000))


async def test_a_dialled_port_of_our_own_is_refused(nursery: trio.Nursery) -> None:
    """TCP can connect a port with itself; the handshake then meets its own first message."""
    host = NativeHost(identity("host"), TcpNetwork(), random=random.Random(1))
    await nursery.start(host.run)
    await host.listen(Address("/ip4/127.0.0.1/tcp/0"))
    with trio.fail_after(5), pytest.raises(HandshakeFailed):
        await host.dial(identity("other").peer_id, host.addresses)
    await trio.testing.wait_all_tasks_blocked()
    assert not host.connections
