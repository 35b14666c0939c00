"""The llama engine: what it says of a model, what it refuses, and its life in a child process."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from gguf_models import Tensor, metadata_of, write_gguf, write_models
from shard_rows import generate, logits_of, row
from tokenizers import Tokenizer

from swarmpy.abc import Progress, Shard, StateKind, Want
from swarmpy.config import EngineConfig
from swarmpy.errors import (
    ConfigError,
    DoesNotFit,
    EngineLost,
    ExtensionNotFound,
    ModelRefused,
    RowError,
)
from swarmpy.pipeline.engine_host import EngineHost, HostedShard
from swarmpy.plugins.llama.devices import GPU_LAYERS_VARIABLE, Gpu
from swarmpy.plugins.llama.library import find_library, open_library
from swarmpy.shards.gguf import GgmlType, read_header
from swarmpy.shards.tokenizer_files import tokenizer_json

try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)

from swarmpy.plugins.llama import LlamaEngine
from swarmpy.plugins.llama import engine as llama_engine

LLAMA = "swarmpy.plugins.llama:LlamaEngine"
ABORTING = "aborting_llama:AbortingEngine"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("llama", "llama+q8_0", "gemma3", "mamba", "minicpm3", "rwkv7")
    return write_models(tmp_path_factory.mktemp("models"), names)


def load(path: Path, *, start: int = 0, end: int = 6, slots: int = 2, context: int = 64) -> Shard:
    return LlamaEngine().load(path, start=start, end=end, slots=slots, context=context, exact=True)


# Inspecting -----------------------------------------------------------------


def test_sizes_are_those_of_the_file(tiny: dict[str, Path]) -> None:
    header = read_header(tiny["llama"])

    inspection = LlamaEngine().inspect(tiny["llama"])

    sizes = {name: tensor.size_bytes for name, tensor in header.tensors.items()}
    in_layers = sum(size for name, size in sizes.items() if name.startswith("blk."))
    assert sum(inspection.layer_weight_bytes) == in_layers
    assert inspection.embedding_weight_bytes == sizes["token_embd.weight"]
    assert inspection.weight_bytes(0, 6) == sum(sizes.values())
    assert (inspection.layer_count, inspection.hidden_size) == (6, 64)
    assert inspection.vocabulary_size == 64
    assert inspection.kv_bytes_per_token == (2 * 2 * 16 * 2,) * 6  # Two heads of 16, halves.
    assert inspection.cuts == (1, 2, 3, 4, 5)
    assert inspection.state_kind is StateKind.KV


def test_cuts_leave_no_part_without_a_window(tiny: dict[str, Path]) -> None:
    """Layers 5, 11 and 17 have none: no part is one of them alone, nor ends the model as such."""
    cuts = LlamaEngine().inspect(tiny["gemma3"]).cuts

    assert cuts == (*range(1, 6), *range(7, 12), *range(13, 17))


def test_a_recurrent_state_does_not_grow_with_tokens(tiny: dict[str, Path]) -> None:
    inspection = LlamaEngine().inspect(tiny["mamba"])

    assert inspection.state_kind is StateKind.RECURRENT
    assert set(inspection.kv_bytes_per_token) == {0}
    assert min(inspection.state_bytes) > 0


def test_the_build_id_names_the_gpu_only_where_it_computes(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = LlamaEngine().inspect(tiny["llama"]).build_id
    monkeypatch.setattr(llama_engine, "find_gpus", lambda library: [Gpu("CUDA0", 10**9)])

    assert LlamaEngine().inspect(tiny["llama"]).build_id == f"{without} gpu CUDA0"
    monkeypatch.setenv(GPU_LAYERS_VARIABLE, "0")
    assert LlamaEngine().inspect(tiny["llama"]).build_id == without


@pytest.mark.parametrize(("setting", "layers"), [("", 7), ("3", 3), ("0", 0)])
def test_a_shard_names_the_layers_that_a_gpu_computes(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, setting: str, layers: int
) -> None:
    """All would fit; there is no GPU here, so that the library leaves everything on the CPU."""
    monkeypatch.setattr(llama_engine, "find_gpus", lambda library: [Gpu("CUDA0", 10**9)])
    monkeypatch.setenv(GPU_LAYERS_VARIABLE, setting)

    shard = LlamaEngine().load(tiny["llama"], start=0, end=6, slots=1, context=256, exact=True)
    shard.close()

    assert ("gpu layers" in shard.exactness) == (layers > 0)
    assert not layers or f"gpu layers {layers}" in shard.exactness


# Refusing -------------------------------------------------------------------


def test_an_architecture_that_is_not_listed_is_refused_by_name(tiny: dict[str, Path]) -> None:
    with pytest.raises(ModelRefused, match="architecture 'rwkv7' is none the llama engine runs"):
        LlamaEngine().inspect(tiny["rwkv7"])


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="the llama engine runs GGUF files"):
        LlamaEngine().inspect(tmp_path)


def test_a_damaged_file_is_refused_by_our_own_reader(tiny: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny["llama"].read_bytes()[:-5000])

    with pytest.raises(ModelRefused, match=r"ends at byte \d+ of \d+"):
        LlamaEngine().inspect(path)


def test_a_file_that_the_library_does_not_take_is_refused_in_its_words(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Method: a model without one of its tensors, which our reader cannot miss."""
    header, raw = read_header(tiny["llama"]), tiny["llama"].read_bytes()
    tensors = {
        name: Tensor(item.type, item.shape, raw[item.offset : item.offset + item.size_bytes])
        for name, item in header.tensors.items()
        if name != "blk.2.ffn_up.weight"
    }
    path = tmp_path / "model.gguf"
    write_gguf(path, metadata_of("llama"), tensors)

    with pytest.raises(ModelRefused, match=r"does not load this model: .*blk\.2\.ffn_up\.weight"):
        load(path)


def test_a_cut_off_the_pattern_is_refused(tiny: dict[str, Path]) -> None:
    with pytest.raises(ModelRefused, match=r"gemma3 cannot be cut before layer 6: only before \("):
        load(tiny["gemma3"], start=5, end=6)


def test_a_model_told_apart_by_its_depth_is_cut_nowhere(tiny: dict[str, Path]) -> None:
    with pytest.raises(ModelRefused, match=r"minicpm3.*apart by their number of layers, so none"):
        load(tiny["minicpm3"], start=0, end=3)


def test_more_slots_than_the_library_has_sequences_do_not_fit(tiny: dict[str, Path]) -> None:
    with pytest.raises(DoesNotFit, match="257 slots asked for, 256 are possible"):
        load(tiny["llama"], slots=257)


def test_a_shard_that_exceeds_the_memory_left_does_not_fit(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_engine, "measured_memory_bytes", lambda: 10_000_000)

    with pytest.raises(DoesNotFit, match="but 10000000 bytes are left"):
        load(tiny["llama"])


@pytest.mark.parametrize("text", ["0", "-1", "two", ""])
def test_a_wrong_number_of_threads_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", text)

    with pytest.raises(ConfigError, match="expected a number of threads"):
        llama_engine.threads_from_environment()


# Exactness ------------------------------------------------------------------


def test_rows_are_batched_only_where_that_was_measured_to_be_exact(
    tiny: dict[str, Path],
) -> None:
    """Half precision has kernels that take several rows at once, and add in another order."""
    library = replace(
        open_library(find_library()), build_id=f"any {llama_engine.BATCH_EXACT_BUILD}"
    )
    half, eight = read_header(tiny["llama"]), read_header(tiny["llama+q8_0"])

    assert half.tensors["blk.0.attn_q.weight"].type is GgmlType.F16
    assert not llama_engine.is_batch_exact(half, library, threads=1)
    assert llama_engine.is_batch_exact(eight, library, threads=1)
    assert not llama_engine.is_batch_exact(eight, library, threads=2)
    elsewhere = replace(library, build_id="any arm64 NEON")
    assert not llama_engine.is_batch_exact(eight, elsewhere, threads=1)


def test_no_file_is_left_behind(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard runs on what was mapped."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shard = load(tiny["llama"])

    assert list(tmp_path.iterdir()) == []
    assert logits_of(shard.step([row([1, 2], 0)])[0]).shape == (64,)
    shard.close()


# Recurrent states -----------------------------------------------------------


def reply(shards: Sequence[Shard], position: int, token_ids: Sequence[int]) -> list[bytes]:
    found = []
    for token in token_ids:
        hidden = None
        for shard in shards:
            is_last = shard is shards[-1]
            asked = row(
                [token] if shard is shards[0] else None,
                position,
                count=1,
                hidden=hidden,
                want=Want.LAST_LOGITS if is_last else Want.HIDDEN,
            )
            output = shard.step([asked])[0]
            assert not output.error, output.error
            hidden = output.hidden
        found.append(logits_of(output).tobytes())
        position += 1
    return found


def test_a_recurrent_state_goes_back_by_snapshots_only(tiny: dict[str, Path]) -> None:
    """Whole and in two shards, with the same bits."""
    whole = [load(tiny["mamba"])]
    halves = [load(tiny["mamba"], end=3), load(tiny["mamba"], start=3)]
    prompted = [reply(shards, 0, [9, 3, 1, 60, 2]) for shards in (whole, halves)]
    kept = [shard.snapshot(0) for shard in halves]
    expected = reply(halves, 5, [4, 44])

    with pytest.raises(RowError, match="restore a snapshot"):
        halves[0].truncate(0, 5)
    for shard, number in zip(halves, kept, strict=True):
        shard.restore(0, number)

    assert prompted[0] == prompted[1]
    assert reply(whole, 5, [4, 44]) == expected
    assert reply(halves, 5, [4, 44]) == expected
    for shard in [*whole, *halves]:
        shard.close()


def test_a_state_that_is_not_by_position_moves_whole_or_not_at_all(tiny: dict[str, Path]) -> None:
    shard, other = load(tiny["mamba"]), load(tiny["mamba"])
    reply([shard], 0, [9, 3, 1])
    state = shard.export_state(0, 0, 3)
    other.import_state(1, 0, 3, state)

    with pytest.raises(RowError, match="moved whole, or not at all"):
        shard.export_state(0, 0, 2)
    with pytest.raises(RowError, match="moved whole, or not at all"):
        other.import_state(1, 3, 6, state)
    for item in (shard, other):
        item.close()


def test_a_window_that_was_restored_cannot_be_cut_back(tiny: dict[str, Path]) -> None:
    """The library keeps of a window what the next token sees, and nothing for those before it.

    Goal: refused, where the library itself would go on with other numbers.
    """
    shard = load(tiny["gemma3"], end=18)
    reply([shard], 0, list(range(1, 21)))
    kept = shard.snapshot(0)
    expected = reply([shard], 20, [4, 44])
    shard.restore(0, kept)

    with pytest.raises(RowError, match="cut back to position 19"):
        shard.truncate(0, 19)

    assert reply([shard], 20, [4, 44]) == expected
    shard.truncate(0, 20)
    assert reply([shard], 20, [4, 44]) == expected
    shard.truncate(0, 0)
    shard.close()


# In a child -----------------------------------------------------------------


@asynccontextmanager
async def running_host(cache: Path, *, name: str = LLAMA) -> AsyncIterator[EngineHost]:
    host = EngineHost(name, config=EngineConfig(threads=1), cache_folder=cache)
    async with trio.open_nursery() as nursery:
        await nursery.start(run_host, host)
        yield host
        nursery.cancel_scope.cancel()


async def run_host(host: EngineHost, task_status: trio.TaskStatus[None]) -> None:
    await host.run(task_status=task_status)


async def load_in_child(host: EngineHost, path: Path, start: int, end: int) -> HostedShard:
    return await host.load(path, start=start, end=end, slots=2, context=128, exact=True)


@pytest.mark.model
@pytest.mark.skipif(sys.platform == "win32", reason="engine children need POSIX")
async def test_three_children_answer_with_the_wholes_tokens(
    default_gguf: Path, tmp_path: Path
) -> None:
    """Goal: a reply after a prompt, bit for bit, that names the capital of France."""
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(read_header(default_gguf))))
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(question, add_special_tokens=False).ids
    told: list[Progress] = []
    async with running_host(tmp_path) as host:
        inspection = await host.inspect(default_gguf)
        split = [
            await load_in_child(host, default_gguf, start, end)
            for start, end in pairwise([0, 10, 20, 30])
        ]
        split_reply = await generate(inspection, split, prompt, count=12)
        state = await split[1].export_state(0, 0, len(prompt))
        await split[1].import_state(1, 0, len(prompt), state)
        whole = await host.load(
            default_gguf, start=0, end=30, slots=2, context=128, exact=True, progress=told.append
        )
        whole_reply = await generate(inspection, [whole], prompt, count=12)

    assert split_reply == whole_reply
    assert "Paris" in tokenizer.decode(whole_reply[0])
    assert {shard.exactness for shard in split} == {whole.exactness}
    assert whole.exactness.startswith(inspection.build_id)
    assert told[-1].done == told[-1].total == whole.weight_bytes


@pytest.mark.skipif(sys.platform == "win32", reason="engine children need POSIX")
async def test_an_abort_inside_the_library_costs_the_shard_and_not_the_node(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Without a debugger for a backtrace, and with the library's last words in the error."""
    async with running_host(tmp_path, name=ABORTING) as host:
        shard = await load_in_child(host, tiny["llama"], 0, 6)

        with pytest.raises(EngineLost) as lost:
            await shard.step([row([1], 0)])

        assert not shard.is_alive
        assert (await host.inspect(tiny["llama"])).layer_count == 6
    assert signal.SIGABRT.name in str(lost.value)


@pytest.mark.skipif(sys.platform == "win32", reason="engine children need POSIX")
async def test_a_refused_architecture_is_refused_by_the_child(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    async with running_host(tmp_path) as host:
        with pytest.raises(ModelRefused, match="'rwkv7'"):
            await host.load(tiny["rwkv7"], start=0, end=6, slots=1, context=64, exact=True)
