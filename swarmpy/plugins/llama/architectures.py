"""Architectures that are run, where each may be cut, and what its state is; all others are refused.

A shard is run by llama.cpp's own code as if it were a whole model of that depth. Where that code
looks at a layer's number it is right only if cuts keep the layers' pattern, and some of it ends the
process otherwise. So an architecture is listed once a shard of it gave the whole's bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from swarmpy.abc import StateKind
from swarmpy.errors import ModelRefused
from swarmpy.shards.gguf import GgufHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How a model family may be cut."""

    period: int = 1
    """Cuts lie at multiples of it: the length of the pattern its layers repeat."""
    state_kind: StateKind = StateKind.KV


_PLAIN = Architecture()

ARCHITECTURES: Mapping[str, Architecture] = {
    "cohere2": Architecture(period=4),  # three layers with a window, one without
    "command-r": _PLAIN,
    "deepseek": _PLAIN,
    "ernie4_5": _PLAIN,
    "exaone": _PLAIN,
    "gemma3": Architecture(period=6),  # five layers with a window, one without
    "gpt-oss": Architecture(period=2),  # with and without a window, in turn
    "granite": _PLAIN,
    "granitemoe": _PLAIN,
    "hunyuan-dense": _PLAIN,
    "llama": _PLAIN,
    "mamba": Architecture(state_kind=StateKind.RECURRENT),
    "minimax-m2": _PLAIN,
    "olmo": _PLAIN,
    "olmo2": Architecture(period=4),  # as of version 3, three layers with a window, one without
    "phi2": _PLAIN,
    "phi3": _PLAIN,
    "phimoe": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2moe": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3moe": _PLAIN,
    "smollm3": Architecture(period=4),  # three layers with rope, one without, counted from 0
}
"""By the name in the file. Proven with random weights, by the bits of a prompt and the steps after
it (tests/plugins/test_llama_architectures.py).

Not here, and why: gemma and gemma2 scale what comes in as if it were an embedding, and glm4 ends
the process over it; some look at the tokens, or hand on more than the hidden state. jamba, lfm2,
qwen3next and granitehybrid need a layer of each kind in every shard, which is the model's pattern
and not the architecture's.
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
