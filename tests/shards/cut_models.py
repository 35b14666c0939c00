"""Small models to cut, and their cuts as our reader understands them."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from shard_files import Value, gguf_bytes

from swarmpy.shards.gguf import GgmlType, GgufHeader, GgufTensor, parse_header, read_header
from swarmpy.shards.gguf_cut import (
    GgufCut,
    cut_layers,
    write_cut,
)
from swarmpy.shards.safetensors import tensor_bytes

VOCABULARY, WIDTH = 40, 64

Tensors = dict[str, tuple[GgmlType, Sequence[int], bytes]]


def tensors(layers: int, *, is_tied: bool = False, vocabulary: int = VOCABULARY) -> Tensors:
    """Two tensors a layer and those of the whole model, no two of equal bytes."""
    shapes: dict[str, Sequence[int]] = {"token_embd.weight": (vocabulary, WIDTH)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.attn_norm.weight": (WIDTH,), f"blk.{layer}.ffn_up.weight": (3,)}
    shapes |= {"output_norm.weight": (WIDTH,), "rope_freqs.weight": (5,)}
    shapes |= {"position_embd.weight": (16, WIDTH)}
    if not is_tied:
        shapes |= {"output.weight": (vocabulary, WIDTH), "output.bias": (vocabulary,)}
    result = {}
    for number, (name, shape) in enumerate(shapes.items()):
        count = shape[0] * shape[-1] if len(shape) == 2 else shape[0]
        result[name] = (GgmlType.F32, shape, struct.pack("<f", number + 1) * count)
    return result


def metadata(layers: int, architecture: str = "llama", **own: Value) -> dict[str, Value]:
    keys = {key.replace("__", "."): value for key, value in own.items()}
    return {
        "general.architecture": architecture,
        "general.name": "a",
        f"{architecture}.block_count": layers,
        **{f"{architecture}.{key}": value for key, value in keys.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b"],
    }


def model(
    metadata: Mapping[str, Value], tensors: Tensors, path: Path = Path("x.gguf")
) -> GgufHeader:
    """The header of a model in memory, or in `path` where its folder is a real one."""
    data = gguf_bytes(metadata, tensors)
    if path.is_absolute():
        path.write_bytes(data)
    return parse_header(io.BytesIO(data), path=path, file_bytes=len(data))


def header_of(cut: GgufCut) -> GgufHeader:
    """A cut's header as our reader understands it."""
    return parse_header(io.BytesIO(cut.header), path=Path("cut.gguf"), file_bytes=cut.size_bytes)


def cut_metadata(
    layers: int, start: int, end: int, architecture: str = "llama", **own: Value
) -> GgufHeader:
    whole = model(metadata(layers, architecture, **own), tensors(layers))
    return header_of(cut_layers(whole, start, end))


def written(header: GgufHeader, start: int, end: int, target: Path) -> GgufHeader:
    write_cut(cut_layers(header, start, end), target)
    return read_header(target)


def raw(tensor: GgufTensor) -> bytes:
    return bytes(tensor_bytes(tensor))
