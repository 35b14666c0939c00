"""What every host must do about streams: bytes, order, ends, back-pressure, cancellation."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from conformance_worlds import HostWorld
from net_hosts import ECHO, echo, exchange, receive_all, receive_exactly

from swarmpy.abc import ProtocolId, Stream
from swarmpy.errors import (
    ConfigError,
    ConnectionLost,
    LocalProtocolError,
    RemoteProtocolError,
    StreamReset,
)

OTHER = ProtocolId("/swarmpy-test/other/1")
MIB = 1024 * 1024


class TestStreams:
    """Native on TCP, native on SimNetwork, SimHost, and an application's py-libp2p host."""

    @pytest.mark.parametrize(
        "size", [1, 64, 32767, 32768, 65280, 65281, 65519, 65520, 262144, 262145, 4 * MIB]
    )
    async def test_bytes_come_back_as_they_were_sent(self, world: HostWorld, size: int) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        sent = random.Random(size).randbytes(size)
        assert await exchange(stream, sent) == sent

    async def test_what_is_taken_without_waiting_arrives_whole_and_in_its_place(
        self, world: HostWorld
    ) -> None:
        """Method: messages that may not wait, until one is not taken; each host may take none."""
        alice, bob = await world.host("alice"), await world.host("bob")
        received: list[bytes] = []
        ended, go_on = trio.Event(), trio.Event()

        async def sink(stream: Stream) -> None:
            await go_on.wait()
            received.append(await receive_all(stream))
            ended.set()

        bob.set_handler(ECHO, sink)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        sent = b"first"
        await stream.send_all(sent)
        for number in range(1000):
            message = bytes([number % 251]) * 1000
            if not stream.send_nowait(message):
                break
            sent += message
        else:
            raise AssertionError("a reader that does not read was sent a megabyte")
        go_on.set()
        await stream.send_all(b"last")
        await stream.close_write()
        await ended.wait()
        assert received == [sent + b"last"]
        assert not stream.send_nowait(b"after the end")

    async def test_nothing_sent_and_ended_comes_back_as_nothing(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        await stream.send_all(b"")
        await stream.close_write()
        assert await stream.receive_some() == b""
        assert await stream.receive_some() == b""

    async def test_each_direction_ends_by_itself(self, world: HostWorld) -> None:
        """The answer comes after the end of the question."""
        alice, bob = await world.host("alice"), await world.host("bob")

        async def answer(stream: Stream) -> None:
            question = await receive_all(stream)
            await stream.send_all(question.upper())

        bob.set_handler(ECHO, answer)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        await stream.send_all(b"question")
        await stream.close_write()
        with pytest.raises(StreamReset, match="closed for sending"):
            await stream.send_all(b"more")

    async def test_an_answer_after_the_end_is_read_to_its_own_end(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def answer(stream: Stream) -> None:
            await stream.send_all((await receive_all(stream)).upper())

        bob.set_handler(ECHO, answer)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        await stream.send_all(b"question")
        await stream.close_write()
        assert await receive_all(stream) == b"QUESTION"

    async def test_many_streams_keep_their_order(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        peer = await world.connect(alice, bob)

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

    async def test_a_large_read_can_be_cut(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        await stream.send_all(b"abcdef")
        assert [await stream.receive_some(4), await receive_exactly(stream, 2)] == [b"abcd", b"ef"]

    async def test_the_newest_common_protocol_is_chosen(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        peer = await world.connect(alice, bob)
        stream = await alice.open_stream(peer, [ProtocolId("/swarmpy-test/echo/2"), ECHO])
        assert stream.protocol == ECHO
        assert await exchange(stream, b"hello") == b"hello"

    async def test_a_protocol_the_peer_does_not_serve_is_refused(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        peer = await world.connect(alice, bob)
        lazy = await alice.open_stream(peer, [ECHO])
        with pytest.raises(RemoteProtocolError, match="does not serve"):
            await lazy.receive_some()
        with pytest.raises(RemoteProtocolError, match="does not serve"):
            await alice.open_stream(peer, [ECHO, OTHER])

    async def test_a_stream_to_a_peer_that_is_not_connected_is_refused(
        self, world: HostWorld
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        with pytest.raises(ConnectionLost, match="not connected"):
            await alice.open_stream(bob.identity.peer_id, [ECHO])

    async def test_a_protocol_has_one_handler(self, world: HostWorld) -> None:
        alice = await world.host("alice")
        alice.set_handler(ECHO, echo)
        with pytest.raises(ConfigError, match="already has a handler"):
            alice.set_handler(ECHO, echo)

    async def test_two_tasks_must_not_send_on_one_stream(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, wait_for_ever)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(2 * world.window_bytes_max))
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(LocalProtocolError, match="two tasks send"):
                await stream.send_all(b"x")
            with pytest.raises(LocalProtocolError, match="while another task sends"):
                await stream.close_write()
            nursery.cancel_scope.cancel()

    async def test_two_tasks_must_not_receive_from_one_stream(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, wait_for_ever)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(LocalProtocolError, match="two tasks receive"):
                await stream.receive_some()
            nursery.cancel_scope.cancel()

    # Back-pressure --------------------------------------------------------------------

    async def test_a_peer_that_does_not_read_blocks_only_its_stream(self, world: HostWorld) -> None:
        """Its sender gets rid of a window and no more, for as long as others talk; then of all."""
        alice, bob = await world.host("alice"), await world.host("bob")
        may_read = trio.Event()
        received: list[bytes] = []
        sent_sizes: list[int] = []

        async def read_late(stream: Stream) -> None:
            await may_read.wait()
            received.append(await receive_all(stream))

        bob.set_handler(OTHER, read_late)
        bob.set_handler(ECHO, echo)
        peer = await world.connect(alice, bob)
        pieces = [random.Random(1).randbytes(16_384)] * (world.window_bytes_max // 16_384 + 10)
        blocked = await alice.open_stream(peer, [OTHER])

        async def send() -> None:
            for piece in pieces:
                await blocked.send_all(piece)
                sent_sizes.append(len(piece))
            await blocked.close_write()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            other = await alice.open_stream(peer, [ECHO])
            for _ in range(50):
                assert await exchange(other, b"x" * 1000) == b"x" * 1000
            assert 0 < sum(sent_sizes) <= world.window_bytes_max
            may_read.set()
        await other.close_write()
        assert await receive_all(blocked) == b""
        assert received == [b"".join(pieces)]

    async def test_a_cancelled_send_costs_only_its_stream(self, world: HostWorld) -> None:
        """A frame is never torn: cancelled at many points, the connection goes on."""
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        bob.set_handler(OTHER, read_slowly)
        peer = await world.connect(alice, bob)
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

    async def test_a_cancelled_read_loses_no_byte(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        for _ in range(5):
            with trio.CancelScope() as scope:
                scope.cancel()
                await stream.receive_some()
            assert await exchange(stream, b"hello") == b"hello"

    # Ends -----------------------------------------------------------------------------

    async def test_a_reset_is_told_from_an_end(self, world: HostWorld) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")

        async def give_up(stream: Stream) -> None:
            await stream.receive_some()
            stream.reset()

        bob.set_handler(ECHO, give_up)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        await stream.send_all(b"hello")
        with pytest.raises(StreamReset, match="the peer gave it up"):
            await stream.receive_some()
        with pytest.raises(StreamReset):
            await stream.send_all(b"more")
        with pytest.raises(StreamReset):
            await stream.close_write()
        assert len(alice.connections) == 1

    async def test_a_handler_learns_that_its_stream_was_reset(self, world: HostWorld) -> None:
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
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        await stream.send_all(b"hello")
        await started.wait()
        stream.reset()
        stream.reset()
        await finished.wait()
        assert len(caught) == 1
        with pytest.raises(StreamReset, match="reset here"):
            await stream.receive_some()

    async def test_a_lost_connection_is_told_from_an_end_and_from_a_reset(
        self, world: HostWorld
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        await exchange(stream, b"hello")
        await world.stop(bob)
        with pytest.raises(ConnectionLost):
            await stream.receive_some()
        with pytest.raises(ConnectionLost):
            await stream.send_all(b"more")
        with pytest.raises(ConnectionLost):
            await stream.close_write()

    async def test_what_was_received_can_be_read_after_the_connection_is_lost(
        self, world: HostWorld
    ) -> None:
        """Method: of two streams' echoes the later one is read; then the earlier one is there."""
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, echo)
        peer = await world.connect(alice, bob)
        stream, other = [await alice.open_stream(peer, [ECHO]) for _ in range(2)]
        for item in (stream, other):
            await exchange(item, b"first, to have agreed on the protocol")
        await stream.send_all(b"hello")
        for _ in range(20):
            await exchange(other, b"what was echoed before this is here")
        await world.stop(bob)
        while alice.connections:
            await trio.lowlevel.checkpoint()
        assert await stream.receive_some() == b"hello"
        with pytest.raises(ConnectionLost):
            await stream.receive_some()

    async def test_a_sender_that_waits_for_window_learns_that_the_connection_is_lost(
        self, world: HostWorld
    ) -> None:
        alice, bob = await world.host("alice"), await world.host("bob")
        bob.set_handler(ECHO, wait_for_ever)
        stream = await alice.open_stream(await world.connect(alice, bob), [ECHO])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_lost, stream, 2 * world.window_bytes_max)
            await trio.testing.wait_all_tasks_blocked()
            await world.stop(bob)


async def wait_for_ever(_: Stream) -> None:
    await trio.sleep_forever()


async def read_slowly(stream: Stream) -> None:
    while await stream.receive_some(1000):
        await trio.lowlevel.checkpoint()


async def expect_lost(stream: Stream, size: int) -> None:
    with pytest.raises(ConnectionLost):
        await stream.send_all(bytes(size))
