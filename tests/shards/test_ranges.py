"""Sets of byte ranges, and which tensors a range of layers needs."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.shards.ranges import bytes_in, merged, missing, needed_tensors, show_layers

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)

SAFETENSORS = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.10.mlp.weight",
    "model.layers.11.mtp.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.rotary.weight",
]


def members(ranges: list[tuple[int, int]]) -> set[int]:
    return {byte for start, end in ranges for byte in range(start, end)}


@given(RANGES)
def test_any_merged_ranges_hold_the_same_bytes_apart_from_each_other(
    ranges: list[tuple[int, int]],
) -> None:
    result = merged(ranges)

    assert members(list(result)) == members(ranges)
    assert all(before[1] < after[0] for before, after in pairwise(result))
    assert bytes_in(ranges) == len(members(ranges))


@given(RANGES, RANGES)
def test_any_missing_bytes_are_the_wanted_without_the_held(
    wanted: list[tuple[int, int]], held: list[tuple[int, int]]
) -> None:
    assert members(list(missing(wanted, held))) == members(wanted) - members(held)


def test_ranges_that_are_near_become_one_with_the_bytes_between() -> None:
    assert merged([(0, 10), (14, 20), (30, 40)], gap_bytes=4) == ((0, 20), (30, 40))


def needed(start: int, end: int, names: list[str] = SAFETENSORS) -> set[str]:
    return set(needed_tensors(names, start=start, end=end, layer_count=11))


def test_a_middle_range_needs_its_layers_and_what_nobody_can_place() -> None:
    assert needed(1, 10) == {"model.layers.1.input_layernorm.weight", "model.rotary.weight"}


def test_the_embedding_goes_with_the_first_layer() -> None:
    assert needed(0, 1) == {
        "model.embed_tokens.weight",
        "model.layers.0.mlp.weight",
        "model.rotary.weight",
    }


def test_norm_head_and_layers_beyond_go_with_the_last_layer() -> None:
    assert needed(10, 11) == set(SAFETENSORS[3:])


def test_a_head_that_is_the_embedding_goes_with_both_ends() -> None:
    names = ["token_embd.weight", "blk.0.ffn_up.weight", "blk.10.ffn_up.weight"]
    names += ["output_norm.weight"]

    assert needed(0, 1, names) == {"token_embd.weight", "blk.0.ffn_up.weight"}
    assert needed(10, 11, names) == set(names) - {"blk.0.ffn_up.weight"}


@pytest.mark.parametrize(
    ("layers", "shown"), [([(0, 10), (20, 30)], "0-9, 20-29"), ([(3, 4)], "3"), ([], "")]
)
def test_layers_are_shown_with_the_last_one_included(
    layers: list[tuple[int, int]], shown: str
) -> None:
    assert show_layers(layers) == shown
