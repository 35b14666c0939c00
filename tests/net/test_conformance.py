"""What every host must do over every network: one class, run on TCP and on the simulated one."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from net_hosts import (
    ECHO,
    World,
    connect,
    echo,
    exchange,
    receive_all,
    receive_exactly,
    wait_until_closed,
)

from swarmpy import config
from swarmpy.abc import Address, ConnectionEvent, Gate, ProtocolId, Stream
from swarmpy.errors import (
    ConfigError,
    ConnectionLost,
    DialFailed,
    HandshakeFailed,
    LocalProtocolError,
    RemoteProtocolError,
    StreamReset,
)
from swarmpy.net.connection import NativeConnection
from swarmpy.net.router import CONNECTION_PENALTY
from swarmpy.net.stream import NativeStream
from swarmpy.proto.yamux import INITIAL_WINDOW_BYTES

OTHER = ProtocolId("/swarmpy-test/other/1")
MIB = 1024 * 1024


class TestHost:
    """Native host on TCP, native host on the simulated network."""

    # Connections ----------------------------------------------------------------------

    async def test_both_ends_see_one_proven_connection(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        events = bob.connection_events()
        near = await alice.dial(bob.identity.peer_id, bob.addresses)
        far = (await anext(events)).connection
        assert (near.peer, far.peer) == (bob.identity.peer_id, alice.identity.peer_id)
        assert (near.direction, far.direction) == ("outbound", "inbound")
        assert near.channel_binding == far.channel_binding
        assert near.local_address == far.remote_address
        assert near.path == "direct"

    async def test_dialling_a_connected_peer_returns_the_connection(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        first = await alice.dial(bob.identity.peer_id, bob.addresses)
        assert await alice.dial(bob.identity.peer_id, []) is first

    async def test_two_tasks_that_dial_one_peer_share_the_connection(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        dialled: list[NativeConnection] = []

        async def dial() -> None:
            dialled.append(await alice.dial(bob.identity.peer_id, bob.addresses))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial)
            nursery.start_soon(dial)
        assert dialled[0] is dialled[1]
        assert len(alice.connections) == 1

    async def test_a_dial_survives_one_of_two_tasks_giving_up(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(alice.dial, bob.identity.peer_id, bob.addresses)
                scope.cancel()
                await alice.dial(bob.identity.peer_id, bob.addresses)
        assert alice.connection_to(bob.identity.peer_id) is not None

    async def test_a_dial_nobody_waits_for_is_given_up(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        with trio.CancelScope() as scope:
            scope.cancel()
            await alice.dial(bob.identity.peer_id, bob.addresses)
        await trio.testing.wait_all_tasks_blocked()
        assert not alice.connections
        assert await alice.dial(bob.identity.peer_id, bob.addresses)

    async def test_another_peer_at_the_address_is_refused(self, world: World) -> None:
        alice, bob, carol = [await world.host(name) for name in ("alice", "bob", "carol")]
        with pytest.raises(HandshakeFailed, match="expected peer"):
            await alice.dial(carol.identity.peer_id, bob.addresses)
        assert not alice.connections

    async def test_a_dead_address_before_a_good_one_does_no_harm(self, world: World) -> None:
        alice, bob, carol = [await world.host(name) for name in ("alice", "bob", "carol")]
        dead = carol.addresses[0]
        carol.close()
        assert await alice.dial(bob.identity.peer_id, [dead, *bob.addresses])

    async def test_a_peer_nobody_can_reach_is_a_failed_dial(self, world: World) -> None:
        alice, carol = await world.host("alice"), await world.host("carol")
        addresses = carol.addresses
        carol.close()
        with pytest.raises(DialFailed):
            await alice.dial(carol.identity.peer_id, addresses)
        with pytest.raises(DialFailed, match="no address"):
            await alice.dial(carol.identity.peer_id, [])

    @pytest.mark.parametrize("address", ["nonsense", "/ip4/127.0.0.1", "/ip4/127.0.0.1/udp/1"])
    async def test_a_malformed_address_is_a_failed_dial(self, world: World, address: str) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        with pytest.raises(DialFailed):
            await alice.dial(bob.identity.peer_id, [Address(address)])

    async def test_an_address_may_name_its_peer_but_no_other(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        wrong = Address(f"{bob.addresses[0]}/p2p/{alice.identity.peer_id}")
        right = Address(f"{bob.addresses[0]}/p2p/{bob.identity.peer_id}")
        with pytest.raises(DialFailed, match="another peer"):
            await alice.dial(bob.identity.peer_id, [wrong])
        assert await alice.dial(bob.identity.peer_id, [right])

    async def test_a_host_does_not_dial_itself(self, world: World) -> None:
        alice = await world.host("alice")
        with pytest.raises(DialFailed, match="itself"):
            await alice.dial(alice.identity.peer_id, alice.addresses)

    async def test_opened_and_closed_connections_are_events(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        events = alice.connection_events()
        connection = await alice.dial(bob.identity.peer_id, bob.addresses)
        assert await anext(events) == ConnectionEvent(kind="opened", connection=connection)
        connection.close()
        closed = await anext(events)
        assert (closed.kind, closed.connection) == ("closed", connection)
        assert "closed here" in closed.reason
        await wait_until_closed(bob)

    async def test_events_end_with_the_host(self, world: World) -> None:
        alice = await world.host("alice")
        events = alice.connection_events()
        alice.close()
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    async def test_closing_leaves_no_task_and_no_connection(self, world: World) -> None:
        before = trio.lowlevel.current_statistics().tasks_living
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        peer = await connect(alice, bob)
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

    async def test_a_taken_address_cannot_be_listened_on(self, world: World) -> None:
        alice = await world.host("alice")
        with pytest.raises(ConfigError, match="cannot listen"):
            await alice.listen(alice.addresses[0])

    @pytest.mark.parametrize("address", ["nonsense", "/ip4/192.0.2.77/tcp/0"])
    async def test_an_address_that_is_not_ours_cannot_be_listened_on(
        self, world: World, address: str
    ) -> None:
        alice = await world.host("alice")
        with pytest.raises(ConfigError, match="cannot listen"):
            await alice.listen(Address(address))

    # Streams --------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [1, 64, 32767, 32768, 65519, 65520, 262144, 262145, 4 * MIB])
    async def test_bytes_come_back_as_they_were_sent(self, world: World, size: int) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        sent = random.Random(size).randbytes(size)
        assert await exchange(stream, sent) == sent

    async def test_nothing_sent_and_ended_comes_back_as_nothing(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        await stream.send_all(b"")
        await stream.close_write()
        assert await stream.receive_some() == b""
        assert await stream.receive_some() == b""

    async def test_each_direction_ends_by_itself(self, world: World) -> None:
        """The answer comes after the end of the question."""
        alice, bob = await world.host("alice"), await world.host("bob")

        async def answer(stream: Stream) -> None:
            question = await receive_all(stream)
            await stream.send_all(question.upper())

        bob.set_handler(ECHO, answer)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        await stream.send_all(b"question")
        await stream.close_write()
        with pytest.raises(StreamReset, match="closed for sending"):
            await stream.send_all(b"more")

    async def test_an_answer_after_the_end_is_read_to_its_own_end(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def answer(stream: Stream) -> None:
            await stream.send_all((await receive_all(stream)).upper())

        bob.set_handler(ECHO, answer)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        await stream.send_all(b"question")
        await stream.close_write()
        assert await receive_all(stream) == b"QUESTION"

    async def test_many_streams_keep_their_order(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        peer = await connect(alice, bob)

        async def converse(index: int) -> None:
            source = random.Random(index)
            stream = await alice.open_stream(peer, [ECHO])
            for _ in range(20):
                sent = source.randbytes(source.choice([1, 100, 5000, 70_000]))
                assert await exchange(stream, sent) == sent
            await stream.close_write()

        async with trio.open_nursery() as nursery:
            for index in range(20):
                nursery.start_soon(converse, index)

    async def test_a_large_read_can_be_cut(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        await stream.send_all(b"abcdef")
        assert [await stream.receive_some(4), await receive_exactly(stream, 2)] == [b"abcd", b"ef"]

    async def test_the_newest_common_protocol_is_chosen(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        peer = await connect(alice, bob)
        stream = await alice.open_stream(peer, [ProtocolId("/swarmpy-test/echo/2"), ECHO])
        assert stream.protocol == ECHO
        assert await exchange(stream, b"hello") == b"hello"

    async def test_a_protocol_the_peer_does_not_serve_is_refused(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        peer = await connect(alice, bob)
        lazy = await alice.open_stream(peer, [ECHO])
        with pytest.raises(RemoteProtocolError, match="does not serve"):
            await lazy.receive_some()
        with pytest.raises(RemoteProtocolError, match="does not serve"):
            await alice.open_stream(peer, [ECHO, OTHER])

    async def test_a_stream_to_a_peer_that_is_not_connected_is_refused(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        with pytest.raises(ConnectionLost, match="not connected"):
            await alice.open_stream(bob.identity.peer_id, [ECHO])

    async def test_a_protocol_has_one_handler(self, world: World) -> None:
        alice = await world.host("alice")
        alice.set_handler(ECHO, echo)
        with pytest.raises(ConfigError, match="already has a handler"):
            alice.set_handler(ECHO, echo)

    async def test_two_tasks_must_not_send_on_one_stream(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, wait_for_ever)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(MIB))
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(LocalProtocolError, match="two tasks send"):
                await stream.send_all(b"x")
            with pytest.raises(LocalProtocolError, match="while another task sends"):
                await stream.close_write()
            nursery.cancel_scope.cancel()

    async def test_two_tasks_must_not_receive_from_one_stream(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, wait_for_ever)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(LocalProtocolError, match="two tasks receive"):
                await stream.receive_some()
            nursery.cancel_scope.cancel()

    # Back-pressure --------------------------------------------------------------------

    async def test_a_peer_that_does_not_read_blocks_only_its_stream(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        may_read = trio.Event()
        received: list[bytes] = []
        held: list[Stream] = []

        async def read_late(stream: Stream) -> None:
            held.append(stream)
            await may_read.wait()
            received.append(await receive_all(stream))

        bob.set_handler(OTHER, read_late)
        bob.set_handler(ECHO, echo)
        peer = await connect(alice, bob)
        sent = random.Random(1).randbytes(MIB)
        blocked = await alice.open_stream(peer, [OTHER])
        assert isinstance(blocked, NativeStream)

        async def send() -> None:
            await blocked.send_all(sent)
            await blocked.close_write()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            other = await alice.open_stream(peer, [ECHO])
            for _ in range(50):
                assert await exchange(other, b"x" * 1000) == b"x" * 1000
            assert blocked.connection.window(blocked.stream_id) == 0
            # All but the negotiation, which was read.
            assert INITIAL_WINDOW_BYTES - 100 < unread_bytes(held[0]) <= INITIAL_WINDOW_BYTES
            may_read.set()
        await other.close_write()
        assert await receive_all(blocked) == b""
        assert received == [sent]

    async def test_a_cancelled_send_costs_only_its_stream(self, world: World) -> None:
        """A frame is never torn: cancelled at many points, the connection goes on."""
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        bob.set_handler(OTHER, read_slowly)
        peer = await connect(alice, bob)
        steady = await alice.open_stream(peer, [ECHO])
        for point in range(60):
            stream = await alice.open_stream(peer, [OTHER])
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send_all, bytes(MIB + point))
                    for _ in range(point):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            with pytest.raises(StreamReset):
                await stream.send_all(b"more")
            assert await exchange(steady, b"still here") == b"still here"
        assert len(alice.connections) == 1

    async def test_a_cancelled_read_loses_no_byte(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        for _ in range(5):
            with trio.CancelScope() as scope:
                scope.cancel()
                await stream.receive_some()
            assert await exchange(stream, b"hello") == b"hello"

    # Ends -----------------------------------------------------------------------------

    async def test_a_reset_is_told_from_an_end(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def give_up(stream: Stream) -> None:
            await stream.receive_some()
            stream.reset()

        bob.set_handler(ECHO, give_up)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        await stream.send_all(b"hello")
        with pytest.raises(StreamReset, match="the peer gave it up"):
            await stream.receive_some()
        with pytest.raises(StreamReset):
            await stream.send_all(b"more")
        with pytest.raises(StreamReset):
            await stream.close_write()
        assert len(alice.connections) == 1

    async def test_a_handler_learns_that_its_stream_was_reset(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        caught: list[Exception] = []
        started, finished = trio.Event(), trio.Event()

        async def note(stream: Stream) -> None:
            started.set()
            try:
                await receive_all(stream)
            except StreamReset as error:
                caught.append(error)
            finished.set()

        bob.set_handler(ECHO, note)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        await stream.send_all(b"hello")
        await started.wait()
        stream.reset()
        stream.reset()
        await finished.wait()
        assert len(caught) == 1
        with pytest.raises(StreamReset, match="reset here"):
            await stream.receive_some()

    async def test_a_lost_connection_is_told_from_an_end_and_from_a_reset(
        self, world: World
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        await exchange(stream, b"hello")
        bob.close()
        with pytest.raises(ConnectionLost):
            await stream.receive_some()
        with pytest.raises(ConnectionLost):
            await stream.send_all(b"more")
        with pytest.raises(ConnectionLost):
            await stream.close_write()

    async def test_what_was_received_can_be_read_after_the_connection_is_lost(
        self, world: World
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        await exchange(stream, b"first, to have agreed on the protocol")
        await stream.send_all(b"hello")
        while not unread_bytes(stream):
            await trio.testing.wait_all_tasks_blocked()
        stream.connection.close()
        assert await stream.receive_some() == b"hello"
        with pytest.raises(ConnectionLost):
            await stream.receive_some()

    async def test_a_sender_that_waits_for_window_learns_that_the_connection_is_lost(
        self, world: World
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, wait_for_ever)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_lost, stream)
            await trio.testing.wait_all_tasks_blocked()
            bob.close()

    # Handlers -------------------------------------------------------------------------

    async def test_a_handler_that_returns_ends_its_stream(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def greet(stream: Stream) -> None:
            await stream.send_all(b"hello")

        bob.set_handler(ECHO, greet)
        stream = await alice.open_stream(await connect(alice, bob), [ECHO])
        assert await receive_all(stream) == b"hello"

    @pytest.mark.parametrize(
        "error",
        [ValueError("oops"), ExceptionGroup("g", [ValueError("oops")]), StreamReset("mine")],
        ids=["error", "group", "network error"],
    )
    async def test_a_failing_handler_costs_its_stream_only(
        self, world: World, error: Exception
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def fail(_: Stream) -> None:
            raise error

        bob.set_handler(OTHER, fail)
        bob.set_handler(ECHO, echo)
        peer = await connect(alice, bob)
        stream = await alice.open_stream(peer, [OTHER])
        with pytest.raises(StreamReset):
            await receive_all(stream)
        assert await exchange(await alice.open_stream(peer, [ECHO]), b"hello") == b"hello"

    async def test_a_failing_task_of_a_handler_costs_its_stream_only(self, world: World) -> None:
        """Its error comes in a group together with cancellations."""
        alice, bob = await world.host("alice"), await world.host("bob")

        async def fail() -> None:
            raise ValueError("oops")

        async def with_tasks(_: Stream) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(fail)

        bob.set_handler(OTHER, with_tasks)
        bob.set_handler(ECHO, echo)
        peer = await connect(alice, bob)
        stream = await alice.open_stream(peer, [OTHER])
        with pytest.raises(StreamReset):
            await receive_all(stream)
        assert await exchange(await alice.open_stream(peer, [ECHO]), b"hello") == b"hello"

    @pytest.mark.parametrize("penalty", [9, 10])
    async def test_a_breach_of_weight_ten_costs_the_connection(
        self, world: World, penalty: int
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def judge(_: Stream) -> None:
            raise RemoteProtocolError("forged", penalty=penalty)

        bob.set_handler(OTHER, judge)
        peer = await connect(alice, bob)
        stream = await alice.open_stream(peer, [OTHER])
        with pytest.raises(ConnectionLost if penalty == 10 else StreamReset):
            await receive_all(stream)
        assert len(bob.connections) == (penalty < 10)

    async def test_small_breaches_add_up_to_the_connection(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def judge(_: Stream) -> None:
            raise RemoteProtocolError("malformed")

        bob.set_handler(OTHER, judge)
        peer = await connect(alice, bob)
        for _ in range(CONNECTION_PENALTY - 1):
            with pytest.raises(StreamReset):
                await receive_all(await alice.open_stream(peer, [OTHER]))
        with pytest.raises(ConnectionLost):
            await receive_all(await alice.open_stream(peer, [OTHER]))

    async def test_nobody_pays_for_the_breach_of_another_peer(self, world: World) -> None:
        """Method: a handler fails at what a third peer said to it."""
        alice, bob = await world.host("alice"), await world.host("bob")

        async def judge(_: Stream) -> None:
            raise RemoteProtocolError("forged", peer="another", penalty=CONNECTION_PENALTY)

        bob.set_handler(OTHER, judge)
        peer = await connect(alice, bob)
        with pytest.raises(StreamReset):
            await receive_all(await alice.open_stream(peer, [OTHER]))
        assert len(bob.connections) == 1

    # Bounds ---------------------------------------------------------------------------

    async def test_a_peer_has_so_many_streams_and_no_more(self, world: World) -> None:
        """Streams at the bound work, the next is reset, and a place that is left is free again."""
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        peer = await connect(alice, bob)
        await alice.wait_identified(peer)
        streams = [await alice.open_stream(peer, [ECHO]) for _ in range(config.INBOUND_STREAMS_MAX)]
        for stream in streams:
            assert await exchange(stream, b"hello") == b"hello"
        refused = await alice.open_stream(peer, [ECHO])
        await refused.send_all(b"hello")
        with pytest.raises(StreamReset):
            await refused.receive_some()
        await streams[0].close_write()
        assert await receive_all(streams[0]) == b""
        await exchange(streams[1], b"bob has seen the end")
        assert await exchange(await alice.open_stream(peer, [ECHO]), b"hello") == b"hello"

    # The gate -------------------------------------------------------------------------

    async def test_the_gate_is_asked_before_a_dial(self, world: World) -> None:
        class Closed(Gate):
            def allow_dial(self, peer: object, address: object) -> bool:
                return False

        alice, bob = await world.host("alice", gate=Closed()), await world.host("bob")
        with pytest.raises(DialFailed, match="gate forbids dialling"):
            await connect(alice, bob)

    async def test_the_gate_is_asked_at_accept(self, world: World) -> None:
        class Closed(Gate):
            def allow_address(self, address: object) -> bool:
                return False

        alice, bob = await world.host("alice"), await world.host("bob", gate=Closed())
        with pytest.raises(DialFailed):
            await connect(alice, bob)

    @pytest.mark.parametrize("direction", ["inbound", "outbound"])
    async def test_the_gate_is_asked_when_the_peer_is_proven(
        self, world: World, direction: str
    ) -> None:
        class Closed(Gate):
            def allow_peer(self, peer: object, direction_asked: object) -> bool:
                return direction_asked != direction

        alice, bob = (
            await world.host("alice", gate=Closed()),
            await world.host("bob", gate=Closed()),
        )
        try:
            await connect(alice, bob)
        except DialFailed:
            assert direction == "outbound"
        await wait_until_closed(alice)
        assert not bob.connections

    async def test_the_gate_is_asked_for_every_stream(self, world: World) -> None:
        """A stranger learns as little as of a protocol that is not served."""

        class NoEcho(Gate):
            def allow_stream(self, peer: object, protocol: object) -> bool:
                return protocol != ECHO

        alice, bob = await world.host("alice"), await world.host("bob", gate=NoEcho())
        bob.set_handler(ECHO, echo)
        bob.set_handler(OTHER, echo)
        peer = await connect(alice, bob)
        with pytest.raises(RemoteProtocolError, match="does not serve"):
            await (await alice.open_stream(peer, [ECHO])).receive_some()
        assert await exchange(await alice.open_stream(peer, [OTHER]), b"hello") == b"hello"
        info = await alice.wait_identified(peer)
        assert OTHER in info.protocols
        assert ECHO not in info.protocols

    # Identify and ping ----------------------------------------------------------------

    async def test_peers_identify_themselves(self, world: World) -> None:
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

    async def test_a_protocol_added_later_is_pushed(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        peer = await connect(alice, bob)
        before = await alice.wait_identified(peer)
        await bob.wait_identified(alice.identity.peer_id)
        bob.set_handler(ECHO, echo)
        with trio.fail_after(5):
            assert ECHO in (await alice.wait_identified(peer, after=before)).protocols

    async def test_a_ping_comes_back(self, world: World) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        peer = await connect(alice, bob)
        assert 0 <= await alice.ping(peer) < 5
        with pytest.raises(ConnectionLost, match="not connected"):
            await alice.ping(alice.identity.peer_id)


async def wait_for_ever(_: Stream) -> None:
    await trio.sleep_forever()


async def read_slowly(stream: Stream) -> None:
    while await stream.receive_some(1000):
        await trio.lowlevel.checkpoint()


async def expect_lost(stream: Stream) -> None:
    with pytest.raises(ConnectionLost):
        await stream.send_all(bytes(MIB))


def unread_bytes(stream: Stream) -> int:
    """Return the bytes a stream has received and not yet handed out."""
    assert isinstance(stream, NativeStream)
    return sum(len(piece) for piece in stream._pieces)
