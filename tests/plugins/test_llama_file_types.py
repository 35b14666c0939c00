"""Which type each tensor of a model gets, as llama.cpp 0.5.0 chose it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from swarmpy.errors import ConfigError
from swarmpy.plugins.llama.file_types import TARGETS, file_type, tensor_types
from swarmpy.shards.gguf import GgmlType, GgufHeader, GgufTensor


def header_of(
    layers: int,
    *,
    width: int = 256,
    architecture: str = "llama",
    further: Sequence[str] = (),
    without: str = "none",
    **more: int,
) -> GgufHeader:
    """A header of a model with the usual matrices, its head apart from its embedding."""
    experts = more.get("expert_count", 0)
    metadata = {"general.architecture": architecture, f"{architecture}.block_count": layers}
    metadata |= {f"{architecture}.{key}": value for key, value in more.items()}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (64, width)}
    for layer in range(layers):
        stem = f"blk.{layer}."
        shapes |= {f"{stem}{name}.weight": (width, width) for name in _SQUARE}
        shapes[f"{stem}attn_norm.weight"] = (width,)
        down = "ffn_down_exps" if experts else "ffn_down"
        shapes[f"{stem}{down}.weight"] = (*((experts,) if experts else ()), width, 512)
        shapes[f"{stem}ffn_gate_inp.weight"] = (8, width)
    shapes |= dict.fromkeys((*further, "output.weight"), (64, width))
    return GgufHeader(
        path=Path("model.gguf"),
        version=3,
        alignment=32,
        metadata=metadata,
        tensors={
            name: GgufTensor(
                name=name,
                type=GgmlType.F32,
                shape=shape,
                path=Path("model.gguf"),
                offset=0,
                size_bytes=0,
            )
            for name, shape in shapes.items()
            if f".{without}." not in name
        },
    )


_SQUARE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate")


def types_of(header: GgufHeader, target: str, part: str) -> list[str]:
    """The types of one kind of matrix, by layer."""
    types = tensor_types(header, file_type(target))
    return [kind.name for name, kind in types.items() if name.endswith(f".{part}.weight")]


MIXTURES = {
    "q4_0": ("Q6_K", "Q4_0", ["Q4_0"] * 10, ["Q4_0"] * 10),
    "q4_1": ("Q6_K", "Q4_1", ["Q4_1"] * 10, ["Q4_1"] * 10),
    "q4_k_s": ("Q6_K", "Q4_K", ["Q5_K"] * 4 + ["Q4_K"] * 6, ["Q5_K"] + ["Q4_K"] * 9),
    "q4_k_m": (
        *("Q6_K", "Q4_K"),
        *([("Q6_K" if index in (0, 3, 6, 8, 9) else "Q4_K") for index in range(10)],) * 2,
    ),
    "q5_0": ("Q6_K", "Q5_0", ["Q5_0"] * 10, ["Q5_0"] * 10),
    "q5_1": ("Q6_K", "Q5_1", ["Q5_1"] * 10, ["Q5_1"] * 10),
    "q5_k_s": ("Q6_K", "Q5_K", ["Q5_K"] * 10, ["Q5_K"] * 10),
    "q5_k_m": (
        *("Q6_K", "Q5_K"),
        *([("Q6_K" if index in (0, 3, 6, 8, 9) else "Q5_K") for index in range(10)],) * 2,
    ),
    "q6_k": ("Q6_K", "Q6_K", ["Q6_K"] * 10, ["Q6_K"] * 10),
    "q8_0": ("Q8_0", "Q8_0", ["Q8_0"] * 10, ["Q8_0"] * 10),
}
"""Head, embedding and queries, values, down projections of ten layers, as `llama_model_quantize` of
llama.cpp 0.5.0 made them of a model of this shape."""


@pytest.mark.parametrize("target", MIXTURES)
def test_each_tensor_gets_the_type_that_llama_cpp_gives_it(target: str) -> None:
    header = header_of(10)
    head, most, values, downs = MIXTURES[target]

    types = tensor_types(header, file_type(target))

    assert types["output.weight"].name == head
    assert types["token_embd.weight"].name == most
    assert types_of(header, target, "attn_v") == values
    assert types_of(header, target, "ffn_down") == downs
    for part in ("attn_q", "attn_k", "attn_output", "ffn_up", "ffn_gate"):
        assert types_of(header, target, part) == [most] * 10
    for part in ("attn_norm", "ffn_gate_inp"):
        assert types_of(header, target, part) == ["F32"] * 10


def test_every_target_was_compared() -> None:
    assert {name.lower() for name in TARGETS} == MIXTURES.keys()


def test_an_embedding_that_is_the_head_too_gets_the_heads_type() -> None:
    header = header_of(2)
    tied = {name: item for name, item in header.tensors.items() if name != "output.weight"}
    header = GgufHeader(
        path=header.path, version=3, alignment=32, metadata=header.metadata, tensors=tied
    )

    assert tensor_types(header, file_type("q4_0"))["token_embd.weight"] is GgmlType.Q6_K


@pytest.mark.parametrize(
    ("has_head", "expected"), [(False, {GgmlType.Q6_K}), (True, {GgmlType.Q4_0})]
)
def test_an_embedding_for_each_layer_gets_what_the_other_gets(
    has_head: bool, expected: set[GgmlType]
) -> None:
    header = header_of(1, further=("per_layer_token_embd.weight",))
    left_out = () if has_head else ("output.weight",)
    tensors = {name: it for name, it in header.tensors.items() if name not in left_out}

    types = tensor_types(replace(header, tensors=tensors), file_type("q4_0"))

    assert {kind for name, kind in types.items() if name.endswith("token_embd.weight")} == expected


def test_latent_keys_and_values_in_one_count_as_values() -> None:
    further = [f"blk.{layer}.attn_kv_b.weight" for layer in range(10)]
    header = header_of(10, architecture="deepseek2", further=further, without="attn_v")

    assert types_of(header, "q4_k_m", "attn_kv_b") == MIXTURES["q4_k_m"][2]


@pytest.mark.parametrize(
    "name",
    [
        "per_layer_model_proj.weight",
        "altup_proj.weight",
        "blk.0.altup_correct_coef.weight",
        "blk.0.laurel_l.weight",
        "blk.0.ssm_conv1d_q.weight",
        "blk.0.shortconv.conv.weight",
        "blk.0.indexer.k_proj.weight",
    ],
)
def test_small_matrices_stay_wherever_their_names_say_so(name: str) -> None:
    header = header_of(1, further=(name, "blk.0.indexer.attn_q_b.weight"))

    types = tensor_types(header, file_type("q4_k_m"))

    assert types[name] is GgmlType.F32
    assert types["blk.0.indexer.attn_q_b.weight"] is GgmlType.Q4_K


FALCON_DOWNS = {
    "q4_0": ["Q4_0"] * 16,
    "q4_k_s": ["Q4_K"] * 16,
    "q4_k_m": [
        "Q6_K" if layer == 0 else "Q5_K" if layer in (1, 4, 7, 10, 13, 14, 15) else "Q4_K"
        for layer in range(16)
    ],
    "q5_k_m": ["Q6_K" if layer in (0, 1, 4, 7, 10, 13, 14, 15) else "Q5_K" for layer in range(16)],
    "q6_k": ["Q6_K"] * 16,
}
"""Down projections of sixteen layers of a falcon, as llama.cpp 0.5.0 made them."""


@pytest.mark.parametrize("target", FALCON_DOWNS)
def test_falcons_bear_less_in_the_head_and_more_in_their_down_projections(target: str) -> None:
    header = header_of(16, architecture="falcon")

    assert tensor_types(header, file_type(target))["output.weight"] is GgmlType.Q8_0
    assert types_of(header, target, "ffn_down") == FALCON_DOWNS[target]


@pytest.mark.parametrize(
    ("target", "width", "expected"),
    [("q4_k_s", 96, "Q5_0"), ("q5_k_s", 96, "Q5_1"), ("q6_k", 96, "Q8_0"), ("q4_0", 40, "F16")],
)
def test_rows_that_are_no_whole_blocks_get_a_type_that_fits(
    target: str, width: int, expected: str
) -> None:
    assert set(types_of(header_of(4, width=width), target, "attn_q")) == {expected}


def test_eight_experts_get_more_bits_for_what_they_share() -> None:
    header = header_of(10, expert_count=8)

    assert set(types_of(header, "q4_0", "attn_v") + types_of(header, "q4_0", "attn_k")) == {"Q8_0"}
    assert set(types_of(header, "q4_k_m", "attn_output")) == {"Q5_K"}
    assert Counter(types_of(header, "q4_k_m", "ffn_down_exps")) == {"Q4_K": 5, "Q6_K": 5}


@pytest.mark.parametrize(
    ("architecture", "kv_heads", "expected"),
    [
        ("llama", 2, "Q5_K"),
        ("llama", 8, "Q4_K"),
        ("deci", 8, "Q5_K"),
        ("qwen2", 8, "Q5_K"),
        ("qwen3", 2, "Q4_K"),
    ],
)
def test_the_shared_values_of_70_b_models_get_more_bits(
    architecture: str, kv_heads: int, expected: str
) -> None:
    heads = {"attention.head_count": 8, "attention.head_count_kv": kv_heads}
    header = header_of(80, architecture=architecture, **heads)

    assert types_of(header, "q4_k_s", "attn_v")[-1] == expected


def test_an_unknown_type_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="quantised to 'q3'") as refused:
        file_type("q3")

    assert refused.value.fix == (
        "Use one of q4_0, q4_1, q4_k_s, q4_k_m, q5_0, q5_1, q5_k_s, q5_k_m, q6_k, q8_0."
    )
