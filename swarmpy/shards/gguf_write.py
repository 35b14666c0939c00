"""Headers of GGUF files that are written here: metadata as encoded, tensors one after the other.

The format is ggml's; `swarmpy/shards/gguf.py` reads it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swarmpy.shards.gguf import MAGIC, GgmlType, bytes_of

ALIGNMENT = 32
"""Of tensors where the file does not say another: the format's default."""

UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
"""Value types, as the file has them before each value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaidOut:
    """A file's header, and where the data of each tensor goes, in the order they were given.

    `header` is padded to where tensor data begins; `offsets` are of the file. `size_bytes` is the
    whole file's size, the last tensor's padding included.
    """

    header: bytes
    offsets: tuple[int, ...]
    size_bytes: int


def lay_out(
    version: int,
    metadata: Mapping[str, bytes],
    tensors: Sequence[tuple[str, GgmlType, tuple[int, ...]]],
    *,
    alignment: int = ALIGNMENT,
) -> LaidOut:
    """Place tensors one after the other behind their header.

    Args:
        metadata: Encoded values by key, their type first.
        tensors: Name, type and row-major shape.

    Raises:
        ModelRefused: A tensor's rows are no whole number of its type's blocks.
    """
    parts = [MAGIC, struct.pack("<IQQ", version, len(tensors), len(metadata))]
    parts += [encoded_text(key) + encoded for key, encoded in metadata.items()]
    offsets, end = [], 0
    for name, kind, shape in tensors:
        sizes = shape[::-1]
        parts += [encoded_text(name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        parts.append(struct.pack("<IQ", kind, end))
        offsets.append(end)
        end = _aligned(end + bytes_of(kind, shape), alignment)
    described = b"".join(parts)
    start = _aligned(len(described), alignment)
    return LaidOut(
        header=described.ljust(start, b"\0"),
        offsets=tuple(start + offset for offset in offsets),
        size_bytes=start + end,
    )


def uint32_value(value: int) -> bytes:
    """Return a metadata value of type uint32."""
    return struct.pack("<II", UINT32, value)


def text_value(text: str) -> bytes:
    """Return a metadata value of type string."""
    return struct.pack("<I", STRING) + encoded_text(text)


def encoded_text(text: str) -> bytes:
    """Return a text as keys, names and string values have it: its length, then UTF-8."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
