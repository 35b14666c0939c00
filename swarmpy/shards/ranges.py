"""Byte ranges, and which of a model's tensors a range of its layers needs.

A range is `(start, end)`, the end excluded; a set of ranges is sorted, disjoint and never adjacent.
Pure: touches no file. Spec: protocols/manifest.md, section 2 (where a tensor lies).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Range = tuple[int, int]

_LAYER = re.compile(r"(?:^|\.)(?:blk|layers|h|blocks)\.(\d{1,6})\.")
"""A layer's number in the names of llama.cpp and Hugging Face."""

_EMBEDDING = re.compile(r"(?:^|\.)(?:token_embd|embed_tokens|wte|word_embeddings|embed_in)\.")

_FINAL_NORM = re.compile(r"(?:^|\.)(?:output_norm|norm|final_layernorm|ln_f)\.[a-z]+$")

_HEAD = re.compile(r"(?:^|\.)(?:lm_head|output|embed_out)\.[a-z]+$")


def merged(ranges: Iterable[Range], *, gap_bytes: int = 0) -> tuple[Range, ...]:
    """Return the ranges sorted and joined where they overlap, touch or are near.

    Args:
        gap_bytes: Ranges with at most so many bytes between them become one, with those bytes.
    """
    joined: list[Range] = []
    for start, end in sorted(item for item in ranges if item[0] < item[1]):
        if joined and start <= joined[-1][1] + gap_bytes:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return tuple(joined)


def missing(wanted: Iterable[Range], held: Iterable[Range]) -> tuple[Range, ...]:
    """Return the parts of `wanted` that no range of `held` has."""
    have, gaps = merged(held), []
    for start, end in merged(wanted):
        for held_start, held_end in have:
            if held_end <= start or held_start >= end:
                continue
            gaps.append((start, held_start))
            start = held_end
        gaps.append((start, end))
    return merged(gaps)


def bytes_in(ranges: Iterable[Range]) -> int:
    """Return how many bytes the ranges have together."""
    return sum(end - start for start, end in merged(ranges))


def needed_tensors(
    names: Iterable[str], *, start: int, end: int, layer_count: int
) -> Sequence[str]:
    """Return the names of the tensors that layers `[start, end)` of a model cannot do without.

    The embedding goes with the first layer (with the last one too where it is the head), the final
    norm and the head with the last. A tensor of unknown use goes with every range: one too many
    costs bytes, one too few the whole shard.

    Args:
        names: All of the model's tensors, named as in its files.
        layer_count: Layers of the whole model. A tensor of a layer beyond (one that predicts a
            second token, say) goes with the last.
    """
    known = list(names)
    is_tied = not any(_HEAD.search(name) for name in known if _LAYER.search(name) is None)
    is_first, is_last = start == 0, end == layer_count
    needed = []
    for name in known:
        layer = _LAYER.search(name)
        if layer is not None:
            is_needed = start <= min(int(layer[1]), layer_count - 1) < end
        elif _EMBEDDING.search(name):
            is_needed = is_first or (is_last and is_tied)
        elif _FINAL_NORM.search(name) or _HEAD.search(name):
            is_needed = is_last
        else:
            is_needed = True
        if is_needed:
            needed.append(name)
    return needed


def show_layers(layers: Iterable[Range]) -> str:
    """Return ranges of layers as people count them, the last layer included: "0-9, 20-29"."""
    return ", ".join(
        str(start) if end - start == 1 else f"{start}-{end - 1}" for start, end in merged(layers)
    )
