"""GGUF headers, versions 2 and 3: metadata and where each tensor lies; every claim is checked.

GGUF readers have a history of overflows, so this one is plain Python with a bound on every count,
and native readers see a file only after it. Nothing but the header is read here; `dequantize` turns
the bytes of one tensor into numbers.
Spec: protocols/manifest.md, section 2; the format is ggml's.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from swarmpy.errors import ModelRefused
from swarmpy.shards.refusals import file_size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGIC = b"GGUF"

VERSIONS = frozenset({2, 3})
"""Version 1 is extinct; 3 is 2 with big-endian files allowed (refused here: no such models)."""

HEADER_BYTES_MAX = 64 * 1024 * 1024
"""Longest header. A vocabulary of 262 k tokens with merges and scores has about 16 MB."""

TENSORS_MAX = 200_000
"""As for safetensors."""

METADATA_MAX = 4096
"""Metadata keys; converters write 20 to 60."""

KEY_BYTES_MAX = 1024
"""Longest metadata key or tensor name; ggml itself cuts names at 64."""

STRING_BYTES_MAX = 1024 * 1024
"""Longest metadata string; the longest chat templates have about 20 KB."""

ITEMS_MAX = 4_000_000
"""Array items of one file in all: tokens, types, scores and merges of a large vocabulary: 1.3 M."""

NESTING_MAX = 2
"""Arrays of arrays exist in the format; nothing of llama.cpp's nests deeper than one."""

DIMENSIONS_MAX = 4
"""ggml's own bound."""

ALIGNMENT_MAX = 1 << 20
"""Largest alignment of tensor data; 32 is the default and nearly universal."""


class GgmlType(enum.IntEnum):
    """How a tensor's numbers are stored; the value is the one in the file.

    4, 5, 31 to 33 and 36 to 38 are formats that ggml has given up.
    """

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


BLOCKS: Mapping[GgmlType, tuple[int, int]] = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q8_1: (32, 36),
    GgmlType.Q2_K: (256, 84),
    GgmlType.Q3_K: (256, 110),
    GgmlType.Q4_K: (256, 144),
    GgmlType.Q5_K: (256, 176),
    GgmlType.Q6_K: (256, 210),
    GgmlType.Q8_K: (256, 292),
    GgmlType.IQ2_XXS: (256, 66),
    GgmlType.IQ2_XS: (256, 74),
    GgmlType.IQ3_XXS: (256, 98),
    GgmlType.IQ1_S: (256, 50),
    GgmlType.IQ4_NL: (32, 18),
    GgmlType.IQ3_S: (256, 110),
    GgmlType.IQ2_S: (256, 82),
    GgmlType.IQ4_XS: (256, 136),
    GgmlType.I8: (1, 1),
    GgmlType.I16: (1, 2),
    GgmlType.I32: (1, 4),
    GgmlType.I64: (1, 8),
    GgmlType.F64: (1, 8),
    GgmlType.IQ1_M: (256, 56),
    GgmlType.BF16: (1, 2),
    GgmlType.TQ1_0: (256, 54),
    GgmlType.TQ2_0: (256, 66),
    GgmlType.MXFP4: (32, 17),
    GgmlType.NVFP4: (64, 36),
    GgmlType.Q1_0: (128, 18),
    GgmlType.Q2_0: (64, 18),
}
"""Elements and bytes of one block, by type; tests hold them against the library's own."""

CONVERTIBLE = frozenset(
    {
        GgmlType.F32,
        GgmlType.F16,
        GgmlType.BF16,
        GgmlType.Q4_0,
        GgmlType.Q4_1,
        GgmlType.Q8_0,
    }
)
"""Types `dequantize` understands."""

MetadataValue = bool | int | float | str | tuple["MetadataValue", ...]

_ARRAY, _STRING, _BOOL = 9, 8, 7
_SCALARS: Mapping[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
"""By the file's value-type number."""

T = TypeVar("T", bool, int, float, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies: `size_bytes` bytes from `offset` (of the file `path`).

    `shape` is row-major like numpy's, (rows, columns): ggml's own order reversed.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    path: Path
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """A file's checked header. The tensors are in the file's order."""

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, GgufTensor]
    encoded: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Each metadata value as the file has it, its type first, but the tokenizer's, which are large
    and are never written again: `metadata` does not tell uint32 from int64."""
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    """Where the file has each metadata value, its type first: offset and bytes."""

    @property
    def architecture(self) -> str:
        """The model family's name, "llama"."""
        return self.text("general.architecture")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a metadata string; without a default a missing key is refused."""
        return self._value(key, str, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a metadata integer."""
        return self._value(key, int, default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a metadata number as float; an integer will do."""
        value = self.metadata.get(key)
        if type(value) is int:
            return float(value)
        return self._value(key, float, default)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return a metadata truth value."""
        return self._value(key, bool, default)

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Return a metadata array of strings."""
        return self._array(key, str, default)

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Return a metadata array of integers."""
        return self._array(key, int, default)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a metadata array of numbers as floats; integers will do."""
        value = self.metadata.get(key)
        if isinstance(value, tuple) and all(type(item) is int for item in value):
            return tuple(map(float, self.integers(key)))
        return self._array(key, float, None)

    def _value(self, key: str, kind: type[T], default: T | None) -> T:
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelRefused(f"{self.path.name} has no metadata {key!r}")
        if type(value) is not kind:
            raise self._mistyped(key, kind.__name__)
        return value

    def _array(self, key: str, kind: type[T], default: tuple[T, ...] | None) -> tuple[T, ...]:
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelRefused(f"{self.path.name} has no metadata {key!r}")
        if not isinstance(value, tuple):
            raise self._mistyped(key, f"array of {kind.__name__}")
        items = tuple(item for item in value if type(item) is kind)
        if len(items) != len(value):
            raise self._mistyped(key, f"array of {kind.__name__}")
        return items

    def _mistyped(self, key: str, expected: str) -> ModelRefused:
        came = type(self.metadata[key]).__name__
        return ModelRefused(f"{self.path.name}: metadata {key!r} is {came}, expected {expected}")


def read_header(path: Path) -> GgufHeader:
    """Read and check a file's header.

    Raises:
        ModelRefused: The file is missing or cut off, of another format or version, a count or
            length is beyond its bound, a type unknown, or tensors overlap or pass the end.
    """
    size = file_size(path)
    try:
        with path.open("rb") as file:
            return parse_header(file, path=path, file_bytes=size)
    except OSError as error:
        raise ModelRefused(f"cannot read {path}: {error.strerror}") from error


def parse_header(file: BinaryIO, *, path: Path, file_bytes: int) -> GgufHeader:
    """Parse the header at the start of a binary file of `file_bytes` bytes; `path` names it.

    Raises:
        ModelRefused: As for `read_header`.
    """
    cursor = _Cursor(file, path.name, min(file_bytes, HEADER_BYTES_MAX))
    if cursor.take(4) != MAGIC:
        raise ModelRefused(f"{path.name} is no GGUF file")
    version = cursor.number(4)
    if version not in VERSIONS:
        raise ModelRefused(f"{path.name}: GGUF version {version}, expected 2 or 3 (little-endian)")
    tensor_count = cursor.count("tensors", TENSORS_MAX)
    metadata, encoded, spans = _read_metadata(cursor)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= ALIGNMENT_MAX or alignment % 8:
        raise ModelRefused(f"{path.name}: alignment {alignment!r:.40} is no multiple of 8")
    described = [_read_tensor(cursor) for _ in range(tensor_count)]
    start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in described:
        if name in tensors:
            raise ModelRefused(f"{path.name}: tensor {name!r} is there twice")
        if offset % alignment:
            raise ModelRefused(f"{path.name}: tensor {name!r} is not aligned to {alignment}")
        tensors[name] = GgufTensor(
            name=name,
            type=kind,
            shape=shape,
            path=path,
            offset=start + offset,
            size_bytes=bytes_of(kind, shape),
        )
    _check_ranges(tensors, path.name, file_bytes)
    return GgufHeader(
        path=path,
        version=version,
        alignment=alignment,
        metadata=metadata,
        tensors=tensors,
        encoded=encoded,
        spans=spans,
    )


def bytes_of(kind: GgmlType, shape: tuple[int, ...]) -> int:
    """Bytes a tensor of this type and row-major shape has.

    Raises:
        ModelRefused: A row is no whole number of blocks.
    """
    items, size = BLOCKS[kind]
    columns = shape[-1] if shape else 1
    if columns % items:
        raise ModelRefused(f"{kind.name} rows are cut in blocks of {items}, a row has {columns}")
    return math.prod(shape) // items * size


def dequantize(
    raw: bytes | bytearray | memoryview, ggml_type: GgmlType, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Return a tensor's numbers as float32, exactly as ggml's reference defines them.

    Args:
        raw: The tensor's bytes in the file.
        ggml_type: One of `CONVERTIBLE`.
        shape: Row-major.

    Raises:
        ModelRefused: The type cannot be converted, or `raw` has another length than type and shape.
    """
    import numpy as np  # 0.1 s to import; a node reads headers without it.

    if ggml_type not in CONVERTIBLE:
        known = ", ".join(sorted(kind.name for kind in CONVERTIBLE))
        raise ModelRefused(f"{ggml_type.name} weights cannot be converted (only {known})")
    if len(raw) != bytes_of(ggml_type, shape):
        raise ModelRefused(f"{ggml_type.name} {shape} came with {len(raw)} bytes")
    match ggml_type:
        case GgmlType.F32:
            numbers = np.frombuffer(raw, "<f4").astype(np.float32)
        case GgmlType.F16:
            numbers = np.frombuffer(raw, "<f2").astype(np.float32)
        case GgmlType.BF16:
            numbers = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        case GgmlType.Q8_0:
            blocks = np.frombuffer(raw, np.dtype([("scale", "<f2"), ("items", "i1", 32)]))
            numbers = blocks["items"] * blocks["scale"].astype(np.float32)[:, None]
        case GgmlType.Q4_0:
            blocks = np.frombuffer(raw, np.dtype([("scale", "<f2"), ("items", "u1", 16)]))
            numbers = _unpack_nibbles(blocks["items"])
            numbers -= 8.0
            numbers *= blocks["scale"].astype(np.float32)[:, None]
        case _:
            blocks = np.frombuffer(
                raw, np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("items", "u1", 16)])
            )
            numbers = _unpack_nibbles(blocks["items"])
            numbers *= blocks["scale"].astype(np.float32)[:, None]
            numbers += blocks["minimum"].astype(np.float32)[:, None]
    return numbers.reshape(shape)


def _unpack_nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Bytes (n, 16) to their nibbles (n, 32): first all low halves, then all high ones."""
    import numpy as np

    numbers = np.empty((len(packed), 32), np.float32)
    numbers[:, :16] = packed & 0x0F
    numbers[:, 16:] = packed >> 4
    return numbers


class _Cursor:
    """Reads a header front to back, never past its bound."""

    def __init__(self, file: BinaryIO, name: str, bytes_max: int) -> None:
        self.name = name
        self.offset = 0
        self._file = file
        self._bytes_max = bytes_max
        self._items_left = ITEMS_MAX
        self._recent = bytearray()

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        if count > self._bytes_max - self.offset:
            raise ModelRefused(f"{self.name}: header is cut off, or longer than {HEADER_BYTES_MAX}")
        data = self._file.read(count)
        if len(data) != count:
            raise ModelRefused(f"{self.name}: the file was cut while it was read")
        self.offset += count
        self._recent += data
        return data

    def recent(self) -> bytes:
        """Return the bytes taken since the last call."""
        data = bytes(self._recent)
        self._recent.clear()
        return data

    def number(self, size: int) -> int:
        """Return the next unsigned integer of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def count(self, what: str, most: int) -> int:
        """Return the next 64-bit count, checked."""
        value = self.number(8)
        if value > most:
            raise ModelRefused(f"{self.name}: {value} {what}, at most {most} are accepted")
        return value

    def string(self, bytes_max: int) -> str:
        """Return the next string. Tokens may hold half a character; it becomes U+FFFD."""
        return self.take(self.count("bytes of text", bytes_max)).decode("utf-8", "replace")

    def value(self, kind: int, *, depth: int = 0) -> MetadataValue:
        """Return the next metadata value of a type."""
        if kind == _STRING:
            return self.string(STRING_BYTES_MAX)
        if kind == _ARRAY:
            return self._array(depth)
        form = _SCALARS.get(kind)
        if form is None:
            raise ModelRefused(f"{self.name}: metadata of unknown type {kind}")
        (value,) = form.unpack(self.take(form.size))
        return bool(value) if kind == _BOOL else value

    def _array(self, depth: int) -> tuple[MetadataValue, ...]:
        if depth >= NESTING_MAX:
            raise ModelRefused(f"{self.name}: arrays nested deeper than {NESTING_MAX}")
        kind = self.number(4)
        count = self.count("array items", self._items_left)
        self._items_left -= count
        form = _SCALARS.get(kind)
        if form is None:
            return tuple(self.value(kind, depth=depth + 1) for _ in range(count))
        values = struct.unpack(f"<{count}{form.format[-1]}", self.take(count * form.size))
        return tuple(map(bool, values)) if kind == _BOOL else values


def _read_metadata(
    cursor: _Cursor,
) -> tuple[dict[str, MetadataValue], dict[str, bytes], dict[str, tuple[int, int]]]:
    """Return the values by key, the bytes of each value, and where they lie."""
    metadata: dict[str, MetadataValue] = {}
    encoded: dict[str, bytes] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(cursor.count("metadata keys", METADATA_MAX)):
        key = cursor.string(KEY_BYTES_MAX)
        if key in metadata:
            raise ModelRefused(f"{cursor.name}: metadata {key!r:.80} is there twice")
        cursor.recent()
        begin = cursor.offset
        metadata[key] = cursor.value(cursor.number(4))
        spans[key] = (begin, cursor.offset - begin)
        raw = cursor.recent()
        if not key.startswith("tokenizer."):
            encoded[key] = raw
    return metadata, encoded, spans


def _read_tensor(cursor: _Cursor) -> tuple[str, GgmlType, tuple[int, ...], int]:
    """Return the next tensor's name, type, row-major shape and offset in the tensor data."""
    name = cursor.string(KEY_BYTES_MAX)
    dimensions = cursor.number(4)
    if dimensions > DIMENSIONS_MAX:
        raise ModelRefused(f"{cursor.name}: tensor {name!r:.80} has {dimensions} dimensions")
    shape = tuple(cursor.number(8) for _ in range(dimensions))[::-1]
    number = cursor.number(4)
    try:
        kind = GgmlType(number)
    except ValueError:
        raise ModelRefused(
            f"{cursor.name}: tensor {name!r:.80} has unknown type {number}"
        ) from None
    return name, kind, shape, cursor.number(8)


def _check_ranges(tensors: Mapping[str, GgufTensor], name: str, file_bytes: int) -> None:
    """Refuse tensors that overlap or pass the end of the file."""
    end = 0
    for tensor in sorted(tensors.values(), key=lambda item: (item.offset, item.size_bytes)):
        if tensor.offset < end:
            raise ModelRefused(f"{name}: tensor {tensor.name!r:.80} overlaps another")
        end = tensor.offset + tensor.size_bytes
        if end > file_bytes:
            raise ModelRefused(
                f"{name}: tensor {tensor.name!r:.80} ends at byte {end} of {file_bytes}"
            )
