"""Sampling against its definition: slow, obvious arithmetic on small rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import RowError, SamplingError
from swarmpy.pipeline.sampling import Choice, check, largest, philox, sample, uniform
from swarmpy.proto.pipeline import SEED_MAX, Sampling

VECTORS = Path(__file__).parents[2] / "protocols" / "vectors" / "pipeline.json"
ROWS = st.lists(
    st.floats(-20, 20, width=32) | st.just(-math.inf) | st.sampled_from([0.0, 1.0, -0.0]),
    min_size=1,
    max_size=400,
).filter(lambda row: any(math.isfinite(value) for value in row))
SPECS = st.builds(
    Sampling,
    temperature=st.just(0.0) | st.floats(0.01, 2),
    top_p=st.just(1.0) | st.floats(0.01, 1),
    top_k=st.integers(0, 50),
    min_p=st.just(0.0) | st.floats(0, 0.9),
    repetition_penalty=st.just(1.0) | st.floats(0.5, 2),
    seed=st.integers(0, SEED_MAX),
    logprobs=st.integers(0, 20),
)


def floats(row: list[float]) -> np.ndarray:
    return np.array(row, np.float32)


def allowed(row: np.ndarray, spec: Sampling) -> list[int]:
    """The ids that may be sampled, by the definition, one filter after the other."""
    ids = sorted(range(len(row)), key=lambda index: (-row[index], index))
    weights = np.exp((row - row.max()).astype(np.float32) / np.float32(spec.temperature))
    if spec.top_k:
        ids = ids[: spec.top_k]
    if spec.top_p < 1:
        total, mass, kept = float(sum(weights[index] for index in ids)), 0.0, []
        for index in ids:
            kept.append(index)
            mass += float(weights[index])
            # A hair beyond: sums in another order may round another way.
            if mass >= spec.top_p * total * (1 + 1e-6):
                break
        ids = kept
    return [index for index in ids if weights[index] >= spec.min_p * (1 - 1e-6)]


@given(row=ROWS, spec=SPECS, position=st.integers(0, 10**6), history=st.lists(st.integers(0, 400)))
def test_any_row_and_valid_spec_give_a_possible_token(
    row: list[float], spec: Sampling, position: int, history: list[int]
) -> None:
    check(spec)

    choice = sample(floats(row), spec, position=position, history=history)

    assert math.isfinite(row[choice.token])
    assert choice == sample(floats(row), spec, position=position, history=history)


@given(row=ROWS, spec=SPECS, position=st.integers(0, 1000))
def test_any_sampled_token_passes_every_filter(
    row: list[float], spec: Sampling, position: int
) -> None:
    if spec.temperature == 0 or spec.repetition_penalty != 1:
        return
    assert sample(floats(row), spec, position=position).token in allowed(floats(row), spec)


@given(ROWS)
def test_any_greedy_choice_is_the_lowest_id_of_the_largest(row: list[float]) -> None:
    assert sample(floats(row), Sampling(), position=0).token == row.index(max(row))


@given(row=ROWS, count=st.integers(1, 450))
def test_any_largest_are_in_order_and_ties_by_lowest_id(row: list[float], count: int) -> None:
    expected = sorted(range(len(row)), key=lambda index: (-row[index], index))[:count]

    assert largest(floats(row), count).tolist() == expected


@pytest.mark.parametrize(
    "spec",
    [
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=0.7, seed=5),
        Sampling(temperature=1.0, top_k=3, seed=5),
        Sampling(temperature=1.0, top_p=0.8, seed=5),
        Sampling(temperature=1.3, top_k=5, top_p=0.9, min_p=0.2, seed=5),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(spec: Sampling) -> None:
    """4,000 positions of one seed; four standard deviations are allowed."""
    row = floats([2.0, 1.5, 1.0, 0.0, -1.0, 1.5])
    ids = allowed(row, spec)
    weights = np.exp(row[ids].astype(float) / spec.temperature)
    drawn = [sample(row, spec, position=position).token for position in range(4000)]

    for index, share in zip(ids, weights / weights.sum(), strict=True):
        deviation = math.sqrt(share * (1 - share) / 4000)
        assert abs(drawn.count(index) / 4000 - share) <= 4 * deviation
    assert set(drawn) <= set(ids)


def test_a_vocabulary_of_blocks_is_drawn_evenly() -> None:
    """50,000 equal tokens: the sums of blocks must not favour any block."""
    row = np.zeros(50_001, np.float32)
    drawn = [sample(row, Sampling(temperature=1.0), position=index).token for index in range(2000)]

    assert abs(np.mean(drawn) - 25_000) < 4 * 50_000 / math.sqrt(12 * 2000)
    assert max(drawn) > 49_500
    assert min(drawn) < 500


def test_a_penalty_makes_repeated_tokens_less_likely() -> None:
    row = floats([3.0, 2.9, -1.0])
    spec = Sampling(repetition_penalty=1.5)

    assert sample(row, spec, position=0, history=[0, 0, 2]).token == 1
    assert sample(row, spec, position=0, history=[]).token == 0
    assert sample(floats([-1.0, -1.1]), spec, position=0, history=[0]).token == 1


def test_a_penalty_ignores_ids_beyond_the_vocabulary() -> None:
    spec = Sampling(repetition_penalty=1.5)

    assert sample(floats([1.0, 0.0]), spec, position=0, history=[-1, 99]).token == 0


def test_the_row_is_not_changed() -> None:
    row = floats([3.0, 2.9, -1.0])
    spec = Sampling(temperature=1.0, repetition_penalty=1.5, min_p=0.1, logprobs=2)

    sample(row, spec, position=0, history=[0])

    assert row.tolist() == floats([3.0, 2.9, -1.0]).tolist()


def test_logprobs_are_of_the_model_before_any_filter() -> None:
    row = floats([math.log(0.5), math.log(0.25), math.log(0.25), -math.inf])
    choice = sample(row, Sampling(logprobs=20), position=0)

    assert choice == Choice(
        0,
        pytest.approx(math.log(0.5)),
        (
            (0, pytest.approx(math.log(0.5))),
            (1, pytest.approx(math.log(0.25))),
            (2, pytest.approx(math.log(0.25))),
        ),
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(RowError, match="largest logit at position 7"):
        sample(floats([0.0, value, 1.0]), Sampling(), position=7)


def test_a_row_without_a_possible_token_is_refused() -> None:
    with pytest.raises(RowError):
        sample(floats([-math.inf, -math.inf]), Sampling(), position=0)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.0}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 2.5}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": SEED_MAX + 1}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
    ],
)
def test_a_parameter_outside_its_range_is_named(changes: dict[str, float], name: str) -> None:
    with pytest.raises(SamplingError, match=name):
        check(Sampling(**changes))  # type: ignore[arg-type]


def test_the_generator_is_philox_as_others_have_it() -> None:
    """numpy counts before it generates."""
    for seed, position in [(0, 0), (5, 6), (SEED_MAX, 2**20), (123456789, 4095)]:
        reference = np.random.Philox(
            key=np.array([seed, 0], np.uint64), counter=np.array([position, 0, 0, 0], np.uint64)
        )
        expected = tuple(int(word) for word in reference.random_raw(4))
        assert philox((seed, 0), (position + 1, 0, 0, 0)) == expected


@given(seed=st.integers(0, SEED_MAX), position=st.integers(0, 1 << 31))
def test_any_chance_lies_in_the_unit_interval(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text())["sampling"])
def test_the_vectors_give_the_chance_of_each_position(case: dict[str, Any]) -> None:
    word = philox((case["seed"], 0), (case["position"], 0, 0, 0))[0]

    assert f"{word:016x}" == case["word"]
    assert uniform(case["seed"], case["position"]) == case["uniform"]
