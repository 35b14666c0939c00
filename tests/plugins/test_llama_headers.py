"""Headers whose numbers would end llama.cpp's process, or keep it busy for ever, are refused.

Method: a tiny model's header with one number changed. What is refused here was seen to abort, to
hang or to crash in the library that the engine pins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_architectures import MODELS
from gguf_models import metadata_of, write_models

from swarmpy.errors import ExtensionNotFound, ModelRefused
from swarmpy.plugins.llama.architectures import ARCHITECTURES
from swarmpy.plugins.llama.header_checks import EXPERTS_MAX, LAYERS_MAX, check_numbers
from swarmpy.plugins.llama.inspection import inspect_header
from swarmpy.plugins.llama.library import find_library
from swarmpy.shards.gguf import GgmlType, GgufHeader, GgufTensor, MetadataValue

PATH = Path("x.gguf")


def tensor(name: str, *shape: int) -> GgufTensor:
    size = 4 * math.prod(shape)
    return GgufTensor(
        name=name, type=GgmlType.F32, shape=shape, path=PATH, offset=0, size_bytes=size
    )


def header_of(metadata: Mapping[str, MetadataValue], *, per_layer: int = 1) -> GgufHeader:
    """A header with an embedding, and so many tensors a layer."""
    architecture = metadata["general.architecture"]
    layers, width = (metadata[f"{architecture}.{it}"] for it in ("block_count", "embedding_length"))
    assert isinstance(layers, int)
    assert isinstance(width, int)
    tensors = [tensor("token_embd.weight", 64, width)]
    tensors += [
        tensor(f"blk.{layer}.{index}", 8) for layer in range(layers) for index in range(per_layer)
    ]
    return GgufHeader(
        path=PATH,
        version=3,
        alignment=32,
        metadata=metadata,
        tensors={each.name: each for each in tensors},
    )


def model(name: str) -> GgufHeader:
    """The header of one of the tiny models, but for its tensors."""
    stated: dict[str, MetadataValue] = {}
    for key, value in metadata_of(name).items():
        stated[key] = value if isinstance(value, (bool, int, float, str)) else tuple(value)
    return header_of(stated)


def changed(name: str, **own: MetadataValue) -> GgufHeader:
    """The same with other numbers; two underscores stand for a dot."""
    header = model(name)
    keys = {f"{header.architecture}.{key.replace('__', '.')}": own[key] for key in own}
    return replace(header, metadata={**header.metadata, **keys})


@pytest.mark.parametrize(
    "name", sorted(name for name in MODELS if name.partition("+")[0] in ARCHITECTURES)
)
def test_models_that_run_are_not_refused(name: str) -> None:
    check_numbers(model(name))


NAN = float("nan")
EPSILON = "attention__layer_norm_rms_epsilon"
ROPE = "rope__dimension_count"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        # No end of loading; of the others, an assertion.
        *((name, ROPE, 0) for name in ("gemma2", "gemma4", "openelm", "minimax-m3", "qwen3next")),
        *(("gemma2", ROPE, value) for value in (1, 3, 34, 1000, 2**31, 2**32 - 1)),
        ("qwen3", ROPE, 12),
        ("deepseek2", ROPE, 24),
        ("gemma4", "rope__dimension_count_swa", 0),
        ("gemma4", "rope__dimension_count_swa", 18),
        ("qwen2vl", "rope__dimension_sections", (0, 0, 0, 0)),
        *(("llama", EPSILON, value) for value in (-1.0, NAN, math.inf)),
        ("llama", "rope__freq_base", NAN),
        ("qwen3moe", "expert_count", 0),
        ("qwen3moe", "expert_count", 1),
        ("qwen3moe", "expert_count", EXPERTS_MAX + 1),
        ("qwen3moe", "expert_used_count", 0),
        ("qwen3moe", "expert_used_count", 5),
        ("llama", "expert_used_count", 1),
        ("deepseek2", "expert_group_count", 4),
        ("deepseek2", "expert_group_count", 3),
        ("deepseek2", "expert_gating_func", 5),
        ("minimax-m3", "expert_gating_func", 0),
        ("grovemoe", "experts_per_group", 0),
        ("grovemoe", "experts_per_group", 4),
        ("ernie4_5-moe", "interleave_moe_layer_step", 0),
        ("llama", "attention__head_count_kv", 3),
        ("llama", "attention__head_count_kv", 8),
        ("phimoe", "attention__head_count", 0),
        ("llama", "attention__head_count_kv", 0),
        ("llama", "attention__head_count_kv", (2, 2, 2, 2, 2, 3)),
        ("deepseek2", "attention__head_count_kv", 2),
        ("deepseek2", "attention__key_length", 25),
        ("kimi-linear", "attention__key_length_mla", 0),
        ("kimi-linear", "attention__value_length_mla", 0),
        ("openelm", "attention__value_length", 8),
        ("gpt-oss", "attention__key_length_swa", 8),
        ("cohere2moe", "rope__dimension_count_swa", 8),
        ("gemma2", "attention__sliding_window", 2**31 - 1),
        ("afmoe", "attention__sliding_window", 0),
        ("cohere2moe", "attention__sliding_window_pattern", (False,) * 12),
        ("gemma4", "attention__shared_kv_layers", 1),
        ("gemma4", "attention__shared_kv_layers", 11),
        ("minimax-m3", "attention__indexer__block_size", 0),
        ("minimax-m3", "attention__indexer__top_k", 2**31),
        ("jamba", "ssm__inner_size", 64),
        ("mamba2", "ssm__conv_kernel", 0),
        ("qwen3next", "ssm__inner_size", 3),
        ("plamo2", "ssm__group_count", 1),
        ("llama", "block_count", LAYERS_MAX + 1),
    ],
)
def test_a_number_that_the_library_does_not_survive_is_refused_by_name(
    name: str, key: str, value: MetadataValue
) -> None:
    header = changed(name, **{key: value})
    if key == "block_count":
        header = header_of(header.metadata)

    with pytest.raises(ModelRefused, match=rf"^x\.gguf: '{name}\.[a-z_.]+' is \S+, "):
        check_numbers(header)


def test_a_refusal_names_the_key_and_the_value() -> None:
    with pytest.raises(ModelRefused) as refusal:
        check_numbers(changed("gemma2", **{ROPE: 7}))

    expected = "'gemma2.rope.dimension_count' is 7, expected an even number from 2 to 32"
    assert str(refusal.value) == f"x.gguf: {expected}"


def test_groups_of_experts_are_used_in_part() -> None:
    stated = {"expert_group_count": 2, "expert_group_used_count": 1}
    check_numbers(changed("deepseek2", **stated))

    with pytest.raises(ModelRefused, match=r"expert_group_used_count' is 2, of 2 groups"):
        check_numbers(changed("deepseek2", **{**stated, "expert_group_used_count": 2}))


def test_a_window_longer_than_the_context_is_no_obstacle() -> None:
    """As Phi 3's files have it; the library keeps all positions then."""
    check_numbers(changed("phi3", attention__sliding_window=262_144))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        find_library()
    except ExtensionNotFound as missing:
        pytest.skip(f"no llama.cpp library: {missing}")
    return write_models(tmp_path_factory.mktemp("models"), ["gemma2"])["gemma2"]


def test_a_file_with_such_a_number_is_refused_before_it_is_loaded(bare: Path) -> None:
    from swarmpy.plugins.llama.engine import LlamaEngine
    from swarmpy.shards.gguf import read_header

    offset, _ = read_header(bare).spans["gemma2.rope.dimension_count"]
    data = bytearray(bare.read_bytes())
    data[offset + 4 : offset + 8] = bytes(4)
    bare.write_bytes(data)

    with pytest.raises(ModelRefused, match=r"rope\.dimension_count' is 0"):
        LlamaEngine().inspect(bare)
    with pytest.raises(ModelRefused, match=r"rope\.dimension_count' is 0"):
        LlamaEngine().load(bare, start=0, end=1, slots=1, context=64, exact=True)


@pytest.mark.parametrize("architecture", ["llama", "deepseek2", "minicpm3"])
def test_a_header_of_many_tensors_is_inspected_at_once(architecture: str) -> None:
    """Goal: work that grows with the tensors, not with the tensors times the layers."""
    stated: dict[str, MetadataValue] = {
        "general.architecture": architecture,
        f"{architecture}.block_count": LAYERS_MAX,
        f"{architecture}.embedding_length": 32,
        f"{architecture}.context_length": 64,
        f"{architecture}.attention.head_count": 1,
    }
    header = header_of(stated, per_layer=100)
    began = time.process_time()

    inspection = inspect_header(header, build_id="")

    assert time.process_time() - began < 2
    assert inspection.layer_count == LAYERS_MAX
