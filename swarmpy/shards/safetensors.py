"""Safetensors headers: which tensors a file holds, and where; every claim is checked.

A file is an 8-byte little-endian length, a JSON object of that length, and the tensors' bytes. Only
the header is parsed and only the ranges asked for are read, so a shard costs its own tensors alone.
Spec: protocols/manifest.md, section 2; the format is Hugging Face's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from swarmpy.errors import ModelRefused
from swarmpy.shards.refusals import file_size, read_json

HEADER_BYTES_MAX = 32 * 1024 * 1024
"""Longest header; the format's own bound is 100 MB, but 100,000 tensors need only 12 MB."""

INDEX_BYTES_MAX = 64 * 1024 * 1024
"""Longest model.safetensors.index.json: one line a tensor; about 9 MB for 90,000 of them."""

TENSORS_MAX = 200_000
"""Tensors of one model; the largest mixtures of experts have about 90,000."""

FILES_MAX = 1000
"""Files one model is cut into; the largest published ones have about 200."""

DIMENSIONS_MAX = 8
"""Dimensions of a tensor."""

NAME_CHARACTERS_MAX = 512
"""Longest tensor name."""

INDEX_NAME = "model.safetensors.index.json"

ITEM_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
"""Bits of one element by dtype name; other dtypes are refused by name."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: `size_bytes` bytes from `offset` (of the file `path`), C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """A file's checked header. The tensors are in the order of their offsets."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


class FileRange(Protocol):
    """What `tensor_bytes` needs of an entry, safetensors or GGUF."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def offset(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check one file's header.

    Raises:
        ModelRefused: The file is missing or cut off, the header too long or malformed, a dtype
            unknown, a size not that of dtype and shape, or tensors overlap, leave gaps or pass
            the end.
    """
    size = file_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelRefused(
                    f"{path.name}: header of {length} bytes in a file of {size}; is it cut off?"
                )
            if length > HEADER_BYTES_MAX:
                raise ModelRefused(
                    f"{path.name}: header of {length} bytes exceeds {HEADER_BYTES_MAX}"
                )
            data = file.read(length)
    except OSError as error:
        raise ModelRefused(f"cannot read {path}: {error.strerror}") from error
    return parse_header(data, path=path, file_bytes=size)


def parse_header(data: bytes, *, path: Path, file_bytes: int) -> SafetensorsHeader:
    """Check a header's JSON (without the length before it) against the size of its file.

    Raises:
        ModelRefused: As for `read_header`.
    """
    try:
        header = json.loads(data, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{path.name}: header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelRefused(f"{path.name}: header is no JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # MLX writes null where it has none.
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelRefused(f"{path.name}: __metadata__ must map text to text")
    if len(header) > TENSORS_MAX:
        raise ModelRefused(f"{path.name}: {len(header)} tensors, at most {TENSORS_MAX}")
    start = 8 + len(data)
    tensors = [_entry(name, value, path, start) for name, value in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps another" if tensor.offset < end else "leaves a gap before it"
            raise ModelRefused(f"{path.name}: tensor {tensor.name!r} {kind}")
        end += tensor.size_bytes
    if end != file_bytes:
        raise ModelRefused(f"{path.name}: tensors end at byte {end} of {file_bytes}")
    return SafetensorsHeader(
        path=path, tensors={tensor.name: tensor for tensor in tensors}, metadata=metadata
    )


def read_folder(folder: Path) -> Mapping[str, TensorEntry]:
    """Read the headers of all of a model's files and return its tensors by name.

    Raises:
        ModelRefused: A file is malformed, a tensor is there twice or in another file than the index
            says, or a tensor of the index is missing.
    """
    tensors: dict[str, TensorEntry] = {}
    for path in tensor_files(folder):
        for name, entry in read_header(path).tensors.items():
            if name in tensors:
                raise ModelRefused(
                    f"tensor {name!r} is in {tensors[name].path.name} and in {path.name}"
                )
            tensors[name] = entry
    if len(tensors) > TENSORS_MAX:
        raise ModelRefused(f"{folder.name}: {len(tensors)} tensors, at most {TENSORS_MAX}")
    for name, file_name in _weight_map(folder).items():
        if name not in tensors or tensors[name].path.name != file_name:
            raise ModelRefused(f"tensor {name!r} is not in {file_name}, where {INDEX_NAME} says")
    return tensors


def tensor_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model: those its index names, else all in the folder.

    Raises:
        ModelRefused: There are none or too many, one is missing or not in the index, or a name
            leads out of the folder.
    """
    weight_map = _weight_map(folder)
    names = sorted(set(weight_map.values())) or sorted(
        path.name for path in folder.glob("*.safetensors") if not path.name.startswith(".")
    )
    if not names:
        raise ModelRefused(
            f"{folder} has no *.safetensors file", fix="Give the .gguf file itself if it is one."
        )
    if len(names) > FILES_MAX:
        raise ModelRefused(f"{folder.name}: {len(names)} safetensors files, at most {FILES_MAX}")
    for name in names:
        check_plain_name(name)
        if not name.endswith(".safetensors"):
            raise ModelRefused(f"{INDEX_NAME} names {name!r}, which is no *.safetensors file")
        file_size(folder / name)
    for path in sorted(folder.glob("model*.safetensors")):
        if path.name not in names:
            # Loaders that take every model*.safetensors would read weights nobody has verified.
            raise ModelRefused(f"{path.name} is not in {INDEX_NAME}; remove it from {folder}")
    return [folder / name for name in names]


def tensor_bytes(entry: FileRange) -> memoryview:
    """Read one tensor's bytes, and no other.

    They are read, not mapped: a file cut short meanwhile is an error here, not a bus error later.

    Raises:
        ModelRefused: The file cannot be read, or ends before the tensor does.
    """
    buffer = bytearray(entry.size_bytes)
    view, filled = memoryview(buffer), 0
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise ModelRefused(f"{entry.path.name} ends inside tensor {entry.name!r}")
                filled += count
    except OSError as error:
        raise ModelRefused(f"cannot read {entry.path}: {error.strerror}") from error
    return view.toreadonly()


def check_plain_name(name: str) -> None:
    """Refuse a file name that is more than a plain name: separators, "..", a leading dot or dash.

    Raises:
        ModelRefused: It is not plain.
    """
    if not _PLAIN_NAME.fullmatch(name):
        raise ModelRefused(f"{name!r:.80} is not a plain file name")


def _weight_map(folder: Path) -> dict[str, str]:
    """The index's file name by tensor name; empty where there is no index."""
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    weight_map = read_json(path, bytes_max=INDEX_BYTES_MAX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelRefused(f"{INDEX_NAME} has no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelRefused(f"{INDEX_NAME}: weight_map must map text to text")
    return weight_map


def _entry(name: str, value: object, path: Path, start: int) -> TensorEntry:
    """Check one tensor's description; `start` is where the file's tensor bytes begin."""
    where = f"{path.name}: tensor {name!r:.80}"
    if not 0 < len(name) <= NAME_CHARACTERS_MAX:
        raise ModelRefused(f"{where}: name of {len(name)} characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ModelRefused(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape = value["dtype"], _whole_numbers(value["shape"])
    offsets = _whole_numbers(value["data_offsets"])
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise ModelRefused(f"{where}: dtype {dtype!r:.40} is not one of {', '.join(ITEM_BITS)}")
    if shape is None or len(shape) > DIMENSIONS_MAX:
        raise ModelRefused(f"{where}: malformed shape")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelRefused(f"{where}: malformed data_offsets")
    size = ITEM_BITS[dtype] // 8
    for dimension in shape:
        size *= dimension
    if size != offsets[1] - offsets[0]:
        raise ModelRefused(
            f"{where}: {dtype} {list(shape)} needs {size} bytes, has {offsets[1] - offsets[0]}"
        )
    return TensorEntry(
        name=name, dtype=dtype, shape=shape, path=path, offset=start + offsets[0], size_bytes=size
    )


def _whole_numbers(value: object) -> tuple[int, ...] | None:
    """The value as a tuple if it is a list of integers from 0 to 2**63, else None."""
    if not isinstance(value, list):
        return None
    numbers = tuple(item for item in value if type(item) is int and 0 <= item < 1 << 63)
    return numbers if len(numbers) == len(value) else None


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Two parsers may choose differently between doubled keys; such a header is refused."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result
