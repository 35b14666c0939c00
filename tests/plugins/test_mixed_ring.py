"""One model, two engines: MLX computes its first layers and llama.cpp its last, or the other way.

Real weights: both unpack the same Q4_1 numbers, but llama.cpp rounds what it multiplies them with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from swarmpy.config import EngineConfig
from swarmpy.errors import ExtensionNotFound
from swarmpy.node import Node
from swarmpy.pipeline.fit import fit
from swarmpy.plugins.llama.library import find_library
from swarmpy.proto.pipeline import Sampling
from swarmpy.shards.gguf import read_header
from swarmpy.shards.tokenizer_files import tokenizer_json
from tests.swarms import config, environment

pytest.importorskip("mlx_lm", reason="needs the extra 'mlx'")
try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(sys.platform == "win32", reason="engine children need POSIX"),
]

LAYERS, CONTEXT = 30, 256
QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nName the capital of France.<|im_end|>\n<|im_start|>assistant\n"
)


def settings(engine: str, memory_bytes: int) -> EngineConfig:
    return EngineConfig(
        name=engine, memory_bytes_max=memory_bytes, context=CONTEXT, slots=1, threads=1
    )


async def budget(folder: Path, model: Path, engine: str, *layers: int) -> int:
    """What the fit check counts for some layers in an engine."""
    wanted = replace(config(engine), engine=settings(engine, 10**10))
    async with Node.open(wanted, environment(folder, f"look-{engine}")) as node:
        pulled = await node.pull(str(model))
        inspection = (await node.stages.choose(pulled.model_id)).inspection
    return fit(inspection, *layers, slots=1, context=CONTEXT).sum_bytes  # type: ignore[misc]


@pytest.mark.parametrize("engines", [("mlx", "llama"), ("llama", "mlx")], ids="-".join)
async def test_two_engines_answer_together(
    engines: Sequence[str], default_gguf: Path, tmp_path: Path
) -> None:
    """Each has the memory for half of the layers in its own engine, and not for the whole."""
    ranges = [(0, LAYERS // 2), (LAYERS // 2, LAYERS)]
    if engines[0] == "llama":  # MLX needs more for its half than llama.cpp for the whole.
        ranges = [(0, 20), (20, LAYERS)]
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(read_header(default_gguf))))
    prompt = tokenizer.encode(QUESTION, add_special_tokens=False).ids
    async with AsyncExitStack() as stack:
        nodes = []
        for engine, layers in zip(engines, ranges, strict=True):
            need = await budget(tmp_path, default_gguf, engine, *layers)
            wanted = replace(config(engine), engine=settings(engine, need))
            node = await stack.enter_async_context(Node.open(wanted, environment(tmp_path, engine)))
            nodes.append(node)
        first, second = nodes
        pulled = await first.pull(str(default_gguf))
        await second.join((await first.create_invite()).code)
        for node in nodes:
            await node.wait_members(1)

        async with await first.generate(
            pulled.model_id, prompt, Sampling(), max_tokens=8
        ) as generation:
            tokens = [token.id async for token in generation]
        stages = generation.pipeline.stages

    assert {stage.engine for stage in stages} == {"llama", "mlx"}
    assert "Paris" in tokenizer.decode(tokens)
