"""The demo's memory budget, checked against the planner that will use it."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmpy.errors import DoesNotFit, NoPipeline
from swarmpy.identity import PeerId
from swarmpy.pipeline.planner import Capacity, plan
from swarmpy.testing.engine import EchoEngine, EchoModel
from swarmpy_cli.budget import split_budget, whole_budget

SLOTS, CONTEXT = 2, 2048


def capacities(count: int, memory_bytes: int) -> list[Capacity]:
    return [
        Capacity(peer=PeerId(f"peer-{index}"), name=f"node-{index}", memory_bytes=memory_bytes)
        for index in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_budget_splits_over_exactly_so_many_nodes(tmp_path: Path, count: int) -> None:
    inspection = EchoEngine().inspect(EchoModel(layers=30).write(tmp_path))
    budget = split_budget(inspection, count, slots=SLOTS, context=CONTEXT)

    made = plan([inspection], capacities(5, budget), slots=SLOTS, context=CONTEXT)
    assert len(made.stages) == count
    with pytest.raises(NoPipeline):
        plan([inspection], capacities(count - 1, budget), slots=SLOTS, context=CONTEXT)


def test_one_node_with_the_whole_budget_holds_the_model_alone(tmp_path: Path) -> None:
    inspection = EchoEngine().inspect(EchoModel(layers=30).write(tmp_path))
    budget = whole_budget(inspection, slots=SLOTS, context=CONTEXT)
    made = plan([inspection], capacities(1, budget), slots=SLOTS, context=CONTEXT)
    assert [(stage.start, stage.end) for stage in made.stages] == [(0, 30)]


def test_more_nodes_than_layers_are_refused(tmp_path: Path) -> None:
    inspection = EchoEngine().inspect(EchoModel(layers=2).write(tmp_path))
    with pytest.raises(DoesNotFit, match="2 layers over exactly 3 nodes"):
        split_budget(inspection, 3, slots=SLOTS, context=CONTEXT)
