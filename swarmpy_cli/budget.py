"""The demo's memory budget: enough for N machines together, too little for fewer.

Counts with the fit check that the planner and the stages use. Spec: protocols/pipeline.md, "Fit".
"""

from __future__ import annotations

from swarmpy.abc import Inspection
from swarmpy.errors import DoesNotFit
from swarmpy.pipeline.fit import fit

WHOLE_SLACK = 1.1
"""Over the whole model's need, for a machine that shall hold all of it."""


def whole_budget(inspection: Inspection, *, slots: int, context: int) -> int:
    """Return a budget in bytes with which one machine holds the whole model."""
    whole = fit(inspection, 0, inspection.layer_count, slots=slots, context=context)
    return round(whole.sum_bytes * WHOLE_SLACK)


def split_budget(inspection: Inspection, count: int, *, slots: int, context: int) -> int:
    """Return a budget in bytes with which `count` machines hold the model, and no fewer can.

    It lies a quarter of the way from the least that `count` need to the least that one machine
    fewer needs: room enough for the planner to balance, and too little for lopsided layouts.

    Raises:
        DoesNotFit: The model cannot be cut so that it takes exactly that many machines.
    """
    if count == 1:
        return whole_budget(inspection, slots=slots, context=context)
    ends = [*sorted(set(inspection.cuts)), inspection.layer_count]
    starts = [0, *ends[:-1]]
    need = {
        (start, end): fit(inspection, start, end, slots=slots, context=context).sum_bytes
        for start in starts
        for end in ends
        if start < end
    }
    least = _least_budget(need, ends, count)
    least_fewer = _least_budget(need, ends, count - 1)
    if least is None or least_fewer is None or least >= least_fewer:
        raise DoesNotFit(
            f"no memory budget splits {inspection.layer_count} layers over exactly {count} nodes",
            fix="Take fewer nodes (--nodes).",
        )
    return least + (least_fewer - least) // 4


def _least_budget(need: dict[tuple[int, int], int], ends: list[int], count: int) -> int | None:
    """The least budget with which `count` ranges suffice: the need of one of the ranges."""
    sizes = sorted(set(need.values()))
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if _stages_needed(need, ends, sizes[middle]) <= count:
            high = middle
        else:
            low = middle + 1
    return sizes[low] if low < len(sizes) else None


def _stages_needed(need: dict[tuple[int, int], int], ends: list[int], budget: int) -> float:
    """How many stages of `budget` bytes hold the model, each filled in turn; inf if none can."""
    count, start = 0, 0
    while start < ends[-1]:
        reached = [end for end in ends if end > start and need[start, end] <= budget]
        if not reached:
            return float("inf")
        count, start = count + 1, reached[-1]
    return count
