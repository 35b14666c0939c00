"""Tiny random GGUF models of many architectures, as a converter would write them for llama.cpp.

The table gives metadata alone. llama.cpp says itself which tensors a model of that metadata has, by
name and shape; the file is written here, its weights from a seed, so it is the same on every run.
Metadata that llama.cpp does not like can end the process: `write_models` does it in a child.
"""

from __future__ import annotations

import ctypes
import math
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf_architectures import COMMON, MODELS, Value

from swarmpy.plugins.llama.library import Library, find_library, open_library
from swarmpy.plugins.llama.structs import ModelParams
from swarmpy.shards.gguf import BLOCKS, GgmlType

SEED = 7
ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a file has of a tensor; the shape is row-major, ggml's order reversed."""

    type: GgmlType
    shape: tuple[int, ...]
    raw: bytes


def write_models(folder: Path, names: Iterable[str] = MODELS) -> dict[str, Path]:
    """Write models to a folder, in a child process, and return their paths by name."""
    paths = {name: folder / f"{name}.gguf" for name in names}
    command = [sys.executable, __file__, str(folder), *paths]
    written = subprocess.run(command, capture_output=True, text=True, check=False)
    assert written.returncode == 0, written.stderr[-2000:]
    return paths


def metadata_of(name: str) -> dict[str, Value]:
    """Return a model's whole metadata."""
    architecture = name.partition("+")[0]
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "none",
    }
    for key, value in {**COMMON, **MODELS[name]}.items():
        metadata[key if key.startswith("xielu.") else f"{architecture}.{key}"] = value
    return metadata


def write_model(library: Library, path: Path, name: str) -> None:
    """Write one model; not outside a child that may be lost."""
    metadata, variant = metadata_of(name), name.partition("+")[2]
    write_gguf(path, metadata, {})
    shapes = wanted_tensors(library, path)
    if variant == "tied":
        del shapes["output.weight"]
    matrices = _MATRICES.get(variant, GgmlType.F16)
    tensors = {tensor: random_tensor(tensor, shapes[tensor], matrices) for tensor in shapes}
    write_gguf(path, metadata, tensors)


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, Tensor]) -> None:
    """Write a GGUF file of version 3."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(_text(key) + _typed(value) for key, value in metadata.items())
    body = bytearray()
    for name, tensor in tensors.items():
        sizes = tensor.shape[::-1]
        header += _text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        header += struct.pack("<IQ", tensor.type, len(body))
        body += _padded(tensor.raw)
    path.write_bytes(_padded(header) + body)


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % ALIGNMENT)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Value) -> bytes:
    """Return a metadata value behind its type: bool, u32 (i32 in arrays), f32, string, or array."""
    match value:
        case bool():
            return struct.pack("<IB", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
    items = [_typed(item) for item in value]
    kind = struct.pack("<I", 5) if type(value[0]) is int else items[0][:4]
    head = struct.pack("<I", 9) + kind + struct.pack("<Q", len(items))
    return head + b"".join(item[4:] for item in items)


class _GgufInit(ctypes.Structure):
    """`struct gguf_init_params`."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


_SetTensor = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


def wanted_tensors(library: Library, header: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors llama.cpp creates for a model of this metadata, optional ones included.

    Raises:
        ValueError: It makes no model of it; the message is llama.cpp's own.
    """
    native = library.native
    shapes: dict[str, tuple[int, ...]] = {}

    def note(tensor: int, _: object) -> None:
        sizes = struct.unpack("<4q", ctypes.string_at(tensor + 16, 32))
        assert math.prod(sizes) == native.ggml_nelements(ctypes.c_void_p(tensor))
        name = ctypes.string_at(native.ggml_get_name(tensor)).decode()
        if not name.endswith((".scale", ".input_scale")):  # Of quantised weights alone.
            shapes[name] = sizes[: native.ggml_n_dims(ctypes.c_void_p(tensor))][::-1]

    native.ggml_nelements.restype = ctypes.c_int64
    native.gguf_init_from_file.argtypes = [ctypes.c_char_p, _GgufInit]
    native.gguf_init_from_file.restype = ctypes.c_void_p
    create = native.llama_model_init_from_user
    create.argtypes = [ctypes.c_void_p, _SetTensor, ctypes.c_void_p, ModelParams]
    create.restype = ctypes.c_void_p
    gguf = native.gguf_init_from_file(str(header).encode(), _GgufInit(True, None))
    params = native.llama_model_default_params()
    params.load_mtp = True  # Else it wants some of those tensors, and asks for none.
    model = create(gguf, _SetTensor(note), None, params)
    if not model:
        raise ValueError(f"{header.stem}: {library.last_errors()}")
    native.llama_model_free(model)
    return shapes


_MATRICES = {
    "q4_0": GgmlType.Q4_0,
    "q4_k": GgmlType.Q4_K,
    "q6_k": GgmlType.Q6_K,
    "q8_0": GgmlType.Q8_0,
}
"""How a variant stores its matrices, where not as float16."""

_MATRIX_NAMES = ("attn_", "ffn_", "output.weight", "token_embd")
"""Of the matrices with other names llama.cpp wants some as float32, so all are."""


def random_tensor(name: str, shape: tuple[int, ...], matrices: GgmlType) -> Tensor:
    """Return a tensor's random values: the same for a name on every run, another for each name.

    Of a size with which states neither vanish nor explode, so that a wrong layer shows in logits.
    """
    random = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    part = name.split(".", 2)[2] if name.startswith("blk.") else name
    is_matrix = part.startswith(_MATRIX_NAMES) and part.endswith(".weight") and "_inp" not in part
    if is_matrix and len(shape) > 1 and "norm" not in part:
        if matrices != GgmlType.F16:
            return Tensor(matrices, shape, _random_blocks(random, matrices, shape))
        halves = random.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[-1]))
        return Tensor(GgmlType.F16, shape, halves.astype(np.float16).tobytes())
    values = random.standard_normal(shape, np.float32)
    if part == "ssm_a":
        values = -np.exp(values)  # A decay.
    else:
        values /= np.float32(8 if len(shape) == 1 else math.sqrt(shape[-1]))
    if part.startswith("rope_"):
        values = np.abs(values)  # Divisors.
    if part.startswith("rope_") or ("norm" in part and part.endswith(".weight")):
        values += np.float32(1)
    return Tensor(GgmlType.F32, shape, values.tobytes())


def _random_blocks(random: np.random.Generator, kind: GgmlType, shape: tuple[int, ...]) -> bytes:
    """Return random bytes, which all are quantised numbers, with scales for numbers of one size."""
    items, size = BLOCKS[kind]
    blocks = random.integers(0, 256, (math.prod(shape) // items, size), np.uint8)
    one = 1 / math.sqrt(shape[-1])
    match kind:
        case GgmlType.Q4_0:
            blocks[:, :2] = _half(one / 4.6)
        case GgmlType.Q8_0:
            blocks[:, :2] = _half(one / 74)
        case GgmlType.Q4_K:
            blocks[:, :4] = np.concatenate([_half(one / 200), _half(one / 200 * 7.5)])
        case _:
            blocks[:, -2:] = _half(one / 1350)
    return blocks.tobytes()


def _half(value: float) -> npt.NDArray[np.uint8]:
    return np.array([value], "<f2").view(np.uint8)


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    opened = open_library(find_library())
    for name in names:
        write_model(opened, Path(folder) / f"{name}.gguf", name)
