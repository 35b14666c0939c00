"""Tensors on the wire: raw little-endian bytes, with dtype and shape declared and checked.

Sans-IO, and free of numpy: what crosses a link is bytes; engines make arrays of them.
Spec: protocols/tensor.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from swarmpy.errors import BadMessage, FrameTooLarge

DType = Literal["float32", "float16", "bfloat16", "int32", "uint32", "int8", "uint8", "bool"]

ITEM_BYTES: dict[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}

DIMENSIONS_MAX = 6
"""Most dimensions of a tensor; mlx-lm's layer outputs have at most five."""

TENSORS_MAX = 16
"""Most tensors between two layers; the widest architecture tried ships four."""

TENSOR_BYTES_MAX = 32 * 1024 * 1024
"""Largest tensor in one frame: 64 tokens of width 16,384 in float32 are 4 MiB, eight times less."""

Dimension = Annotated[int, msgspec.Meta(ge=-1, le=1 << 30)]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """What one tensor between two layers must look like; -1 stands for the row's token count."""

    dtype: DType
    shape: Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=DIMENSIONS_MAX)]


WireSpec = Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=TENSORS_MAX)]
"""The tensors that cross one cut between two layers, in order."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Raw little-endian bytes with a dtype and a shape, C order. `data` is never copied here."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)


Hidden = tuple[Tensor, ...]
"""The state of one row between two layers: usually one tensor (T, D) in the wire dtype."""


def bytes_of(dtype: DType, shape: Sequence[int]) -> int:
    """Bytes a tensor of this dtype and shape has.

    Raises:
        FrameTooLarge: More than `TENSOR_BYTES_MAX`.
        BadMessage: A dimension is negative.
    """
    size = ITEM_BYTES[dtype]
    for dimension in shape:
        if dimension < 0:
            raise BadMessage(f"shape {tuple(shape)} has a negative dimension")
        size *= dimension
        if size > TENSOR_BYTES_MAX:
            raise FrameTooLarge(f"tensor {dtype} {tuple(shape)} exceeds {TENSOR_BYTES_MAX} bytes")
    return size


def check_hidden(hidden: Hidden, spec: tuple[TensorSpec, ...], *, count: int) -> None:
    """Check received tensors against the cut's wire spec for `count` tokens.

    Finiteness is the caller's: it needs arrays, and this module has none.

    Raises:
        BadMessage: Another number of tensors, dtype, shape or length than agreed.
    """
    if len(hidden) != len(spec):
        raise BadMessage(f"{len(hidden)} tensors at a cut that carries {len(spec)}")
    for tensor, expected in zip(hidden, spec, strict=True):
        shape = tuple(count if size == -1 else size for size in expected.shape)
        if tensor.dtype != expected.dtype or tensor.shape != shape:
            raise BadMessage(
                f"tensor {tensor.dtype} {tensor.shape}, expected {expected.dtype} {shape}"
            )
        if len(tensor.data) != bytes_of(tensor.dtype, tensor.shape):
            raise BadMessage(f"tensor {tensor.shape} came with {len(tensor.data)} bytes")


def split(specs: Sequence[TensorSpec], payload: memoryview) -> Hidden:
    """Cut a frame's payload into the tensors its header declared, without copying.

    Raises:
        BadMessage: The declared sizes do not add up to the payload.
        FrameTooLarge: A declared tensor is beyond its bound.
    """
    tensors: list[Tensor] = []
    offset = 0
    for spec in specs:
        size = bytes_of(spec.dtype, spec.shape)
        tensors.append(Tensor(spec.dtype, spec.shape, payload[offset : offset + size]))
        offset += size
    if offset != len(payload):
        raise BadMessage(f"tensors of {offset} bytes declared, {len(payload)} came")
    return tuple(tensors)
