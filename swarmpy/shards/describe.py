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
from swarmpy.shards.gguf import GgmlType
from swarmpy.shards.manifest import is_model_id
from swarmpy.shards.refusals import check_config, check_folder

DERIVED_FROM_KEY = "swarmpy.derived_from"
"""Metadata of a GGUF that was quantised here: the id of the model it was made from."""

FILE_TYPES: Mapping[int, tuple[str, GgmlType]] = {
    0: ("F32", GgmlType.F32),
    1: ("F16", GgmlType.F16),
    2: ("Q4_0", GgmlType.Q4_0),
    3: ("Q4_1", GgmlType.Q4_1),
    7: ("Q8_0", GgmlType.Q8_0),
    8: ("Q5_0", GgmlType.Q5_0),
    9: ("Q5_1", GgmlType.Q5_1),
    10: ("Q2_K", GgmlType.Q2_K),
    11: ("Q3_K_S", GgmlType.Q3_K),
    12: ("Q3_K_M", GgmlType.Q3_K),
    13: ("Q3_K_L", GgmlType.Q3_K),
    14: ("Q4_K_S", GgmlType.Q4_K),
    15: ("Q4_K_M", GgmlType.Q4_K),
    16: ("Q5_K_S", GgmlType.Q5_K),
    17: ("Q5_K_M", GgmlType.Q5_K),
    18: ("Q6_K", GgmlType.Q6_K),
    19: ("IQ2_XXS", GgmlType.IQ2_XXS),
    20: ("IQ2_XS", GgmlType.IQ2_XS),
    21: ("Q2_K_S", GgmlType.Q2_K),
    22: ("IQ3_XS", GgmlType.IQ3_S),
    23: ("IQ3_XXS", GgmlType.IQ3_XXS),
    24: ("IQ1_S", GgmlType.IQ1_S),
    25: ("IQ4_NL", GgmlType.IQ4_NL),
    26: ("IQ3_S", GgmlType.IQ3_S),
    27: ("IQ3_M", GgmlType.IQ3_S),
    28: ("IQ2_S", GgmlType.IQ2_XS),
    29: ("IQ2_M", GgmlType.IQ2_S),
    30: ("IQ4_XS", GgmlType.IQ4_XS),
    31: ("IQ1_M", GgmlType.IQ1_M),
    32: ("BF16", GgmlType.BF16),
    36: ("TQ1_0", GgmlType.TQ1_0),
    37: ("TQ2_0", GgmlType.TQ2_0),
    38: ("MXFP4_MOE", GgmlType.MXFP4),
    39: ("NVFP4", GgmlType.NVFP4),
    40: ("Q1_0", GgmlType.Q1_0),
    41: ("Q2_0", GgmlType.Q2_0),
}
"""By `general.file_type`: what people call such a file, and what most of it is meant to be."""

_UNQUANTIZED = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16})


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A model's own words about itself; 0 or "" where it does not say."""

    architecture: str
    layer_count: int
    parameter_count: int
    context_max: int
    quantization: str
    """How most weights are stored: "Q4_K_M", "4-bit", "BF16"."""
    license: str
    derived_from: str = ""
    """Id of the model that this one says it was quantised from."""


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
        quantization=_file_type(header, sizes),
        license=printable(header.text("general.license", "")[:100]),
        derived_from=_model_id(header.metadata.get(DERIVED_FROM_KEY)),
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


def _model_id(value: object) -> str:
    """A file's word for its origin, if it has the form of an id; nothing is concluded from it."""
    return value if isinstance(value, str) and is_model_id(value) else ""


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


def _file_type(header: gguf.GgufHeader, sizes: Counter[str]) -> str:
    """What the file says it is where its tensors bear that out, else their widest type.

    A mix as Q4_K_M may hold more bytes of other types: rows that are no whole blocks get another.
    """
    widest = _widest(sizes)
    name, kind = FILE_TYPES.get(header.integer("general.file_type", -1), ("", None))
    if kind is None or kind.name not in sizes or (kind in _UNQUANTIZED and kind.name != widest):
        return widest
    return name


def _widest(sizes: Counter[str]) -> str:
    """The kind that takes the most bytes; the first of them by name where two take the same."""
    return min(sizes, key=lambda kind: (-sizes[kind], kind), default="")
