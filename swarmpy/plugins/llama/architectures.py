"""Architectures that are run, where each may be cut, and what its state is; all others are refused.

A shard is run by llama.cpp's own code as if it were a whole model of that depth. Where that code
looks at a layer's number it is right only if cuts keep the layers' pattern, and some of it ends the
process otherwise. So an architecture is listed once shards of it gave the whole's bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from swarmpy.errors import ModelRefused
from swarmpy.plugins.llama.structs import SEQUENCES_MAX
from swarmpy.shards.gguf import GgufHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How a model family may be cut, and how a part of it is run."""

    period: int = 1
    """Shards begin at multiples of it: what a layer computes follows from its number."""
    period_key: tuple[str, int] | None = None
    """Metadata that states another such number, and what it is where it is absent."""
    entry_node: str = ""
    """Node of a graph that the hidden states which come in replace, token ids of 0 standing in for
    them; empty where the library takes states as they are."""
    exit_node: str = "l_out-{}"
    """What a graph calls the hidden state behind its last layer, whose number is filled in."""
    needs_full: bool = False
    """Every shard needs a layer without a window, not only one with."""
    begins_with_attention: bool = False
    """Shards begin with a layer that has attention, from which the library takes sizes for all."""
    is_parallel: bool = False
    """Recurrent layers have attention as well."""
    slots_max: int = SEQUENCES_MAX
    """1 where the library ends the process over several sequences."""


PLAIN = Architecture()

_IN_EMBEDDING = Architecture(entry_node="embd")
"""Takes states for images, and gives those four positions or weights of their own."""

ARCHITECTURES: Mapping[str, Architecture] = {
    "afmoe": Architecture(period=4, entry_node="inp_embd_scaled"),
    "apertus": PLAIN,
    "arcee": PLAIN,
    "arctic": PLAIN,
    "baichuan": PLAIN,
    "bailingmoe": PLAIN,
    "bailingmoe2": PLAIN,
    "bitnet": PLAIN,
    "bloom": Architecture(entry_node="inp_norm-0"),
    "chatglm": PLAIN,
    "codeshell": PLAIN,
    "cogvlm": _IN_EMBEDDING,
    "cohere2": PLAIN,
    "cohere2moe": PLAIN,
    "command-r": PLAIN,
    "dbrx": PLAIN,
    "deci": Architecture(begins_with_attention=True),
    "deepseek": PLAIN,
    "deepseek2": PLAIN,
    "deepseek32": PLAIN,
    "dots1": PLAIN,
    "ernie4_5": PLAIN,
    "ernie4_5-moe": PLAIN,
    "exaone": PLAIN,
    "exaone-moe": PLAIN,
    "exaone4": PLAIN,
    "falcon": PLAIN,
    "falcon-h1": Architecture(is_parallel=True),
    "gemma": Architecture(entry_node="inp_scaled"),
    "gemma2": Architecture(entry_node="inp_scaled"),
    "gemma3": PLAIN,
    "gemma4": Architecture(needs_full=True),
    "glm-dsa": PLAIN,
    "glm4": _IN_EMBEDDING,
    "glm4moe": _IN_EMBEDDING,
    "gpt-oss": PLAIN,
    "gpt2": PLAIN,
    "gptneox": PLAIN,
    "granite": PLAIN,
    "granitehybrid": PLAIN,
    "granitemoe": PLAIN,
    "grok": PLAIN,
    "grovemoe": PLAIN,
    "hunyuan-dense": PLAIN,
    "hunyuan-moe": PLAIN,
    "hunyuan_vl": _IN_EMBEDDING,
    "hy_v3": PLAIN,
    "internlm2": PLAIN,
    "jais": PLAIN,
    "jais2": PLAIN,
    "jamba": PLAIN,
    "kimi-linear": Architecture(slots_max=1),
    "laguna": PLAIN,
    "lfm2": PLAIN,
    "lfm2moe": PLAIN,
    "llama": PLAIN,
    "llama4": Architecture(period=4, period_key=("interleave_moe_layer_step", 1)),
    "maincoder": PLAIN,
    "mamba": PLAIN,
    "mamba2": PLAIN,
    "mellum": PLAIN,
    "mimo2": Architecture(exit_node="h_nextn"),
    "minicpm": PLAIN,
    "minicpm3": PLAIN,
    "minimax-m2": PLAIN,
    "minimax-m3": PLAIN,
    "mistral3": PLAIN,
    "mistral4": PLAIN,
    "mpt": PLAIN,
    "nanbeige": PLAIN,
    "nemotron": PLAIN,
    "nemotron_h": Architecture(exit_node="nemotron_h_block_out-{}"),
    "nemotron_h_moe": Architecture(exit_node="nemotron_h_block_out-{}"),
    "olmo": PLAIN,
    "olmo2": PLAIN,
    "olmoe": PLAIN,
    "openelm": PLAIN,
    "orion": PLAIN,
    "paddleocr": _IN_EMBEDDING,
    "pangu-embedded": PLAIN,
    "phi2": PLAIN,
    "phi3": PLAIN,
    "phimoe": PLAIN,
    "plamo": PLAIN,
    "plamo2": Architecture(exit_node="ffn_residual-{}"),
    "plamo3": PLAIN,
    "qwen": PLAIN,
    "qwen2": PLAIN,
    "qwen2moe": PLAIN,
    "qwen2vl": _IN_EMBEDDING,
    "qwen3": PLAIN,
    "qwen35": Architecture(
        period_key=("full_attention_interval", 4), entry_node="model.input_embed"
    ),
    "qwen35moe": Architecture(
        period_key=("full_attention_interval", 4), entry_node="model.input_embed"
    ),
    "qwen3moe": PLAIN,
    "qwen3next": Architecture(period_key=("full_attention_interval", 4)),
    "qwen3vl": _IN_EMBEDDING,
    "qwen3vlmoe": _IN_EMBEDDING,
    "refact": PLAIN,
    "seed_oss": PLAIN,
    "smollm3": Architecture(period=4),
    "stablelm": PLAIN,
    "starcoder": PLAIN,
    "starcoder2": PLAIN,
    "step35": Architecture(exit_node="h_nextn"),
    "xverse": PLAIN,
}
"""By the name in the file. Proven with random weights, by bits (tests/plugins/
test_llama_architectures.py): cut at every layer where a cut is allowed, and in two and three parts;
several sessions at once; cut back, restored, and moved to another shard.

Not here, and why: rwkv7 and talkie hand on more than the hidden state; smallthinker gives other
numbers in parts; gemma3n feeds the token ids to each of its layers.
"""


def architecture_of(header: GgufHeader) -> Architecture:
    """Return how a file's architecture may be cut.

    Raises:
        ModelRefused: It is not listed.
    """
    name = header.architecture
    if name not in ARCHITECTURES:
        raise ModelRefused(
            f"{header.path.name}: architecture {name!r:.40} is none the llama engine runs "
            f"(it runs {', '.join(sorted(ARCHITECTURES))})"
        )
    return ARCHITECTURES[name]


def period_of(header: GgufHeader) -> int:
    """Return the number of whose multiples shards of a model begin.

    Raises:
        ModelRefused: The header states one that cannot be.
    """
    architecture = architecture_of(header)
    if architecture.period_key is None:
        return architecture.period
    key, default = architecture.period_key
    stated = header.integer(f"{header.architecture}.{key}", default)
    if not 0 < stated <= PERIOD_MAX:
        raise ModelRefused(f"{header.path.name}: {key} of {stated}, expected 1 to {PERIOD_MAX}")
    return math.lcm(architecture.period, stated)


PERIOD_MAX = 1024
"""Longest pattern of layers; no model has more layers."""
