"""What a node and its engine's child process say to each other, and how it is framed.

Sans-IO. Both ends treat the other like a peer: every frame is bounded before it is read, every
message decoded strictly. Spec: protocols/engine.md (revision 1).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from swarmpy.errors import BadMessage, FrameTooLarge
from swarmpy.proto import wire
from swarmpy.proto.tensor import Tensor, TensorSpec, WireSpec

PAYLOAD_BYTES_MAX = 256 * 1024 * 1024
"""Most tensor bytes of one frame: the exported state of one 4,096-token slot of a 30-layer model is
190 MB; larger states are exported in ranges of positions."""

ROWS_MAX = 256
"""Rows of one step: as many as a stage knows sessions."""

LAYERS_MAX = 1024
"""Layers of a model; the deepest published ones have 126."""

STATE_TENSORS_MAX = 4 * LAYERS_MAX
"""Tensors of an exported state: up to four a layer."""

PREFIX = struct.Struct("<II")
"""Bytes of the message and bytes of the tensors behind it."""

SCRATCH_BYTES = 64 * 1024
"""Frames up to this are read in one go; a decode step's have 3 KB, a prefill chunk's 150 KB."""

MAPPED_BYTES_MIN = 1024 * 1024
"""Frames from this size are read into mapped memory: what a prefix announces costs nothing before
it comes. Smaller ones are not worth two system calls."""

Frame = tuple[memoryview, memoryview]
"""A message's bytes, and those of the tensors behind it."""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Index = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
PathText = Annotated[str, msgspec.Meta(max_length=8192)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
PerLayer = Annotated[tuple[Count, ...], msgspec.Meta(max_length=LAYERS_MAX)]
StepSpecs = Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=ROWS_MAX * 17)]
StateSpecs = Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=STATE_TENSORS_MAX)]
StateNames = Annotated[tuple[Name, ...], msgspec.Meta(max_length=STATE_TENSORS_MAX)]


class RowHeader(msgspec.Struct, frozen=True, array_like=True):
    """One row of a step; its tensors follow in order: token ids if any, then hidden state."""

    slot: Index
    position: Index
    count: Index
    has_token_ids: bool
    hidden_count: Annotated[int, msgspec.Meta(ge=0, le=16)]
    want: Literal["nothing", "hidden", "last_logits", "all_logits"]


class OutputHeader(msgspec.Struct, frozen=True, array_like=True):
    """What one row gave; its tensors follow in order: hidden state, then logits."""

    slot: Index
    hidden_count: Annotated[int, msgspec.Meta(ge=0, le=16)]
    has_logits: bool
    error: Text


class Inspect(msgspec.Struct, frozen=True, tag="inspect"):
    """Node to child: read a model's headers. Answer: `Inspected`."""

    id: Count
    path: PathText


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Node to child: load layers [start, end). Answers: some `Progressed`, then `Loaded`."""

    id: Count
    path: PathText
    start: Index
    end: Index
    slots: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    context: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    exact: bool
    threads: Annotated[int, msgspec.Meta(ge=1, le=4096)]


class Step(msgspec.Struct, frozen=True, tag="step"):
    """Node to child: run rows. Answer: `Stepped`."""

    id: Count
    rows: Annotated[tuple[RowHeader, ...], msgspec.Meta(max_length=ROWS_MAX)]
    tensors: StepSpecs


class Truncate(msgspec.Struct, frozen=True, tag="truncate"):
    """Node to child: forget a slot's state from a position on. Answer: `Done`."""

    id: Count
    slot: Index
    position: Index


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot"):
    """Node to child: keep a slot's present state. Answer: `Snapshotted`."""

    id: Count
    slot: Index


class Restore(msgspec.Struct, frozen=True, tag="restore"):
    """Node to child: return a slot to a snapshot and forget it. Answer: `Done`."""

    id: Count
    slot: Index
    snapshot: Index


class Export(msgspec.Struct, frozen=True, tag="export"):
    """Node to child: give the state of positions [start, end). Answer: `Exported`."""

    id: Count
    slot: Index
    start: Index
    end: Index


class Import(msgspec.Struct, frozen=True, tag="import"):
    """Node to child: put an exported state into a slot. Answer: `Done`."""

    id: Count
    slot: Index
    start: Index
    end: Index
    names: StateNames
    tensors: StateSpecs


class Free(msgspec.Struct, frozen=True, tag="free"):
    """Node to child: forget everything a slot holds. Answer: `Done`."""

    id: Count
    slot: Index


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    """Node to child: release the shard. Answer: `Done`."""

    id: Count


class Inspected(msgspec.Struct, frozen=True, tag="inspected"):
    """Child to node: `swarmpy.abc.Inspection`, field by field."""

    id: Count
    engine: Name
    build_id: Text
    architecture: Name
    layer_count: Annotated[int, msgspec.Meta(ge=1, le=LAYERS_MAX)]
    hidden_size: Count
    vocabulary_size: Count
    context_max: Count
    cuts: PerLayer
    wire_specs: Annotated[dict[Index, WireSpec], msgspec.Meta(max_length=LAYERS_MAX)]
    token_layers: PerLayer
    layer_weight_bytes: PerLayer
    embedding_weight_bytes: Count
    head_weight_bytes: Count
    is_tied: bool
    kv_bytes_per_token: PerLayer
    state_bytes: PerLayer
    state_kind: Literal["kv", "rolling", "recurrent"]
    slots_max: Count
    head_cost_layers: Annotated[float, msgspec.Meta(ge=0)]


class Progressed(msgspec.Struct, frozen=True, tag="progressed"):
    """Child to node: how far a load is."""

    id: Count
    step: Name
    done: Count
    total: Count


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """Child to node: the shard is in memory; `received` and `sent` are its two wire specs."""

    id: Count
    weight_bytes: Count
    exactness: Text
    received: WireSpec
    sent: WireSpec
    vocabulary_size: Count
    """Width of the logits; 0 where the shard is not the last."""


class Stepped(msgspec.Struct, frozen=True, tag="stepped"):
    """Child to node: one output a row, and the seconds spent inside the engine's step."""

    id: Count
    outputs: Annotated[tuple[OutputHeader, ...], msgspec.Meta(max_length=ROWS_MAX)]
    tensors: StepSpecs
    engine_s: Annotated[float, msgspec.Meta(ge=0)]


class Snapshotted(msgspec.Struct, frozen=True, tag="snapshotted"):
    """Child to node: the snapshot's number."""

    id: Count
    snapshot: Index


class Exported(msgspec.Struct, frozen=True, tag="exported"):
    """Child to node: a slot's state as named tensors."""

    id: Count
    names: StateNames
    tensors: StateSpecs


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Child to node: it is done, and there is nothing to tell."""

    id: Count


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Child to node: the request failed, with one of our error classes by name and its message."""

    id: Count
    error: Literal[
        "ModelRefused", "ModelNotFound", "DoesNotFit", "RowError", "EngineLost", "ConfigError"
    ]
    message: Text


Request = Inspect | Load | Step | Truncate | Snapshot | Restore | Export | Import | Free | Unload
"""What a node sends."""

Reply = Inspected | Progressed | Loaded | Stepped | Snapshotted | Exported | Done | Failed
"""What a child sends."""


def encode_frame(
    message: msgspec.Struct, tensors: Sequence[Tensor] = ()
) -> list[bytes | memoryview]:
    """Return the buffers of one frame: prefix and message, then each tensor's bytes, uncopied.

    Raises:
        FrameTooLarge: The message or the tensors are beyond their bounds.
    """
    head = wire.encode(message)
    size = sum(len(tensor.data) for tensor in tensors)
    _check_sizes(len(head), size)
    return [PREFIX.pack(len(head), size) + head, *(tensor.data for tensor in tensors)]


def decode_request(data: memoryview) -> Request:
    """Decode what a node sent.

    Raises:
        BadMessage: It is no request.
    """
    # A union of types decodes like a type; typing has no name for that.
    request: Request = wire.decode(data, Request)  # type: ignore[arg-type]
    return request


def decode_reply(data: memoryview) -> Reply:
    """Decode what a child sent.

    Raises:
        BadMessage: It is no reply.
    """
    reply: Reply = wire.decode(data, Reply)  # type: ignore[arg-type]
    return reply


class FrameReader:
    """Assembles frames from bytes as they arrive.

    Read into `wanted`, then tell `received`. Small frames are read in one go with their lengths and
    copied once; a large one gets its own buffer, which is read into.
    """

    def __init__(self) -> None:
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._held = 0  # bytes of a frame's beginning in the scratch buffer
        self._body: memoryview | None = None  # of a large frame under way
        self._filled = 0
        self._head_bytes = 0

    @property
    def wanted(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._body is not None:
            return self._body[self._filled :]
        return self._scratch[self._held :]

    def received(self, count: int) -> list[Frame]:
        """Tell that `count` bytes were read into `wanted`.

        Returns:
            The frames that are complete now: message and payload of each.

        Raises:
            FrameTooLarge: A prefix announces more than the bounds.
            BadMessage: A prefix announces an empty message.
        """
        if self._body is not None:
            self._filled += count
            if self._filled < len(self._body):
                return []
            whole, self._body = self._body.toreadonly(), None
            return [(whole[: self._head_bytes], whole[self._head_bytes :])]
        frames: list[Frame] = []
        start, end = 0, self._held + count
        while end - start >= PREFIX.size:
            head_bytes, payload_bytes = PREFIX.unpack_from(self._scratch, start)
            _check_sizes(head_bytes, payload_bytes)
            body = start + PREFIX.size
            following = body + head_bytes + payload_bytes
            if following > end:
                if following - start > SCRATCH_BYTES:
                    self._begin_large(head_bytes, payload_bytes, self._scratch[body:end])
                    start = end
                break
            whole = memoryview(bytes(self._scratch[body:following]))
            frames.append((whole[:head_bytes], whole[head_bytes:]))
            start = following
        if start:
            self._scratch[: end - start] = bytes(self._scratch[start:end])
        self._held = end - start
        return frames

    def _begin_large(self, head_bytes: int, payload_bytes: int, begun: memoryview) -> None:
        self._head_bytes = head_bytes
        size = head_bytes + payload_bytes
        is_small = size < MAPPED_BYTES_MIN
        self._body = memoryview(bytearray(size) if is_small else mmap.mmap(-1, size))
        self._filled = len(begun)
        self._body[: len(begun)] = begun


def _check_sizes(head_bytes: int, payload_bytes: int) -> None:
    if head_bytes == 0:
        raise BadMessage("frame with an empty message")
    if head_bytes > wire.MESSAGE_BYTES_MAX:
        raise FrameTooLarge(f"message of {head_bytes} bytes exceeds {wire.MESSAGE_BYTES_MAX}")
    if payload_bytes > PAYLOAD_BYTES_MAX:
        raise FrameTooLarge(f"tensors of {payload_bytes} bytes exceed {PAYLOAD_BYTES_MAX}")
