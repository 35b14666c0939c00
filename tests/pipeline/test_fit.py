"""Fit: the terms a range of layers is refused for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.abc import Inspection
from swarmpy.pipeline.fit import CHILD_BYTES, RESERVE_BYTES, fit, format_bytes
from swarmpy.testing.engine import EchoModel, inspection_of


def smollm() -> Inspection:
    """SmolLM2-135M in float32: 30 layers, tied embeddings, 3 KV heads of 64."""
    model = EchoModel(
        layers=30,
        hidden_size=576,
        vocabulary_size=49_152,
        layer_weight_bytes=14_160_000,
        embedding_weight_bytes=113_246_208,
        head_weight_bytes=113_248_512,
        is_tied=True,
        kv_bytes_per_token=2 * 3 * 64 * 4,
    )
    return inspection_of(model)


def test_the_whole_default_model_takes_what_was_measured() -> None:
    """538 MB of weights, and 190 MB for a slot of 4,096 tokens."""
    terms = fit(smollm(), 0, 30, slots=1, context=4096)

    assert terms.weights == pytest.approx(538e6, rel=0.01)
    assert terms.slots == pytest.approx(190e6, rel=0.01)
    assert terms.child == CHILD_BYTES
    assert terms.reserve == RESERVE_BYTES


def test_only_the_last_stage_counts_logits() -> None:
    assert fit(smollm(), 0, 15, slots=1, context=4096).logits == 0
    assert fit(smollm(), 15, 30, slots=1, context=4096).logits == 2 * 64 * 49_152 * 4


def test_tied_embeddings_count_on_both_ends_and_once_on_one_node() -> None:
    whole = fit(smollm(), 0, 30, slots=1, context=4096).weights
    ends = [fit(smollm(), *ends, slots=1, context=4096).weights for ends in ((0, 15), (15, 30))]

    assert sum(ends) - whole == smollm().embedding_weight_bytes


def test_a_state_that_does_not_grow_counts_once_a_slot() -> None:
    inspection = replace(smollm(), kv_bytes_per_token=(0,) * 30, state_bytes=(1000,) * 30)
    terms = fit(inspection, 0, 10, slots=4, context=4096)

    assert terms.slots == 4 * 10 * 1000
    assert terms.growth == 0


def test_a_refusal_lists_its_terms() -> None:
    text = str(fit(smollm(), 0, 10, slots=4, context=4096))

    assert text.startswith(format_bytes(fit(smollm(), 0, 10, slots=4, context=4096).sum_bytes))
    for name in ("weights", "slots", "growth", "activations", "child", "reserve"):
        assert name in text
    assert "logits" not in text


@given(start=st.integers(0, 28), length=st.integers(1, 29), slots=st.integers(1, 8))
def test_any_larger_range_needs_more(start: int, length: int, slots: int) -> None:
    """The planner finds the furthest end by halving: the sum must only grow."""
    end = min(29, start + length)
    inside = fit(smollm(), start, end, slots=slots, context=4096).sum_bytes

    assert fit(smollm(), start, end + 1, slots=slots, context=4096).sum_bytes >= inside
    assert fit(smollm(), max(0, start - 1), end, slots=slots, context=4096).sum_bytes >= inside


@pytest.mark.parametrize(("start", "end"), [(0, 0), (5, 3), (0, 31), (-1, 3)])
def test_a_range_outside_the_model_is_our_mistake(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="layers"):
        fit(smollm(), start, end, slots=1, context=64)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (538_000_000, "538 MB"), (1_500_000_000, "1.5 GB"),
     (999_900_000, "1 GB"), (7_200_000_000_000, "7.2 TB")],
)  # fmt: skip
def test_sizes_are_written_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text
