"""What peers say their engines need: the silent are done without, the lying are left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio
from rings import CONTEXT, ECHO, MODEL_ID, Node, budget_for, open_swarm
from trio.testing import MockClock

from swarmpy.abc import Inspection
from swarmpy.config import PREFILL_CHUNK
from swarmpy.errors import RemoteProtocolError
from swarmpy.pipeline.assembler import DESCRIBE_WAIT_S
from swarmpy.pipeline.offers import described, inspection_of
from swarmpy.proto.pipeline import Describe, Described
from swarmpy.testing import engine
from swarmpy.testing.engine import EchoModel

ECHOES = engine.inspection_of(EchoModel())
OTHER = "picky_engines:AllRounder"
"""An engine that calls itself "all", and agrees with the EchoEngine."""

LIES = [
    {"slots_max": 0},
    {"context_max": PREFILL_CHUNK - 1},
    {"build_id": "\x1b[2J"},
    {"architecture": "a\nb"},
]


def fall_silent(monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    """Let a node never answer what its engine needs."""

    async def never(_: Describe) -> Described:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(node.service, "_describe", never)


def say(monkeypatch: pytest.MonkeyPatch, node: Node, inspection: Inspection) -> None:
    """Let a node describe every model so."""

    async def answer(_: Describe) -> Described:
        return described(inspection)

    monkeypatch.setattr(node.service, "_describe", answer)


def answer_late(monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    """Let a node describe a model a second after it was asked."""
    describe = node.service._describe

    async def answer(message: Describe) -> object:
        await trio.sleep(1)
        return await describe(message)

    monkeypatch.setattr(node.service, "_describe", answer)


@pytest.mark.parametrize("count", [1, 2])
async def test_silent_peers_of_other_engines_delay_an_assembly_by_seconds_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, autojump_clock: MockClock
) -> None:
    """The coordinator itself can hold the model."""
    whole = budget_for(EchoModel(), 1)
    async with open_swarm(tmp_path, budgets=[whole] * 3) as swarm:
        for node in swarm.nodes[-count:]:
            swarm.engines[node.peer] = f"engine of {node.name}"
            fall_silent(monkeypatch, node)
        began = trio.current_time()
        pipeline = await swarm.nodes[0].assembler.pipeline_for(MODEL_ID)
        waited_s = trio.current_time() - began

        assert pipeline.plan.ring == (swarm.nodes[0].peer,)
        assert waited_s == pytest.approx(DESCRIBE_WAIT_S)


async def test_a_silent_peer_is_not_waited_for_once_another_has_described_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """The coordinator does not have the model: what it plans with it must be told."""
    whole = budget_for(EchoModel(), 1)
    async with open_swarm(
        tmp_path, budgets=[0, whole, whole], holds_model=[False, True, True]
    ) as swarm:
        silent = swarm.nodes[2]
        swarm.engines[silent.peer] = "other"
        fall_silent(monkeypatch, silent)
        began = trio.current_time()
        pipeline = await swarm.nodes[0].assembler.pipeline_for(MODEL_ID)
        waited_s = trio.current_time() - began

        assert pipeline.plan.ring == (swarm.nodes[1].peer,)
        assert waited_s == pytest.approx(DESCRIBE_WAIT_S)


@pytest.mark.parametrize(
    "lie",
    [*LIES, {"engine": ""}, {"engine": "\x1b[2J"}, {"cuts": (12,)}, {"state_bytes": ()}],
    ids=str,
)
def test_a_description_that_cannot_be_true_is_a_breach(lie: dict[str, object]) -> None:
    assert inspection_of(described(ECHOES)) == ECHOES
    with pytest.raises(RemoteProtocolError):
        inspection_of(described(replace(ECHOES, **lie)))  # type: ignore[arg-type]


@pytest.mark.parametrize("lie", LIES, ids=str)
async def test_a_peer_with_an_impossible_description_does_not_spoil_the_ring_of_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lie: dict[str, object],
    autojump_clock: MockClock,
) -> None:
    """The fourth offers more than all others, and would run the whole."""
    third = budget_for(EchoModel(), 3)
    async with open_swarm(
        tmp_path, count=4, budgets=[third] * 4, engines=[ECHO, OTHER, OTHER, ECHO]
    ) as swarm:
        liar = swarm.nodes[3]
        swarm.engines = {node.peer: "all" for node in swarm.nodes[1:3]} | {liar.peer: "liar"}
        swarm.announced[liar.peer] = 10**12
        say(monkeypatch, liar, replace(ECHOES, engine="liar", **lie))  # type: ignore[arg-type]
        pipeline = await swarm.nodes[0].assembler.pipeline_for(MODEL_ID)

        assert set(pipeline.plan.ring) == {node.peer for node in swarm.nodes[:3]}
        assert pipeline.context == CONTEXT


async def test_a_peer_that_describes_another_engine_than_it_announced_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Else whoever answers first could say what the others' engine needs."""
    third = budget_for(EchoModel(), 3)
    heavy = replace(ECHOES, engine="all", layer_weight_bytes=(10**12,) * ECHOES.layer_count)
    async with open_swarm(
        tmp_path, count=4, budgets=[third] * 4, engines=[ECHO, OTHER, OTHER, ECHO]
    ) as swarm:
        honest, liar = swarm.nodes[1:3], swarm.nodes[3]
        swarm.engines = {node.peer: "all" for node in honest} | {liar.peer: "liar"}
        say(monkeypatch, liar, heavy)
        for node in honest:
            answer_late(monkeypatch, node)
        pipeline = await swarm.nodes[0].assembler.pipeline_for(MODEL_ID)

        assert set(pipeline.plan.ring) == {node.peer for node in swarm.nodes[:3]}
