"""What each layer of a GGUF keeps, and where the model may be cut: from its header alone.

The library makes a memory for each kind of layer a model has, and ends the process where a model
has none of a kind that its architecture is known for. So every shard needs a layer of each kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from swarmpy.errors import ModelRefused
from swarmpy.plugins.llama.architectures import architecture_of, period_of
from swarmpy.shards.gguf import GgufHeader
from swarmpy.shards.gguf_cut import (
    is_separable,
    layer_count,
    sliding_layers,
    why_undivided,
)
from swarmpy.shards.refusals import check_config

_HALF_BYTES, _FLOAT_BYTES = 2, 4
"""Keys and values are kept as float16, recurrent states as float32."""

_RECURRENT_TENSORS = ("ssm_", "shortconv.")
_INDEXER_TENSORS = ("indexer.",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer: the kinds of memory it has, and their sizes."""

    kinds: frozenset[str]
    """Of `attention`, `window`, `full`, `index` and `recurrent`."""
    kv_bytes: int
    """Of one token."""
    state_bytes: int
    """Of one slot."""


def layers_of(header: GgufHeader) -> tuple[Layer, ...]:
    """Return a model's layers.

    Raises:
        ModelRefused: Numbers that are missing or absurd.
    """
    count, names = layer_count(header), _tensor_names(header)
    architecture, slides = architecture_of(header), sliding_layers(header)
    is_recurrent, has_index = (
        [any(name.startswith(marks) for name in names[index]) for index in range(count)]
        for marks in (_RECURRENT_TENSORS, _INDEXER_TENSORS)
    )
    sizes = _kv_sizes(header, count) if not all(is_recurrent) or architecture.is_parallel else []
    state_bytes = _state_bytes(header) if any(is_recurrent) else 0
    layers = []
    for index in range(count):
        kinds, kv_bytes = set(), 0
        if is_recurrent[index]:
            kinds.add("recurrent")
        if (architecture.is_parallel or not is_recurrent[index]) and sizes[index]:
            kinds |= {"attention", "window" if slides[index] else "full"}
            kv_bytes = sizes[index]
            if has_index[index]:
                kinds.add("index")
                kv_bytes += _index_bytes(header)
        layers.append(
            Layer(
                kinds=frozenset(kinds),
                kv_bytes=kv_bytes,
                state_bytes=state_bytes if is_recurrent[index] else 0,
            )
        )
    return tuple(layers)


def allowed_cuts(header: GgufHeader, layers: Sequence[Layer]) -> tuple[int, ...]:
    """Return where the model may be cut: a part between any two of these is computed right.

    Raises:
        ModelRefused: As for `layers_of`.
    """
    if why_undivided(header):
        return ()
    needed = _kinds(layers)
    architecture = architecture_of(header)
    if not architecture.needs_full:
        needed -= {"full"}
    begins = frozenset({"attention"} if architecture.begins_with_attention else ())
    period = period_of(header)
    possible = [
        cut
        for cut, layer in enumerate(layers)
        if cut > 0 and cut % period == 0 and begins <= layer.kinds
    ]
    cuts = list(_segment_ends(layers, possible, needed))
    return _without_odd_depths(header, cuts, len(layers))


def _segment_ends(
    layers: Sequence[Layer], possible: Sequence[int], needed: frozenset[str]
) -> Iterator[int]:
    """Yield cuts between which, and behind the last of which, there is a layer of each kind."""
    start = 0
    for cut in possible:
        if needed <= _kinds(layers[start:cut]) and needed <= _kinds(layers[cut:]):
            yield cut
            start = cut


def _kinds(layers: Sequence[Layer]) -> frozenset[str]:
    return frozenset[str]().union(*(layer.kinds for layer in layers))


def _without_odd_depths(header: GgufHeader, cuts: list[int], count: int) -> tuple[int, ...]:
    """Return those of the cuts between which no part has a depth it would be mistaken for.

    Of the ways to take every so many, the one that leaves the least to the largest part.
    """
    odd = {depth for depth in range(1, count) if not is_separable(header, depth, layers=count)}
    if not odd:
        return tuple(cuts)
    best: list[int] = []
    best_gap = count
    for step in range(1, len(cuts) + 1):
        chosen: list[int] = []
        for cut in cuts[step - 1 :: step]:
            if not any(abs(cut - edge) in odd for edge in (0, *chosen, count)):
                chosen.append(cut)
        edges = [0, *chosen, count]
        gap = max(end - start for start, end in pairwise(edges))
        if gap < best_gap:
            best, best_gap = chosen, gap
    return tuple(best)


# Sizes ------------------------------------------------------------------------


def _tensor_names(header: GgufHeader) -> dict[int, list[str]]:
    """Return the names of each layer's tensors, without the layer."""
    found: dict[int, list[str]] = {}
    for name in header.tensors:
        if name.startswith("blk."):
            _, number, short = name.split(".", 2)
            found.setdefault(int(number), []).append(short)
    return found


def _kv_sizes(header: GgufHeader, count: int) -> list[int]:
    """Return bytes of keys and values of a token, by layer, as if all had attention."""
    heads = _by_layer(header, "attention.head_count", count)
    kv_heads = _by_layer(header, "attention.head_count_kv", count, default=heads)
    head_size = _integer(header, "embedding_length") // max(1, *heads)
    key = _integer(header, "attention.key_length", head_size)
    value = _integer(header, "attention.value_length", head_size)
    window_key = _integer(header, "attention.key_length_swa", key)
    window_value = _integer(header, "attention.value_length_swa", value)
    if _is_latent(header):
        value = window_value = 0  # Part of what is kept as the key.
    widths = [key, value, window_key, window_value]
    check_config(
        {"num_key_value_heads": list(kv_heads), "head_dim": widths}, where=header.path.name
    )
    if min(*kv_heads, value, window_value) < 0 or min(key, window_key) < 1:
        raise ModelRefused(f"{header.path.name}: heads of {key} and {value} numbers")
    shared = _integer(header, "attention.shared_kv_layers", 0)
    return [
        items * (window_key + window_value if slides else key + value) * _HALF_BYTES
        if index < count - shared
        else 0
        for index, (items, slides) in enumerate(zip(kv_heads, sliding_layers(header), strict=True))
    ]


def _is_latent(header: GgufHeader) -> bool:
    """Whether keys and values of all heads are kept as one vector they are computed from."""
    return all(_integer(header, f"attention.{key}_length_mla", 0) > 0 for key in ("key", "value"))


def _index_bytes(header: GgufHeader) -> int:
    """Return bytes of what picks a layer's keys, of a token."""
    width = _integer(header, "attention.indexer.key_length")
    check_config({"head_dim": width}, where=header.path.name)
    return width * _HALF_BYTES * (1 if _is_latent(header) else 2)


def _state_bytes(header: GgufHeader) -> int:
    """Return bytes of one recurrent layer's state: a convolution's window, and what it feeds."""
    if window := _integer(header, "shortconv.l_cache", 0):
        width = _integer(header, "embedding_length")
        check_config({"hidden_size": width, "head_dim": window}, where=header.path.name)
        return max(0, window - 1) * width * _FLOAT_BYTES
    kernel = _integer(header, "ssm.conv_kernel")
    if head := _integer(header, "kda.head_dim", 0):
        heads = _by_layer(header, "attention.head_count", layer_count(header))
        inner, state, convolved = head * max(heads), head, 3 * head * max(heads)
    else:
        inner, state = (_integer(header, f"ssm.{key}") for key in ("inner_size", "state_size"))
        convolved = inner + 2 * _integer(header, "ssm.group_count", 0) * state
    check_config(
        {"intermediate_size": [inner, convolved], "head_dim": [kernel, state]},
        where=header.path.name,
    )
    return (max(0, kernel - 1) * convolved + state * inner) * _FLOAT_BYTES


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


def _integer(header: GgufHeader, key: str, default: int | None = None) -> int:
    return header.integer(f"{header.architecture}.{key}", default)
