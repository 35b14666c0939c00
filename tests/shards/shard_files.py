"""Writes the small model files these tests read: safetensors, GGUF, folders, and wheels of them."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from swarmpy.shards.gguf import BLOCKS, GgmlType
from swarmpy.shards.sources import PackageModel

Value = bool | int | float | str | Sequence["Value"]


def safetensors_bytes(header: Mapping[str, object] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header, true or false."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> None:
    """A correct safetensors file of tensors given as dtype, shape and bytes."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += raw
    path.write_bytes(safetensors_bytes(header, data))


def write_model_folder(folder: Path, *, config: Mapping[str, object] | None = None) -> Path:
    """A folder in Hugging Face layout with one tensor of 12 numbers."""
    folder.mkdir(parents=True)
    stated = {"model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps({**stated, **(config or {})}))
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", {"a.weight": ("F32", (3, 4), bytes(48))})
    return folder


def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value: Value) -> bytes:
    """A metadata value behind its type: int64, float64, bool, string or an array of one of them."""
    kind, raw = _typed(value)
    return struct.pack("<I", kind) + raw


def _typed(value: Value) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<B", value)
    if isinstance(value, int):
        return 11, struct.pack("<q", value)
    if isinstance(value, float):
        return 12, struct.pack("<d", value)
    if isinstance(value, str):
        return 8, gguf_string(value)
    items = [_typed(item) for item in value]
    kind = items[0][0] if items else 4
    return 9, struct.pack("<IQ", kind, len(items)) + b"".join(raw for _, raw in items)


def gguf_tensor(name: str, kind: int, shape: Sequence[int], offset: int) -> bytes:
    """A tensor's description; `shape` is row-major."""
    dimensions = b"".join(struct.pack("<Q", size) for size in reversed(shape))
    head = gguf_string(name) + struct.pack("<I", len(shape)) + dimensions
    return head + struct.pack("<IQ", kind, offset)


def gguf_header(
    metadata: Mapping[str, Value] | Sequence[bytes],
    tensors: Sequence[bytes],
    *,
    version: int = 3,
    tensor_count: int | None = None,
    metadata_count: int | None = None,
) -> bytes:
    """A header of any parts, true or false."""
    if isinstance(metadata, Mapping):
        metadata = [gguf_string(key) + gguf_value(value) for key, value in metadata.items()]
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(metadata) if metadata_count is None else metadata_count,
    )
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*metadata, *tensors])


def gguf_bytes(
    metadata: Mapping[str, Value], tensors: Mapping[str, tuple[GgmlType, Sequence[int], bytes]]
) -> bytes:
    """A correct GGUF with the default alignment of 32 bytes."""
    described, data = [], b""
    for name, (kind, shape, raw) in tensors.items():
        described.append(gguf_tensor(name, kind, shape, len(data)))
        data += raw + bytes(-len(raw) % 32)
    header = gguf_header(metadata, described)
    return header + bytes(-len(header) % 32) + data


def zeros(kind: GgmlType, shape: Sequence[int]) -> tuple[GgmlType, Sequence[int], bytes]:
    """A tensor of zeros, for `gguf_bytes`."""
    items, size = BLOCKS[kind]
    return kind, shape, bytes(math.prod(shape) // items * size)


def byte_letters() -> list[str]:
    """The 256 printable characters that stand for the bytes in byte-level vocabularies, by byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def vocabulary(pre: str = "smollm") -> dict[str, Value]:
    """Metadata of a vocabulary: two special tokens, the bytes, and "hello" with its merges."""
    merged = ["he", "ll", "hell", "hello"]
    tokens = ["<|start|>", "<|end|>", *byte_letters(), *merged]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }


def llama_metadata() -> dict[str, Value]:
    """Metadata of a two-layer llama of width 64, two heads, one key head."""
    return {
        "general.architecture": "llama",
        "general.license": "apache-2.0",
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.rope.freq_base": 100000.0,
        **vocabulary(),
    }


def llama_tensors(
    kind: GgmlType = GgmlType.Q4_0,
) -> dict[str, tuple[GgmlType, Sequence[int], bytes]]:
    """Zeros for every tensor of that model."""
    shapes: dict[str, Sequence[int]] = {"token_embd.weight": (262, 64), "output_norm.weight": (64,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (64,),
            f"blk.{layer}.attn_q.weight": (64, 64),
            f"blk.{layer}.attn_k.weight": (32, 64),
            f"blk.{layer}.attn_v.weight": (32, 64),
            f"blk.{layer}.attn_output.weight": (64, 64),
            f"blk.{layer}.ffn_norm.weight": (64,),
            f"blk.{layer}.ffn_gate.weight": (96, 64),
            f"blk.{layer}.ffn_up.weight": (96, 64),
            f"blk.{layer}.ffn_down.weight": (64, 96),
        }
    return {
        name: zeros(GgmlType.F32 if len(shape) == 1 else kind, shape)
        for name, shape in shapes.items()
    }


def llama_gguf() -> bytes:
    """A whole tiny llama."""
    return gguf_bytes(llama_metadata(), llama_tensors())


def write_wheel(folder: Path, members: Mapping[str, bytes], *, version: str = "1.0") -> Path:
    """A wheel of the project "tiny-model" that holds `members`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tiny_model-{version}-py3-none-any.whl"
    info = f"tiny_model-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n"
    wheel = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    return path


def tiny_package(file: bytes, wheel: Path) -> PackageModel:
    """What our source would say of that wheel."""
    return PackageModel(
        name="tiny",
        display_name="Tiny (Q4_0)",
        project="tiny-model",
        version="1.0",
        wheel_bytes=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        file_bytes=len(file),
        sha256=hashlib.sha256(file).hexdigest(),
    )
