"""Frames and messages over a stream: cut anywhere, ended anywhere, large and small."""

from __future__ import annotations

import random
from collections.abc import Awaitable
from typing import Annotated, TypeVar

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from net_hosts import ECHO, World, connect, echo

from swarmpy.abc import Stream
from swarmpy.errors import BadMessage, ConnectionLost, FrameTooLarge, RemoteProtocolError
from swarmpy.identity import PeerId
from swarmpy.net.messages import JOINED_BYTES_MAX, MessageStream
from swarmpy.proto import wire

T = TypeVar("T")


class Greeting(msgspec.Struct, frozen=True):
    """A message."""

    text: Annotated[str, msgspec.Meta(max_length=100)]


class Pieces(Stream):
    """A stream whose bytes come in given pieces; what is sent is kept."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)
        self.sent: list[bytes] = []

    @property
    def peer(self) -> PeerId:
        return PeerId("peer")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))

    async def receive_some(self, bytes_max: int | None = None) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    async def close_write(self) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        raise NotImplementedError


def run(coroutine: Awaitable[T]) -> T:
    """Run a coroutine that never waits: these streams have everything at hand."""

    async def main() -> T:
        return await coroutine

    return trio.run(main)


@given(st.lists(st.binary(max_size=50), max_size=6), st.data())
def test_any_frames_cut_anywhere_arrive_whole(frames: list[bytes], data: st.DataObject) -> None:
    sent = b"".join(wire.frame(frame) for frame in frames)
    pieces = []
    while sent:
        size = data.draw(st.integers(1, len(sent)))
        pieces.append(sent[:size])
        sent = sent[size:]
    stream = MessageStream(Pieces(*pieces))
    assert [bytes(run(stream.receive_frame(50)) or b"") for _ in frames] == frames  # type: ignore[arg-type]
    assert run(stream.receive_frame(50)) is None


@given(st.lists(st.integers(0, 3 * JOINED_BYTES_MAX), max_size=4))
def test_any_parts_are_sent_as_one_frame(sizes: list[int]) -> None:
    parts = [bytes([index]) * size for index, size in enumerate(sizes)]
    stream = Pieces()
    run(MessageStream(stream).send_frame(*parts))
    assert b"".join(stream.sent) == wire.frame(b"".join(parts))


def test_a_frame_in_one_piece_is_not_copied() -> None:
    payload = bytes(100_000)
    piece = wire.frame(payload)
    frame = run(MessageStream(Pieces(piece)).receive_frame(100_000))
    assert isinstance(frame, memoryview)
    assert frame.obj is piece


def test_small_parts_are_sent_at_once() -> None:
    stream = Pieces()
    run(MessageStream(stream).send_frame(b"head", b"body"))
    assert stream.sent == [b"\x08headbody"]


@pytest.mark.parametrize("size", [99, 100])
def test_a_frame_up_to_its_bound_is_read(size: int) -> None:
    frame = run(MessageStream(Pieces(wire.frame(bytes(size)))).receive_frame(100))
    assert len(frame) == size  # type: ignore[arg-type]


def test_a_frame_beyond_its_bound_is_refused_by_its_length_alone() -> None:
    with pytest.raises(FrameTooLarge, match="101 bytes exceeds 100") as caught:
        run(MessageStream(Pieces(wire.encode_varint(101))).receive_frame(100))
    assert caught.value.peer == "peer"


@pytest.mark.parametrize("cut", [b"\x80", b"\x05", b"\x05abcd"])
def test_an_end_inside_a_frame_is_the_peers_breach(cut: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="inside a frame"):
        run(MessageStream(Pieces(cut)).receive_frame(100))


def test_an_endless_length_is_refused() -> None:
    with pytest.raises(BadMessage):
        run(MessageStream(Pieces(b"\xff" * 5, b"\xff" * 5)).receive_frame(100))


def test_an_end_instead_of_a_message_is_a_lost_exchange() -> None:
    with pytest.raises(ConnectionLost, match="ended the stream"):
        run(MessageStream(Pieces()).receive(Greeting))


def test_an_end_where_it_is_expected_is_none() -> None:
    stream = MessageStream(Pieces(wire.frame(wire.encode(Greeting("hello")))))
    assert run(stream.receive_or_end(Greeting)) == Greeting("hello")
    assert run(stream.receive_or_end(Greeting)) is None


def test_a_bad_message_names_its_peer() -> None:
    with pytest.raises(BadMessage) as caught:
        run(MessageStream(Pieces(wire.frame(b"\xc1"))).receive(Greeting))
    assert caught.value.peer == "peer"


async def test_messages_and_large_frames_cross_a_connection(world: World) -> None:
    """A 150 KB frame is a chunk of hidden states."""
    alice, bob = await world.host("alice"), await world.host("bob")
    bob.set_handler(ECHO, echo)
    stream = MessageStream(await alice.open_stream(await connect(alice, bob), [ECHO]))
    assert stream.peer == bob.identity.peer_id
    tensor = random.Random(1).randbytes(150_000)
    for _ in range(3):
        await stream.send(Greeting("hello"))
        await stream.send_frame(b"head", memoryview(tensor), b"")
        assert await stream.receive(Greeting) == Greeting("hello")
        frame = await stream.receive_frame(200_000)
        assert frame == b"head" + tensor
    await stream.close_write()
    assert await stream.receive_or_end(Greeting) is None
    stream.reset()


def test_a_frame_that_drips_in_byte_by_byte_is_kept_as_bytes_not_as_objects() -> None:
    """A member could fill 350 times the memory of its frame otherwise."""
    payload = bytes(range(256)) * 800
    dripped = [wire.frame(payload)[index : index + 1] for index in range(len(payload) + 3)]
    stream = MessageStream(Pieces(*dripped[:-1]))
    with pytest.raises(RemoteProtocolError, match="inside a frame"):
        run(stream.receive_frame(len(payload)))
    assert len(stream._pieces) <= 2
    assert bytes(run(MessageStream(Pieces(*dripped)).receive_frame(len(payload)))) == payload  # type: ignore[arg-type]
