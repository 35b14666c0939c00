"""Tiny random models of many architectures, saved as an ordinary model folder would be."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

LAYERS = 6
VOCABULARY = 160

_COMMON: dict[str, object] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
}

CONFIGS: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True, "rope_theta": 1e6},
    "gemma2": {"head_dim": 16},
    "phi3": {"rope_theta": 1e4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
    },
    "glm4": {
        "attention_bias": True,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "rope_theta": 1e4,
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "intermediate_size": 128,
        "state_size": 16,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": 4,
    },
    "gemma3_text": {
        "head_dim": 16,
        "num_key_value_heads": 1,
        "sliding_window": 48,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
    },
    "rwkv7": {
        "norm_eps": 1e-5,
        "head_dim": 16,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "sliding_window": 32,
        "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "qwen3_next": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "head_dim": 16,
        "full_attention_interval": 3,
    },
}
"""What each architecture needs beyond the common sizes."""


def save_model(folder: Path, architecture: str, **changes: object) -> Path:
    """Write a random model of an architecture and return its folder."""
    config = {"model_type": architecture, **_COMMON, **CONFIGS[architecture], **changes}
    source = importlib.import_module(f"mlx_lm.models.{architecture}")
    mx.random.seed(7)
    model = source.Model(source.ModelArgs.from_dict(config))
    # Fresh models start with zeros and ones in places where a wrong wiring would not show.
    model.update(tree_map(_jitter, model.parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def _jitter(array: mx.array) -> mx.array:
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array + 0.05 * mx.random.normal(array.shape)
