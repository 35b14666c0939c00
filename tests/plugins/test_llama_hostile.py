"""What a peer may ask of a shard or put into it harms neither its child nor other sessions."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import trio
from gguf_models import write_models
from shard_rows import logits_of, row

from swarmpy.config import EngineConfig
from swarmpy.errors import ExtensionNotFound, ModelRefused, RowError
from swarmpy.pipeline.engine_host import EngineHost
from swarmpy.plugins.llama.library import find_library
from swarmpy.proto.tensor import Tensor

try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)

from swarmpy.plugins.llama import LlamaEngine
from swarmpy.plugins.llama.shard import LlamaShard
from swarmpy.plugins.llama.structs import SEQUENCES_MAX

RECURRENT = ("mamba", "jamba", "lfm2", "falcon-h1", "qwen3next")
PROMPT = list(range(1, 21))
CONTEXT = 256


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    names = (*RECURRENT, "gemma3", "deepseek32", "gpt2", "llama")
    return write_models(tmp_path_factory.mktemp("models"), names)


def load(path: Path, *, slots: int = 2, context: int = CONTEXT) -> LlamaShard:
    """The whole of a model, in this process."""
    engine = LlamaEngine()
    count = engine.inspect(path).layer_count
    shard = engine.load(path, start=0, end=count, slots=slots, context=context, exact=True)
    assert isinstance(shard, LlamaShard)
    return shard


def answer(shard: LlamaShard, slot: int) -> bytes:
    """The logits after the prompt in a fresh slot."""
    shard.free(slot)
    return logits_of(shard.step([row(PROMPT, 0, slot=slot)])[0]).tobytes()


# States -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECURRENT)
def test_a_state_of_huge_numbers_harms_no_session_after_it(
    models: Mapping[str, Path], name: str
) -> None:
    """Finite when it came, no number after a step: it must not outlive its session."""
    shard = load(models[name])
    expected = [answer(shard, slot) for slot in (0, 1)]
    shard.free(1)
    state = shard.export_state(0, 0, len(PROMPT))
    huge = {
        key: Tensor(
            tensor.dtype,
            tensor.shape,
            np.full(tensor.shape, np.finfo(tensor.dtype).max, tensor.dtype).tobytes(),
        )
        for key, tensor in state.items()
    }
    shard.free(0)

    with suppress(RowError):
        shard.import_state(0, 0, len(PROMPT), huge)
        shard.step([row([1], len(PROMPT))])

    assert [answer(shard, slot) for slot in (0, 1)] == expected
    shard.close()


@pytest.mark.parametrize("name", ["gemma3", "deepseek32"])
def test_a_state_without_some_rows_of_its_second_cache_is_refused(
    models: Mapping[str, Path], name: str
) -> None:
    """A window's rows, or those of what picks keys: without them other numbers would come."""
    shard = load(models[name])
    answer(shard, 0)
    state = shard.export_state(0, 0, len(PROMPT))
    short = {
        key: Tensor(tensor.dtype, (1, tensor.shape[1]), bytes(tensor.data)[: 2 * tensor.shape[1]])
        if key.startswith("second.")
        else tensor
        for key, tensor in state.items()
    }

    with pytest.raises(RowError, match=r"state second\..*\(1, "):
        shard.import_state(1, 0, len(PROMPT), short)
    shard.import_state(1, 0, len(PROMPT), state)
    shard.close()


# Sizes ------------------------------------------------------------------------------------------


def test_a_context_beyond_the_models_is_refused(models: Mapping[str, Path]) -> None:
    """Learned positions end there, and the library with them."""
    with pytest.raises(ModelRefused, match="a context of 320, gpt2 has 256"):
        load(models["gpt2"], context=320)


@pytest.mark.skipif(sys.platform == "win32", reason="engine children need POSIX")
@pytest.mark.parametrize("name", ["llama", "mamba"])
async def test_as_many_slots_as_are_said_to_be_possible_are(
    models: Mapping[str, Path], tmp_path: Path, name: str
) -> None:
    """In a child, since the library would end the process over too many."""
    host = EngineHost("llama", config=EngineConfig(threads=1), cache_folder=tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        inspection = await host.inspect(models[name])
        assert inspection.slots_max == SEQUENCES_MAX
        shard = await host.load(
            models[name],
            start=0,
            end=inspection.layer_count,
            slots=SEQUENCES_MAX,
            context=64,
            exact=True,
        )
        rows = [row([5], 0, slot=slot) for slot in range(SEQUENCES_MAX)]
        outputs = (await shard.step(rows)).outputs
        nursery.cancel_scope.cancel()

    assert len({logits_of(output).tobytes() for output in outputs}) == 1
