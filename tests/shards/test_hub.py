"""Models of the Hub, whole and by layers, against a server on this machine that imitates it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_models import (
    LAYER_BYTES,
    LAYERS,
    RELEASE,
    WEIGHTS,
    asked_files,
    catalog_of,
    ignore,
    layer_tensors,
    safetensors_file,
    source_of,
)
from hub_server import COMMIT, FakeHub

from swarmpy.abc import Progress
from swarmpy.errors import ModelNotFound
from swarmpy.shards import hub_download
from swarmpy.shards.catalog import Catalog
from swarmpy.shards.gguf import read_header
from swarmpy.shards.hub import HubSource
from swarmpy.shards.hub_names import parse_name
from swarmpy.shards.safetensors import read_folder, tensor_bytes
from swarmpy.shards.sources import FolderSource
from swarmpy_cli.main import main

pytest.importorskip("huggingface_hub", reason="needs the extra 'hub'")


# Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ann/tiny", ("ann/tiny", "main", "")),
        ("Ann-1/Tiny.v2_x@refs/pr/3", ("Ann-1/Tiny.v2_x", "refs/pr/3", "")),
        ("ann/tiny:t-Q4_K_M.gguf", ("ann/tiny", "main", "t-Q4_K_M.gguf")),
        (f"ann/tiny@{COMMIT}:t.GGUF", ("ann/tiny", COMMIT, "t.GGUF")),
    ],
)
def test_a_name_says_repository_revision_and_file(text: str, meant: tuple[str, str, str]) -> None:
    name = parse_name(text)
    assert name is not None
    assert (name.repository, name.revision, name.file) == meant


@pytest.mark.parametrize(
    "text",
    [
        *("tiny", "./ann/tiny", "/ann/tiny", "~/tiny", "folder/tiny.gguf", "C:/tiny.gguf", ""),
        *("a/b/c", "ann/tiny:x.bin", "ann/tiny:../x.gguf", "ann/..", "ann/tiny@", "ann/tiny\n"),
    ],
)
def test_a_path_or_another_name_is_not_of_the_hub(text: str) -> None:
    assert not HubSource().matches(text)


# Whole models ---------------------------------------------------------------------------------


async def test_a_whole_model_is_fetched_verified_and_listed(hub: FakeHub, cache: Path) -> None:
    entry = await catalog_of(hub, cache).pull("ann/tiny")

    assert entry.path == cache / "models" / RELEASE
    assert (entry.name, entry.layer_count, entry.format) == ("tiny", LAYERS, "safetensors")
    assert entry.source == f"Hugging Face ann/tiny@{COMMIT}"
    assert (entry.path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert list((cache / "partial").iterdir()) == []


async def test_only_files_that_are_data_are_asked_for(hub: FakeHub, cache: Path) -> None:
    await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert asked_files(hub) == {"config.json", "tokenizer.json", WEIGHTS}


async def test_the_id_is_that_of_the_same_files_in_a_folder(
    hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        (folder / name).write_bytes(hub.files[name])

    fetched = await catalog_of(hub, cache).pull("ann/tiny")
    copied = await Catalog(tmp_path / "other", sources=[FolderSource()]).pull(str(folder))

    assert fetched.model_id == copied.model_id


async def test_no_byte_is_fetched_twice_and_a_pinned_model_needs_no_hub(
    hub: FakeHub, cache: Path
) -> None:
    catalog = catalog_of(hub, cache)
    entry = await catalog.pull("ann/tiny")
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])
    hub.forget()

    assert await catalog.verify(entry) == entry
    assert await catalog.pull("tiny") == entry
    assert hub.asked == []


async def test_a_hub_out_of_reach_leaves_the_copy_that_is_here(hub: FakeHub, cache: Path) -> None:
    entry = await catalog_of(hub, cache).pull("ann/tiny")
    hub.is_offline = True

    assert await catalog_of(hub, cache).pull("ann/tiny") == entry


async def test_a_new_commit_is_another_model(hub: FakeHub, cache: Path) -> None:
    catalog = catalog_of(hub, cache)
    before = await catalog.pull("ann/tiny")
    hub.commit = "c" * 40
    hub.files["tokenizer.json"] = b'{"new": 1}'

    after = await catalog.pull("ann/tiny")

    assert after.model_id != before.model_id
    assert [entry.name for entry in catalog.list()] == ["tiny", "tiny-2"]
    assert await catalog.pull(f"ann/tiny@{COMMIT}") == before


async def test_progress_ends_with_all_bytes(hub: FakeHub, cache: Path) -> None:
    told: list[Progress] = []

    await source_of(hub).fetch("ann/tiny", cache, told.append)

    total = sum(len(hub.files[name]) for name in ("config.json", "tokenizer.json", WEIGHTS))
    downloading = [item for item in told if item.step == "downloading"]
    assert downloading[-1] == Progress(step="downloading", done=total, total=total)
    assert [item.done for item in downloading if item.total == total] == sorted(
        item.done for item in downloading if item.total == total
    )
    assert "reading headers" in {item.step for item in told}


async def test_the_index_decides_which_weights_are_the_models(
    hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    tensors = layer_tensors()
    first = dict(list(tensors.items())[:5])
    second = dict(list(tensors.items())[5:])
    names = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(
        second, "model-2.safetensors"
    )
    hub.files |= {
        "model-1.safetensors": safetensors_file(tmp_path, first),
        "model-2.safetensors": safetensors_file(tmp_path, second),
        "model.safetensors.index.json": json.dumps({"weight_map": names}).encode(),
    }

    path = await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert WEIGHTS not in asked_files(hub)
    assert set(read_folder(path)) == set(tensors)
    assert not (path / WEIGHTS).exists()


async def test_a_damaged_file_is_fetched_again_and_no_other(hub: FakeHub, cache: Path) -> None:
    catalog = catalog_of(hub, cache)
    entry = await catalog.pull("ann/tiny")
    with (entry.path / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    hub.forget()

    assert await catalog.verify(entry) == entry
    assert (entry.path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert asked_files(hub) == {WEIGHTS}


async def test_a_file_cut_short_is_fetched_again(hub: FakeHub, cache: Path) -> None:
    catalog = catalog_of(hub, cache)
    entry = await catalog.pull("ann/tiny")
    os.truncate(entry.path / "tokenizer.json", 1)

    assert await catalog.verify(entry) == entry
    assert (entry.path / "tokenizer.json").read_bytes() == b"{}"


async def test_a_removed_model_leaves_no_file(hub: FakeHub, cache: Path) -> None:
    catalog = catalog_of(hub, cache)
    entry = await catalog.pull("ann/tiny")

    await catalog.remove("tiny")

    assert not entry.path.exists()


# Layers ---------------------------------------------------------------------------------------


async def test_only_headers_and_the_layers_asked_for_are_fetched(hub: FakeHub, cache: Path) -> None:
    path = await source_of(hub).fetch_layers("ann/tiny", cache, ignore, start=1, end=3)

    tensors = read_folder(path)
    header = min(tensor.offset for tensor in tensors.values())
    wanted = tensors["model.layers.1.mlp.weight"].offset, 2 * LAYER_BYTES
    assert hub.ranges_of(WEIGHTS) == [(0, 8), (8, header), (wanted[0], sum(wanted))]
    assert bytes(tensor_bytes(tensors["model.layers.1.mlp.weight"])) == b"\x02" * LAYER_BYTES
    assert bytes(tensor_bytes(tensors["model.layers.2.mlp.weight"])) == b"\x03" * LAYER_BYTES
    assert bytes(tensor_bytes(tensors["model.layers.3.mlp.weight"])) == bytes(LAYER_BYTES)


async def test_the_first_and_last_layers_bring_what_stands_before_and_after(
    hub: FakeHub, cache: Path
) -> None:
    source = source_of(hub)
    first = read_folder(await source.fetch_layers("ann/tiny", cache, ignore, start=0, end=1))
    assert bytes(tensor_bytes(first["model.embed_tokens.weight"])) == b"e" * 16384
    assert bytes(tensor_bytes(first["lm_head.weight"])) == bytes(16384)

    both = read_folder(await source.fetch_layers("ann/tiny", cache, ignore, start=3, end=4))
    assert bytes(tensor_bytes(both["lm_head.weight"])) == b"h" * 16384
    assert bytes(tensor_bytes(both["model.norm.weight"])) == b"n" * 256


async def test_layers_of_a_gguf_come_without_the_others(gguf_hub: FakeHub, cache: Path) -> None:
    path = await source_of(gguf_hub).fetch_layers("ann/tiny", cache, ignore, start=2, end=3)

    tensors = read_header(path).tensors
    assert path.name == "tiny-F32.gguf"
    assert bytes(tensor_bytes(tensors["blk.2.ffn_up.weight"])) == b"\x03" * LAYER_BYTES
    assert bytes(tensor_bytes(tensors["blk.3.ffn_up.weight"])) == bytes(LAYER_BYTES)
    beyond = hub_download.HEADER_STEP_BYTES
    assert gguf_hub.sent["tiny-F32.gguf"] <= LAYER_BYTES + beyond


async def test_layers_fetched_one_after_another_become_the_whole_model(
    hub: FakeHub, cache: Path
) -> None:
    catalog = catalog_of(hub, cache)
    held = await catalog.pull_layers("ann/tiny", start=0, end=2)
    assert held.layers == ((0, 2),)

    entry = await catalog.pull_layers("ann/tiny", start=2, end=LAYERS)

    assert entry.layers is None
    assert entry.model_id == held.model_id
    assert catalog.list() == [entry]
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])


async def test_the_rest_of_a_partial_model_comes_by_its_name(hub: FakeHub, cache: Path) -> None:
    catalog = catalog_of(hub, cache)
    await catalog.pull_layers("ann/tiny", start=1, end=2)

    entry = await catalog.pull("tiny")

    assert catalog.find("tiny") == entry
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])


async def test_a_partial_model_is_listed_with_the_layers_that_are_here(
    hub: FakeHub, cache: Path
) -> None:
    catalog = catalog_of(hub, cache)

    held = await catalog.pull_layers("ann/tiny", start=1, end=3)

    assert held.layers_shown == "layers 1-2 of 4"
    assert held.size_bytes > held.held_bytes > 2 * LAYER_BYTES
    assert catalog.list() == [held]
    assert (catalog.find("tiny"), catalog.by_id(held.model_id)) == (held, held)


async def test_headers_alone_are_a_model_of_which_everything_is_to_be_fetched(
    gguf_hub: FakeHub, cache: Path
) -> None:
    catalog = catalog_of(gguf_hub, cache)

    held = await catalog.pull_layers("ann/tiny", start=0, end=0)

    assert held.layers == ()
    assert held.held_bytes < held.size_bytes / 2
    one = catalog.missing_bytes(held, start=1, end=2)
    assert LAYER_BYTES <= one < 2 * LAYER_BYTES
    assert catalog.missing_bytes(held, start=1, end=3) >= one + LAYER_BYTES


async def test_what_is_to_be_fetched_is_what_then_comes(hub: FakeHub, cache: Path) -> None:
    catalog = catalog_of(hub, cache)
    held = await catalog.pull_layers("ann/tiny", start=0, end=1)
    missing = catalog.missing_bytes(held, start=1, end=3)
    sent = hub.sent[WEIGHTS]

    entry = await catalog.obtain(held, start=1, end=3)

    assert hub.sent[WEIGHTS] - sent == missing
    assert entry.layers == ((0, 3),)
    assert catalog.missing_bytes(entry, start=0, end=3) == 0


async def test_layers_that_are_here_are_obtained_without_the_hub(hub: FakeHub, cache: Path) -> None:
    catalog = catalog_of(hub, cache)
    held = await catalog.pull_layers("ann/tiny", start=1, end=3)
    asked = len(hub.asked)

    assert await catalog.obtain(held, start=1, end=2) == held
    assert len(hub.asked) == asked


async def test_layers_that_are_not_here_are_refused_with_the_command(
    hub: FakeHub, cache: Path
) -> None:
    held = await catalog_of(hub, cache).pull_layers("ann/tiny", start=1, end=3)

    held.check_layers(1, 3)
    with pytest.raises(ModelNotFound, match="layers 3 are not on this machine") as caught:
        held.check_layers(2, 4)
    assert caught.value.fix == "swarmpy models pull tiny --layers 3-3"


async def test_a_partial_model_is_removed_with_its_files(hub: FakeHub, cache: Path) -> None:
    catalog = catalog_of(hub, cache)
    held = await catalog.pull_layers("ann/tiny", start=1, end=3)

    await catalog.remove("tiny")

    assert catalog.list() == []
    assert not held.path.exists()


async def test_layers_that_the_model_does_not_have_are_refused(hub: FakeHub, cache: Path) -> None:
    with pytest.raises(ModelNotFound, match="has layers 0-3, not 2-8"):
        await source_of(hub).fetch_layers("ann/tiny", cache, ignore, start=2, end=9)


async def test_layers_of_a_folder_cannot_be_pulled(hub: FakeHub, cache: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model of a hub"):
        await catalog_of(hub, cache).pull_layers("./tiny", start=0, end=1)


async def test_weights_without_a_hash_are_fetched_whole(hub: FakeHub, cache: Path) -> None:
    """Small weights kept in git: without their SHA-256 the model would have no id."""
    hub.lfs = frozenset()

    held = await catalog_of(hub, cache).pull_layers("ann/tiny", start=0, end=1)

    assert len(held.model_id) == 64
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])


# The command line -----------------------------------------------------------------------------


Run = Callable[..., str]


@pytest.fixture
def run(cache: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line, which gives an exit code, and returns what it printed."""

    def run(*words: str, code: int = 0) -> str:
        places = ["--data-dir", str(cache.parent / "data"), "--cache-dir", str(cache)]
        assert main([*places, *words]) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


def test_the_command_line_pulls_layers_and_shows_what_is_here(
    hub: FakeHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)

    pulled = run("models", "pull", "ann/tiny", "--layers", "0-1")
    listed = run("models", "list")
    known = json.loads(run("models", "list", "--json"))

    assert "Tiny (F32): layers 0-1, 148 kB of 296 kB" in pulled
    assert "layers 0-1, 148 kB" in listed
    assert "layers          layers 0-1, 148 kB" in run("models", "show", "tiny")
    assert known["models"][0]["layers"] == [[0, 2]]


def test_the_command_line_pulls_headers_alone(
    hub: FakeHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)

    assert "Tiny (F32): headers, " in run("models", "pull", "ann/tiny", "--layers", "none")


def test_the_command_line_fetches_the_rest(
    hub: FakeHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    run("models", "pull", "ann/tiny", "--layers", "3")

    assert "tiny: " in run("models", "pull", "tiny")
    listed = json.loads(run("models", "list", "--json"))

    assert [model["layers"] for model in listed["models"]] == [None]


def test_the_command_line_takes_a_file_of_the_hub_for_no_path(
    gguf_hub: FakeHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", gguf_hub.url)

    assert "Tiny (F32): " in run("models", "pull", "ann/tiny:tiny-F32.gguf")


@pytest.mark.parametrize("layers", ["", "a", "3-1", "1-", "-1"])
def test_layers_that_are_no_range_are_a_mistake_in_the_command(run: Run, layers: str) -> None:
    assert "--layers" in run("models", "pull", "ann/tiny", f"--layers={layers}", code=2)
