"""Which models a node holds: on demand or from the start, one at a time, idle ones making room.

Real nodes over real TCP on loopback, with the EchoEngine and two models.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from swarmpy.config import Config, ModelsConfig
from swarmpy.errors import NoPipeline
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


async def ask(node: Node, model: str, *, max_tokens: int = 5) -> Generation:
    return await node.generate(model, PROMPT, Sampling(), max_tokens=max_tokens)


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


async def test_a_preloaded_model_comes_back_when_it_was_lost(tmp_path: Path) -> None:
    async with node_with_both(tmp_path, settings()) as node:
        pass

    async with Node.open(settings(preload=("first",)), environment(tmp_path, "a")) as node:
        await until_loaded(node, "first")
        before = node.pipelines()[0]
        node.assembler.ready(before.model_id).close(NoPipeline("lost"))  # type: ignore[union-attr]

        with trio.fail_after(10):
            while [view.id for view in node.pipelines()] in ([], [before.id]):  # noqa: ASYNC110
                await trio.sleep(0.01)


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
