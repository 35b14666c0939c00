"""What a stage does about files: it says what it would fetch, and one stage at a time does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from hand import MODEL, open_hand, receive
from rings import MODEL_ID, budget_for
from trio.testing import MockClock, wait_all_tasks_blocked

from swarmpy.errors import ModelNotFound, ModelRefused, SwarmError
from swarmpy.pipeline.engine_host import EngineHost, HostedShard
from swarmpy.proto.pipeline import Accepted, Load, Loaded, Refused


@pytest.mark.parametrize("error", [ModelNotFound, ModelRefused])
async def test_an_offer_of_files_that_cannot_be_had_is_refused_and_the_stage_goes_on(
    tmp_path: Path, error: type[SwarmError], autojump_clock: MockClock
) -> None:
    async def check(model_id: str, start: int, end: int) -> int:
        if model_id != MODEL_ID:
            raise error("config.json was moved meanwhile")
        return 0

    async with open_hand(tmp_path, check_files=check) as hand:
        control = await hand.open_stream(hand.offer(model_id="cd" * 32))
        refused = await receive(control)

        assert isinstance(refused, Refused)
        assert refused.reason == "model"
        assert "config.json" in refused.message
        assert hand.node.service.memory_bytes_free == hand.node.service.memory_bytes_max
        await hand.loaded()


async def test_an_answer_tells_what_would_be_fetched_until_the_shard_is_loaded(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async def check(model_id: str, start: int, end: int) -> int:
        return 1000 * (end - start)

    async with open_hand(tmp_path, check_files=check) as hand:
        control = await hand.open_stream(hand.offer())
        first = await receive(control)
        await control.send(Load())
        assert isinstance(await receive(control), Loaded)
        again = await receive(await hand.open_stream(hand.offer(pipeline=b"q" * 16)))

    assert isinstance(first, Accepted)
    assert isinstance(again, Accepted)
    assert (first.fetch_bytes, first.is_loaded) == (6000, False)
    assert (again.fetch_bytes, again.is_loaded) == (0, True)


def read(path: Path) -> None:
    """As an engine does that finds no files."""
    if not path.exists():
        raise ModelRefused(f"{path} is gone")


@pytest.fixture
def is_loading(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Lets each load take ten seconds, and only then read the files; set when one has begun."""
    begun = trio.Event()
    load = EngineHost.load

    async def load_slowly(host: EngineHost, path: Path, **shard: Any) -> HostedShard:
        begun.set()
        await trio.sleep(10)
        read(path)
        return await load(host, path, **shard)

    monkeypatch.setattr(EngineHost, "load", load_slowly)
    return begun


async def test_files_are_not_moved_by_one_stage_while_another_of_the_model_loads_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_loading: trio.Event,
    autojump_clock: MockClock,
) -> None:
    """The second stage's fetch makes the model whole, and so moves it."""
    part, whole = MODEL.write(tmp_path / "part"), tmp_path / "whole"
    monkeypatch.setattr("swarmpy.pipeline.stage.LOADS_MAX", 1)

    async def obtain(model_id: str, start: int, end: int, report: object) -> Path:
        if end < MODEL.layers:
            return part
        part.rename(whole)
        return whole

    async with open_hand(tmp_path, budget=2 * budget_for(MODEL, 1), obtain_files=obtain) as hand:
        offers = (hand.offer_of_the_first_layers(), hand.offer())
        stages = [await hand.open_stream(offer) for offer in offers]
        for stage in stages:
            assert isinstance(await receive(stage), Accepted)
            await stage.send(Load())
            await is_loading.wait()

        assert [type(await receive(stage)) for stage in stages] == [Loaded, Loaded]


async def test_a_loaded_shard_is_used_at_once_while_another_stage_of_the_model_fetches(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async def obtain(model_id: str, start: int, end: int, report: object) -> Path:
        if end < MODEL.layers:
            await trio.sleep_forever()
        return tmp_path

    async with open_hand(tmp_path, budget=2 * budget_for(MODEL, 1), obtain_files=obtain) as hand:
        await hand.loaded()
        fetching = await hand.open_stream(hand.offer_of_the_first_layers())
        assert isinstance(await receive(fetching), Accepted)
        await fetching.send(Load())
        await wait_all_tasks_blocked()

        await hand.loaded(pipeline=b"r" * 16)


async def test_files_that_another_process_moves_are_looked_for_once_more(
    tmp_path: Path, is_loading: trio.Event, autojump_clock: MockClock
) -> None:
    part, whole = MODEL.write(tmp_path / "part"), tmp_path / "whole"

    async def obtain(model_id: str, start: int, end: int, report: object) -> Path:
        return whole if whole.exists() else part

    async with open_hand(tmp_path, obtain_files=obtain) as hand:
        control = await hand.open_stream(hand.offer())
        assert isinstance(await receive(control), Accepted)
        await control.send(Load())
        await is_loading.wait()
        part.rename(whole)

        assert isinstance(await receive(control), Loaded)
