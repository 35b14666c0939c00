"""Every architecture quantised: which of its matrices stay, and that what comes of it runs.

llama.cpp ends a process, or gives other numbers, where a matrix that it wants in full is quantised.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
from gguf_models import write_models

from swarmpy.errors import ExtensionNotFound
from swarmpy.plugins.llama.architectures import ARCHITECTURES
from swarmpy.plugins.llama.library import find_library
from swarmpy.shards.gguf import read_header

try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)

import llama_quantised
from llama_cuts import check_models

TARGET = "q4_0"

EVERYWHERE: Mapping[str, str] = {"F32": "ffn_gate_inp", "Q8_0": "output"}
"""Matrices that are not Q4_0, by type, in each model that has them."""

FURTHER: Mapping[str, Mapping[str, str]] = {
    "bitnet": {"Q8_0": "token_embd"},
    "cohere2": {"Q8_0": "token_embd"},
    "command-r": {"Q8_0": "token_embd"},
    "deepseek2": {"F16": "attn_k_b attn_q_b attn_v_b"},
    "deepseek32": {"F16": "attn_k_b attn_q_b attn_v_b indexer.attn_q_b"},
    "falcon-h1": {"F32": "ssm_a ssm_conv1d ssm_d ssm_norm"},
    "gemma": {"Q8_0": "token_embd"},
    "gemma2": {"Q8_0": "token_embd"},
    "gemma4+e2b": {"F16": "proj", "F32": "per_layer_model_proj"},
    "glm-dsa": {"F16": "attn_k_b attn_q_b attn_v_b indexer.attn_q_b"},
    "gpt-oss": {"F32": "ffn_down_exps.bias ffn_gate_exps.bias ffn_up_exps.bias"},
    "gpt2": {"F32": "position_embd"},
    "granitehybrid": {"F32": "ssm_a ssm_conv1d ssm_d ssm_norm"},
    "grovemoe": {"F16": "ffn_down_chexps"},
    "jamba": {"F16": "ssm_dt", "F32": "ssm_a ssm_conv1d"},
    "kimi-linear": {
        "F16": "attn_k_b attn_v_b ssm_f_b ssm_g_b",
        "F32": "ssm_a ssm_conv1d_k ssm_conv1d_q ssm_conv1d_v",
    },
    "lfm2": {"F32": "shortconv.conv"},
    "lfm2moe": {"F32": "shortconv.conv"},
    "llama+tied": {"Q8_0": "token_embd"},
    "mamba": {"F16": "ssm_dt", "F32": "ssm_a ssm_conv1d"},
    "mamba2": {"F32": "ssm_a ssm_conv1d ssm_d ssm_norm"},
    "minicpm3": {"F16": "attn_kv_b attn_q_b"},
    "minimax-m3": {"F32": "indexer.k_proj indexer.q_proj"},
    "mistral4": {"F16": "attn_k_b attn_q_b attn_v_b"},
    "mpt": {"F32": "position_embd"},
    "nemotron_h": {"F32": "ssm_a ssm_conv1d ssm_d ssm_norm"},
    "nemotron_h_moe": {"F32": "ssm_a ssm_conv1d ssm_d ssm_norm"},
    "openelm": {"Q8_0": "token_embd"},
    "plamo2": {"F32": "attn_k_norm attn_q_norm ssm_conv1d"},
    "qwen": {"F16": "ffn_down"},
    "qwen2+tied": {"Q8_0": "token_embd"},
    "qwen35": {"F32": "ssm_conv1d"},
    "qwen35moe": {"F32": "ssm_conv1d"},
    "qwen3next": {"F32": "ssm_conv1d"},
    "stablelm": {"F32": "attn_k_norm attn_q_norm"},
    "starcoder": {"F32": "position_embd"},
}
"""Those of single models, as `llama_model_quantize` of llama.cpp 0.5.0 wrote the same files; F16
where rows are no whole blocks of 32."""

MODELS = sorted({*ARCHITECTURES, *(name for name in FURTHER if "+" in name)})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"), MODELS)


@pytest.fixture(scope="module")
def errors(models: dict[str, Path]) -> dict[str, dict[str, str]]:
    """What came of each model, quantised and run once: all in one child, as long as it lives."""
    checks = {name: [TARGET] for name in MODELS}
    return check_models(models, checks, child=Path(llama_quantised.__file__))


@pytest.mark.parametrize("name", MODELS)
def test_a_quantised_model_runs(name: str, errors: dict[str, dict[str, str]]) -> None:
    assert not errors[name][TARGET], errors[name][TARGET]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("errors")
def test_llama_cpp_keeps_the_same_matrices(name: str, models: dict[str, Path]) -> None:
    written = llama_quantised.quantised_path(models[name], TARGET)

    types = types_by_matrix(written)

    kept = {part: kinds for part, kinds in types.items() if kinds != {"Q4_0"}}
    listed = by_matrix(EVERYWHERE) | by_matrix(FURTHER.get(name, {}))
    assert kept == {part: kinds for part, kinds in listed.items() if part in types}
    assert by_matrix(FURTHER.get(name, {})).keys() <= types.keys()


def types_by_matrix(path: Path) -> dict[str, set[str]]:
    """The types of each kind of matrix of a file, by its name within a layer."""
    types = defaultdict(set)
    for tensor in read_header(path).tensors.values():
        if len(tensor.shape) > 1:
            part = re.sub(r"^blk\.[0-9]+\.", "", tensor.name).removesuffix(".weight")
            types[part].add(tensor.type.name)
    return types


def by_matrix(parts_by_type: Mapping[str, str]) -> dict[str, set[str]]:
    return {part: {kind} for kind, parts in parts_by_type.items() for part in parts.split()}
