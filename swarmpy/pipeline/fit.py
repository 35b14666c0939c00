"""Fit: how much memory layers [start, end) need with all slots full, term by term.

The planner and every stage count with this one function, so that an offer that was planned is not
refused for arithmetic; a refusal prints the terms. Spec: protocols/pipeline.md, section "Fit".
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from swarmpy.abc import Inspection
from swarmpy.config import PREFILL_CHUNK

CHILD_BYTES = 110 * 10**6
"""An engine's child process before it has weights: interpreter, numpy, MLX and mlx-lm."""

RESERVE_BYTES = 32 * 10**6
"""What nobody counts: allocator slack, frames under way, the interpreter's own growth."""

_FLOAT_BYTES = 4

_ACTIVATIONS_PER_HIDDEN = 16
"""Floats alive per token and hidden unit while a layer runs: residual, norm, q, k, v, attention
output, and a gated MLP of up to four times the width, twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitTerms:
    """What a range of layers needs, in bytes."""

    weights: int
    """In the dtype that is computed in: a 98 MB Q4 file is 538 MB in float32."""
    slots: int
    """Keys and values of every slot at full context, and the states that do not grow."""
    growth: int
    """Copy of one layer's slots while they grow."""
    activations: int
    """One prefill chunk through one layer, its attention scores included."""
    logits: int
    """Logits of one prefill chunk, twice; on the last stage only."""
    child: int
    reserve: int

    @property
    def sum_bytes(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))

    def __str__(self) -> str:
        terms = [
            f"{item.name} {format_bytes(getattr(self, item.name))}"
            for item in fields(self)
            if getattr(self, item.name)
        ]
        return f"{format_bytes(self.sum_bytes)} = " + " + ".join(terms)


def fit(inspection: Inspection, start: int, end: int, *, slots: int, context: int) -> FitTerms:
    """Return the memory that layers [start, end) need with `slots` sessions of `context` tokens."""
    if not 0 <= start < end <= inspection.layer_count:
        raise ValueError(f"layers [{start}, {end}) of a model with {inspection.layer_count}")
    kv = inspection.kv_bytes_per_token[start:end]
    hidden, is_last = inspection.hidden_size, end == inspection.layer_count
    activations = _ACTIVATIONS_PER_HIDDEN * hidden * PREFILL_CHUNK
    # Scores of one chunk against the whole context, with heads of 64 units.
    scores = PREFILL_CHUNK * context * max(1, hidden // 64) if any(kv) else 0
    return FitTerms(
        weights=inspection.weight_bytes(start, end),
        slots=slots * (context * sum(kv) + sum(inspection.state_bytes[start:end])),
        growth=slots * context * max(kv),
        activations=(activations + scores) * _FLOAT_BYTES,
        logits=2 * PREFILL_CHUNK * inspection.vocabulary_size * _FLOAT_BYTES if is_last else 0,
        child=CHILD_BYTES,
        reserve=RESERVE_BYTES,
    )


def format_bytes(size: int) -> str:
    """Write a size for people, in decimal units: "538 MB"."""
    if size < 1000:
        return f"{size} bytes"
    value = float(size)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.3g} TB"


def passed_bytes(inspection: Inspection, start: int, end: int) -> float:
    """Weight bytes that one decode step of layers [start, end) passes over.

    The embedding is looked up, not passed over; the head counts as the layers it costs. Planner and
    measurement share this, so that a measured speed predicts the stage it was measured on.
    """
    passed = float(sum(inspection.layer_weight_bytes[start:end]))
    if end == inspection.layer_count:
        mean = sum(inspection.layer_weight_bytes) / inspection.layer_count
        passed += inspection.head_cost_layers * mean
    return passed
