"""Which models a node holds: on demand or from the start, one at a time, idle ones making room.

Real nodes over real TCP on loopback, with the EchoEngine and two models.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from swarmpy.abc import Progress
from swarmpy.config import Config, ModelsConfig
from swarmpy.errors import NoPipeline, StageLost
from swarmpy.node import Node
from swarmpy.pipeline import holdings
from swarmpy.pipeline.session import Generation
from swarmpy.proto.pipeline import Sampling
from swarmpy.testing.engine import EchoModel, reply
from tests.swarms import MODEL, WHOLE_BYTES, config, environment

OTHER = EchoModel(layers=6, layer_weight_bytes=50_000_000, vocabulary_size=128)
PROMPT = list(range(100))


def settings(memory_bytes: int = WHOLE_BYTES, **models: object) -> Config:
    return replace(config("a", memory_bytes), models=ModelsConfig(**models))  # type: ignore[arg-type]


@asynccontextmanager
async def node_with_both(folder: Path, wanted: Config) -> AsyncIterator[Node]:
    async with Node.open(wanted, environment(folder, "a")) as node:
        for name, model in (("first", MODEL), ("second", OTHER)):
            await node.pull(str(model.write(folder / name)))
        yield node


async def ask(node: Node, model: str, *, max_tokens: int = 5, **options: Any) -> Generation:
    return await node.generate(model, PROMPT, Sampling(), max_tokens=max_tokens, **options)


async def tokens_of(generation: Generation) -> list[int]:
    async with generation:
        return [token.id async for token in generation]


def loaded(node: Node) -> set[str]:
    return {view.model for view in node.pipelines()}


async def until_loaded(node: Node, *models: str) -> None:
    with trio.fail_after(10):
        while loaded(node) != set(models):  # noqa: ASYNC110 (nothing tells of it)
            await trio.sleep(0.01)


async def test_models_are_loaded_when_they_are_asked_for_and_stay(tmp_path: Path) -> None:
    async with node_with_both(tmp_path, settings()) as node:
        assert loaded(node) == set()
        assert await tokens_of(await ask(node, "first")) == reply(MODEL, PROMPT, 5)
        assert await tokens_of(await ask(node, "second")) == reply(OTHER, PROMPT, 5)
        assert loaded(node) == {"first", "second"}


async def test_a_model_that_is_idle_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings, "IDLE_S", 0.0)
    async with node_with_both(tmp_path, settings(memory_bytes=1_000_000_000)) as node:
        await tokens_of(await ask(node, "first"))

        assert await tokens_of(await ask(node, "second")) == reply(OTHER, PROMPT, 5)

        await until_loaded(node, "second")


async def test_a_model_in_use_makes_no_room(tmp_path: Path) -> None:
    async with node_with_both(tmp_path, settings(memory_bytes=1_000_000_000)) as node:
        generation = await ask(node, "first", max_tokens=200)
        with pytest.raises(NoPipeline):
            await ask(node, "second")
        assert await tokens_of(generation) == reply(MODEL, PROMPT, 200)


async def test_a_preloaded_model_is_ready_before_anybody_asks(tmp_path: Path) -> None:
    async with node_with_both(tmp_path, settings()) as node:
        pass  # Listed from now on.

    async with Node.open(settings(preload=("second",)), environment(tmp_path, "a")) as node:
        await until_loaded(node, "second")


@pytest.mark.parametrize("single", [False, True])
async def test_a_preloaded_model_comes_back_when_it_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    monkeypatch.setattr("swarmpy.node.PRELOAD_PAUSE_S", 0.01)
    async with node_with_both(tmp_path, settings()) as node:
        pass

    wanted = settings(preload=("first",), single=single)
    async with Node.open(wanted, environment(tmp_path, "a")) as node:
        await until_loaded(node, "first")
        before = node.pipelines()[0]
        node.assembler.ready(before.model_id).close(StageLost("lost"))  # type: ignore[union-attr]

        with trio.fail_after(10):
            while [view.id for view in node.pipelines()] in ([], [before.id]):  # noqa: ASYNC110
                await trio.sleep(0.01)


@pytest.mark.parametrize(
    "wanted",
    [{"memory_bytes": 1_000_000_000}, {"single": True}],
    ids=["memory for one", "one at a time"],
)
async def test_a_preloaded_model_that_made_room_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, object]
) -> None:
    """Else two that do not fit together would replace each other for ever.

    Method: what keeps the model loaded ends once another was asked for.
    """
    monkeypatch.setattr(holdings, "IDLE_S", 0.0)
    async with node_with_both(tmp_path, settings(**wanted)) as node:  # type: ignore[arg-type]
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node._keep_loaded, "first")
                await until_loaded(node, "first")
                await node.prepare("second")

        assert loaded(node) == {"second"}


async def test_one_model_at_a_time_gives_the_other_up(tmp_path: Path) -> None:
    async with node_with_both(tmp_path, settings(single=True)) as node:
        await tokens_of(await ask(node, "first"))
        assert await tokens_of(await ask(node, "second")) == reply(OTHER, PROMPT, 5)

        assert loaded(node) == {"second"}
        assert {shard.model_id for shard in node.stages.shards} == {node.pipelines()[0].model_id}


async def test_one_model_at_a_time_lets_replies_of_the_other_finish(tmp_path: Path) -> None:
    steps: list[str] = []
    async with node_with_both(tmp_path, settings(single=True)) as node:
        generation = await ask(node, "first", max_tokens=30)
        async with trio.open_nursery() as nursery:

            async def ask_other() -> None:
                await node.prepare("second", on_progress=lambda item: steps.append(item.step))
                steps.append("ready")

            nursery.start_soon(ask_other)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert await tokens_of(generation) == reply(MODEL, PROMPT, 30)

    assert steps[0] == "waiting for replies of first"
    assert steps[-1] == "ready"


async def test_one_model_at_a_time_answers_requests_for_both_in_turn(tmp_path: Path) -> None:
    answers: list[tuple[str, list[int]]] = []

    async def ask_one(node: Node, name: str) -> None:
        answers.append((name, await tokens_of(await ask(node, name))))

    async with (
        node_with_both(tmp_path, settings(single=True)) as node,
        trio.open_nursery() as nursery,
    ):
        for name in ("first", "second", "first", "second"):
            nursery.start_soon(ask_one, node, name)

    expected = {"first": reply(MODEL, PROMPT, 5), "second": reply(OTHER, PROMPT, 5)}
    assert len(answers) == 4
    assert all(tokens == expected[name] for name, tokens in answers)


async def test_one_model_at_a_time_fails_no_request_of_many_for_both(tmp_path: Path) -> None:
    """Method: with one slot all but one of twelve clients wait, for it or for the other model."""
    answers: list[tuple[str, list[int]]] = []
    wanted = settings(single=True)
    wanted = replace(wanted, engine=replace(wanted.engine, slots=1))

    async def ask_thrice(node: Node, name: str) -> None:
        for _ in range(3):
            answers.append((name, await tokens_of(await ask(node, name))))

    async with node_with_both(tmp_path, wanted) as node, trio.open_nursery() as nursery:
        for name in ("first", "second") * 6:
            nursery.start_soon(ask_thrice, node, name)

    expected = {"first": reply(MODEL, PROMPT, 5), "second": reply(OTHER, PROMPT, 5)}
    assert len(answers) == 36
    assert all(tokens == expected[name] for name, tokens in answers)


async def test_one_model_at_a_time_lets_who_waits_for_a_slot_of_it_finish(tmp_path: Path) -> None:
    """The one that waits is given the slot just when the last reply is over."""
    wanted = settings(single=True)
    wanted = replace(wanted, engine=replace(wanted.engine, slots=1))
    async with node_with_both(tmp_path, wanted) as node:
        running = await ask(node, "first", max_tokens=400)
        async with trio.open_nursery() as nursery:

            async def wait_for_the_slot() -> None:
                waiting = await ask(node, "first", on_progress=queued.note)
                assert waiting.pipeline.id == running.pipeline.id
                assert await tokens_of(waiting) == reply(MODEL, PROMPT, 5)
                assert loaded(node) == {"first"}

            queued, draining = Step("queued"), Step("waiting for replies of first")
            nursery.start_soon(wait_for_the_slot)
            await queued.begun.wait()
            nursery.start_soon(partial(node.prepare, "second", on_progress=draining.note))
            await draining.begun.wait()
            await running.aclose()

        assert loaded(node) == {"second"}


async def test_a_model_goes_on_when_a_request_for_another_is_cancelled(tmp_path: Path) -> None:
    async with node_with_both(tmp_path, settings(single=True)) as node:
        running = await ask(node, "first", max_tokens=400)
        await cancel_while_waiting(node, "second")
        assert await tokens_of(running) == reply(MODEL, PROMPT, 400)

        again = await ask(node, "first")
        assert await tokens_of(again) == reply(MODEL, PROMPT, 5)
        assert again.pipeline.id == running.pipeline.id


async def test_replies_are_waited_for_again_when_one_request_for_another_model_was_cancelled(
    tmp_path: Path,
) -> None:
    """The last reply is over at the very moment at which the request is cancelled."""
    async with node_with_both(tmp_path, settings(single=True)) as node:
        running = await ask(node, "first", max_tokens=400)
        await cancel_while_waiting(node, "second", at_once=running.close)
        again = await ask(node, "first", max_tokens=400)
        async with trio.open_nursery() as nursery:
            draining = Step("waiting for replies of first")
            nursery.start_soon(partial(node.prepare, "second", on_progress=draining.note))
            await draining.begun.wait()

            assert await tokens_of(again) == reply(MODEL, PROMPT, 400)


@dataclass
class Step:
    """Something that a request tells it has come to."""

    name: str
    begun: trio.Event = field(default_factory=trio.Event)

    def note(self, progress: Progress) -> None:
        if progress.step == self.name:
            self.begun.set()


async def cancel_while_waiting(
    node: Node, model: str, *, at_once: Callable[[], None] = lambda: None
) -> None:
    """Ask for a model, and give up while replies of the first are waited for."""
    async with trio.open_nursery() as nursery:
        draining = Step("waiting for replies of first")
        nursery.start_soon(partial(node.prepare, model, on_progress=draining.note))
        await draining.begun.wait()
        nursery.cancel_scope.cancel()
        at_once()
