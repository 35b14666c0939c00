"""Nodes that have a model's headers alone run it together: each fetches the layers it is given.

Real nodes, connections, engine children and downloads; the Hub is imitated on this machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from gguf_models import write_models
from hub_server import FakeHub

from swarmpy import node_offers
from swarmpy.config import Config, EngineConfig, ModelsConfig
from swarmpy.errors import ExtensionNotFound, NoPipeline
from swarmpy.node import Node
from swarmpy.pipeline.engine_host import EngineHost, HostedShard
from swarmpy.pipeline.links import CoordinatorControl
from swarmpy.pipeline.session import Generation
from swarmpy.plugins.llama.library import find_library
from swarmpy.proto.pipeline import Accepted, Load, Loaded, Offer, Progressed, Sampling
from swarmpy_cli.budget import split_budget, whole_budget
from tests.small_nodes import until
from tests.swarms import config, environment

pytest.importorskip("huggingface_hub", reason="needs the extra 'hub'")
try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="engine children need POSIX")

NAME = "ann/tiny"
FILE = "tiny-F32.gguf"
CONTEXT = 256
SLOTS = 2
PROMPT = list(range(1, 40))
TOKENS = 8


@pytest.fixture
def model_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub with a model of six layers that llama.cpp runs."""
    path = write_models(tmp_path, ["llama"])["llama"]
    hub.files, hub.lfs = {FILE: path.read_bytes()}, frozenset({FILE})
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    return hub


def settings(name: str, *, memory_bytes: int, fetch: bool = True) -> Config:
    engine = EngineConfig(
        name="llama", memory_bytes_max=memory_bytes, context=CONTEXT, slots=SLOTS, threads=1
    )
    return replace(config(name), engine=engine, models=ModelsConfig(fetch=fetch))


@asynccontextmanager
async def open_nodes(
    folder: Path, budgets: Sequence[int], *, fetch: bool = True
) -> AsyncIterator[list[Node]]:
    """Nodes with a cache each, that have the headers of the model, in one network."""
    async with AsyncExitStack() as stack:
        nodes = []
        for name, memory_bytes in zip("abc", budgets, strict=False):
            machine = replace(environment(folder, name), cache_folder=folder / name / "cache")
            wanted = settings(name, memory_bytes=memory_bytes, fetch=fetch)
            node = await stack.enter_async_context(Node.open(wanted, machine))
            await node.pull(NAME, layers=(0, 0))
            nodes.append(node)
        for node in nodes[1:]:
            await node.join((await nodes[0].create_invite()).code)
        for node in nodes:
            await node.wait_members(len(nodes) - 1)
        yield nodes


async def budget_of(folder: Path, parts: int) -> int:
    """The memory with which so many nodes hold the model, and fewer do not."""
    async with open_nodes(folder / "look", [10**9]) as (node,):
        model_id = node.models()[0].model_id
        inspection = (await node.stages.choose(model_id)).inspection
    if parts == 1:
        return whole_budget(inspection, slots=SLOTS, context=CONTEXT)
    return split_budget(inspection, parts, slots=SLOTS, context=CONTEXT)


async def tokens_of(generation: Generation) -> list[int]:
    async with generation:
        return [token.id async for token in generation]


async def test_each_node_fetches_only_the_layers_it_is_given(
    model_hub: FakeHub, tmp_path: Path
) -> None:
    budget = await budget_of(tmp_path, 3)
    size = len(model_hub.files[FILE])
    async with open_nodes(tmp_path, [budget] * 3) as nodes:
        before = model_hub.sent[FILE]
        view = await nodes[0].prepare("tiny-f32")
        fetched = model_hub.sent[FILE] - before
        split = await tokens_of(
            await nodes[0].generate("tiny-f32", PROMPT, Sampling(), max_tokens=TOKENS)
        )
        held = {node.name: node.catalog.find("tiny-f32") for node in nodes}

    assert len(view.stages) == 3
    assert fetched == sum(stage.fetch_bytes for stage in view.stages) <= size
    for stage in view.stages:
        assert held[stage.name].layers == ((stage.start, stage.end),)
        assert 0 < stage.fetch_bytes < size * 0.6
        blocks = os.stat(held[stage.name].path).st_blocks * 512
        assert blocks < size, "the rest of the file is a hole"

    whole = tmp_path / "whole"
    async with open_nodes(whole, [await budget_of(whole, 1)]) as (alone,):
        reply = await alone.generate("tiny-f32", PROMPT, Sampling(), max_tokens=TOKENS)
        assert await tokens_of(reply) == split
        assert alone.catalog.find("tiny-f32").layers is None, "the last layer made it whole"


async def test_what_a_node_has_fetched_it_uses_again_and_tells(
    model_hub: FakeHub, tmp_path: Path
) -> None:
    budget = await budget_of(tmp_path, 2)
    async with open_nodes(tmp_path, [budget] * 2) as (first, second):
        view = await first.prepare("tiny-f32")
        sent = model_hub.sent[FILE]
        ranges = {stage.name: ((stage.start, stage.end),) for stage in view.stages}
        with trio.fail_after(10):
            while True:
                told = first.discovery.announcement(second.peer_id)
                if told is not None and told.models[0].layers == ranges["b"]:
                    break
                await first.wait_members_changed()
        first.assembler.ready(view.model_id).close(NoPipeline("again"))  # type: ignore[union-attr]

        again = await first.prepare("tiny-f32")

    assert [(stage.name, stage.start, stage.end) for stage in again.stages] == [
        (stage.name, stage.start, stage.end) for stage in view.stages
    ]
    assert model_hub.sent[FILE] == sent
    assert [stage.fetch_bytes for stage in again.stages] == [0, 0]


async def test_a_node_that_may_not_fetch_is_not_given_layers_it_lacks(
    model_hub: FakeHub, tmp_path: Path
) -> None:
    budget = await budget_of(tmp_path, 1)
    async with open_nodes(tmp_path, [budget], fetch=False) as (node,):
        sent = model_hub.sent[FILE]
        with pytest.raises(NoPipeline, match=r"a offers .* and has the files of layers none"):
            await node.prepare("tiny-f32")

    assert model_hub.sent[FILE] == sent


async def test_a_node_that_may_not_fetch_refuses_the_offer_of_layers_it_lacks(
    model_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its coordinator believes that it has them all."""
    own_capacity = node_offers._own_capacity
    monkeypatch.setattr(
        node_offers,
        "_own_capacity",
        lambda node, model_id: replace(own_capacity(node, model_id), files=None),
    )
    async with open_nodes(tmp_path, [10**10], fetch=False) as (node,):
        with pytest.raises(NoPipeline, match=r"a refused .*layers .* are not on this machine"):
            await node.prepare("tiny-f32")

        assert node.stages.shards == ()


async def test_two_stages_of_a_model_on_one_node_load_though_the_second_makes_it_whole(
    model_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of two rings, whose other halves are the other node's.

    Method: the first is loaded once the second waits for it, or has moved the model.
    """
    monkeypatch.setattr("swarmpy.pipeline.stage.LOADS_MAX", 1)
    load, is_loading = EngineHost.load, trio.Event()
    async with open_nodes(tmp_path, [10**10, 0]) as (node, other):
        entry = node.catalog.find("tiny-f32")
        locks = node.stages._file_locks

        def is_second_there() -> bool:
            lock = locks.get(entry.model_id)
            is_waiting = lock is not None and lock.statistics().tasks_waiting > 0
            return is_waiting or not entry.path.exists()

        async def load_late(host: EngineHost, path: Path, **shard: Any) -> HostedShard:
            if shard["start"] == 0:
                is_loading.set()
                await until(is_second_there)
            return await load(host, path, **shard)

        monkeypatch.setattr(EngineHost, "load", load_late)
        inspection = (await node.stages.choose(entry.model_id)).inspection
        cut = inspection.cuts[len(inspection.cuts) // 2]
        specs = tuple(inspection.wire_specs[cut])
        first = Offer(
            pipeline=b"1" * 16,
            model_id=entry.model_id,
            stage=0,
            ring=(node.peer_id, other.peer_id),
            cuts=(0, cut, inspection.layer_count),
            slots=1,
            context=CONTEXT,
            exact=False,
            received=(),
            sent=specs,
            expected_bytes=0,
        )
        second = msgspec.structs.replace(
            first,
            pipeline=b"2" * 16,
            stage=1,
            ring=(other.peer_id, node.peer_id),
            received=specs,
            sent=(),
        )
        stages = [node.stages.offer_local(offer) for offer in (first, second)]
        for stage in stages:
            assert isinstance(await stage.receive(), Accepted)
        for stage in stages:
            stage.send_nowait(Load())
            await is_loading.wait()

        assert [await last_report(stage) for stage in stages] == [Loaded, Loaded]
        assert not entry.path.exists(), "the model was moved"


async def last_report(stage: CoordinatorControl) -> type[object]:
    """Wait until a stage is loaded or has failed."""
    while isinstance(report := await stage.receive(), Progressed):
        pass
    return type(report)


async def test_a_hub_that_is_gone_while_a_stage_fetches_is_told_with_its_reason(
    model_hub: FakeHub, tmp_path: Path
) -> None:
    budget = await budget_of(tmp_path, 1)
    async with open_nodes(tmp_path, [budget]) as (node,):
        model_hub.is_offline = True
        with pytest.raises(NoPipeline, match="Hub"):
            await node.prepare("tiny-f32")
        model_hub.is_offline = False

        assert len((await node.prepare("tiny-f32")).stages) == 1
