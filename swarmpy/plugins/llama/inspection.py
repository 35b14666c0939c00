"""What a GGUF's header says about a model, in the engine contract's terms. Reads nothing else."""

from __future__ import annotations

import re

from swarmpy.abc import Inspection, StateKind
from swarmpy.errors import ModelRefused
from swarmpy.plugins.llama.architectures import architecture_of
from swarmpy.plugins.llama.header_checks import check_numbers
from swarmpy.plugins.llama.layers import allowed_cuts, layers_of
from swarmpy.proto.tensor import TensorSpec
from swarmpy.shards.gguf import GgufHeader
from swarmpy.shards.gguf_cut import layer_count
from swarmpy.shards.refusals import check_config

_LAYER = re.compile(r"blk\.([0-9]+)\.")


def inspect_header(header: GgufHeader, *, build_id: str) -> Inspection:
    """Describe a model to planners.

    Raises:
        ModelRefused: An architecture that is not run, or numbers that are missing, absurd, or known
            to end the library's process.
    """
    architecture = architecture_of(header)
    family, count = header.architecture, layer_count(header)
    check_numbers(header)
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
    layers = layers_of(header)
    cuts = allowed_cuts(header, layers)
    is_recurrent = any(layer.state_bytes for layer in layers)
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
        kv_bytes_per_token=tuple(layer.kv_bytes for layer in layers),
        state_bytes=tuple(layer.state_bytes for layer in layers),
        state_kind=StateKind.RECURRENT if is_recurrent else StateKind.KV,
        slots_max=architecture.slots_max,
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
