"""What breaks costs the session it belongs to, with an error that has a name; the rest goes on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from faulty import POISON
from rings import ECHO, MODEL_ID, budget_for, open_swarm
from trio.testing import MockClock, wait_all_tasks_blocked

from swarmpy.abc import Progress
from swarmpy.config import SESSION_LEASE_S
from swarmpy.errors import (
    BadMessage,
    ContextExceeded,
    DownloadFailed,
    EngineLost,
    ModelRefused,
    NetworkError,
    NoPipeline,
    OfferRejected,
    PeerTimeout,
    PipelineError,
    RowError,
    SamplingError,
    StageBusy,
    StageLost,
)
from swarmpy.identity import Identity
from swarmpy.net.messages import MessageStream
from swarmpy.pipeline.coordinator import Pipeline, StageClient
from swarmpy.pipeline.fit import fit
from swarmpy.pipeline.holdings import Holding, Holdings
from swarmpy.pipeline.links import PROTOCOL, control_pair
from swarmpy.pipeline.planner import StagePlan
from swarmpy.pipeline.session import Generation
from swarmpy.proto.pipeline import Edge, Loaded, Sampling, TokenFrame
from swarmpy.testing.engine import EchoModel, inspection_of, reply
from swarmpy.testing.network import Link

PROMPT = list(range(5, 25))
POISONED = PROMPT[:POISON]
SLOW = Link(latency_s=0.01)


async def read(generation: Generation, tokens: list[int]) -> None:
    """Read a reply to its end."""
    async for token in generation:
        tokens.append(token.id)


# A stage, a node, a client goes away ------------------------------------------------


async def test_a_stage_that_vanishes_ends_the_reply_and_frees_the_others(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path, link=SLOW) as swarm:
        generation = await swarm.nodes[0].generate(PROMPT, max_tokens=1000)
        tokens = [(await anext(generation)).id for _ in range(5)]
        swarm.nodes[2].host.close()

        with pytest.raises(StageLost, match="node2"):
            await read(generation, tokens)
        await trio.sleep(1)

        assert tokens == reply(EchoModel(), PROMPT, len(tokens))
        assert [node.service.session_count for node in swarm.nodes[:2]] == [0, 0]
        assert [node.service.shards for node in swarm.nodes[:2]] == [(), ()]


async def test_the_next_request_is_planned_without_the_lost_stage(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    half = budget_for(EchoModel(), 2)
    async with open_swarm(tmp_path, budgets=[half, half, half], link=SLOW) as swarm:
        generation = await swarm.nodes[0].generate(PROMPT, max_tokens=1000)
        lost = next(view.name for view in generation.pipeline.stages if view.name != "node0")
        next(node for node in swarm.nodes if node.name == lost).host.close()
        with pytest.raises(StageLost):
            await read(generation, [])

        assert await swarm.nodes[0].reply(PROMPT) == reply(EchoModel(), PROMPT, 8)


async def test_a_coordinator_that_vanishes_leaves_no_shard_behind(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path, link=SLOW) as swarm:
        await swarm.nodes[0].generate(PROMPT, max_tokens=1000)
        swarm.nodes[0].scope.cancel()
        await trio.sleep(1)

        assert [node.service.shards for node in swarm.nodes[1:]] == [(), ()]


async def test_a_client_that_hangs_up_frees_its_slot_on_every_stage(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path, link=SLOW) as swarm:
        generation = await swarm.nodes[0].generate(PROMPT, max_tokens=1000)
        for _ in range(5):
            await anext(generation)
        assert [node.service.session_count for node in swarm.nodes] == [1, 1, 1]

        await generation.aclose()
        await trio.sleep(0.1)

        assert [node.service.session_count for node in swarm.nodes] == [0, 0, 0]
        assert [node.used_slots for node in swarm.nodes] == [0, 0, 0]


async def test_a_request_cancelled_while_it_waits_for_a_slot_leaves_the_line(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path, slots=1, link=SLOW) as swarm:
        first = await swarm.nodes[0].generate(PROMPT, max_tokens=1000)
        with trio.move_on_after(1):
            await swarm.nodes[0].generate(PROMPT)
        await first.aclose()

        assert await swarm.nodes[0].reply(PROMPT) == reply(EchoModel(), PROMPT, 8)
        assert swarm.nodes[0].assembler.pipelines()[0].sessions == 0


async def test_the_requester_of_an_assembly_may_leave_and_the_next_one_takes_over(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path, link=SLOW) as swarm, trio.open_nursery() as nursery:
        first = trio.CancelScope()
        tokens: list[int] = []

        async def leave() -> None:
            with first:
                await swarm.nodes[0].reply(PROMPT)

        async def stay() -> None:
            tokens.extend(await swarm.nodes[0].reply(PROMPT))

        nursery.start_soon(leave)
        nursery.start_soon(stay)
        await trio.sleep(0.015)
        first.cancel()

    assert tokens == reply(EchoModel(), PROMPT, 8)


async def test_a_ring_that_falls_silent_is_given_up(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A stage forgets the session without a word: its steps are dropped there."""
    async with open_swarm(tmp_path, link=SLOW) as swarm:
        generation = await swarm.nodes[0].generate(PROMPT, max_tokens=1000)
        await anext(generation)
        stage = swarm.nodes[1].service.stage_of(bytes.fromhex(generation.pipeline.id))
        assert stage is not None
        stage.sessions.clear()

        with pytest.raises(PeerTimeout, match="130 s"):
            await read(generation, [])


async def test_a_session_lives_as_long_as_its_coordinator_beats(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A stage drops the steps: none is made for two leases, and the others keep their slots."""
    async with (
        open_swarm(tmp_path, link=SLOW) as swarm,
        await swarm.nodes[0].generate(PROMPT, max_tokens=1000) as generation,
    ):
        stage = swarm.nodes[1].service.stage_of(bytes.fromhex(generation.pipeline.id))
        assert stage is not None
        stage.sessions.clear()
        await trio.sleep(2 * SESSION_LEASE_S)

        assert [node.service.session_count for node in swarm.nodes] == [1, 0, 1]


async def test_a_reply_that_is_over_frees_its_slots_before_it_is_read(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with (
        open_swarm(tmp_path) as swarm,
        await swarm.nodes[0].generate(PROMPT, max_tokens=3) as generation,
    ):
        await trio.sleep(1)
        sessions = [node.service.session_count for node in swarm.nodes]
        tokens = [token.id async for token in generation]

    assert sessions == [0, 0, 0]
    assert tokens == reply(EchoModel(), PROMPT, 3)


# Bad tensors and engines -------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "error", "match"),
    [
        ("faulty:NanEngine", BadMessage, "NaN"),
        ("faulty:ShapeEngine", BadMessage, "expected float32"),
        ("faulty:RowEngine", RowError, "this row is refused"),
        ("faulty:LostEngine", EngineLost, "process ended"),
    ],
)
async def test_a_faulty_stage_gives_the_session_an_error_with_a_name(
    tmp_path: Path,
    engine: str,
    error: type[Exception],
    match: str,
    autojump_clock: MockClock,
) -> None:
    async with open_swarm(tmp_path, engines=[ECHO, engine, ECHO], link=SLOW) as swarm:
        with pytest.raises(error, match=match):
            await swarm.nodes[0].reply(POISONED)
        await trio.sleep(1)

        assert [node.service.session_count for node in swarm.nodes] == [0, 0, 0]
        assert [node.used_slots for node in swarm.nodes] == [0, 0, 0]
        assert await swarm.nodes[0].reply(PROMPT) == reply(EchoModel(), PROMPT, 8)


@pytest.mark.parametrize("engine", ["faulty:RowEngine", "faulty:NanEngine"])
async def test_one_bad_session_does_not_touch_another(
    tmp_path: Path, engine: str, autojump_clock: MockClock
) -> None:
    async with (
        open_swarm(tmp_path, engines=[ECHO, engine, ECHO], link=SLOW) as swarm,
        await swarm.nodes[0].generate(PROMPT, max_tokens=50) as generation,
    ):
        tokens = [(await anext(generation)).id]
        with pytest.raises((RowError, BadMessage)):
            await swarm.nodes[0].reply(POISONED)
        await read(generation, tokens)

    assert tokens == reply(EchoModel(), PROMPT, 50)


async def test_tokens_of_a_peer_that_is_not_the_last_stage_are_not_read(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The middle stage forges the next token."""
    async with (
        open_swarm(tmp_path, link=SLOW) as swarm,
        await swarm.nodes[0].generate(PROMPT, max_tokens=30) as generation,
    ):
        tokens = [(await anext(generation)).id]
        pipeline = bytes.fromhex(generation.pipeline.id)
        stream = MessageStream(
            await swarm.nodes[1].host.open_stream(swarm.nodes[0].peer, [PROTOCOL])
        )
        await stream.send(Edge(pipeline=pipeline, kind="token"))
        forged = TokenFrame(
            session=generation.id,
            epoch=0,
            step=1,
            position=len(PROMPT) + 1,
            token=7,
            engine_us=(0, 0, 0),
        )
        await stream.send(forged)
        with pytest.raises(NetworkError), trio.fail_after(60):
            await stream.receive_frame(1)
        await read(generation, tokens)

    assert tokens == reply(EchoModel(), PROMPT, 30)


async def test_a_prompt_runs_no_further_ahead_than_stages_plus_one_chunks(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The last stage drops all steps, so that no chunk of twenty comes round."""
    async with open_swarm(tmp_path, link=SLOW) as swarm:
        await swarm.nodes[0].reply(PROMPT)
        pipeline = bytes.fromhex(swarm.nodes[0].assembler.pipelines()[0].id)
        first, _, last = (node.service.stage_of(pipeline) for node in swarm.nodes)
        assert first is not None
        assert last is not None
        async with await swarm.nodes[0].generate([1] * 64 * 20) as generation:
            last.sessions.clear()
            await trio.sleep(5)

            assert first.sessions[generation.id].next_step == 4


# Refused offers ----------------------------------------------------------------------


async def test_a_refused_offer_is_planned_around_with_what_the_peer_can_give(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A peer announced room for half the model and has room for a quarter."""
    model = EchoModel()
    half, quarter = budget_for(model, 2), budget_for(model, 4)
    async with open_swarm(tmp_path, budgets=[half, quarter, half]) as swarm:
        for node in swarm.nodes:
            swarm.announced[node.peer] = half
        swarm.speeds = {node.peer: 1e9 for node in swarm.nodes}
        swarm.speeds[swarm.nodes[1].peer] = 100e9

        tokens = await swarm.nodes[0].reply(PROMPT)
        stages = swarm.nodes[0].assembler.pipelines()[0].stages

    assert tokens == reply(model, PROMPT, 8)
    assert sorted(stage.name for stage in stages) == ["node0", "node2"]


async def test_a_refusal_that_cannot_be_planned_around_rolls_everything_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    third = budget_for(EchoModel(), 3)
    async with open_swarm(tmp_path, budgets=[third, 1000, third]) as swarm:
        swarm.announced[swarm.nodes[1].peer] = third

        with pytest.raises(NoPipeline, match=r"node1 refused layers .* weights .* missing"):
            await swarm.nodes[0].reply(PROMPT)
        await wait_all_tasks_blocked()

        assert [node.service.memory_bytes_free for node in swarm.nodes] == [third, 1000, third]
        assert swarm.nodes[0].assembler.pipelines() == []


async def test_a_peer_that_failed_is_not_asked_again_when_another_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """The fastest cannot load; the one that is planned with instead is busy twice."""
    half = budget_for(EchoModel(), 2)
    offers = {"node1": 0, "node2": 0}
    reserve = Holdings.reserve
    async with open_swarm(
        tmp_path, budgets=[half] * 3, engines=[ECHO, "faulty:RefusingEngine", ECHO]
    ) as swarm:
        names = {id(node.service._holdings): node.name for node in swarm.nodes[1:]}

        async def reserve_later(holdings: Holdings, wanted: Holding, pipeline: bytes) -> Holding:
            name = names.get(id(holdings), "")
            if name:
                offers[name] += 1
            if name == "node2" and offers[name] <= 2:
                raise StageBusy("the memory is promised")
            return await reserve(holdings, wanted, pipeline)

        monkeypatch.setattr(Holdings, "reserve", reserve_later)
        swarm.speeds = {node.peer: 1e9 for node in swarm.nodes}
        swarm.speeds[swarm.nodes[1].peer] = 100e9

        assert await swarm.nodes[0].reply(PROMPT) == reply(EchoModel(), PROMPT, 8)

    assert offers == {"node1": 1, "node2": 3}


async def test_a_failed_load_rolls_everything_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path, engines=[ECHO, ECHO, "faulty:RefusingEngine"]) as swarm:
        third = swarm.budgets[swarm.nodes[0].peer]
        with pytest.raises(NoPipeline, match="contradict the header"):
            await swarm.nodes[0].reply(PROMPT)
        await wait_all_tasks_blocked()

        assert [node.service.memory_bytes_free for node in swarm.nodes] == [third] * 3
        assert [node.service.shards for node in swarm.nodes] == [(), (), ()]


async def test_a_model_the_only_engine_refuses_keeps_its_error(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    whole = budget_for(EchoModel(), 1)
    async with open_swarm(
        tmp_path, count=1, budgets=[whole], engines=["faulty:RefusingEngine"]
    ) as swarm:
        with pytest.raises((ModelRefused, NoPipeline), match="contradict the header"):
            await swarm.nodes[0].reply(PROMPT)


async def test_an_engine_with_other_tensors_between_layers_refuses_the_offer(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path, engines=[ECHO, "faulty:OtherSpecEngine", ECHO]) as swarm:
        with pytest.raises((NoPipeline, OfferRejected), match="tensors between layers differ"):
            await swarm.nodes[0].reply(PROMPT)


async def test_nobody_can_hold_the_model_says_what_is_missing_and_who_was_asked(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path, budgets=[10**8, 10**8, 10**8]) as swarm:
        with pytest.raises(NoPipeline, match=r"\d+ bytes .* missing.*asked: .*node0.*100 MB"):
            await swarm.nodes[0].reply(PROMPT)


async def test_an_idle_shard_makes_room_for_another_model(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path) as swarm:
        await swarm.nodes[0].reply(PROMPT)
        await trio.sleep(10)

        other = await swarm.nodes[1].assembler.pipeline_for("cd" * 32)

        assert other.is_open
        assert swarm.nodes[0].assembler.ready(MODEL_ID) is None
        assert {shard.model_id for node in swarm.nodes for shard in node.service.shards} == {
            "cd" * 32
        }


async def test_a_shard_makes_no_room_while_another_stage_of_its_ring_fetches(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Another model needs everybody's memory meanwhile, and two of three shards are loaded."""
    pipelines: list[Pipeline] = []

    async def obtain(model_id: str, start: int, end: int, report: object) -> Path:
        if (model_id, end) == (MODEL_ID, EchoModel().layers):
            await trio.sleep(20)
        return tmp_path

    async with open_swarm(tmp_path, obtain_files=obtain) as swarm, trio.open_nursery() as nursery:

        async def assemble() -> None:
            pipelines.append(await swarm.nodes[0].assembler.pipeline_for(MODEL_ID))

        nursery.start_soon(assemble)
        await trio.sleep(5)
        assert [len(node.service.shards) for node in swarm.nodes] == [1, 1, 0]
        with pytest.raises(NoPipeline):
            await swarm.nodes[1].assembler.pipeline_for("cd" * 32)
        await trio.sleep(1)

        assert [pipeline.error for pipeline in pipelines] == [None]
        assert await swarm.nodes[0].reply(PROMPT) == reply(EchoModel(), PROMPT, 8)


# Files -----------------------------------------------------------------------------------


async def test_a_fetch_is_told_four_times_a_second_over_a_slow_link_and_once_it_is_done(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Goal: a download that reports every piece does not fill its control stream's queue."""
    pieces, seconds = 5000, 10.0
    told: dict[str, list[int]] = {}

    async def obtain(
        model_id: str, start: int, end: int, report: Callable[[Progress], None]
    ) -> Path:
        for done in range(1, pieces + 1):
            await trio.sleep(seconds / pieces)
            report(Progress(step="downloading", done=done, total=pieces, unit="bytes"))
        return tmp_path

    def note(progress: Progress) -> None:
        if progress.unit == "bytes":
            told.setdefault(progress.step, []).append(progress.done)

    link = Link(latency_s=0.05, bytes_per_s=12_500)
    async with open_swarm(tmp_path, obtain_files=obtain, link=link) as swarm:
        pipeline = await swarm.nodes[0].assembler.pipeline_for(MODEL_ID, on_progress=note)

        assert pipeline.is_open
    assert len(told) == 3
    for reports in told.values():
        assert 4 * seconds - 2 <= len(reports) <= 4 * seconds + 2
        assert reports[-1] == pieces


async def test_a_failed_download_is_told_by_name(tmp_path: Path, autojump_clock: MockClock) -> None:
    """It failed on the last stage, which is another node's."""

    async def obtain(model_id: str, start: int, end: int, report: object) -> Path:
        if end == EchoModel().layers:
            raise DownloadFailed("the Hub has no room for us")
        return tmp_path

    async with open_swarm(tmp_path, obtain_files=obtain) as swarm:
        with pytest.raises(NoPipeline, match="node2: the Hub has no room for us") as caught:
            await swarm.nodes[0].reply(PROMPT)

    assert isinstance(caught.value.__cause__, DownloadFailed)


# Reports -------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("\x1b[2J", "echo"), ("echo", "a\nb")])
async def test_an_engine_whose_name_would_command_a_terminal_is_a_breach(
    names: tuple[str, str],
) -> None:
    engine, exactness = names
    here, there = (Identity.generate(random.Random(index)).peer_id for index in range(2))
    coordinator_end, stage_end = control_pair(coordinator=here, stage=there)
    terms = fit(inspection_of(EchoModel()), 0, 12, slots=1, context=64)
    planned = StagePlan(peer=there, name="node1", start=0, end=12, terms=terms, seconds=1.0)
    stage_end.send_nowait(
        Loaded(weight_bytes=1, rss_bytes=1, slots=1, engine=engine, exactness=exactness)
    )

    with pytest.raises(BadMessage, match="cannot be printed"):
        await StageClient(coordinator_end, planned).load(lambda _: None)


async def test_a_stage_that_reports_such_an_engine_is_planned_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    half = budget_for(EchoModel(), 2)
    async with open_swarm(tmp_path, budgets=[half] * 3) as swarm:
        swarm.speeds = {node.peer: 1e9 for node in swarm.nodes}
        swarm.speeds[swarm.nodes[1].peer] = 100e9
        (engine,) = swarm.nodes[1].service._engines.hosts
        monkeypatch.setattr(engine, "engine_name", "\x1b[31mecho")

        assert await swarm.nodes[0].reply(PROMPT) == reply(EchoModel(), PROMPT, 8)
        stages = swarm.nodes[0].assembler.pipelines()[0].stages

    assert {stage.name for stage in stages} == {"node0", "node2"}


# Bad requests --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ([], {}, PipelineError),
        ([256], {}, PipelineError),
        ([-1], {}, PipelineError),
        ([1] * 4096, {}, ContextExceeded),
        (PROMPT, {"max_tokens": 0}, SamplingError),
        (PROMPT, {"stop_ids": range(100)}, SamplingError),
        (PROMPT, {"spec": Sampling(temperature=-1)}, SamplingError),
    ],
)
async def test_a_bad_request_takes_no_slot(
    tmp_path: Path,
    prompt: list[int],
    options: dict[str, object],
    error: type[Exception],
    autojump_clock: MockClock,
) -> None:
    async with open_swarm(tmp_path) as swarm:
        with pytest.raises(error):
            await swarm.nodes[0].reply(prompt, **options)

        assert [node.service.session_count for node in swarm.nodes] == [0, 0, 0]


async def test_a_stop_token_ends_the_reply_and_is_not_part_of_it(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    expected = reply(EchoModel(), PROMPT, 20)
    stop = expected[7]

    async with (
        open_swarm(tmp_path) as swarm,
        await swarm.nodes[0].generate(PROMPT, max_tokens=20, stop_ids=[stop]) as generation,
    ):
        tokens = [token.id async for token in generation]

    assert generation.finish_reason == "stop"
    assert tokens == expected[: expected.index(stop)]


async def test_a_reply_ends_where_the_context_ends(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    prompt = [3] * 4090

    async with (
        open_swarm(tmp_path) as swarm,
        await swarm.nodes[0].generate(prompt, max_tokens=100) as generation,
    ):
        tokens = [token.id async for token in generation]

    assert generation.finish_reason == "length"
    assert tokens == reply(EchoModel(), prompt, 6)
