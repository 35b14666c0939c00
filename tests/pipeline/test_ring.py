"""The ring as a whole: real hosts and services around the EchoEngine, on a simulated network.

Every expected reply comes from `reply`, which knows no stages: a lost, doubled or reordered step
anywhere would change it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from rings import MODEL_ID, Node, budget_for, open_swarm
from trio.testing import MockClock, wait_all_tasks_blocked

from swarmpy.abc import Progress
from swarmpy.errors import ModelNotFound
from swarmpy.net.tcp import TcpNetwork
from swarmpy.proto.pipeline import Sampling
from swarmpy.testing.engine import EchoModel, reply
from swarmpy.testing.network import Link

PROMPT = list(range(5, 25))
SLOW = Link(latency_s=0.01)


async def test_three_nodes_answer_with_the_tokens_of_the_whole_model(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path) as swarm:
        tokens = await swarm.nodes[0].reply(PROMPT, max_tokens=20)

    assert tokens == reply(EchoModel(), PROMPT, 20)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 130, 2000])
async def test_a_prompt_of_any_length_crosses_the_ring_in_chunks(
    tmp_path: Path, length: int, autojump_clock: MockClock
) -> None:
    prompt = [(7 * index) % 256 for index in range(length)]

    async with open_swarm(tmp_path, link=Link(latency_s=0.01)) as swarm:
        tokens = await swarm.nodes[0].reply(prompt, max_tokens=5)

    assert tokens == reply(EchoModel(), prompt, 5)


async def test_thirty_replies_in_a_row_leave_nothing_behind(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path) as swarm:
        for index in range(30):
            prompt = [index, *PROMPT]
            assert await swarm.nodes[0].reply(prompt, max_tokens=4) == reply(EchoModel(), prompt, 4)
        await wait_all_tasks_blocked()

        assert [node.service.session_count for node in swarm.nodes] == [0, 0, 0]
        assert [node.used_slots for node in swarm.nodes] == [0, 0, 0]


async def test_sessions_at_the_same_time_do_not_mix(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    replies: dict[int, list[int]] = {}

    async with open_swarm(tmp_path, link=Link(latency_s=0.003)) as swarm:

        async def run(index: int) -> None:
            prompt = [index] * (40 * index + 1)
            replies[index] = await swarm.nodes[0].reply(prompt, max_tokens=30)

        async with trio.open_nursery() as nursery:
            for index in range(10):
                nursery.start_soon(run, index)

    for index in range(10):
        assert replies[index] == reply(EchoModel(), [index] * (40 * index + 1), 30)


async def test_a_reply_over_real_tcp_is_the_same(tmp_path: Path) -> None:
    async with open_swarm(
        tmp_path, networks=lambda _: TcpNetwork(), listen="/ip4/127.0.0.1/tcp/0"
    ) as swarm:
        tokens = await swarm.nodes[0].reply(PROMPT, max_tokens=50)

    assert tokens == reply(EchoModel(), PROMPT, 50)


async def test_the_coordinator_takes_a_model_it_can_hold_alone(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    whole = budget_for(EchoModel(), 1)

    async with open_swarm(tmp_path, budgets=[whole, whole, whole]) as swarm:
        tokens = await swarm.nodes[0].reply(PROMPT, max_tokens=20)
        stages = swarm.nodes[0].assembler.pipelines()[0].stages

    assert [stage.path for stage in stages] == ["local"]
    assert tokens == reply(EchoModel(), PROMPT, 20)


async def test_a_peer_that_can_hold_the_model_alone_gets_the_prompt(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    whole = budget_for(EchoModel(), 1)

    async with open_swarm(tmp_path, budgets=[1, whole, 1]) as swarm:
        tokens = await swarm.nodes[0].reply(PROMPT * 10, max_tokens=20)
        stages = swarm.nodes[0].assembler.pipelines()[0].stages

    assert [stage.name for stage in stages] == ["node1"]
    assert tokens == reply(EchoModel(), PROMPT * 10, 20)


async def test_a_second_coordinator_uses_the_shards_that_are_loaded(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Nobody has memory for a second copy; the second coordinator is not the first stage."""
    async with open_swarm(tmp_path) as swarm:
        await swarm.nodes[0].reply(PROMPT)
        shards = [node.service.shards for node in swarm.nodes]

        tokens = await swarm.nodes[1].reply(PROMPT * 5, max_tokens=20)

        assert [node.service.shards for node in swarm.nodes] == shards
        assert tokens == reply(EchoModel(), PROMPT * 5, 20)


async def test_two_coordinators_share_slots_and_wait_for_each_other(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path, slots=1, link=SLOW) as swarm:
        await swarm.nodes[0].reply(PROMPT)
        held = await swarm.nodes[0].generate(PROMPT, max_tokens=1000)

        async with trio.open_nursery() as nursery:

            async def release() -> None:
                await trio.sleep(5)
                await held.aclose()

            nursery.start_soon(release)
            tokens = await swarm.nodes[1].reply(PROMPT, max_tokens=20)

    assert tokens == reply(EchoModel(), PROMPT, 20)


async def test_a_request_waits_in_line_for_a_slot(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path, slots=1, link=SLOW) as swarm:
        first = await swarm.nodes[0].generate(PROMPT, max_tokens=1000)
        order: list[str] = []

        async def second() -> None:
            await swarm.nodes[0].reply(PROMPT, max_tokens=3)
            order.append("second")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(second)
            await trio.sleep(1)
            order.append("first")
            await first.aclose()

    assert order == ["first", "second"]


async def test_layers_that_need_token_ids_get_them_and_are_reported(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Layer 6 depends on the ids: the stages up to it are sent them, the last one is not."""
    model = EchoModel(token_layers=(0, 6))

    async with open_swarm(tmp_path, model=model) as swarm:
        tokens = await swarm.nodes[0].reply(PROMPT, max_tokens=20)
        stages = swarm.nodes[0].assembler.pipelines()[0].stages

    assert tokens == reply(model, PROMPT, 20)
    assert [stage.sees_prompt for stage in stages] == [stage.start <= 6 for stage in stages]
    assert not stages[-1].sees_prompt


async def test_the_view_names_every_stage_and_its_weights(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path) as swarm:
        await swarm.nodes[0].reply(PROMPT)
        view = swarm.nodes[0].assembler.pipelines()[0]

    assert [stage.start for stage in view.stages[1:]] == [stage.end for stage in view.stages[:-1]]
    assert {stage.name for stage in view.stages} == {"node0", "node1", "node2"}
    assert view.stages[0].name == "node0"
    assert all(stage.weight_bytes == stage.planned_weight_bytes for stage in view.stages)
    assert [stage.path for stage in view.stages] == ["local", "direct", "direct"]


async def test_progress_tells_the_plan_and_each_load(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    steps: list[Progress] = []

    async with open_swarm(tmp_path) as swarm:
        await swarm.nodes[0].assembler.pipeline_for(MODEL_ID, on_progress=steps.append)

    assert any(step.step.startswith("planned layers 0-") for step in steps)


async def test_a_reply_reports_its_loops_and_hops(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A token takes three hops of 10 ms each."""
    async with open_swarm(tmp_path, link=Link(latency_s=0.01)) as swarm:
        async with await swarm.nodes[0].generate(PROMPT, max_tokens=10) as generation:
            tokens = [token async for token in generation]
        report = generation.report

    assert len(tokens) == report.reply_tokens == 10
    assert report.hops == 3
    assert report.loop_ms_p50 == pytest.approx(30)
    assert report.tok_s == pytest.approx(1 / 0.03)
    assert report.ttft_s < 0.1
    assert report.sees_prompt == ("node0",)


async def test_the_same_seed_samples_the_same_reply_through_any_cut(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    spec = Sampling(temperature=1.5, top_p=0.9, seed=7, logprobs=3)
    replies = []
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        async with (
            open_swarm(folder, count=count) as swarm,
            await swarm.nodes[0].generate(PROMPT, max_tokens=30, spec=spec) as generation,
        ):
            replies.append([token async for token in generation])

    assert replies[0] == replies[1] == replies[2]
    assert [token.id for token in replies[0]] != reply(EchoModel(), PROMPT, 30)
    assert all(len(token.top_logprobs) == 3 for token in replies[0])


async def test_a_repetition_penalty_shows_the_prompt_to_the_last_stage(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    spec = Sampling(repetition_penalty=1.3)

    async with (
        open_swarm(tmp_path) as swarm,
        await swarm.nodes[0].generate(PROMPT, max_tokens=30, spec=spec) as generation,
    ):
        tokens = [token.id async for token in generation]
        names = generation.report.sees_prompt

    assert names[0] == "node0"
    assert len(names) == 2
    assert len(tokens) == 30


async def test_a_peer_without_the_model_is_not_asked_to_hold_it(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The coordinator has no files either: a member describes the model to it."""
    half = budget_for(EchoModel(), 2)

    async with open_swarm(
        tmp_path, budgets=[half, half, half], holds_model=[False, True, True]
    ) as swarm:
        tokens = await swarm.nodes[0].reply(PROMPT, max_tokens=10)
        stages = swarm.nodes[0].assembler.pipelines()[0].stages

    assert sorted(stage.name for stage in stages) == ["node1", "node2"]
    assert tokens == reply(EchoModel(), PROMPT, 10)


async def test_requests_at_the_same_time_share_one_assembly(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    plans: list[Progress] = []

    async with open_swarm(tmp_path, link=SLOW) as swarm:
        assembler = swarm.nodes[0].assembler
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(
                    lambda: assembler.pipeline_for(MODEL_ID, on_progress=plans.append)
                )
        shards = [len(node.service.shards) for node in swarm.nodes]

    assert len([step for step in plans if step.step.startswith("planned")]) == 1
    assert shards == [1, 1, 1]


async def test_three_coordinators_that_start_together_end_with_one_ring(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Each plans itself as the first stage; there is memory for one ring alone."""
    replies: dict[str, list[int]] = {}

    async with open_swarm(tmp_path, link=SLOW) as swarm:

        async def run(node: Node) -> None:
            replies[node.name] = await node.reply(PROMPT)

        async with trio.open_nursery() as nursery:
            for node in swarm.nodes:
                nursery.start_soon(run, node)
        shards = [len(node.service.shards) for node in swarm.nodes]

    assert list(replies.values()) == [reply(EchoModel(), PROMPT, 8)] * 3
    assert shards == [1, 1, 1]


async def test_a_model_nobody_has_is_not_found(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_swarm(tmp_path, holds_model=[False, False, False]) as swarm:
        with pytest.raises(ModelNotFound):
            await swarm.nodes[0].reply(PROMPT)
