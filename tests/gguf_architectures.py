"""Metadata of tiny models, by architecture: the least with which llama.cpp loads and runs each.

Windows are shorter than the tests' prompts, and variants have the depths by which llama.cpp tells
models of one architecture apart. Keys are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float]

VOCABULARY = 64
WIDTH = 64
LAYERS = 6
"""Can be cut into two and three equal parts; a longer period needs more (`_layers`)."""

COMMON: Mapping[str, Value] = {
    "block_count": LAYERS,
    "context_length": 256,
    "embedding_length": WIDTH,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 16,
    "vocab_size": VOCABULARY,
}
"""Every model's metadata; `<architecture>.` goes before each key."""

_HEADS_OF_32: Mapping[str, Value] = {
    # Wider than embedding_length / head_count, as in these families: two scales, both visible.
    "attention.key_length": 32,
    "attention.value_length": 32,
    "rope.dimension_count": 32,
}
_WINDOW: Mapping[str, Value] = {"attention.sliding_window": 8}
_EXPERTS: Mapping[str, Value] = {
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_feed_forward_length": 32,
}
_SHARED_EXPERTS: Mapping[str, Value] = {
    **_EXPERTS,
    "expert_shared_count": 1,
    "expert_shared_feed_forward_length": 32,
}
_ROUTED: Mapping[str, Value] = {
    **_SHARED_EXPERTS,
    "leading_dense_block_count": 1,
    "expert_weights_scale": 1.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
}
_LATENT_LITE: Mapping[str, Value] = {
    "attention.kv_lora_rank": 16,
    "attention.key_length": 24,
    "attention.value_length": 16,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "attention.head_count_kv": 1,
    "rope.dimension_count": 8,
}
_LATENT: Mapping[str, Value] = {**_LATENT_LITE, "attention.q_lora_rank": 24}
_INDEXER: Mapping[str, Value] = {
    "attention.indexer.head_count": 1,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 8,
}
_SCALES: Mapping[str, Value] = {
    "logit_scale": 0.5,
    "embedding_scale": 12.0,
    "residual_scale": 0.22,
    "attention.scale": 0.0625,
}
_STATE_SPACE: Mapping[str, Value] = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 128,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
}
_STATE_SPACE_2: Mapping[str, Value] = {
    **_STATE_SPACE,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 2,
}
_NO_ATTENTION: Mapping[str, Value] = {
    "attention.head_count": 0,
    "attention.head_count_kv": 0,
    "feed_forward_length": 0,
}
_SECTIONS: Mapping[str, Value] = {"rope.dimension_sections": [2, 3, 3, 0]}


def _layers(count: int) -> Mapping[str, Value]:
    return {"block_count": count}


def _attention_in(*pattern: int) -> Mapping[str, Value]:
    """Key/value heads by layer; 0 where another kind of layer stands."""
    return {"attention.head_count_kv": list(pattern) * (LAYERS // len(pattern))}


_NARROW: Mapping[str, Value] = {
    # For the deep ones, to stay small.
    "embedding_length": 32,
    "feed_forward_length": 48,
    "rope.dimension_count": 8,
}

_WIDE: Mapping[str, Value] = {
    # A row of 256 for each block of numbers that share their scales.
    "embedding_length": 256,
    "feed_forward_length": 256,
    "rope.dimension_count": 64,
    "block_count": 3,
}

_DELTA_NET: Mapping[str, Value] = {
    **_STATE_SPACE,
    **_layers(12),
    "ssm.inner_size": 64,
    "ssm.group_count": 2,
    "full_attention_interval": 4,
    "attention.key_length": 16,
    "attention.value_length": 16,
}

MODELS: Mapping[str, Mapping[str, Value]] = {
    "afmoe": {**_ROUTED, **_WINDOW, **_layers(12)},
    "apertus": {
        "xielu.alpha_n": [0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
        "xielu.alpha_p": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
        "xielu.beta": [0.5] * LAYERS,
        "xielu.eps": [-1e-6] * LAYERS,
    },
    "arcee": {},
    "arctic": _EXPERTS,
    "baichuan": {},
    "baichuan+13b": {**_NARROW, **_layers(40)},
    "bailingmoe": _ROUTED,
    "bailingmoe2": _ROUTED,
    "bitnet": {},
    "bloom": {},
    "chatglm": {},
    "codeshell": {},
    "cogvlm": {},
    "cohere2": {**_WINDOW, **_layers(12), "logit_scale": 0.5},
    "cohere2moe": {
        **_EXPERTS,
        **_WINDOW,
        **_layers(12),
        "logit_scale": 0.5,
        "attention.sliding_window_pattern": [True, True, True, False] * 3,
        "leading_dense_block_count": 1,
    },
    "command-r": {"logit_scale": 0.5},
    "command-r+plus": {**_NARROW, **_layers(64), "logit_scale": 0.5},
    "command-r+q8_0": {"logit_scale": 0.5},
    "dbrx": {**_EXPERTS, "attention.clamp_kqv": 8.0},
    "deci": {},
    "deci+uneven": {
        # Layers without attention, without all but its output, and without a feed-forward.
        "attention.head_count": [4, 0, 4, 4, 0, 4],
        "attention.head_count_kv": [2, 0, 0, 1, 0, 2],
        "feed_forward_length": [96, 96, 32, 0, 64, 96],
    },
    "deepseek": _ROUTED,
    "deepseek2": {**_ROUTED, **_LATENT},
    "deepseek2+lite": {**_NARROW, **_ROUTED, **_LATENT_LITE, **_layers(27)},
    "deepseek32": {**_ROUTED, **_LATENT, **_INDEXER},
    "dots1": {**_ROUTED, "attention.head_count_kv": 4},
    "ernie4_5": {},
    "ernie4_5-moe": {**_ROUTED, "interleave_moe_layer_step": 1},
    "exaone": {},
    "exaone-moe": {**_ROUTED, **_WINDOW, **_layers(12)},
    "exaone4": {},
    "exaone4+32b": {**_NARROW, **_WINDOW, **_layers(64)},
    "falcon": {},
    "falcon-h1": _STATE_SPACE_2,
    "gemma": _HEADS_OF_32,
    "gemma2": {
        **_WINDOW,
        **_HEADS_OF_32,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma2+q8_0": {**_WINDOW, **_HEADS_OF_32},
    "gemma2+27b": {**_NARROW, **_WINDOW, **_HEADS_OF_32, **_layers(46)},
    "gemma3": {**_WINDOW, **_HEADS_OF_32, **_layers(18)},
    "gemma3+q4_0": {**_WINDOW, **_HEADS_OF_32, **_layers(12)},
    "gemma3+stated": {
        **_WINDOW,
        **_HEADS_OF_32,
        **_layers(12),
        "attention.sliding_window_pattern": 3,
    },
    "gemma3+27b": {**_NARROW, **_WINDOW, **_HEADS_OF_32, **_layers(62)},
    "gemma4": {
        **_WINDOW,
        **_HEADS_OF_32,
        **_layers(12),
        "attention.key_length_swa": 16,
        "attention.value_length_swa": 16,
        "attention.shared_kv_layers": 0,
        "attention.sliding_window_pattern": [True, True, True, False] * 3,
        "embedding_length_per_layer_input": 0,
        "rope.dimension_count_swa": 16,
        "rope.freq_base_swa": 1e4,
    },
    "gemma4+e2b": {
        **_WINDOW,
        **_HEADS_OF_32,
        **_layers(12),
        "attention.key_length_swa": 16,
        "attention.value_length_swa": 16,
        "attention.shared_kv_layers": 4,
        "attention.sliding_window_pattern": [True, True, True, False] * 3,
        "embedding_length_per_layer_input": 16,
        "rope.dimension_count_swa": 16,
        "rope.freq_base_swa": 1e4,
    },
    "glm-dsa": {**_ROUTED, **_LATENT, **_INDEXER},
    "glm4": {},
    "glm4moe": _ROUTED,
    "glm4moe+next": {**_ROUTED, **_layers(7), "nextn_predict_layers": 1},
    "gpt-oss": {
        **_EXPERTS,
        **_WINDOW,
        "attention.key_length": 16,
        "attention.value_length": 16,
    },
    "gpt2": {},
    "gptneox": {"use_parallel_residual": True},
    "gptneox+serial": {"use_parallel_residual": False},
    "granite": _SCALES,
    "granitehybrid": {**_STATE_SPACE_2, **_SHARED_EXPERTS, **_SCALES, **_attention_in(0, 2)},
    "granitemoe": {**_EXPERTS, **_SCALES, "expert_shared_feed_forward_length": 32},
    "grok": {**_EXPERTS, "logit_scale": 0.5},
    "grovemoe": {
        **_EXPERTS,
        "expert_chunk_feed_forward_length": 16,
        "expert_group_scale": 0.05,
        "experts_per_group": 2,
    },
    "hunyuan-dense": {},
    "hunyuan-moe": _SHARED_EXPERTS,
    "hunyuan_vl": _SECTIONS,
    "hy_v3": _ROUTED,
    "internlm2": {},
    "jais": {"attention.max_alibi_bias": 8.0},
    "jais2": {},
    "jamba": {**_STATE_SPACE, **_EXPERTS, **_attention_in(0, 2)},
    "kimi-linear": {
        **_ROUTED,
        **_LATENT,
        **_attention_in(0, 1),
        "kda.head_dim": 16,
        "ssm.conv_kernel": 4,
    },
    "laguna": {**_ROUTED, **_WINDOW, **_layers(12)},
    "lfm2": {**_attention_in(0, 2), "shortconv.l_cache": 3},
    "lfm2moe": {
        **_EXPERTS,
        **_attention_in(0, 2),
        "shortconv.l_cache": 3,
        "leading_dense_block_count": 2,
        "expert_gating_func": 2,
    },
    "llama": {},
    "llama+experts": _EXPERTS,
    "llama+q4_0": {},
    "llama+q4_k": _WIDE,
    "llama+q6_k": _WIDE,
    "llama+q8_0": {},
    "llama+tied": {},
    "llama4": {**_EXPERTS, **_layers(12), "interleave_moe_layer_step": 2},
    "llama4+scout": {**_EXPERTS, **_layers(12), "interleave_moe_layer_step": 1},
    "maincoder": {},
    "mamba": {**_STATE_SPACE, **_NO_ATTENTION},
    "mamba2": {**_STATE_SPACE_2, **_NO_ATTENTION},
    "mellum": {**_EXPERTS, **_WINDOW, **_layers(12)},
    "mimo2": {**_EXPERTS, **_WINDOW, "attention.sliding_window_pattern": [True, False] * 3},
    "minicpm": {},
    "minicpm+scales": _SCALES,
    "minicpm3": {
        "attention.q_lora_rank": 24,
        "attention.kv_lora_rank": 16,
        "attention.key_length": 24,
        "attention.value_length": 16,
        "attention.head_count_kv": 4,
        "rope.dimension_count": 8,
    },
    "minimax-m2": {**_EXPERTS, "expert_gating_func": 2},
    "minimax-m3": {
        **_ROUTED,
        **_INDEXER,
        "attention.indexer.head_count": 2,
        "attention.indexer.key_length": 16,
        "attention.indexer.block_size": 4,
        "attention.indexer.local_blocks": 1,
    },
    "mistral3": {},
    "mistral4": {**_ROUTED, **_LATENT},
    "mpt": {"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 6.0},
    "nanbeige": {},
    "nemotron": {},
    "nemotron_h": {
        **_STATE_SPACE_2,
        **_layers(12),
        "attention.head_count_kv": [0, 2, 0] * 4,
        "feed_forward_length": [0, 0, 96] * 4,
    },
    "nemotron_h_moe": {
        **_STATE_SPACE_2,
        **_SHARED_EXPERTS,
        **_layers(12),
        "attention.head_count_kv": [0, 2, 0] * 4,
        "feed_forward_length": [0, 0, 96] * 4,
    },
    "olmo": {"attention.clamp_kqv": 8.0},
    "olmo2": {},
    "olmo2+window": {**_WINDOW, **_layers(12)},
    "olmoe": {**_EXPERTS, "attention.head_count_kv": 4},
    "openelm": {},
    "openelm+uneven": {
        "attention.head_count": [4, 4, 4, 8, 8, 8],
        "attention.head_count_kv": [1, 1, 2, 2, 4, 4],
        "attention.key_length": 16,
        "attention.value_length": 16,
        "feed_forward_length": [64, 64, 96, 96, 128, 128],
    },
    "orion": {},
    "paddleocr": _SECTIONS,
    "pangu-embedded": {},
    "phi2": {},
    "phi3": _WINDOW,
    "phimoe": _EXPERTS,
    "plamo": {},
    "plamo2": {
        **_STATE_SPACE_2,
        **_attention_in(0, 2),
        "ssm.group_count": 0,
        "attention.key_length": 16,
        "attention.value_length": 16,
    },
    "plamo3": {**_WINDOW, "attention.sliding_window_pattern": 2},
    "qwen": {},
    "qwen2": {},
    "qwen2+tied": {},
    "qwen2moe": _SHARED_EXPERTS,
    "qwen2vl": _SECTIONS,
    "qwen3": {},
    "qwen35": {**_DELTA_NET, **_SECTIONS},
    "qwen35moe": {**_DELTA_NET, **_SECTIONS, **_SHARED_EXPERTS},
    "qwen3moe": _EXPERTS,
    "qwen3next": {**_DELTA_NET, **_SHARED_EXPERTS},
    "qwen3vl": {**_SECTIONS, "n_deepstack_layers": 3},
    "qwen3vl+q8_0": {**_SECTIONS, "n_deepstack_layers": 3},
    "qwen3vlmoe": {**_SECTIONS, **_EXPERTS, "n_deepstack_layers": 3},
    "refact": {},
    "rwkv7": {
        "wkv.head_size": 16,
        "feed_forward_length": 128,
        "attention.decay_lora_rank": 8,
        "attention.iclr_lora_rank": 8,
        "attention.value_residual_mix_lora_rank": 8,
        "attention.gate_lora_rank": 8,
        "token_shift_count": 2,
    },
    "seed_oss": {},
    "smallthinker": {**_EXPERTS, **_WINDOW, **_layers(12), "expert_gating_func": 2},
    "smollm3": _layers(12),
    "stablelm": {},
    "starcoder": {},
    "starcoder2": {},
    "step35": {
        **_SHARED_EXPERTS,
        **_WINDOW,
        "attention.sliding_window_pattern": [True, False] * 3,
        "leading_dense_block_count": 1,
    },
    "talkie": {"logit_scale": 0.5},
    "xverse": {},
}
"""Metadata beyond `COMMON`, by architecture; behind a plus sign, which of its variants."""
