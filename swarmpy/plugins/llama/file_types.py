"""Which type each tensor gets when a model is quantised to a file type, "q4_k_m" and the like.

A file type is a mixture: the head, and in some the value and down projections of some layers, get
more bits. These are llama.cpp's own choices without an importance matrix, so that a name means here
what it means in files from elsewhere; its quantiser itself is in no wheel.
Source: src/llama-quant.cpp and `enum llama_ftype` of llama.cpp 0.5.0 (MIT). Compared, tensor by
tensor and byte by byte, with what that release's `llama_model_quantize` writes: a tiny model of
each architecture that is run, to each of `TARGETS`; where rows are no whole blocks of 32 as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from swarmpy.errors import ConfigError
from swarmpy.shards.describe import FILE_TYPES
from swarmpy.shards.gguf import BLOCKS, GgmlType, GgufHeader, GgufTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FileType:
    """A mixture of tensor types."""

    name: str
    """As people call it: "Q4_K_M"."""
    number: int
    """`general.file_type` in the file, llama.cpp's `llama_ftype`."""
    type: GgmlType
    """Of most matrices."""

    @property
    def is_more_for_some(self) -> bool:
        """Whether the value and down projections of a half of the layers get more bits."""
        return self.name.endswith("_M")

    @property
    def is_more_for_first(self) -> bool:
        """Whether those of the first layers do; of this kind llama.cpp knows one."""
        return self.name == "Q4_K_S"


TARGETS = (
    "Q4_0",
    "Q4_1",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_0",
    "Q5_1",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
)
"""What a model can be quantised to, from small to large. Smaller ones lose much without an
importance matrix, which needs a text to be run through the original first."""

_FALLBACKS: Mapping[GgmlType, GgmlType] = {
    GgmlType.Q4_K: GgmlType.Q5_0,
    GgmlType.Q5_K: GgmlType.Q5_1,
    GgmlType.Q6_K: GgmlType.Q8_0,
}
"""For rows that are no whole number of blocks of 256; where they are none of 32 either, F16."""

_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
)
"""Parts of names of matrices that are small and sensitive, and stay as they are."""

_KEPT_WHOLE = frozenset({"position_embd.weight", "token_types.weight"})

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
"""They get the head's type where a model has no head apart."""

_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
"""The projections that bear the least; others that are in one with the values count as these."""

_SEVENTY_BILLION = frozenset({"deci", "llama", "olmo", "qwen2"})
"""Architectures whose models of 80 layers llama.cpp takes for 70 B: eight heads share one value, so
more bits for these cost next to nothing."""

_LAYER = re.compile(r"blk\.([0-9]+)\.")


def file_type(name: str) -> FileType:
    """Return one of `TARGETS` by its name, in any case.

    Raises:
        ConfigError: There is none of this name; the fix lists them.
    """
    for number, (known, kind) in FILE_TYPES.items():
        if known == name.upper() and known in TARGETS:
            return FileType(name=known, number=number, type=kind)
    raise ConfigError(
        f"no model can be quantised to {name!r:.40}",
        fix=f"Use one of {', '.join(TARGETS).lower()}.",
    )


def tensor_types(header: GgufHeader, target: FileType) -> dict[str, GgmlType]:
    """Return the type of each tensor of a model once it is quantised, in the file's order."""
    chosen = {tensor.name: kind for tensor, kind in _chosen(header, target)}
    return {
        tensor.name: _fitting(chosen[tensor.name], tensor) if tensor.name in chosen else tensor.type
        for tensor in header.tensors.values()
    }


def _chosen(header: GgufHeader, target: FileType) -> Iterator[tuple[GgufTensor, GgmlType]]:
    """Yield the tensors that are quantised, and the types they would have by their place alone."""
    tensors = sorted(filter(_is_quantised, header.tensors.values()), key=_place)
    values = [tensor.name for tensor in tensors if _has(tensor, *_VALUES)]
    downs = [tensor.name for tensor in tensors if _has(tensor, "ffn_down")]
    family = header.architecture
    is_falcon = family == "falcon"
    layers = header.integer(f"{family}.block_count")
    experts = header.integer(f"{family}.expert_count", 0)
    heads = ("output.weight",) if "output.weight" in header.tensors else _EMBEDDINGS
    for tensor in tensors:
        kind = target.type
        if tensor.name in heads:
            kind = GgmlType.Q8_0 if is_falcon else _head_type(tensor, kind)
        elif _has(tensor, *_VALUES):
            index = values.index(tensor.name)
            kind = _more(target, index, of=len(values), first=4)
            if kind is GgmlType.Q4_K and _is_70b(header, layers):
                kind = GgmlType.Q5_K
            if experts == 8:
                kind = GgmlType.Q8_0
        elif _has(tensor, "attn_k.weight") and experts == 8:
            kind = GgmlType.Q8_0
        elif _has(tensor, "attn_output.weight") and experts == 8 and kind is GgmlType.Q4_K:
            kind = GgmlType.Q5_K
        elif _has(tensor, "ffn_down"):
            index = _place(tensor)[0] if experts > 1 else downs.index(tensor.name)
            if is_falcon and kind is GgmlType.Q4_K:
                kind = _falcon_down(target, index, of=layers)
            else:
                kind = _more(target, index, of=layers, first=layers // 8)
        yield tensor, kind


def _more(target: FileType, index: int, *, of: int, first: int) -> GgmlType:
    """Return the type of one of a kind of projection, by its number among `of`."""
    if target.is_more_for_some and _is_chosen(index, of):
        return GgmlType.Q6_K
    if target.is_more_for_first and index < first:
        return GgmlType.Q5_K
    return target.type


def _falcon_down(target: FileType, index: int, *, of: int) -> GgmlType:
    """Return the type of one of falcon's down projections, which bear less in fewer layers."""
    if not target.is_more_for_some:
        return target.type
    if index < of // 16:
        return GgmlType.Q6_K
    return GgmlType.Q5_K if _is_chosen(index, of) else target.type


def _is_chosen(index: int, of: int) -> bool:
    """Whether a layer is one of the first or last eighth, or a third one between."""
    eighth = of // 8
    return index < eighth or index >= 7 * of // 8 or (index - eighth) % 3 == 2


def _head_type(tensor: GgufTensor, kind: GgmlType) -> GgmlType:
    """Return the type of what gives the logits: never less than Q6_K."""
    if kind is GgmlType.Q8_0 or tensor.shape[-1] % BLOCKS[kind][0]:
        return GgmlType.Q8_0
    return GgmlType.Q6_K


def _fitting(kind: GgmlType, tensor: GgufTensor) -> GgmlType:
    """Return the type, or one like it of which the tensor's rows are whole blocks."""
    columns = tensor.shape[-1]
    if columns % BLOCKS[kind][0]:
        kind = _FALLBACKS.get(kind, kind)
    return GgmlType.F16 if columns % BLOCKS[kind][0] else kind


def _is_quantised(tensor: GgufTensor) -> bool:
    """Whether it is a matrix of weights, or several."""
    is_matrix = math.prod(tensor.shape[:-1]) > 1
    is_weight = tensor.name.endswith("weight") and not _has(tensor, *_KEPT)
    return is_matrix and is_weight and tensor.name not in _KEPT_WHOLE


def _has(tensor: GgufTensor, *parts: str) -> bool:
    return any(part in tensor.name for part in parts)


def _place(tensor: GgufTensor) -> tuple[int, str]:
    """A tensor's layer, -1 for the whole model's, and its name: the order in which they count."""
    match = _LAYER.match(tensor.name)
    return (int(match[1]) if match else -1), tensor.name


def _is_70b(header: GgufHeader, layers: int) -> bool:
    family = header.architecture
    if family not in _SEVENTY_BILLION or layers != 80:
        return False
    heads, kv_heads = (header.metadata.get(f"{family}.attention.{key}") for key in _HEAD_COUNTS)
    return family != "llama" or (kv_heads is not None and heads != kv_heads)


_HEAD_COUNTS = ("head_count", "head_count_kv")
