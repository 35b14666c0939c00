"""What a GGUF's header says about a model, in the engine contract's terms. Reads nothing else."""

from __future__ import annotations

import re

from swarmpy.abc import Inspection, StateKind
from swarmpy.errors import ModelRefused
from swarmpy.plugins.llama.architectures import architecture_of
from swarmpy.plugins.llama.structs import SEQUENCES_MAX
from swarmpy.proto.tensor import TensorSpec
from swarmpy.shards.gguf import GgufHeader
from swarmpy.shards.gguf_cut import layer_count
from swarmpy.shards.refusals import check_config

_LAYER = re.compile(r"blk\.([0-9]+)\.")

_HALF_BYTES, _FLOAT_BYTES = 2, 4
"""Keys and values are kept as float16, recurrent states as float32."""


def inspect_header(header: GgufHeader, *, build_id: str) -> Inspection:
    """Describe a model to planners.

    Raises:
        ModelRefused: An architecture that is not run, or numbers that are missing or absurd.
    """
    architecture = architecture_of(header)
    family, count = header.architecture, layer_count(header)
    hidden_size = header.integer(f"{family}.embedding_length")
    context_max = header.integer(f"{family}.context_length")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or embedding.shape[1:] != (hidden_size,):
        raise ModelRefused(f"{header.path.name}: no token embedding of width {hidden_size}")
    sizes = {
        "num_hidden_layers": count,
        "hidden_size": hidden_size,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": context_max,
    }
    check_config(dict(sizes), where=header.path.name)
    layer_bytes, embedding_bytes, head_bytes = _weight_bytes(header, count)
    is_tied = "output.weight" not in header.tensors
    cuts = tuple(range(architecture.period, count, architecture.period))
    is_recurrent = architecture.state_kind is StateKind.RECURRENT
    nothing = (0,) * count
    return Inspection(
        engine="llama",
        build_id=build_id,
        architecture=family,
        layer_count=count,
        hidden_size=hidden_size,
        vocabulary_size=embedding.shape[0],
        context_max=context_max,
        cuts=cuts,
        wire_specs={cut: (TensorSpec("float32", (-1, hidden_size)),) for cut in cuts},
        token_layers=(0,),
        layer_weight_bytes=layer_bytes,
        embedding_weight_bytes=embedding_bytes,
        head_weight_bytes=head_bytes + (embedding.size_bytes if is_tied else 0),
        is_tied=is_tied,
        kv_bytes_per_token=nothing if is_recurrent else _kv_bytes(header, count),
        state_bytes=(_recurrent_bytes(header),) * count if is_recurrent else nothing,
        state_kind=architecture.state_kind,
        slots_max=SEQUENCES_MAX,
        head_cost_layers=(head_bytes + (embedding.size_bytes if is_tied else 0))
        / max(1.0, sum(layer_bytes) / count),
    )


def _weight_bytes(header: GgufHeader, count: int) -> tuple[tuple[int, ...], int, int]:
    """Return the bytes of each layer, of the embedding and of the head, as in the file.

    Tensors of no layer that every shard keeps (rope factors) are small and count with the head.
    """
    layers, embedding, head = [0] * count, 0, 0
    for tensor in header.tensors.values():
        match = _LAYER.match(tensor.name)
        if match and int(match[1]) < count:
            layers[int(match[1])] += tensor.size_bytes
        elif tensor.name.startswith(("token_embd", "position_embd")):
            embedding += tensor.size_bytes
        elif not match:
            head += tensor.size_bytes
    return tuple(layers), embedding, head


def _kv_bytes(header: GgufHeader, count: int) -> tuple[int, ...]:
    """Return bytes of keys and values a token, by layer."""
    family = header.architecture
    heads = _by_layer(header, "attention.head_count", count)
    kv_heads = _by_layer(header, "attention.head_count_kv", count, default=heads)
    hidden_size = header.integer(f"{family}.embedding_length")
    head_size = hidden_size // max(1, *heads)
    key = header.integer(f"{family}.attention.key_length", head_size)
    value = header.integer(f"{family}.attention.value_length", head_size)
    check_config(
        {"num_key_value_heads": list(kv_heads), "head_dim": [key, value]}, where=header.path.name
    )
    if min(*heads, key, value) < 1:
        raise ModelRefused(f"{header.path.name}: heads {min(heads)}, of {key} and {value} numbers")
    return tuple(items * (key + value) * _HALF_BYTES for items in kv_heads)


def _by_layer(
    header: GgufHeader, key: str, count: int, *, default: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Return a number that a file states once, or for each layer."""
    name = f"{header.architecture}.{key}"
    if name not in header.metadata and default is not None:
        return default
    if not isinstance(header.metadata.get(name), tuple):
        return (header.integer(name),) * count
    values = header.integers(name)
    if len(values) < count:
        raise ModelRefused(f"{header.path.name}: {len(values)} items of {name} for {count} layers")
    return values[:count]


def _recurrent_bytes(header: GgufHeader) -> int:
    """Return bytes of one layer's state: a convolution's window, and what it feeds."""
    family = header.architecture
    kernel, inner, state = (
        header.integer(f"{family}.ssm.{key}") for key in ("conv_kernel", "inner_size", "state_size")
    )
    check_config({"intermediate_size": inner, "head_dim": [kernel, state]}, where=header.path.name)
    return (max(1, kernel) - 1 + state) * inner * _FLOAT_BYTES
