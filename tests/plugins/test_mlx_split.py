"""Any architecture, split in three through real child processes, gives the whole's bits.

Method: tiny random models, three children that hold a third each and a fourth that holds all; the
same prompt in chunks and the same reply token by token through both; logits compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from shard_rows import ring_rows, row
from tiny_models import CONFIGS, LAYERS, VOCABULARY, save_model

from swarmpy.abc import Inspection, Want
from swarmpy.config import EngineConfig
from swarmpy.pipeline.engine_host import EngineHost
from swarmpy.pipeline.engine_process import EngineProcess
from swarmpy.pipeline.engine_shards import ChildShard, ask
from swarmpy.proto import engine as messages

CHUNKS = [list(range(64)), list(range(80, 111))]
REPLY = [5, 150, 33, 7, 99]


@dataclass(frozen=True)
class Comparison:
    inspection: Inspection
    edges: list[int]
    whole: list[bytes]
    split: list[bytes]
    stages_given_ids: list[bool]


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Comparison]:
    """Every architecture's two runs; the four children serve one model after the other."""
    folder = tmp_path_factory.mktemp("models")
    return trio.run(compare_all, folder)


async def compare_all(folder: Path) -> dict[str, Comparison]:
    host = EngineHost("mlx", config=EngineConfig(threads=1), cache_folder=folder / "cache")
    found: dict[str, Comparison] = {}
    async with trio.open_nursery() as nursery:
        children = [EngineProcess("mlx", lock_folder=folder / "run", threads=1) for _ in range(4)]
        for child in children:
            nursery.start_soon(child.watch)
        await nursery.start(run_host, host)
        for name in CONFIGS:
            path = save_model(folder / name, name)
            found[name] = await compare(await host.inspect(path), path, children)
        nursery.cancel_scope.cancel()
    return found


async def run_host(host: EngineHost, task_status: trio.TaskStatus[None]) -> None:
    await host.run(task_status=task_status)


async def compare(
    inspection: Inspection, path: Path, children: Sequence[EngineProcess]
) -> Comparison:
    thirds = {LAYERS // 3, 2 * LAYERS // 3}
    cuts = thirds if thirds <= set(inspection.cuts) else inspection.cuts
    edges = [0, min(cuts), max(cuts), LAYERS]
    split = [
        await load(child, path, start, end)
        for child, start, end in zip(children, edges[:-1], edges[1:], strict=False)
    ]
    whole = [await load(children[3], path, 0, LAYERS)]
    comparison = Comparison(
        inspection,
        edges,
        await answer(inspection, whole),
        await answer(inspection, split),
        [inspection.needs_token_ids(shard.start, shard.end) for shard in split],
    )
    for child in children:
        await ask(child, messages.Unload(id=child.next_id()), messages.Done, timeout_s=60)
    return comparison


async def load(child: EngineProcess, path: Path, start: int, end: int) -> ChildShard:
    request = messages.Load(
        id=child.next_id(),
        path=str(path),
        start=start,
        end=end,
        slots=2,
        context=256,
        exact=True,
        threads=1,
    )
    loaded = await ask(child, request, messages.Loaded, timeout_s=60)
    return ChildShard(child, request, loaded, step_timeout_s=60)


async def answer(inspection: Inspection, shards: Sequence[ChildShard]) -> list[bytes]:
    """Run the prompt and the reply and return the logits of each step."""
    found = []
    position = 0
    for token_ids in [*CHUNKS, *([token] for token in REPLY)]:
        hidden = None
        for shard in shards:
            ids, want = ring_rows(
                inspection, shard.start, shard.end, token_ids, want=Want.ALL_LOGITS
            )
            asked = row(ids, position, want=want, hidden=hidden, count=len(token_ids))
            output = (await shard.step([asked])).outputs[0]
            assert not output.error, output.error
            hidden = output.hidden
        assert output.logits is not None
        found.append(bytes(output.logits.data))
        position += len(token_ids)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_three_stages_give_the_wholes_bits(comparisons: dict[str, Comparison], name: str) -> None:
    comparison = comparisons[name]

    assert comparison.split == comparison.whole
    assert len(set(comparison.whole)) == len(comparison.whole)
    assert len(comparison.whole[0]) == 64 * VOCABULARY * 4


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gemma4_text"])
def test_only_the_first_stage_is_given_token_ids(
    comparisons: dict[str, Comparison], name: str
) -> None:
    assert comparisons[name].stages_given_ids == [True, False, False]


def test_stages_whose_output_depends_on_the_tokens_are_given_them(
    comparisons: dict[str, Comparison],
) -> None:
    """gemma4 adds an embedding of the token in every layer."""
    assert comparisons["gemma4_text"].stages_given_ids == [True, True, True]


def test_layers_that_share_keys_are_not_cut_apart(comparisons: dict[str, Comparison]) -> None:
    """The last two layers of this gemma4 read the keys of layers 2 and 3."""
    assert comparisons["gemma4_text"].inspection.cuts == (1, 2)


def test_everything_a_layer_hands_on_crosses_the_cut(comparisons: dict[str, Comparison]) -> None:
    """rwkv7 hands the first layer's values from layer to layer beside the hidden state."""
    assert len(comparisons["rwkv7"].inspection.wire_specs[2]) == 2
