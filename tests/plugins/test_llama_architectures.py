"""Layers of a GGUF, cut and run one part after the other, give the bits of the whole.

Method: a tiny random model of each architecture; the file as it is, against parts loaded by the
engine with hidden states handed on, prompts in chunks and then four tokens; logits compared as
bytes. The parts are cut where the model's inspection allows it.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_architectures import MODELS
from gguf_models import write_models

from swarmpy.abc import Inspection
from swarmpy.errors import ExtensionNotFound, ModelRefused
from swarmpy.plugins.llama.architectures import ARCHITECTURES
from swarmpy.plugins.llama.inspection import inspect_header
from swarmpy.plugins.llama.library import find_library
from swarmpy.shards.gguf import GgufHeader, read_header

try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)

from llama_cuts import CHECKS, LONG, check_models

NOT_RUN: Mapping[str, str] = {
    "rwkv7": "hands more than states from layer 0 to all others",
    "smallthinker": "gives other numbers in parts",
    "talkie": "hands the embedding to all layers",
}
"""Models that are written all the same, and why none of them is run."""

WHOLE = frozenset(
    {
        "baichuan+13b",
        "command-r+plus",
        "exaone4+32b",
        "gemma2+27b",
        "gemma3+27b",
        "gemma4+e2b",
        "minicpm3",
    }
)
"""Those that are run, and only whole."""

RUN = sorted(set(MODELS) - set(NOT_RUN))

SHORT_TABLES = frozenset({"gpt2", "mpt", "starcoder"})
"""Models whose positions are rows of a table, so that no text is longer than it."""

QUICK_LONG = ("deepseek2", "gemma3+stated", "jamba", "llama", "mamba2", "minimax-m3")
"""Run with long texts each time, one of each kind of memory: latent, window, hybrid, plain,
recurrent, indexer. All take minutes: with SWARMPY_ALL_DEPTHS=1, for another version of the
library."""

RUN_LONG = sorted(set(RUN) - SHORT_TABLES) if os.environ.get("SWARMPY_ALL_DEPTHS") else QUICK_LONG

LONG_CHECKS = ("three", "sessions", "back", "move")


def inspection_of(path: Path) -> Inspection:
    return inspect_header(read_header(path), build_id="")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each model."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def errors(models: dict[str, Path]) -> dict[str, dict[str, str]]:
    """What came of each model's checks: all in one child, as long as it lives."""
    return check_models(models, {name: checks_of(name) for name in RUN})


@pytest.fixture(scope="module")
def long_errors(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """What came of the checks with long texts."""
    folder = tmp_path_factory.mktemp("long")
    longer = {name: with_long_context(models[name], folder) for name in RUN_LONG}
    return check_models(longer, {name: long_checks_of(name) for name in RUN_LONG}, is_long=True)


def with_long_context(path: Path, folder: Path) -> Path:
    """Return a copy that says it is for texts as long as the long ones."""
    header, data = read_header(path), bytearray(path.read_bytes())
    offset, size = header.spans[f"{header.architecture}.context_length"]
    data[offset : offset + size] = struct.pack("<II", 4, LONG.context)
    (folder / path.name).write_bytes(data)
    return folder / path.name


def long_checks_of(name: str) -> list[str]:
    return [check for check in LONG_CHECKS if check in checks_of(name)]


def checks_of(name: str) -> list[str]:
    left_out = set() if "+q" in name else {"batch"}
    if name in WHOLE:
        left_out |= {"two", "three", "every"}
    return [check for check in CHECKS if check not in left_out]


@pytest.mark.parametrize(
    ("name", "check"), [(name, check) for name in RUN for check in checks_of(name)]
)
def test_parts_give_the_bits_of_the_whole(
    name: str, check: str, errors: dict[str, dict[str, str]]
) -> None:
    """In as many parts as can be, in sessions side by side, cut back, moved, and as planned."""
    assert not errors[name][check], errors[name][check]


@pytest.mark.parametrize(
    ("name", "check"), [(name, check) for name in RUN_LONG for check in long_checks_of(name)]
)
def test_parts_give_the_bits_of_the_whole_over_long_texts(
    name: str, check: str, long_errors: dict[str, dict[str, str]]
) -> None:
    """In whole chunks, and beyond the positions that attention is computed over at once."""
    assert not long_errors[name][check], long_errors[name][check]


def test_every_architecture_that_is_run_is_proven() -> None:
    """An architecture is listed once parts of it gave the whole's bits, and no sooner."""
    assert {name.partition("+")[0] for name in RUN} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", RUN)
def test_a_model_can_be_cut_into_three_parts_or_not_at_all(
    name: str, models: dict[str, Path]
) -> None:
    """So no check of three parts has fewer."""
    cuts = inspection_of(models[name]).cuts

    assert not cuts if name in WHOLE else len(cuts) > 1


@pytest.mark.parametrize("name", sorted(NOT_RUN))
def test_all_others_are_refused_by_name(name: str, models: dict[str, Path]) -> None:
    with pytest.raises(ModelRefused, match=rf"{name!r} is none the llama engine runs .*mamba2"):
        inspection_of(models[name])


# Where models may be cut ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("llama", (1, 2, 3, 4, 5)),
        ("smollm3", (4, 8)),
        ("gemma2", (1, 3)),
        ("gemma3+stated", (1, 2, 4, 5, 7, 8, 10)),
        ("laguna", (2, 3, 4, 6, 7, 8, 10, 11)),
        ("jamba", (2, 4)),
        ("nemotron_h", (2, 5, 8)),
        ("qwen3next", (4, 8)),
        ("minimax-m3", (2, 3, 4, 5)),
        ("falcon-h1", (1, 2, 3, 4, 5)),
        ("gemma4", (4, 8)),
        ("deci+uneven", (3, 5)),
        ("gemma2+27b", ()),
    ],
)
def test_every_part_has_a_layer_of_each_kind(
    name: str, cuts: tuple[int, ...], models: dict[str, Path]
) -> None:
    assert inspection_of(models[name]).cuts == cuts


@pytest.mark.parametrize(
    ("layers", "cuts"),
    [
        (25, tuple(range(1, 25))),
        (26, ()),
        (61, tuple(range(4, 61, 4))),
        (62, (*range(4, 36, 4), *range(40, 62, 4))),
    ],
)
def test_no_part_has_a_depth_that_means_another_model(
    layers: int, cuts: tuple[int, ...], models: dict[str, Path]
) -> None:
    """Goal: deepseek2 has no part of 26 or 27 layers, which would be taken for its lite one."""
    found = inspect_header(deeper(models["deepseek2"], layers), build_id="").cuts
    edges = [0, *found, layers]

    depths = {end - start for end in edges for start in edges if start < end} - {layers}
    assert not depths & {26, 27}
    assert found == cuts


def deeper(path: Path, layers: int) -> GgufHeader:
    """Return the header of a model with so many layers, all as the second."""
    header = read_header(path)
    tensors = dict(header.tensors)
    for layer in range(2, layers):
        for name, tensor in header.tensors.items():
            if name.startswith("blk.1."):
                other = f"blk.{layer}.{name.removeprefix('blk.1.')}"
                tensors[other] = replace(tensor, name=other)
    count = {f"{header.architecture}.block_count": layers}
    return replace(header, metadata={**header.metadata, **count}, tensors=tensors)


@pytest.mark.parametrize("interval", [0, -1, 2**31])
def test_an_interval_that_cannot_be_is_refused(interval: int, models: dict[str, Path]) -> None:
    header = read_header(models["qwen3next"])
    stated = {"qwen3next.full_attention_interval": interval}
    header = replace(header, metadata={**header.metadata, **stated})

    with pytest.raises(ModelRefused, match="full_attention_interval of"):
        inspect_header(header, build_id="")


# The models themselves --------------------------------------------------------


def test_models_are_the_same_files_each_time(models: dict[str, Path], tmp_path: Path) -> None:
    names = ["llama", "deepseek2", "qwen3next", "mamba2"]

    again = write_models(tmp_path, names)

    assert [digest(again[name]) for name in names] == [digest(models[name]) for name in names]


def test_models_are_small(models: dict[str, Path]) -> None:
    assert max(path.stat().st_size for path in models.values()) < 2.5e6


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
