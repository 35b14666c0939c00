"""A GGUF as a llama configuration: right where it is plain, refused where it is anything more."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from shard_files import Value, gguf_bytes, llama_metadata, llama_tensors, zeros

from swarmpy.errors import ModelRefused
from swarmpy.shards.gguf import GgmlType, GgufHeader, parse_header
from swarmpy.shards.llama import llama_config

Tensors = Mapping[str, tuple[GgmlType, Sequence[int], bytes]]


def header_of(metadata: Mapping[str, Value], tensors: Tensors) -> GgufHeader:
    data = gguf_bytes(metadata, tensors)
    return parse_header(io.BytesIO(data), path=Path("x.gguf"), file_bytes=len(data))


def config_of(
    metadata: Mapping[str, Value] | None = None, tensors: Tensors | None = None
) -> dict[str, object]:
    return llama_config(
        header_of(llama_metadata() | dict(metadata or {}), llama_tensors() | dict(tensors or {}))
    )


def test_a_plain_llama_gives_its_configuration() -> None:
    assert config_of() == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "max_position_embeddings": 512,
        "vocab_size": 262,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def test_a_head_of_its_own_is_not_tied() -> None:
    config = config_of(tensors={"output.weight": zeros(GgmlType.Q8_0, (262, 64))})

    assert config["tie_word_embeddings"] is False


def test_an_end_of_turn_token_ends_a_reply_too() -> None:
    assert config_of({"tokenizer.ggml.eot_token_id": 2})["eos_token_id"] == [1, 2]


def test_linear_rope_scaling_is_carried_over() -> None:
    config = config_of({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})

    assert config["rope_scaling"] == {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("metadata", "tensors", "reason"),
    [
        ({"general.architecture": "gemma"}, {}, "architecture 'gemma' cannot be converted"),
        ({"llama.expert_count": 8}, {}, "mixtures of experts"),
        ({"split.count": 2}, {}, "several files"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "rope scaling 'yarn'"),
        ({"llama.rope.freq_base": math.nan}, {}, "freq_base is nan"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, {}, "epsilon is -1"),
        ({"llama.attention.head_count": 0}, {}, "0 heads"),
        ({"llama.attention.head_count_kv": 0}, {}, "do not share 0 key heads"),
        ({"llama.attention.key_length": 16}, {}, r"attn_q.weight' has shape"),
        ({"llama.attention.value_length": 16}, {}, "of one width"),
        ({"llama.rope.dimension_count": 16}, {}, "part of a head"),
        ({"llama.block_count": 1}, {}, r"'blk.1.attn_norm.weight' is not of a plain llama"),
        ({"llama.block_count": 3}, {}, r"'blk.2.attn_norm.weight' is missing"),
        ({"llama.block_count": 1 << 40}, {}, "num_hidden_layers is"),
        ({"llama.embedding_length": 128}, {}, "has shape"),
        ({}, {"rope_freqs.weight": zeros(GgmlType.F32, (16,))}, "rope frequency factors"),
        ({}, {"blk.0.attn_q.bias": zeros(GgmlType.F32, (64,))}, "not of a plain llama"),
        ({}, {"output.weight": zeros(GgmlType.Q6_K, (262, 256))}, "Q6_K, which cannot be"),
        ({}, {"output.weight": zeros(GgmlType.F16, (64, 262))}, "shape .64, 262., expected"),
    ],
)
def test_what_the_conversion_would_lose_is_refused(
    metadata: dict[str, Value], tensors: Tensors, reason: str
) -> None:
    with pytest.raises(ModelRefused, match=reason):
        config_of(metadata, tensors)


@pytest.mark.model
def test_the_default_model_has_its_known_configuration(default_model: GgufHeader) -> None:
    config = llama_config(default_model)

    assert (config["hidden_size"], config["num_hidden_layers"], config["head_dim"]) == (576, 30, 64)
    assert config["tie_word_embeddings"] is True
