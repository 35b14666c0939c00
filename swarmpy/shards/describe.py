"""What a model's headers say about it, for people and planners; no tensor is read.

Everything a later load relies on is checked on the way: configuration, index, headers.
Spec: protocols/manifest.md, sections 2 and 3.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from swarmpy.errors import ModelRefused
from swarmpy.proto.wire import printable
from swarmpy.shards import gguf, safetensors
from swarmpy.shards.refusals import check_config, check_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A model's own words about itself; 0 or "" where it does not say."""

    architecture: str
    layer_count: int
    parameter_count: int
    context_max: int
    quantization: str
    """How most weights are stored: "Q4_1", "4-bit", "BF16"."""
    license: str


def describe(path: Path) -> Description:
    """Read and check the headers of the model at `path`, a folder or a GGUF. Blocks.

    Raises:
        ModelRefused: A header or configuration is malformed, or asks for what a model must not do.
    """
    return _describe_folder(path) if path.is_dir() else _describe_gguf(path)


def _describe_gguf(path: Path) -> Description:
    header = gguf.read_header(path)
    family = _architecture(header.architecture, path.name)
    if header.integer("split.count", 0) > 1:
        raise ModelRefused(f"{path.name} is one of several files; merge them first")
    sizes: Counter[str] = Counter()
    for tensor in header.tensors.values():
        sizes[tensor.type.name] += tensor.size_bytes
    layer_count = header.integer(f"{family}.block_count")
    context_max = header.integer(f"{family}.context_length", 0)
    sizes_stated = {"num_hidden_layers": layer_count, "max_position_embeddings": context_max}
    check_config(sizes_stated, where=path.name)
    return Description(
        architecture=family,
        layer_count=layer_count,
        parameter_count=sum(math.prod(tensor.shape) for tensor in header.tensors.values()),
        context_max=context_max,
        quantization=_widest(sizes),
        license=printable(header.text("general.license", "")[:100]),
    )


def _describe_folder(path: Path) -> Description:
    config = check_folder(path)
    tensors = safetensors.read_folder(path)
    text = config.get("text_config")
    inner: Mapping[str, object] = text if isinstance(text, dict) else config
    bits = _bits(config)
    sizes: Counter[str] = Counter()
    parameters = 0
    for name, tensor in tensors.items():
        sizes[tensor.dtype] += tensor.size_bytes
        prefix = name.removesuffix(".weight")
        if bits and tensor.dtype == "U32" and f"{prefix}.scales" in tensors:
            parameters += tensor.size_bytes * 8 // bits
        elif not (bits and name.endswith((".scales", ".biases"))):
            parameters += math.prod(tensor.shape)
    return Description(
        architecture=_architecture(config.get("model_type"), "config.json"),
        layer_count=_first_size(inner, "num_hidden_layers", "n_layers", "n_layer", "num_layers"),
        parameter_count=parameters,
        context_max=_first_size(inner, "max_position_embeddings", "n_positions", "max_seq_len"),
        quantization=f"{bits}-bit" if bits else _widest(sizes),
        license="",
    )


def _architecture(value: object, where: str) -> str:
    """A model family's name; it is used to find code and printed, so it must be a plain word."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
        return value
    raise ModelRefused(f"{where}: the architecture is {value!r:.80}, expected a plain word")


def _bits(config: Mapping[str, object]) -> int:
    """Bits a weight is packed in by MLX's quantisation, 0 where it is not."""
    quantization = config.get("quantization")
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    return bits if type(bits) is int and 0 < bits <= 8 else 0


def _first_size(config: Mapping[str, object], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if type(value) is int:
            return value
    return 0


def _widest(sizes: Counter[str]) -> str:
    """The kind that takes the most bytes; the first of them by name where two take the same."""
    return min(sizes, key=lambda kind: (-sizes[kind], kind), default="")
