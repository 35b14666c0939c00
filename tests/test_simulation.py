"""Three real nodes on in-memory byte streams and a virtual clock: the whole story, repeatable."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio

from swarmpy.config import Config
from swarmpy.node import Node
from swarmpy.proto.pipeline import Sampling
from swarmpy.testing import simulate, views_agree
from swarmpy.testing.engine import reply
from swarmpy.testing.network import Link
from swarmpy.testing.simulation import Run, Simulation, run_simulation
from tests.swarms import MODEL, WHOLE_BYTES, config, join_all, wait_no_sessions

LINK = Link(latency_s=0.01, bytes_per_s=12_500_000)
"""A home network's worst case: 20 ms round trip, 100 Mbit/s."""

PROMPT = list(range(130))


@asynccontextmanager
async def simulated_swarm(simulation: Simulation) -> AsyncIterator[list[Node]]:
    """Three nodes with machines of their own, joined, with a model that none can hold alone."""
    with TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            nodes = []
            for index, name in enumerate(("a", "b", "c")):
                host = f"10.0.0.{index + 1}"
                settings = config(name, listen=(f"/ip4/{host}/tcp/4001",))
                environment = simulation.environment(host, Path(folder) / name)
                nodes.append(await stack.enter_async_context(Node.open(settings, environment)))
            await join_all(nodes, MODEL.write(Path(folder) / "echo"))
            yield nodes


async def tell_the_story(simulation: Simulation) -> dict[str, object]:
    """Join, plan, reply, cancel; then say what came of it."""
    async with simulated_swarm(simulation) as nodes:
        async with await nodes[0].generate("echo", PROMPT, Sampling(), max_tokens=40) as whole:
            tokens = [token.id async for token in whole]
        async with await nodes[1].generate("echo", PROMPT, Sampling(), max_tokens=99) as cut:
            await anext(cut)
        await wait_no_sessions(*nodes)
        return {
            "tokens": tokens,
            "stages": [(stage.name, stage.start, stage.end) for stage in whole.pipeline.stages],
            "loop_ms": whole.report.loop_ms_p50,
            "took_s": trio.current_time(),
        }


async def ask_everywhere_at_once(simulation: Simulation) -> dict[str, list[int]]:
    """Three coordinators want the same model at the same time; each would lay it out otherwise."""
    answers: dict[str, list[int]] = {}

    async def ask(node: Node) -> None:
        await trio.sleep(simulation.random.random() * 0.1)
        async with await node.generate("echo", PROMPT, Sampling(), max_tokens=5) as generation:
            answers[node.name] = [token.id async for token in generation]

    async with simulated_swarm(simulation) as nodes, trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(ask, node)
    return answers


@pytest.mark.parametrize("seed", range(12))
def test_coordinators_that_compete_for_memory_all_get_their_reply(seed: int) -> None:
    answers = run_simulation(ask_everywhere_at_once, seed=seed, link=LINK).result

    assert answers == dict.fromkeys("abc", reply(MODEL, PROMPT, 5))


def run(seed: int) -> Run[dict[str, object]]:
    return run_simulation(tell_the_story, seed=seed, link=LINK)


def test_three_simulated_nodes_join_plan_reply_and_cancel() -> None:
    result = run(1).result

    assert result["tokens"] == reply(MODEL, PROMPT, 40)
    assert sorted(name for name, _, _ in result["stages"]) == ["a", "b", "c"]  # type: ignore[attr-defined]


def test_a_token_costs_one_hop_for_each_stage() -> None:
    """A ring of three on 10 ms links: 30 ms a token. Through the coordinator it would be 60."""
    loop_ms = run(1).result["loop_ms"]

    assert isinstance(loop_ms, float)
    assert 30.0 <= loop_ms < 31.0


def test_same_seed_gives_the_same_trace_and_another_seed_another() -> None:
    first, again, other = run(7), run(7), run(8)

    assert first.trace.digest == again.trace.digest
    assert first.result == again.result
    assert first.trace.digest != other.trace.digest


def only_the_first_has_memory(index: int, settings: Config) -> Config:
    memory_bytes = WHOLE_BYTES if index == 0 else 1_000_000
    return replace(settings, engine=replace(settings.engine, memory_bytes_max=memory_bytes))


@simulate(nodes=60, seeds=2, change=only_the_first_has_memory)
async def test_a_member_that_is_no_neighbour_computes_too(sim: Simulation) -> None:
    """Method: one node of sixty can hold the model; who asks it is not connected to it."""
    await sim.until(lambda: views_agree(sim), within_s=60, what="all know each other")
    able = sim.nodes[0]
    asking = next(node for node in sim.nodes[1:] if node.node.host.connection_to(able.peer) is None)
    with sim.within(30, "a reply"):
        assert len(await sim.reply(asking, PROMPT, 10)) == 10
