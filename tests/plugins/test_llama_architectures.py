"""Layers of a GGUF, cut and run one part after the other, give the bits of the whole.

Method: a tiny random model of each architecture; the file run whole, and as two and three parts
with hidden states handed on; a prompt in two chunks, then four tokens; logits compared as bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from gguf_architectures import MODELS
from gguf_models import metadata_of, write_models

from swarmpy.errors import ExtensionNotFound
from swarmpy.plugins.llama.architectures import ARCHITECTURES
from swarmpy.plugins.llama.library import find_library

try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)

from llama_cuts import Outcome, compare

PERIODS: Mapping[str, int] = dict.fromkeys(MODELS, 1) | {
    # Every part needs a layer with a window; with two layers it has one.
    "cohere2": 2,
    "cohere2moe": 2,
    "exaone-moe": 2,
    "gemma3": 2,
    "gpt-oss": 2,
    "laguna": 2,
    "mellum": 2,
    "olmo2+window": 2,
    "plamo3": 2,
    # Every part needs a layer of each kind.
    "gemma4": 4,
    "granitehybrid": 2,
    "jamba": 2,
    "kimi-linear": 2,
    "lfm2": 2,
    "lfm2moe": 2,
    "minimax-m3": 2,
    # What a layer computes follows from its number.
    "llama4": 4,
    "qwen3next": 4,
    "smollm3": 4,
}
"""Where a model of the table can be cut: at multiples of this."""

NOT_CUT: Mapping[str, str] = {
    "afmoe": "scales the states that come in",
    "baichuan+13b": "tells by its depth whether it has rope",
    "bloom": "norms the states that come in",
    "cogvlm": "takes other weights for states than for tokens",
    "deepseek2+lite": "tells by its depth which queries it has",
    "exaone4+32b": "tells by its depth that it has windows",
    "gemma": "scales the states that come in",
    "gemma2": "scales the states that come in",
    "gemma2+27b": "tells by its depth how it scales attention",
    "gemma3+27b": "tells by its depth how it scales attention",
    "glm4": "ends the process over states that come in",
    "glm4moe": "ends the process over states that come in",
    "hunyuan_vl": "wants four positions of a state",
    "mimo2": "has no node with the name of a layer's output",
    "minicpm": "computes a scale from its depth",
    "minicpm3": "computes a scale from its depth",
    "nemotron_h": "has no node with the name of a layer's output in every layer",
    "nemotron_h_moe": "has no node with the name of a layer's output in every layer",
    "paddleocr": "wants four positions of a state",
    "plamo2": "has no node with the name of a layer's output",
    "qwen2vl": "wants four positions of a state",
    "qwen35": "wants four positions of a state",
    "qwen35moe": "wants four positions of a state",
    "qwen3vl": "wants four positions of a state",
    "qwen3vlmoe": "wants four positions of a state",
    "rwkv7": "hands more than states from layer 0 to all others",
    "smallthinker": "routes by the states before the layer, and rotates by a layer's number",
    "step35": "has no node with the name of a layer's output",
    "talkie": "hands the embedding to all layers",
}
"""Models that are written all the same, and why no part of them can be run this way."""

CUT = sorted(set(MODELS) - set(NOT_CUT))


def ways_to_cut(name: str) -> list[list[int]]:
    """Edges of two parts as equal as can be, and of three with the least of layers at both ends."""
    layers = metadata_of(name)[f"{name.partition('+')[0]}.block_count"]
    assert isinstance(layers, int)
    period = PERIODS[name]
    return [
        [0, layers // period // 2 * period, layers],
        [0, period, (layers - 1) // period * period, layers],
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each model."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def outcomes(models: dict[str, Path]) -> dict[str, list[Outcome]]:
    """What came of each model's cuts: all in one child, as long as it lives."""
    edges = {name: ways_to_cut(name) for name in CUT}
    found: dict[str, list[Outcome]] = {name: [] for name in CUT}
    for outcome in compare(models, edges):
        found[outcome.name].append(outcome)
    return found


@pytest.mark.parametrize("name", CUT)
def test_two_and_three_parts_give_the_bits_of_the_whole(
    name: str, outcomes: dict[str, list[Outcome]]
) -> None:
    assert [len(outcome.edges) for outcome in outcomes[name]] == [3, 4]
    for outcome in outcomes[name]:
        assert outcome.is_equal, f"cut at {outcome.edges}: {outcome.error or 'other logits'}"
        assert math.isfinite(outcome.spread), "the whole gives no numbers"
        assert outcome.spread > 0.1, "logits all alike would be equal however they were cut"


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_what_the_engine_runs_is_proven_at_its_cuts(architecture: str) -> None:
    """An architecture is listed once a part of it gave the whole's bits, and no sooner."""
    proven = [name for name in CUT if name.partition("+")[0] == architecture]
    assert proven, NOT_CUT.get(architecture, "there is no model of it")
    for name in proven:
        assert ARCHITECTURES[architecture].period % PERIODS[name] == 0, name


def test_models_are_the_same_files_each_time(models: dict[str, Path], tmp_path: Path) -> None:
    names = ["llama", "deepseek2", "qwen3next", "mamba2"]

    again = write_models(tmp_path, names)

    assert [digest(again[name]) for name in names] == [digest(models[name]) for name in names]


def test_models_are_small(models: dict[str, Path]) -> None:
    assert max(path.stat().st_size for path in models.values()) < 2.5e6


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
