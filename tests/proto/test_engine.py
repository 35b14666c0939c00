"""Frames between a node and its engine's child: any bytes make a frame or a named error."""

from __future__ import annotations

import struct

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, FrameTooLarge
from swarmpy.proto import engine, wire
from swarmpy.proto.tensor import Tensor, split


def read_frames(data: bytes, piece_bytes: int = 1 << 30) -> list[tuple[bytes, bytes]]:
    """Read frames as they would come in over a pipe, at most `piece_bytes` at a time."""
    reader = engine.FrameReader()
    frames = []
    rest = memoryview(data)
    while rest:
        count = min(len(reader.wanted), len(rest), piece_bytes)
        reader.wanted[:count] = rest[:count]
        rest = rest[count:]
        frames += [(bytes(head), bytes(payload)) for head, payload in reader.received(count)]
    return frames


def joined(message: engine.Request | engine.Reply, tensors: list[Tensor]) -> bytes:
    return b"".join(engine.encode_frame(message, tensors))


def test_a_step_survives_the_pipe() -> None:
    row = engine.RowHeader(2, 64, 1, True, 1, "hidden")
    tensors = [Tensor("int32", (1,), b"\x07\0\0\0"), Tensor("float32", (1, 2), bytes(8))]
    step = engine.Step(id=5, rows=(row,), tensors=tuple(tensor.spec for tensor in tensors))

    [(head, payload)] = read_frames(joined(step, tensors))

    decoded = engine.decode_request(memoryview(head))
    assert decoded == step
    assert split(step.tensors, memoryview(payload)) == tuple(tensors)


def test_frames_behind_each_other_are_told_apart() -> None:
    frees = [engine.Free(id=number, slot=0) for number in range(3)]

    frames = read_frames(b"".join(joined(free, []) for free in frees))

    assert [engine.decode_request(memoryview(head)) for head, _ in frames] == frees


def test_what_a_prefix_announces_costs_no_memory_before_it_comes() -> None:
    reader = engine.FrameReader()
    prefix = struct.pack("<II", 10, engine.PAYLOAD_BYTES_MAX)
    reader.wanted[: len(prefix)] = prefix
    process = psutil.Process()
    before = process.memory_info().rss

    assert reader.received(len(prefix)) == []

    assert len(reader.wanted) == engine.PAYLOAD_BYTES_MAX + 10
    assert process.memory_info().rss - before < engine.PAYLOAD_BYTES_MAX // 8


def test_a_large_frame_comes_whole() -> None:
    payload = bytes(range(256)) * (engine.MAPPED_BYTES_MIN // 256)

    frames = read_frames(
        joined(engine.Done(id=1), [Tensor("uint8", (len(payload),), payload)]), 50_000
    )

    assert [taken for _, taken in frames] == [payload]


@given(
    st.lists(st.sampled_from([0, 1, 5000, engine.SCRATCH_BYTES, 200_000]), max_size=6),
    st.integers(1, 2 * engine.SCRATCH_BYTES),
)
def test_any_frames_in_pieces_of_any_size_come_out_whole(sizes: list[int], piece: int) -> None:
    piece = max(piece, sum(sizes) // 1000)
    done = engine.Done(id=1)
    payloads = [bytes([index + 1]) * size for index, size in enumerate(sizes)]
    data = b"".join(
        joined(done, [Tensor("uint8", (len(payload),), payload)]) for payload in payloads
    )

    assert read_frames(data, piece) == [(wire.encode(done), payload) for payload in payloads]


def test_a_reply_is_no_request() -> None:
    with pytest.raises(BadMessage):
        engine.decode_request(memoryview(wire.encode(engine.Done(id=1))))


def test_a_request_is_no_reply() -> None:
    with pytest.raises(BadMessage):
        engine.decode_reply(memoryview(wire.encode(engine.Free(id=1, slot=0))))


@pytest.mark.parametrize(
    ("head_bytes", "payload_bytes", "error"),
    [
        (0, 0, BadMessage),
        (wire.MESSAGE_BYTES_MAX + 1, 0, FrameTooLarge),
        (1, engine.PAYLOAD_BYTES_MAX + 1, FrameTooLarge),
    ],
)
def test_a_frame_beyond_its_bounds_is_refused_before_it_is_read(
    head_bytes: int, payload_bytes: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        read_frames(engine.PREFIX.pack(head_bytes, payload_bytes))


def test_tensors_beyond_the_bound_are_not_sent() -> None:
    huge = Tensor("uint8", (1,), memoryview(bytes(1)))
    one_too_many = [Tensor("uint8", (1,), memoryview(bytes(1024 * 1024)))] * 257

    with pytest.raises(FrameTooLarge):
        engine.encode_frame(engine.Free(id=1, slot=0), [huge, *one_too_many])


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_a_named_error(data: bytes) -> None:
    try:
        for head, _ in read_frames(data):
            engine.decode_request(memoryview(head))
    except (BadMessage, FrameTooLarge):
        pass


@given(st.binary(max_size=200))
def test_any_message_bytes_are_a_reply_or_bad(data: bytes) -> None:
    try:
        engine.decode_reply(memoryview(data))
    except BadMessage:
        pass
