"""What native hosts do beyond the contract of every host: identify and ping."""

from __future__ import annotations

import pytest
import trio
from net_hosts import ECHO, World, connect, echo, exchange

from swarmpy.abc import Gate, ProtocolId, Stream
from swarmpy.errors import ConnectionLost
from swarmpy.net.stream import NativeStream
from swarmpy.proto.yamux import INITIAL_WINDOW_BYTES

OTHER = ProtocolId("/swarmpy-test/other/1")


async def test_peers_identify_themselves(world: World) -> None:
    alice, bob = await world.host("alice"), await world.host("bob", agent="other/2")
    bob.set_handler(ECHO, echo)
    assert alice.identified(bob.identity.peer_id) is None
    peer = await connect(alice, bob)
    info = await alice.wait_identified(peer)
    assert alice.identified(peer) == info
    assert info.agent == "other/2"
    assert ECHO in info.protocols
    assert info.addresses == tuple(bob.addresses)
    connection = alice.connection_to(peer)
    assert connection is not None
    assert info.observed_address == connection.local_address


async def test_a_protocol_added_later_is_pushed(world: World) -> None:
    alice, bob = await world.host("alice"), await world.host("bob")
    peer = await connect(alice, bob)
    before = await alice.wait_identified(peer)
    await bob.wait_identified(alice.identity.peer_id)
    bob.set_handler(ECHO, echo)
    with trio.fail_after(5):
        assert ECHO in (await alice.wait_identified(peer, after=before)).protocols


async def test_a_ping_comes_back(world: World) -> None:
    alice, bob = await world.host("alice"), await world.host("bob")
    peer = await connect(alice, bob)
    assert 0 <= await alice.ping(peer) < 5
    with pytest.raises(ConnectionLost, match="not connected"):
        await alice.ping(alice.identity.peer_id)


async def test_identify_tells_a_peer_only_what_the_gate_lets_it_use(world: World) -> None:
    class NoEcho(Gate):
        def allow_stream(self, peer: object, protocol: object) -> bool:
            return protocol != ECHO

    alice, bob = await world.host("alice"), await world.host("bob", gate=NoEcho())
    bob.set_handler(ECHO, echo)
    bob.set_handler(OTHER, echo)
    peer = await connect(alice, bob)
    info = await alice.wait_identified(peer)
    assert OTHER in info.protocols
    assert ECHO not in info.protocols


async def test_a_peer_that_does_not_read_holds_one_window_of_bytes(world: World) -> None:
    """What arrived of a stream nobody reads is counted to the byte."""
    alice, bob = await world.host("alice"), await world.host("bob")
    held: list[NativeStream] = []

    async def hold(stream: Stream) -> None:
        assert isinstance(stream, NativeStream)
        held.append(stream)
        await trio.sleep_forever()

    bob.set_handler(OTHER, hold)
    bob.set_handler(ECHO, echo)
    peer = await connect(alice, bob)
    blocked = await alice.open_stream(peer, [OTHER])
    assert isinstance(blocked, NativeStream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(blocked.send_all, bytes(4 * INITIAL_WINDOW_BYTES))
        other = await alice.open_stream(peer, [ECHO])
        for _ in range(50):
            assert await exchange(other, b"x" * 1000) == b"x" * 1000
        assert blocked.connection.window(blocked.stream_id) == 0
        unread = sum(len(piece) for piece in held[0]._pieces)
        # All but the negotiation, which was read.
        assert INITIAL_WINDOW_BYTES - 100 < unread <= INITIAL_WINDOW_BYTES
        nursery.cancel_scope.cancel()
