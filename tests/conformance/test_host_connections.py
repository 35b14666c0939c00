"""What every host must do about connections: dials, refusals, events, listening, the end."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from conformance_worlds import HostWorld
from net_hosts import ECHO, echo, exchange, wait_until_closed

from swarmpy.abc import Address, Connection, ConnectionEvent
from swarmpy.errors import ConfigError, DialFailed, HandshakeFailed, LocalProtocolError


class TestConnections:
    """Native on TCP, native on SimNetwork, SimHost, and an application's py-libp2p host."""

    async def test_both_ends_see_one_proven_connection(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        events = bob.connection_events()
        near = alice.connection_to(await world.connect(alice, bob))
        far = (await anext(events)).connection
        assert near is not None
        assert (near.peer, far.peer) == (bob.identity.peer_id, alice.identity.peer_id)
        assert (near.direction, far.direction) == ("outbound", "inbound")
        assert near.channel_binding == far.channel_binding
        assert near.local_address == far.remote_address
        assert near.path == "direct"

    async def test_dialling_a_connected_peer_returns_the_connection(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        first = await alice.dial(bob.identity.peer_id, bob.addresses)
        assert await alice.dial(bob.identity.peer_id, []) is first

    async def test_two_tasks_that_dial_one_peer_share_the_connection(
        self, world: HostWorld
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        dialled: list[Connection] = []

        async def dial() -> None:
            dialled.append(await alice.dial(bob.identity.peer_id, bob.addresses))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial)
            nursery.start_soon(dial)
        assert dialled[0] is dialled[1]
        assert len(alice.connections) == 1

    async def test_a_dial_survives_one_of_two_tasks_giving_up(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(alice.dial, bob.identity.peer_id, bob.addresses)
                scope.cancel()
                await alice.dial(bob.identity.peer_id, bob.addresses)
        assert alice.connection_to(bob.identity.peer_id) is not None

    async def test_a_dial_nobody_waits_for_is_given_up(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        with trio.CancelScope() as scope:
            scope.cancel()
            await alice.dial(bob.identity.peer_id, bob.addresses)
        await trio.testing.wait_all_tasks_blocked()
        assert not alice.connections
        assert await alice.dial(bob.identity.peer_id, bob.addresses)

    async def test_another_peer_at_the_address_is_refused(self, world: HostWorld) -> None:
        alice, bob, carol = [await world.host(name) for name in ("alice", "bob", "carol")]
        with pytest.raises(HandshakeFailed, match="expected peer"):
            await alice.dial(carol.identity.peer_id, bob.addresses)
        assert not alice.connections

    async def test_a_dead_address_before_a_good_one_does_no_harm(self, world: HostWorld) -> None:
        alice, bob, carol = [await world.host(name) for name in ("alice", "bob", "carol")]
        dead = carol.addresses[0]
        await world.stop(carol)
        assert await alice.dial(bob.identity.peer_id, [dead, *bob.addresses])

    async def test_a_peer_nobody_can_reach_is_a_failed_dial(self, world: HostWorld) -> None:
        alice, carol = await world.host("alice"), await world.host("carol")
        addresses = carol.addresses
        await world.stop(carol)
        with pytest.raises(DialFailed):
            await alice.dial(carol.identity.peer_id, addresses)
        with pytest.raises(DialFailed, match="no address"):
            await alice.dial(carol.identity.peer_id, [])

    @pytest.mark.parametrize("address", ["nonsense", "/ip4/127.0.0.1", "/ip4/127.0.0.1/udp/1"])
    async def test_a_malformed_address_is_a_failed_dial(
        self, world: HostWorld, address: str
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        with pytest.raises(DialFailed):
            await alice.dial(bob.identity.peer_id, [Address(address)])

    async def test_an_address_may_name_its_peer_but_no_other(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        wrong = Address(f"{bob.addresses[0]}/p2p/{alice.identity.peer_id}")
        right = Address(f"{bob.addresses[0]}/p2p/{bob.identity.peer_id}")
        with pytest.raises(DialFailed, match="another peer"):
            await alice.dial(bob.identity.peer_id, [wrong])
        assert await alice.dial(bob.identity.peer_id, [right])

    async def test_a_host_does_not_dial_itself(self, world: HostWorld) -> None:
        alice = await world.host("alice")
        with pytest.raises(DialFailed, match="itself"):
            await alice.dial(alice.identity.peer_id, alice.addresses)

    async def test_opened_and_closed_connections_are_events(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        events = alice.connection_events()
        connection = alice.connection_to(await world.connect(alice, bob))
        assert connection is not None
        assert await anext(events) == ConnectionEvent(kind="opened", connection=connection)
        connection.close()
        closed = await anext(events)
        assert (closed.kind, closed.connection) == ("closed", connection)
        assert "closed here" in closed.reason
        await wait_until_closed(bob)

    async def test_events_end_with_the_host(self, world: HostWorld) -> None:
        alice = await world.host("alice")
        events = alice.connection_events()
        alice.close()
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    @pytest.mark.needs("tasks of its own")
    async def test_closing_leaves_no_task_and_no_connection(self, world: HostWorld) -> None:
        before = trio.lowlevel.current_statistics().tasks_living
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        peer = await world.connect(alice, bob)
        stream = await alice.open_stream(peer, [ECHO])
        assert await exchange(stream, b"hello") == b"hello"
        alice.close()
        bob.close()
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == before
        assert not alice.connections
        assert not bob.connections
        with pytest.raises(LocalProtocolError, match="not running"):
            await alice.dial(peer, [])

    @pytest.mark.needs("listening")
    async def test_a_taken_address_cannot_be_listened_on(self, world: HostWorld) -> None:
        alice = await world.host("alice")
        with pytest.raises(ConfigError, match="cannot listen"):
            await alice.listen(alice.addresses[0])

    @pytest.mark.needs("listening")
    @pytest.mark.parametrize("address", ["nonsense", "/ip4/192.0.2.77/tcp/0"])
    async def test_an_address_that_is_not_ours_cannot_be_listened_on(
        self, world: HostWorld, address: str
    ) -> None:
        alice = await world.host("alice")
        with pytest.raises(ConfigError, match="cannot listen"):
            await alice.listen(Address(address))
