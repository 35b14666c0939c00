"""What every host must do about handlers: whom they serve, how many, what their errors cost."""

from __future__ import annotations

import pytest
import trio
from conformance_worlds import HostWorld
from net_hosts import ECHO, echo, exchange, receive_all, wait_until_closed

from swarmpy import config
from swarmpy.abc import Gate, ProtocolId, Stream
from swarmpy.errors import ConnectionLost, DialFailed, RemoteProtocolError, StreamReset
from swarmpy.net.containment import CONNECTION_PENALTY

OTHER = ProtocolId("/swarmpy-test/other/1")


class TestHandlers:
    """Native on TCP, native on SimNetwork, SimHost, and an application's py-libp2p host."""

    async def test_a_handler_that_returns_ends_its_stream(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def greet(stream: Stream) -> None:
            await stream.send_all(b"hello")

        bob.set_handler(ECHO, greet)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        assert await receive_all(stream) == b"hello"

    @pytest.mark.parametrize(
        "error",
        [ValueError("oops"), ExceptionGroup("g", [ValueError("oops")]), StreamReset("mine")],
        ids=["error", "group", "network error"],
    )
    async def test_a_failing_handler_costs_its_stream_only(
        self, world: HostWorld, error: Exception
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def fail(_: Stream) -> None:
            raise error

        bob.set_handler(OTHER, fail)
        bob.set_handler(ECHO, echo)
        peer = await world.connect(alice, bob)
        stream = await alice.open_stream(peer, [OTHER])
        with pytest.raises(StreamReset):
            await receive_all(stream)
        assert await exchange(await alice.open_stream(peer, [ECHO]), b"hello") == b"hello"

    async def test_a_failing_task_of_a_handler_costs_its_stream_only(
        self, world: HostWorld
    ) -> None:
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
        peer = await world.connect(alice, bob)
        stream = await alice.open_stream(peer, [OTHER])
        with pytest.raises(StreamReset):
            await receive_all(stream)
        assert await exchange(await alice.open_stream(peer, [ECHO]), b"hello") == b"hello"

    @pytest.mark.parametrize("penalty", [9, 10])
    async def test_a_breach_of_weight_ten_costs_the_connection(
        self, world: HostWorld, penalty: int
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def judge(_: Stream) -> None:
            raise RemoteProtocolError("forged", penalty=penalty)

        bob.set_handler(OTHER, judge)
        peer = await world.connect(alice, bob)
        stream = await alice.open_stream(peer, [OTHER])
        with pytest.raises(ConnectionLost if penalty == 10 else StreamReset):
            await receive_all(stream)
        assert len(bob.connections) == (penalty < 10)

    async def test_small_breaches_add_up_to_the_connection(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def judge(_: Stream) -> None:
            raise RemoteProtocolError("malformed")

        bob.set_handler(OTHER, judge)
        peer = await world.connect(alice, bob)
        for _ in range(CONNECTION_PENALTY - 1):
            with pytest.raises(StreamReset):
                await receive_all(await alice.open_stream(peer, [OTHER]))
        with pytest.raises(ConnectionLost):
            await receive_all(await alice.open_stream(peer, [OTHER]))

    async def test_nobody_pays_for_the_breach_of_another_peer(self, world: HostWorld) -> None:
        """Method: a handler fails at what a third peer said to it."""
        alice, bob = await world.host("alice"), await world.host("bob")

        async def judge(_: Stream) -> None:
            raise RemoteProtocolError("forged", peer="another", penalty=CONNECTION_PENALTY)

        bob.set_handler(OTHER, judge)
        peer = await world.connect(alice, bob)
        with pytest.raises(StreamReset):
            await receive_all(await alice.open_stream(peer, [OTHER]))
        assert len(bob.connections) == 1

    # Bounds ---------------------------------------------------------------------------

    async def test_a_peer_has_so_many_streams_and_no_more(self, world: HostWorld) -> None:
        """Streams at the bound work, the next is reset, and a place that is left is free again."""
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        peer = await world.connect(alice, bob)
        await world.settle(alice, peer)
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

    async def test_the_gate_is_asked_before_a_dial(self, world: HostWorld) -> None:
        class Closed(Gate):
            def allow_dial(self, peer: object, address: object) -> bool:
                return False

        alice, bob = await world.host("alice", gate=Closed()), await world.host("bob")
        with pytest.raises(DialFailed, match="gate forbids dialling"):
            await world.connect(alice, bob)

    @pytest.mark.needs("accepting")
    async def test_the_gate_is_asked_at_accept(self, world: HostWorld) -> None:
        class Closed(Gate):
            def allow_address(self, address: object) -> bool:
                return False

        alice, bob = await world.host("alice"), await world.host("bob", gate=Closed())
        with pytest.raises(DialFailed):
            await world.connect(alice, bob)

    @pytest.mark.parametrize(
        "direction", [pytest.param("inbound", marks=pytest.mark.needs("accepting")), "outbound"]
    )
    async def test_the_gate_is_asked_when_the_peer_is_proven(
        self, world: HostWorld, direction: str
    ) -> None:
        class Closed(Gate):
            def allow_peer(self, peer: object, direction_asked: object) -> bool:
                return direction_asked != direction

        alice, bob = [await world.host(name, gate=Closed()) for name in ("alice", "bob")]
        try:
            await world.connect(alice, bob)
        except DialFailed:
            assert direction == "outbound"
        await wait_until_closed(alice)
        assert not bob.connections

    async def test_the_gate_is_asked_for_every_stream(self, world: HostWorld) -> None:
        """A stranger learns as little as of a protocol that is not served."""

        class NoEcho(Gate):
            def allow_stream(self, peer: object, protocol: object) -> bool:
                return protocol != ECHO

        alice, bob = await world.host("alice"), await world.host("bob", gate=NoEcho())
        bob.set_handler(ECHO, echo)
        bob.set_handler(OTHER, echo)
        peer = await world.connect(alice, bob)
        with pytest.raises(RemoteProtocolError, match="does not serve"):
            await (await alice.open_stream(peer, [ECHO])).receive_some()
        assert await exchange(await alice.open_stream(peer, [OTHER]), b"hello") == b"hello"
