"""A model made of another: what is written, and what never is."""

from __future__ import annotations

import os
import shutil
import signal
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trio
from gguf_models import Tensor, metadata_of, write_gguf, write_models

from swarmpy.abc import Progress
from swarmpy.errors import ConfigError, DoesNotFit, EngineLost, ExtensionNotFound, ModelRefused
from swarmpy.plugins.llama import measure, quantize_child
from swarmpy.plugins.llama import quantize as quantizing
from swarmpy.plugins.llama.file_types import file_type
from swarmpy.plugins.llama.library import find_library, open_library
from swarmpy.plugins.llama.quantize import Quantized, derived_title, quantize_model
from swarmpy.plugins.llama.quantized_file import quantized_file
from swarmpy.shards.catalog import Catalog, ModelEntry, ignore
from swarmpy.shards.describe import describe
from swarmpy.shards.gguf import GgmlType, dequantize, read_header

try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)

ID = "5" * 64


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("SmolLM2 135M Instruct (Q4_1)", "SmolLM2 135M Instruct (Q8_0)"),
        ("tiny-F32", "tiny (Q8_0)"),
        ("Mistral-7B.Q4_K_M", "Mistral-7B (Q8_0)"),
        ("Qwen3", "Qwen3 (Q8_0)"),
        ("../own er/x", "own er-x (Q8_0)"),
        ("F16", "model (Q8_0)"),
    ],
)
def test_a_title_says_the_type_once_and_is_a_plain_file_name(title: str, expected: str) -> None:
    assert derived_title(title, file_type("q8_0")) == expected


# What is written --------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("gemma4", "llama", "llama+q4_k", "llama+q8_0", "mamba", "minicpm3", "rwkv7")
    return write_models(tmp_path_factory.mktemp("models"), names)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "cache")


async def listed(catalog: Catalog, path: Path) -> ModelEntry:
    return await catalog.pull(str(path))


def numbers(path: Path, name: str) -> np.ndarray:
    tensor = read_header(path).tensors[name]
    raw = path.read_bytes()[tensor.offset : tensor.offset + tensor.size_bytes]
    return dequantize(raw, tensor.type, tensor.shape)


def overwrite(path: Path, offset: int, raw: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(raw)


def left_over(catalog: Catalog) -> list[str]:
    """What lies in the cache besides the index and the locks."""
    folder = catalog.cache_folder
    return sorted(
        str(path.relative_to(folder))
        for part in ("models", "downloads")
        for path in (folder / part).glob("**/*")
    )


async def test_a_quantised_model_is_listed_beside_its_original(
    catalog: Catalog, tiny: dict[str, Path]
) -> None:
    original = await listed(catalog, tiny["llama"])
    before = tiny["llama"].read_bytes()
    told: list[Progress] = []

    made = await quantize_model(catalog, original, "q8_0", progress=told.append)

    entry = made.entry
    assert made == Quantized(entry=catalog.find("llama-q8_0"), is_new=True)
    assert (entry.display_name, entry.quantization) == ("Llama (Q8_0)", "Q8_0")
    assert entry.derived_from == original.model_id != entry.model_id
    assert (original.derived_from, catalog.find("llama")) == ("", original)
    assert tiny["llama"].read_bytes() == before
    folder = entry.path.parent.relative_to(catalog.cache_folder)
    assert left_over(catalog) == [str(folder), str(folder / "Llama (Q8_0).gguf")]
    steps = [(item.done, item.total) for item in told if item.step == "quantising"]
    assert steps[0][0] == 0
    assert (
        steps[-1][0]
        == steps[-1][1]
        == sum(tensor.size_bytes for tensor in read_header(tiny["llama"]).tensors.values())
    )


@pytest.mark.parametrize(("source", "steps"), [("llama", 256), ("llama+q8_0", 127)])
async def test_weights_lie_within_a_step_of_the_originals(
    catalog: Catalog, tiny: dict[str, Path], source: str, steps: int
) -> None:
    """Method: a block of 32 keeps its largest number, and all others to a step of it."""
    made = await quantize_model(catalog, await listed(catalog, tiny[source]), "q4_1")

    before = numbers(tiny[source], "blk.3.ffn_up.weight").reshape(-1, 32)
    after = numbers(made.entry.path, "blk.3.ffn_up.weight").reshape(-1, 32)

    step = (before.max(axis=1) - before.min(axis=1)) / 15
    rounding = np.abs(before).max(axis=1) / steps
    assert (np.abs(after - before).max(axis=1) <= 0.5 * step + rounding).all()
    assert (after != before).mean() > 0.5


async def test_tensors_that_are_not_quantised_keep_their_bytes(
    catalog: Catalog, tiny: dict[str, Path]
) -> None:
    made = await quantize_model(catalog, await listed(catalog, tiny["mamba"]), "q8_0")
    before, after = read_header(tiny["mamba"]), read_header(made.entry.path)

    kept = [name for name, item in after.tensors.items() if item.type is before.tensors[name].type]

    assert {"blk.0.ssm_conv1d.weight", "blk.0.ssm_a", "output_norm.weight"} <= set(kept)
    assert after.tensors["blk.0.ssm_in.weight"].type is GgmlType.Q8_0
    for name in kept:
        assert (numbers(made.entry.path, name) == numbers(tiny["mamba"], name)).all()


def test_metadata_stays_but_for_what_was_said_of_the_old_weights(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    """The tokeniser's, too, to the byte: also a token that is no UTF-8."""
    path = tmp_path / "model.gguf"
    tokens = struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", 2) + b"\xff\xfe"
    metadata = {**metadata_of("llama"), "tokenizer.ggml.tokens": ["ab"]}
    metadata |= {"general.file_type": 1, "general.name": "A model", "split.no": 0}
    metadata |= {"quantize.imatrix.file": "theirs", "swarmpy.derived_from": "4" * 64}
    write_gguf(path, metadata, {"token_embd.weight": Tensor(GgmlType.F32, (1, 32), bytes(128))})
    path.write_bytes(path.read_bytes().replace(tokens[:-2] + b"ab", tokens))
    planned = quantized_file(read_header(path), file_type("q4_0"), derived_from=ID)
    written = tmp_path / "written.gguf"
    written.write_bytes(planned.laid_out.header.ljust(planned.laid_out.size_bytes, b"\0"))

    after = read_header(written)

    said = {"general.quantization_version": 2, "general.file_type": 2, "swarmpy.derived_from": ID}
    gone = {"split.no", "quantize.imatrix.file"}
    before = read_header(path).metadata
    assert after.metadata == {key: before[key] for key in before if key not in gone} | said
    assert tokens in written.read_bytes()


@pytest.mark.parametrize("claim", ["", "a model", ID[1:], ID.upper().replace("5", "A"), 5])
def test_an_origin_that_is_no_id_is_not_shown(tmp_path: Path, claim: str | int) -> None:
    path = tmp_path / "model.gguf"
    metadata = {**metadata_of("llama"), "swarmpy.derived_from": claim}
    write_gguf(path, metadata, {"token_embd.weight": Tensor(GgmlType.F32, (1, 32), bytes(128))})

    assert describe(path).derived_from == ""


async def test_the_same_original_gives_the_same_model_wherever_it_is_made(
    catalog: Catalog, tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: again in another cache, in small pieces, and by three threads."""
    first = await quantize_model(catalog, await listed(catalog, tiny["llama"]), "q4_k_m")
    planned = quantized_file(
        read_header(tiny["llama"]), file_type("q4_k_m"), derived_from=first.entry.derived_from
    )
    converter = quantize_child.Converter(open_library(find_library()))
    monkeypatch.setattr(quantize_child, "CHUNK_NUMBERS", 200)
    again = tmp_path / "again.gguf"

    quantize_child.write_quantised(planned, again, converter, threads=3, report=lambda *_: None)

    assert again.read_bytes() == first.entry.path.read_bytes()


async def test_a_second_time_nothing_is_made_unless_it_is_forced(
    catalog: Catalog, tiny: dict[str, Path]
) -> None:
    original = await listed(catalog, tiny["llama"])
    first = await quantize_model(catalog, original, "q8_0")
    state = first.entry.path.stat()

    second = await quantize_model(catalog, original, "Q8_0")
    assert second == Quantized(entry=first.entry, is_new=False)
    assert first.entry.path.stat() == state

    third = await quantize_model(catalog, original, "q8_0", is_forced=True)
    assert third == first
    assert first.entry.path.stat().st_ino != state.st_ino


# What is refused --------------------------------------------------------------


async def test_a_model_of_that_type_is_refused(catalog: Catalog, tiny: dict[str, Path]) -> None:
    original = await listed(catalog, tiny["llama+q8_0"])

    with pytest.raises(ModelRefused, match="is Q8_0 already"):
        await quantize_model(catalog, original, "q8_0")


async def test_a_folder_is_refused_with_what_to_fetch(
    catalog: Catalog, tiny: dict[str, Path]
) -> None:
    folder = replace(await listed(catalog, tiny["llama"]), format="safetensors")

    with pytest.raises(ModelRefused, match="folder of safetensors") as refused:
        await quantize_model(catalog, folder, "q8_0")

    assert "models pull owner/name:file.gguf" in refused.value.fix


async def test_an_architecture_that_is_not_run_is_refused(
    catalog: Catalog, tiny: dict[str, Path]
) -> None:
    original = await listed(catalog, tiny["rwkv7"])

    with pytest.raises(ModelRefused, match="'rwkv7'"):
        await quantize_model(catalog, original, "q8_0")


async def test_an_original_that_changed_is_refused(
    catalog: Catalog, tiny: dict[str, Path], tmp_path: Path
) -> None:
    path = Path(shutil.copy(tiny["llama"], tmp_path / "copy.gguf"))
    original = await listed(catalog, path)
    last = list(read_header(path).tensors.values())[-1]
    overwrite(path, last.offset, b"\x3c")

    with pytest.raises(ModelRefused, match="changed since"):
        await quantize_model(catalog, original, "q8_0")


async def test_an_original_that_changes_while_it_is_read_is_refused(
    catalog: Catalog, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Method: a byte is changed as soon as the work has begun."""
    path = Path(shutil.copy(tiny["llama"], tmp_path / "copy.gguf"))
    original = await listed(catalog, path)
    last = list(read_header(path).tensors.values())[-1]

    def change(progress: Progress) -> None:
        if progress.step == "quantising":
            overwrite(path, last.offset, b"\x3c")

    with pytest.raises(ModelRefused, match="changed since"):
        await quantize_model(catalog, original, "q8_0", progress=change)

    assert left_over(catalog) == []


async def test_an_original_that_was_put_back_in_the_meantime_is_refused(
    catalog: Catalog, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """What was read may have been what lay there before."""
    path = Path(shutil.copy(tiny["llama"], tmp_path / "copy.gguf"))
    original = await listed(catalog, path)

    def put_back(progress: Progress) -> None:
        if progress.step == "quantising":
            shutil.copy(tiny["llama"], tmp_path / "new.gguf")
            (tmp_path / "new.gguf").replace(path)

    with pytest.raises(ModelRefused, match="changed while it was quantised"):
        await quantize_model(catalog, original, "q8_0", progress=put_back)

    assert left_over(catalog) == []


async def test_a_result_that_does_not_run_is_not_listed(
    catalog: Catalog, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "ENGINE", "aborting_llama:AbortingEngine")
    original = await listed(catalog, tiny["llama"])

    with pytest.raises(ModelRefused, match=r"Llama \(Q8_0\) does not run.*SIGABRT"):
        await quantize_model(catalog, original, "q8_0")

    assert left_over(catalog) == []
    assert catalog.list() == [original]


async def test_a_result_that_does_not_fit_is_run_in_parts(
    catalog: Catalog, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: an engine that has room for four layers, and a model of twelve."""
    monkeypatch.setattr(measure, "ENGINE", "narrow_llama:NarrowEngine")

    made = await quantize_model(catalog, await listed(catalog, tiny["gemma4"]), "q8_0")

    assert made.entry in catalog.list()


async def test_a_result_of_which_no_part_fits_is_not_listed(
    catalog: Catalog, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is one that is run whole or not at all."""
    monkeypatch.setattr(measure, "ENGINE", "narrow_llama:NarrowEngine")
    original = await listed(catalog, tiny["minicpm3"])

    with pytest.raises(DoesNotFit, match=r"cannot be run once here.*6 layers, room for 4"):
        await quantize_model(catalog, original, "q8_0")

    assert left_over(catalog) == []


@pytest.mark.parametrize("target", ["q4_0", "q4_k_m"])
async def test_weights_that_are_not_finite_are_refused_by_name(
    catalog: Catalog, tiny: dict[str, Path], tmp_path: Path, target: str
) -> None:
    """K-quants of such would end the process."""
    path = Path(shutil.copy(tiny["llama"], tmp_path / "broken.gguf"))
    name = "blk.2.attn_q.weight"
    overwrite(path, read_header(path).tensors[name].offset + 64, np.float16("nan").tobytes())
    original = await listed(catalog, path)

    with pytest.raises(ModelRefused, match=f"tensor '{name}': F16 weights are not finite"):
        await quantize_model(catalog, original, target)

    assert left_over(catalog) == []


async def test_a_disk_without_room_is_noticed_before_anything_is_written(
    catalog: Catalog, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = await listed(catalog, tiny["llama"])
    usage = shutil.disk_usage(catalog.cache_folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    with pytest.raises(ConfigError, match=r"bytes in .*, 1000 are free"):
        await quantize_model(catalog, original, "q8_0")

    assert left_over(catalog) == []


def test_a_library_that_lays_its_types_out_in_another_way_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks: Mapping[GgmlType, tuple[int, int]] = {
        **quantize_child.BLOCKS,
        GgmlType.Q4_0: (32, 20),
    }
    monkeypatch.setattr(quantize_child, "BLOCKS", blocks)

    with pytest.raises(ConfigError, match="describes Q4_0 as"):
        quantize_child.Converter(open_library(find_library()))


# How it ends ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "step"),
    [
        ("checking", "quantising"),
        ("quantising", "checking"),
        ("quantising", "running it once"),
        ("running it once", "checking"),
    ],
)
async def test_what_is_interrupted_leaves_nothing(
    catalog: Catalog, tiny: dict[str, Path], after: str, step: str
) -> None:
    """Method: cancelled in each of its steps, at last while the result is hashed for its id."""
    original = await listed(catalog, tiny["llama"])
    scope = trio.CancelScope()
    told: list[str] = []

    def cancel(progress: Progress) -> None:
        told.append(progress.step)
        if progress.step == step and after in told:
            scope.cancel()

    with scope:
        await quantize_model(catalog, original, "q8_0", progress=cancel)

    assert scope.cancelled_caught
    assert left_over(catalog) == []
    assert catalog.list() == [original]


async def test_a_model_that_is_listed_elsewhere_is_not_kept_twice(
    catalog: Catalog, tiny: dict[str, Path], tmp_path: Path
) -> None:
    original = await listed(catalog, tiny["llama"])
    made = await quantize_model(catalog, original, "q8_0")
    copy = Path(shutil.copy(made.entry.path, tmp_path / "copy.gguf"))
    await catalog.remove(made.entry.name)
    elsewhere = await listed(catalog, copy)

    again = await quantize_model(catalog, original, "q8_0")

    assert again.entry == elsewhere
    assert left_over(catalog) == []


async def test_an_abort_inside_the_library_is_an_error_and_not_the_end(
    catalog: Catalog, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "CHILD", "aborting_quantiser")
    original = await listed(catalog, tiny["llama"])

    with pytest.raises(EngineLost) as lost:
        await quantize_model(catalog, original, "q8_0")

    assert signal.SIGABRT.name in str(lost.value)
    assert left_over(catalog) == []


async def test_a_process_that_makes_no_progress_is_ended(
    catalog: Catalog, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much it says."""
    monkeypatch.setattr(quantizing, "CHILD", "hanging_quantiser")
    monkeypatch.setattr(quantizing, "SILENCE_S_MAX", 0.5)
    original = await listed(catalog, tiny["llama"])

    with trio.fail_after(60), pytest.raises(EngineLost, match=r"no progress for 0\.5 s"):
        await quantize_model(catalog, original, "q8_0")

    assert left_over(catalog) == []


def test_what_was_written_goes_to_the_disk_piece_by_piece(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wait for all of it at the end would be taken for a process that hangs."""
    planned = quantized_file(read_header(tiny["llama"]), file_type("q8_0"), derived_from=ID)
    converter = quantize_child.Converter(open_library(find_library()))
    events: list[str] = []
    monkeypatch.setattr(quantize_child, "SYNC_BYTES", 1000)
    monkeypatch.setattr(os, "fsync", lambda file: events.append("synced"))

    quantize_child.write_quantised(
        planned,
        tmp_path / "model.gguf",
        converter,
        threads=1,
        report=lambda done, total: events.append("told"),
    )

    assert ["synced", "told", "synced"] in [events[at : at + 3] for at in range(len(events))]


async def test_what_a_killed_process_left_is_swept_and_the_work_done(
    catalog: Catalog, tiny: dict[str, Path]
) -> None:
    original = await listed(catalog, tiny["llama"])
    made = await quantize_model(catalog, original, "q8_0")
    await catalog.remove(made.entry.name)
    remains = catalog.cache_folder / "downloads" / made.entry.path.parent.name
    remains.mkdir(parents=True)
    (remains / made.entry.path.name).write_bytes(b"half")

    again = await quantize_model(catalog, original, "q8_0", progress=ignore)

    assert again == made
    assert not remains.exists()
