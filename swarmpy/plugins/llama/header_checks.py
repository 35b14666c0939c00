"""Numbers of a GGUF's header that end the library's process, or keep it busy for ever, if wrong.

llama.cpp asserts them only while it loads or computes. Checked are those that are known to matter:
found by changing one value after another in a model of each architecture. What is left is
contained by the engine's child process, which may be lost.
The bounds are llama.cpp's own, of the release that the engine pins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from swarmpy.errors import ModelRefused
from swarmpy.shards.gguf import GgufHeader, MetadataValue
from swarmpy.shards.gguf_cut import layer_count, sliding_layers
from swarmpy.shards.refusals import SIZES_MAX

LAYERS_MAX = 512
"""`LLAMA_MAX_LAYERS`."""

EXPERTS_MAX = 1024
"""`LLAMA_MAX_EXPERTS`."""

GATING_MAX = 4
"""Largest of the ways to weigh experts (`llama_expert_gating_func_type`)."""

_CONTEXT_MAX = SIZES_MAX["max_position_embeddings"]
_WIDTH_MAX = SIZES_MAX["intermediate_size"]
_HEAD_MAX = SIZES_MAX["head_dim"]
_HEADS_MAX = SIZES_MAX["num_attention_heads"]

_RANGES: Mapping[str, tuple[int, int]] = {
    "attention.head_count": (0, _HEADS_MAX),
    "attention.head_count_kv": (0, _HEADS_MAX),
    "attention.indexer.block_size": (1, _CONTEXT_MAX),
    "attention.indexer.head_count": (1, _HEADS_MAX),
    "attention.indexer.key_length": (1, _HEAD_MAX),
    "attention.indexer.local_blocks": (0, _CONTEXT_MAX),
    "attention.indexer.top_k": (1, _CONTEXT_MAX),
    "attention.key_length": (1, _HEAD_MAX),
    "attention.key_length_mla": (1, _HEAD_MAX),
    "attention.key_length_swa": (1, _HEAD_MAX),
    "attention.sliding_window": (0, _CONTEXT_MAX),
    "attention.value_length": (1, _HEAD_MAX),
    "attention.value_length_mla": (1, _HEAD_MAX),
    "attention.value_length_swa": (1, _HEAD_MAX),
    "block_count": (1, LAYERS_MAX),
    "expert_chunk_feed_forward_length": (0, _WIDTH_MAX),
    "expert_count": (0, EXPERTS_MAX),
    "expert_feed_forward_length": (0, _WIDTH_MAX),
    "expert_gating_func": (0, GATING_MAX),
    "expert_group_count": (0, EXPERTS_MAX),
    "expert_group_used_count": (0, EXPERTS_MAX),
    "expert_shared_count": (0, EXPERTS_MAX),
    "expert_shared_feed_forward_length": (0, _WIDTH_MAX),
    "expert_used_count": (0, EXPERTS_MAX),
    "experts_per_group": (1, EXPERTS_MAX),
    "feed_forward_length": (0, _WIDTH_MAX),
    "interleave_moe_layer_step": (1, LAYERS_MAX),
    "kda.head_dim": (1, _HEAD_MAX),
    "rope.dimension_count": (0, _HEAD_MAX),
    "rope.dimension_count_swa": (0, _HEAD_MAX),
    "rope.dimension_sections": (0, _HEAD_MAX),
    "shortconv.l_cache": (1, _HEAD_MAX),
    "ssm.conv_kernel": (1, _HEAD_MAX),
    "ssm.group_count": (0, _WIDTH_MAX),
    "ssm.inner_size": (1, _WIDTH_MAX),
    "ssm.state_size": (1, _HEAD_MAX),
    "ssm.time_step_rank": (1, _WIDTH_MAX),
}
"""Least and largest number by key, stated once or for each layer."""

_NOT_NEGATIVE = ("_epsilon", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor")
"""How keys end whose numbers are finite and at least 0."""

_NEEDS_GATING = frozenset(
    {
        "bailingmoe2",
        "deepseek32",
        "dots1",
        "exaone-moe",
        "kimi-linear",
        "lfm2moe",
        "minimax-m2",
        "minimax-m3",
    }
)
"""Architectures without a default for `expert_gating_func`."""

_ROTATES_ALL = frozenset(
    {
        "arctic",
        "baichuan",
        "codeshell",
        "cohere2moe",
        "dbrx",
        "deepseek",
        "dots1",
        "ernie4_5",
        "ernie4_5-moe",
        "grok",
        "grovemoe",
        "hunyuan-dense",
        "hunyuan-moe",
        "hunyuan_vl",
        "hy_v3",
        "internlm2",
        "jais2",
        "maincoder",
        "mellum",
        "olmo",
        "olmo2",
        "olmoe",
        "orion",
        "paddleocr",
        "plamo",
        "qwen2",
        "qwen2moe",
        "qwen2vl",
        "qwen3",
        "qwen3moe",
        "qwen3vl",
        "qwen3vlmoe",
        "seed_oss",
        "smollm3",
        "starcoder2",
        "xverse",
    }
)
"""Architectures that rotate whole heads: any other number of dimensions ends the process."""

_SAME_SIZES = frozenset(
    {
        "bailingmoe",
        "cogvlm",
        "dots1",
        "exaone-moe",
        "gpt-oss",
        "openelm",
        "qwen",
        "seed_oss",
    }
)
"""Architectures whose keys and values are of one size, which their tensors do not show."""

_SAME_IN_WINDOWS = frozenset({"cohere2", "exaone-moe", "gpt-oss", "laguna"})
"""Architectures whose heads are of one size, in layers with a window too."""

_NEEDS_WINDOW = frozenset({"afmoe", "llama4"})
"""Architectures that end the process if their window is switched off."""

_TWICE_AS_WIDE = frozenset({"granitehybrid", "jamba"})
"""Architectures whose recurrent layers are twice as wide as the model."""

_DELTA_NET = frozenset({"qwen35", "qwen35moe", "qwen3next"})
"""Architectures whose recurrent layers have heads for keys and values of one size."""


def check_numbers(header: GgufHeader) -> None:
    """Refuse numbers with which the library would end the process, or not come back.

    Raises:
        ModelRefused: One is of another type, out of range, or contradicts another; the message
            names the key and the value.
    """
    numbers = _Numbers(header)
    for key, (low, high) in _RANGES.items():
        for value in numbers.integers(key):
            if not low <= value <= high:
                raise numbers.refused(key, value, f"expected {low} to {high}")
    for name, stated in header.metadata.items():
        if name.endswith(_NOT_NEGATIVE):
            _check_not_negative(numbers, name, stated)
    layers = layer_count(header)
    _check_heads(numbers, layers)
    _check_rope(numbers)
    _check_experts(numbers)
    _check_recurrent(numbers)
    _check_windows(numbers)
    _check_shared_layers(numbers, layers)


class _Numbers:
    """A header's numbers by key without the architecture, which is `family`."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.family = header.architecture

    def integers(self, key: str) -> tuple[int, ...]:
        """Return what is stated once or for each layer; nothing where it is not stated."""
        name = f"{self.family}.{key}"
        if name not in self.header.metadata:
            return ()
        if isinstance(self.header.metadata[name], tuple):
            return self.header.integers(name)
        return (self.header.integer(name),)

    def integer(self, key: str, default: int = 0) -> int:
        """Return what is stated once, or for the first layer."""
        return next(iter(self.integers(key)), default)

    def by_layer(self, key: str, layers: int, default: Sequence[int] = (0,)) -> tuple[int, ...]:
        stated = self.integers(key) or tuple(default)
        return stated * layers if len(stated) == 1 else stated[:layers]

    def refused(self, key: str, value: object, expected: str) -> ModelRefused:
        return self.refused_name(f"{self.family}.{key}", value, expected)

    def refused_name(self, name: str, value: object, expected: str) -> ModelRefused:
        return ModelRefused(f"{self.header.path.name}: {name!r:.100} is {value!r:.40}, {expected}")


def _check_not_negative(numbers: _Numbers, name: str, stated: MetadataValue) -> None:
    for value in stated if isinstance(stated, tuple) else (stated,):
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise numbers.refused_name(name, value, "expected a finite number of at least 0")


def _check_heads(numbers: _Numbers, layers: int) -> None:
    """Check that keys and values are shared by whole groups of queries."""
    key = "attention.head_count_kv"
    heads = numbers.by_layer("attention.head_count", layers)
    kv_heads = numbers.by_layer(key, layers, heads)
    is_latent = numbers.integer("attention.key_length_mla") > 0
    for count, kv_count in zip(heads, kv_heads, strict=False):
        if is_latent and kv_count > 1:
            raise numbers.refused(key, kv_count, "expected 1, as keys of all heads are one vector")
        if kv_count and (not count or count % kv_count):
            raise numbers.refused(key, kv_count, f"which does not divide {count} heads")
    others = (numbers.integer(it) for it in ("ssm.conv_kernel", "shortconv.l_cache"))
    if not any(kv_heads) and not any(others):
        raise numbers.refused("attention.head_count", 0, "but no layer is of another kind")


def _check_rope(numbers: _Numbers) -> None:
    """Check the sizes of heads, and that what is rotated of one are pairs of its numbers."""
    heads = max(numbers.integers("attention.head_count"), default=0)
    if not heads:
        return
    width = numbers.header.integer(f"{numbers.family}.embedding_length")
    default = width // (numbers.integer("attention.head_count") or heads)
    size = numbers.integer("attention.key_length", default)
    value_size = numbers.integer("attention.value_length", default)
    if numbers.family in _SAME_SIZES and value_size != size:
        raise numbers.refused("attention.value_length", value_size, f"but a key has {size}")
    if numbers.family in _SAME_IN_WINDOWS:
        for key, full in (("key_length_swa", size), ("value_length_swa", value_size)):
            if (stated := numbers.integer(f"attention.{key}", full)) != full:
                raise numbers.refused(f"attention.{key}", stated, f"expected {full}")
    latent_size = numbers.integer("attention.key_length_mla")
    limits = {
        "rope.dimension_count": latent_size or size,
        "rope.dimension_count_swa": numbers.integer("attention.key_length_swa", size),
    }
    for key, limit in limits.items():
        for value in numbers.integers(key):
            if value % 2 or not 2 <= value <= limit:
                raise numbers.refused(key, value, f"expected an even number from 2 to {limit}")
    rotated = numbers.integer("rope.dimension_count", size)
    if numbers.family in _ROTATES_ALL:
        for key in limits:
            if (stated := numbers.integer(key, size)) != size:
                raise numbers.refused(key, stated, f"expected {size}, as a key has")
    sections = numbers.integers("rope.dimension_sections")
    if sections and not any(sections[:3]):
        raise numbers.refused("rope.dimension_sections", sections, "expected one above 0")
    rank = numbers.integer("attention.kv_lora_rank")
    if latent_size and rank:
        if rotated >= latent_size:
            expected = f"expected less than {latent_size}"
            raise numbers.refused("rope.dimension_count", rotated, expected)
        if size != rank + rotated:
            raise numbers.refused("attention.key_length", size, f"expected {rank + rotated}")


def _check_experts(numbers: _Numbers) -> None:
    """Check how many experts there are, and how many of them are used."""
    experts, groups = numbers.integer("expert_count"), numbers.integer("expert_group_count")
    used = numbers.integers("expert_used_count") or (0,)
    if max(used) > experts or (experts and not max(used)):
        raise numbers.refused("expert_used_count", max(used), f"of {experts} experts")
    per_group = numbers.integer("experts_per_group", 1)
    if max(used) > experts // per_group:
        raise numbers.refused("experts_per_group", per_group, f"of {experts} experts")
    if groups and (groups >= experts or experts % groups):
        raise numbers.refused("expert_group_count", groups, f"of {experts} experts")
    if groups > 1:
        groups_used = numbers.integer("expert_group_used_count")
        if not 0 < groups_used < groups:
            raise numbers.refused("expert_group_used_count", groups_used, f"of {groups} groups")
    needs_gating = experts and numbers.family in _NEEDS_GATING
    if needs_gating and not numbers.integer("expert_gating_func"):
        raise numbers.refused("expert_gating_func", 0, f"expected 1 to {GATING_MAX}")


def _check_recurrent(numbers: _Numbers) -> None:
    """Check the widths of recurrent layers."""
    key = "ssm.inner_size"
    inner = numbers.integer(key)
    width = numbers.header.integer(f"{numbers.family}.embedding_length")
    if numbers.family in _TWICE_AS_WIDE and inner != 2 * width:
        raise numbers.refused(key, inner, f"expected {2 * width}, twice the model's width")
    heads, state = (numbers.integer(f"ssm.{it}") for it in ("time_step_rank", "state_size"))
    if numbers.family in _DELTA_NET and inner != heads * state:
        raise numbers.refused(key, inner, f"expected {heads * state}")
    if numbers.family == "plamo2" and (groups := numbers.integer("ssm.group_count")):
        raise numbers.refused("ssm.group_count", groups, "expected 0")


def _check_windows(numbers: _Numbers) -> None:
    """Check that a model with a window has layers with one."""
    key, pattern = "attention.sliding_window", "attention.sliding_window_pattern"
    if numbers.family in _NEEDS_WINDOW and not numbers.integer(key, 1):
        raise numbers.refused(key, 0, "expected a window")
    is_stated = f"{numbers.family}.{pattern}" in numbers.header.metadata
    if is_stated and numbers.integer(key) and not any(sliding_layers(numbers.header)):
        stated = numbers.header.metadata[f"{numbers.family}.{pattern}"]
        raise numbers.refused(pattern, stated, "so no layer has the window")


def _check_shared_layers(numbers: _Numbers, layers: int) -> None:
    """Check that layers without keys of their own follow one of each kind that has some."""
    key = "attention.shared_kv_layers"
    shared = numbers.integer(key)
    if not shared:
        return
    own = layers - shared
    slides = sliding_layers(numbers.header)
    if not 0 < shared < layers - 1 or not slides[own - 2] or slides[own - 1]:
        raise numbers.refused(
            key, shared, "expected a layer with a window and a full one before those that share"
        )
