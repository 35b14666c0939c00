"""A GGUF of the llama family as a config.json, with every tensor's name and shape held against it.

What the configuration cannot say (unknown tensors, rope factors, experts) is refused by name:
ignoring it would give a model that runs and is wrong.
Spec: protocols/manifest.md, section 4; names and keys are llama.cpp's and Hugging Face's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from swarmpy.errors import ModelRefused
from swarmpy.shards.gguf import CONVERTIBLE, GgufHeader
from swarmpy.shards.refusals import check_config
from swarmpy.shards.special_tokens import end_ids, special_token_id


def llama_config(header: GgufHeader) -> dict[str, object]:
    """Return the contents of config.json (model type "llama", unquantised) for a GGUF.

    Raises:
        ModelRefused: Another architecture, a feature or tensor type that is not converted, a tensor
            missing, unknown or of another shape, or sizes that contradict each other.
    """
    if header.architecture != "llama":
        raise ModelRefused(
            f"{header.path.name}: a GGUF of architecture {header.architecture!r:.40} cannot be "
            "converted (only 'llama'); use the model's safetensors folder"
        )
    _check_features(header)
    hidden_size = header.integer("llama.embedding_length")
    head_count = header.integer("llama.attention.head_count")
    if not 0 < head_count <= hidden_size:
        raise ModelRefused(f"{header.path.name}: {head_count} heads in a width of {hidden_size}")
    config: dict[str, object] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden_size,
        "num_hidden_layers": header.integer("llama.block_count"),
        "intermediate_size": header.integer("llama.feed_forward_length"),
        "num_attention_heads": head_count,
        "num_key_value_heads": header.integer("llama.attention.head_count_kv", head_count),
        "head_dim": header.integer("llama.attention.key_length", hidden_size // head_count),
        "rms_norm_eps": _number(header, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _number(header, "llama.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(header),
        "max_position_embeddings": header.integer("llama.context_length"),
        "vocab_size": len(header.texts("tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": special_token_id(header, "bos"),
        "eos_token_id": _end_tokens(header),
    }
    check_config(config, where=header.path.name)
    _check_tensors(header, config)
    return config


def _check_features(header: GgufHeader) -> None:
    """Refuse what the family allows and this conversion does not carry over."""
    name = header.path.name
    if header.integer("llama.expert_count", 0) != 0:
        raise ModelRefused(f"{name}: mixtures of experts cannot be converted from GGUF")
    if header.integer("split.count", 0) > 1:
        raise ModelRefused(f"{name}: a GGUF in several files cannot be converted; merge it first")
    if "rope_freqs.weight" in header.tensors:
        raise ModelRefused(f"{name}: rope frequency factors cannot be converted from GGUF")
    for tensor in header.tensors.values():
        if tensor.type not in CONVERTIBLE:
            known = ", ".join(sorted(kind.name for kind in CONVERTIBLE))
            raise ModelRefused(
                f"{name}: {tensor.name!r:.80} is {tensor.type.name}, which cannot be converted "
                f"(only {known})"
            )


def _number(header: GgufHeader, key: str, default: float | None = None) -> float:
    """A positive number, as the shortest decimal of its float32: 1e-05, not 9.99999974e-06."""
    value = header.number(key, default)
    if not (math.isfinite(value) and value > 0):
        raise ModelRefused(f"{header.path.name}: {key} is {value}, expected a positive number")
    return float(f"{value:.7g}")


def _rope_scaling(header: GgufHeader) -> dict[str, object] | None:
    kind = header.text("llama.rope.scaling.type", "none")
    match kind:
        case "none":
            return None
        case "linear":
            return {"type": "linear", "factor": _number(header, "llama.rope.scaling.factor")}
        case _:
            raise ModelRefused(
                f"{header.path.name}: rope scaling {kind!r:.40} cannot be converted from GGUF"
            )


def _end_tokens(header: GgufHeader) -> int | list[int] | None:
    """The tokens that end a reply: a list where there are several."""
    known = sorted(end_ids(header))
    return known if len(known) > 1 else known[0] if known else None


def _check_tensors(header: GgufHeader, config: Mapping[str, object]) -> None:
    """Hold every tensor's name and shape against the configuration; both ways round."""
    expected = _expected_shapes(header, config)
    name = header.path.name
    for key, tensor in header.tensors.items():
        if key not in expected:
            raise ModelRefused(f"{name}: tensor {key!r:.80} is not of a plain llama model")
        if tensor.shape != expected[key]:
            raise ModelRefused(
                f"{name}: tensor {key!r:.80} has shape {tensor.shape}, expected {expected[key]}"
            )
    for key in expected:
        if key not in header.tensors:
            raise ModelRefused(f"{name}: tensor {key!r} is missing")


def _expected_shapes(
    header: GgufHeader, config: Mapping[str, object]
) -> dict[str, tuple[int, ...]]:
    """Row-major shapes by tensor name."""
    width, inner, vocabulary, head, heads, kv_heads, layers = (
        _size(config, key)
        for key in (
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "head_dim",
            "num_attention_heads",
            "num_key_value_heads",
            "num_hidden_layers",
        )
    )
    if not kv_heads or heads % kv_heads or head % 2:
        raise ModelRefused(
            f"{header.path.name}: {heads} heads of {head} do not share {kv_heads} key heads"
        )
    if header.integer("llama.rope.dimension_count", head) != head:
        raise ModelRefused(f"{header.path.name}: a rope over part of a head cannot be converted")
    if header.integer("llama.attention.value_length", head) != head:
        raise ModelRefused(f"{header.path.name}: keys and values must be of one width")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, width),
        "output_norm.weight": (width,),
    }
    if "output.weight" in header.tensors:
        shapes["output.weight"] = (vocabulary, width)
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (width,),
            f"blk.{layer}.attn_q.weight": (heads * head, width),
            f"blk.{layer}.attn_k.weight": (kv_heads * head, width),
            f"blk.{layer}.attn_v.weight": (kv_heads * head, width),
            f"blk.{layer}.attn_output.weight": (width, heads * head),
            f"blk.{layer}.ffn_norm.weight": (width,),
            f"blk.{layer}.ffn_gate.weight": (inner, width),
            f"blk.{layer}.ffn_up.weight": (inner, width),
            f"blk.{layer}.ffn_down.weight": (width, inner),
        }
    return shapes


def _size(config: Mapping[str, object], key: str) -> int:
    """A size that `check_config` has found whole and in range."""
    value = config[key]
    assert isinstance(value, int)
    return value
