"""The default model through real children: the same tokens split and whole, and sensible ones."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
from shard_rows import generate, row
from tiny_models import LAYERS, save_model
from tokenizers import Tokenizer

from swarmpy.abc import Want
from swarmpy.config import EngineConfig
from swarmpy.pipeline.engine_host import EngineHost, HostedShard
from swarmpy.shards.gguf import read_header
from swarmpy.shards.tokenizer_files import tokenizer_json

LAYER_COUNT = 30


@asynccontextmanager
async def running_host(cache: Path) -> AsyncIterator[EngineHost]:
    host = EngineHost("mlx", config=EngineConfig(threads=1), cache_folder=cache)
    async with trio.open_nursery() as nursery:
        await nursery.start(run_host, host)
        yield host
        nursery.cancel_scope.cancel()


async def run_host(host: EngineHost, task_status: trio.TaskStatus[None]) -> None:
    await host.run(task_status=task_status)


async def load(
    host: EngineHost, path: Path, start: int, end: int, *, context: int = 512
) -> HostedShard:
    return await host.load(path, start=start, end=end, slots=2, context=context, exact=True)


@pytest.mark.model
async def test_three_stages_answer_with_the_wholes_tokens(
    default_gguf: Path, tmp_path: Path
) -> None:
    """Goal: 20 tokens after a prompt, bit for bit, that name the capital of France."""
    header = read_header(default_gguf)
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(header)))
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(question, add_special_tokens=False).ids
    async with running_host(tmp_path) as host:
        inspection = await host.inspect(default_gguf)
        split = [
            await load(host, default_gguf, start, end)
            for start, end in itertools.pairwise([0, 10, 20, LAYER_COUNT])
        ]
        split_tokens, split_logits = await generate(inspection, split, prompt, count=20)
        for shard in split:
            await shard.close()
        whole = [await load(host, default_gguf, 0, LAYER_COUNT)]
        whole_tokens, whole_logits = await generate(inspection, whole, prompt, count=20)

    assert split_tokens == whole_tokens
    assert split_logits == whole_logits
    assert "Paris" in tokenizer.decode(split_tokens)


@pytest.mark.model
async def test_a_shard_reads_and_keeps_its_own_tensors_only(
    default_gguf: Path, tmp_path: Path
) -> None:
    """A third without embedding holds 142 MB; the whole model would be 538."""
    async with running_host(tmp_path) as host:
        await host.inspect(default_gguf)
        assert host._spare is not None
        before = host._spare.rss_bytes()
        shard = await load(host, default_gguf, 10, 20)

        assert 141_000_000 < shard.weight_bytes < 142_000_000
        assert shard.rss_bytes() - before < 1.25 * shard.weight_bytes


@pytest.mark.model
async def test_a_prompt_of_2000_tokens_goes_through_one_stage(
    default_gguf: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    prompt = [int(token) for token in rng.integers(10, 40_000, 2000)]
    async with running_host(tmp_path) as host:
        shard = await load(host, default_gguf, 0, 2, context=2048)
        for start in range(0, len(prompt), 64):
            ids = prompt[start : start + 64]
            output = (await shard.step([row(ids, start, want=Want.HIDDEN)])).outputs[0]
            assert output.error == ""
            assert output.hidden is not None
            assert output.hidden[0].shape == (len(ids), 576)


async def test_thirty_sessions_in_a_row_leave_the_childs_memory_flat(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", "llama")
    async with running_host(tmp_path) as host:
        shard = await load(host, path, 0, LAYERS, context=1024)
        resident: list[int] = []
        for _ in range(30):
            for start in range(0, 512, 64):
                await shard.step([row([9] * 64, start, want=Want.NOTHING)])
            for position in range(512, 522):
                await shard.step([row([3], position)])
            await shard.free(0)
            resident.append(shard.rss_bytes())

    assert max(resident[5:]) - resident[4] < 4_000_000
