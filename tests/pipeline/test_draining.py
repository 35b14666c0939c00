"""A pipeline that is given up lets what it has begun finish, and who waits for a slot."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from rings import MODEL_ID, Node, budget_for, open_swarm
from trio.testing import MockClock

from swarmpy.errors import StageEvicted
from swarmpy.pipeline.coordinator import Pipeline
from swarmpy.pipeline.session import Generation, generate
from swarmpy.proto.pipeline import Sampling
from swarmpy.testing.engine import EchoModel, reply

PROMPT = list(range(5, 25))
ROUNDS = 10
"""Of two tasks that wake together either may run first: each does, in some round."""


@asynccontextmanager
async def open_node(folder: Path) -> AsyncIterator[Node]:
    """A node that holds the model by itself, for one session at a time."""
    budget = budget_for(EchoModel(), 1)
    async with open_swarm(folder, count=1, budgets=[budget], slots=1) as swarm:
        yield swarm.nodes[0]


async def start(node: Node, pipeline: Pipeline, *, max_tokens: int = 8) -> Generation:
    """Begin a reply in a pipeline, draining or not."""
    session_id = node.random.randbytes(16)
    return await generate(
        pipeline, PROMPT, Sampling(), session_id=session_id, max_tokens=max_tokens
    )


async def read(generation: Generation) -> list[int]:
    async with generation:
        return [token.id async for token in generation]


async def test_who_waits_for_a_slot_is_given_it_before_the_pipeline_is_given_up(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    answers: list[list[int]] = []

    async def wait_for_the_slot(node: Node, pipeline: Pipeline) -> None:
        answers.append(await read(await start(node, pipeline)))

    async with open_node(tmp_path) as node:
        for _ in range(ROUNDS):
            pipeline = await node.assembler.pipeline_for(MODEL_ID)
            running = await start(node, pipeline, max_tokens=2000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_for_the_slot, node, pipeline)
                nursery.start_soon(pipeline.drain, StageEvicted("made room"))
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                running.close()
            assert not pipeline.is_open

    assert answers == [reply(EchoModel(), PROMPT, 8)] * ROUNDS


async def test_a_session_that_begins_just_when_the_last_one_is_over_is_waited_for(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Its request was given the pipeline before that was to be given up."""
    async with open_node(tmp_path) as node:
        for _ in range(ROUNDS):
            pipeline = await node.assembler.pipeline_for(MODEL_ID)
            running = await start(node, pipeline, max_tokens=2000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pipeline.drain, StageEvicted("made room"))
                await trio.lowlevel.checkpoint()
                running.close()
                assert await read(await start(node, pipeline)) == reply(EchoModel(), PROMPT, 8)
            assert not pipeline.is_open
