"""Models that are here in part: listed once, under one name, whatever befalls their folders."""

from __future__ import annotations

import json
import logging
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_models import (
    LAYER_BYTES,
    LAYERS,
    RELEASE,
    WEIGHTS,
    catalog_of,
    ignore,
    layer_tensors,
    safetensors_file,
    source_of,
)
from hub_server import COMMIT, FakeHub
from shard_files import write_model_folder

from swarmpy.errors import DownloadFailed, ModelNotFound, ModelRefused
from swarmpy.shards import hub_download
from swarmpy.shards.catalog import Catalog
from swarmpy.shards.hub import HubSource
from swarmpy.shards.hub_download import RESERVE_BYTES_MIN, reserve_bytes
from swarmpy.shards.locks import hold_lock
from swarmpy.shards.partial import partial_models

pytest.importorskip("huggingface_hub", reason="needs the extra 'hub'")

OTHER_COMMIT = "b" * 40
Usage = namedtuple("Usage", "total used free")


def disk_with(monkeypatch: pytest.MonkeyPatch, *, free: int, total: int = 0) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(total, total - free, free))


async def two_commits_of_one_model(hub: FakeHub, cache: Path) -> Catalog:
    """Two folders of one model; the second, of a commit that changed a README, has more layers."""
    source = source_of(hub)
    await source.fetch_layers(f"ann/tiny@{COMMIT}", cache, ignore, start=0, end=1)
    hub.commit = OTHER_COMMIT
    await source.fetch_layers(f"ann/tiny@{OTHER_COMMIT}", cache, ignore, start=1, end=3)
    assert len(list((cache / "partial").iterdir())) == 2
    return catalog_of(hub, cache)


# Damaged folders --------------------------------------------------------------------------------


async def test_a_damaged_partial_model_hides_no_other(
    hub: FakeHub, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = await source_of(hub).fetch_layers("ann/tiny", cache, ignore, start=0, end=1)
    (path / "config.json").unlink()
    catalog = catalog_of(hub, cache)
    other = await catalog.pull(str(write_model_folder(tmp_path / "other")))

    with caplog.at_level(logging.WARNING):
        assert catalog.list() == [other]
        assert (catalog.find("other"), catalog.by_id(other.model_id)) == (other, other)
        with pytest.raises(ModelNotFound):
            catalog.find("tiny")

    told = [record for record in caplog.records if record.msg == "catalog.partial_damaged"]
    assert [record.__dict__["path"] for record in told] == [str(path)], "once, not at every look"


async def test_a_damaged_partial_model_is_repaired_by_its_name(hub: FakeHub, cache: Path) -> None:
    path = await source_of(hub).fetch_layers("ann/tiny", cache, ignore, start=0, end=1)
    (path / "config.json").unlink()
    catalog = catalog_of(hub, cache)
    assert catalog.list() == []

    held = await catalog.pull_layers("tiny", start=1, end=2)

    assert held.layers == ((0, 2),)
    assert catalog.list() == [held]


async def test_a_damaged_partial_model_can_be_removed(hub: FakeHub, cache: Path) -> None:
    path = await source_of(hub).fetch_layers("ann/tiny", cache, ignore, start=0, end=1)
    (path / "config.json").unlink()

    assert (await catalog_of(hub, cache).remove("tiny")).layers == ((0, 1),)

    assert not path.exists()


# One model, several folders ---------------------------------------------------------------------


async def test_two_commits_of_one_model_are_listed_once_with_the_most_bytes(
    hub: FakeHub, cache: Path
) -> None:
    catalog = await two_commits_of_one_model(hub, cache)

    (held,) = catalog.list()

    assert held.layers == ((1, 3),)
    assert catalog.find("tiny") == catalog.find(held.model_id[:8]) == held
    assert catalog.by_id(held.model_id) == await catalog.verify(held) == held


async def test_layers_follow_those_of_the_commit_that_is_listed(hub: FakeHub, cache: Path) -> None:
    catalog = await two_commits_of_one_model(hub, cache)
    sent = hub.sent[WEIGHTS]

    entry = await catalog.obtain(catalog.find("tiny"), start=0, end=LAYERS)

    assert entry.layers is None
    assert entry.path.name == f"hub--ann--tiny--{OTHER_COMMIT[:12]}"
    assert hub.sent[WEIGHTS] - sent < len(hub.files[WEIGHTS]) - 2 * LAYER_BYTES
    assert catalog.list() == [entry], "the other folder is no second model"


async def test_a_model_in_two_folders_is_removed_from_both(hub: FakeHub, cache: Path) -> None:
    catalog = await two_commits_of_one_model(hub, cache)

    await catalog.remove("tiny")

    assert catalog.list() == []
    assert list((cache / "partial").iterdir()) == []


async def test_a_commit_that_changes_other_files_alone_begins_no_second_folder(
    hub: FakeHub, cache: Path
) -> None:
    catalog = catalog_of(hub, cache)
    await catalog.pull_layers("ann/tiny", start=0, end=1)
    hub.commit, hub.files["README.md"] = OTHER_COMMIT, b"# Tiny, explained"

    held = await catalog.pull_layers("ann/tiny", start=1, end=2)
    assert held.layers == ((0, 2),)
    whole = await catalog.pull("ann/tiny")

    assert whole.model_id == held.model_id
    assert whole.path.name == RELEASE
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS]), "no byte came twice"


def changed(hub: FakeHub, folder: Path, name: str) -> bytes:
    """A file as another commit could have it, one that the first does not have included."""
    if name == "chat_template.jinja":
        return b"{{ messages }}"
    if name.endswith(".safetensors"):
        tensors = layer_tensors() | {"model.norm.weight": ("F32", (64,), b"N" * 256)}
        if name != WEIGHTS:
            tensors = {"model.layers.0.extra.weight": ("F32", (64,), b"x" * 256)}
        return safetensors_file(folder, tensors)
    return hub.files[name] + b" "


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "extra.safetensors"])
async def test_a_commit_that_changes_a_file_of_the_model_begins_another(
    hub: FakeHub, cache: Path, tmp_path: Path, name: str
) -> None:
    catalog = catalog_of(hub, cache)
    first = await catalog.pull_layers("ann/tiny", start=0, end=1)
    hub.commit, hub.lfs = OTHER_COMMIT, hub.lfs | {"extra.safetensors"}
    hub.files[name] = changed(hub, tmp_path, name)

    second = await catalog.pull_layers("ann/tiny", start=1, end=2)

    assert second.model_id != first.model_id
    assert [entry.layers for entry in catalog.list()] == [((0, 1),), ((1, 2),)]


@pytest.mark.parametrize(
    ("name", "count"), [("chat_template.jinja", 2), ("extra.safetensors", 1), ("README.md", 1)]
)
async def test_of_an_indexed_model_weights_beyond_the_index_make_no_other(
    hub: FakeHub, cache: Path, tmp_path: Path, name: str, count: int
) -> None:
    index = {"weight_map": dict.fromkeys(layer_tensors(), WEIGHTS)}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.files["spare.safetensors"] = changed(hub, tmp_path, "spare.safetensors")
    catalog = catalog_of(hub, cache)
    await catalog.pull_layers("ann/tiny", start=0, end=1)
    hub.commit = OTHER_COMMIT
    hub.files[name] = changed(hub, tmp_path, name)

    await catalog.pull_layers("ann/tiny", start=1, end=2)

    assert len(catalog.list()) == len(list((cache / "partial").iterdir())) == count


# Names ------------------------------------------------------------------------------------------


async def test_a_renamed_partial_model_keeps_its_name_until_it_is_whole_and_after(
    hub: FakeHub, cache: Path
) -> None:
    catalog = catalog_of(hub, cache)
    await catalog.pull_layers("ann/tiny", start=0, end=1)

    renamed = await catalog.rename("tiny", "mine")

    assert renamed.name == "mine"
    assert catalog_of(hub, cache).find("mine") == renamed
    assert (await catalog.pull_layers("mine", start=1, end=2)).name == "mine"
    whole = await catalog.pull("ann/tiny")
    assert (whole.name, whole.layers, catalog.list()) == ("mine", None, [whole])


async def test_a_partial_model_is_not_renamed_while_it_is_being_fetched(
    hub: FakeHub, cache: Path
) -> None:
    catalog = catalog_of(hub, cache)
    held = await catalog.pull_layers("ann/tiny", start=0, end=1)

    async with hold_lock(cache / "locks" / f"{RELEASE}.lock", waiting=lambda: None):
        with pytest.raises(ModelRefused, match="layers of tiny are being fetched"):
            await catalog.rename("tiny", "mine")

    assert catalog.list() == [held]


async def test_the_name_of_a_partial_model_is_taken(
    hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    catalog = catalog_of(hub, cache)
    await catalog.pull_layers("ann/tiny", start=0, end=1)
    await catalog.pull(str(write_model_folder(tmp_path / "one")))

    with pytest.raises(ModelRefused, match="tiny is another model's name"):
        await catalog.rename("one", "tiny")
    with pytest.raises(ModelRefused, match="one is another model's name"):
        await catalog.rename("tiny", "one")
    listed = await catalog.pull(str(write_model_folder(tmp_path / "tiny", config={"a": "b"})))

    assert listed.name == "tiny-2"
    assert [entry.name for entry in catalog.list()] == ["one", "tiny", "tiny-2"]


async def test_a_partial_model_whose_name_is_taken_gets_a_number(
    hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    catalog = catalog_of(hub, cache)
    await catalog.pull(str(write_model_folder(tmp_path / "tiny")))

    held = await catalog.pull_layers("ann/tiny", start=0, end=1)

    assert held.name == "tiny-2"
    assert catalog.find("tiny-2") == held
    assert (await catalog.pull_layers("ann/tiny", start=1, end=2)).name == "tiny-2"


# Space and disappearing folders -----------------------------------------------------------------


def test_the_reserve_is_two_gigabytes_or_a_twentieth_of_a_large_disk() -> None:
    assert reserve_bytes(10**9) == reserve_bytes(40 * 10**9) == RESERVE_BYTES_MIN == 2 * 10**9
    assert reserve_bytes(10**12) == 50 * 10**9


async def test_what_others_ask_for_leaves_the_reserve_free(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = catalog_of(hub, cache)
    held = await catalog.pull_layers("ann/tiny", start=0, end=1)
    sent = hub.sent[WEIGHTS]
    needed = catalog.missing_bytes(held, start=1, end=2)

    disk_with(monkeypatch, free=RESERVE_BYTES_MIN + needed - 1)
    with pytest.raises(DownloadFailed, match=f"of which {RESERVE_BYTES_MIN} are kept"):
        await catalog.obtain(held, start=1, end=2)
    assert hub.sent[WEIGHTS] == sent
    disk_with(monkeypatch, free=RESERVE_BYTES_MIN + needed)

    assert (await catalog.obtain(held, start=1, end=2)).layers == ((0, 2),)


async def test_a_disk_that_fills_during_a_fetch_for_others_keeps_its_reserve(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = catalog_of(hub, cache)
    held = await catalog.pull_layers("ann/tiny", start=0, end=0)
    monkeypatch.setattr(hub_download, "SAVE_BYTES", 1)
    free = [RESERVE_BYTES_MIN + 10**6]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free.pop() if free else 0))

    with pytest.raises(DownloadFailed, match="are kept"):
        await catalog.obtain(held, start=0, end=3)


async def test_what_the_owner_pulls_may_fill_the_disk(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = catalog_of(hub, cache)
    disk_with(monkeypatch, free=10**6)

    assert (await catalog.pull_layers("ann/tiny", start=0, end=1)).layers == ((0, 1),)
    assert (await catalog.pull("ann/tiny")).layers is None


def after_the_fetch(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """Let another process change the folder between a fetch of layers and what follows."""
    fetch_layers = HubSource.fetch_layers

    async def fetch_then_change(*args: object, **options: object) -> Path:
        path: Path = await fetch_layers(*args, **options)  # type: ignore[arg-type]
        change(path)
        return path

    monkeypatch.setattr(HubSource, "fetch_layers", fetch_then_change)


async def test_a_folder_removed_after_the_fetch_is_not_fetched_whole(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_the_fetch(monkeypatch, shutil.rmtree)

    with pytest.raises(DownloadFailed, match="was removed while it was fetched"):
        await catalog_of(hub, cache).pull_layers("ann/tiny", start=0, end=1)

    assert hub.sent[WEIGHTS] < 2 * LAYER_BYTES


async def test_a_folder_that_another_process_made_whole_after_the_fetch_is_listed(
    hub: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await source_of(hub).fetch("ann/tiny", tmp_path / "other", ignore)

    def finish(path: Path) -> None:
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "other" / "models", cache / "models")

    after_the_fetch(monkeypatch, finish)
    catalog = catalog_of(hub, cache)

    entry = await catalog.pull_layers("ann/tiny", start=0, end=1)

    assert (entry.layers, entry.path) == (None, cache / "models" / RELEASE)
    assert catalog.list() == [entry]


@pytest.mark.parametrize("gone", [WEIGHTS, ".swarmpy.json", ""])
async def test_nothing_is_missing_of_a_folder_on_its_way_out(
    hub: FakeHub, cache: Path, gone: str
) -> None:
    catalog = catalog_of(hub, cache)
    held = await catalog.pull_layers("ann/tiny", start=0, end=1)
    if gone:
        (held.path / gone).unlink()
    else:
        shutil.rmtree(held.path)

    assert catalog.missing_bytes(held, start=1, end=3) == 0


async def test_missing_bytes_read_the_headers_once(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = catalog_of(hub, cache)
    held = await catalog.pull_layers("ann/tiny", start=0, end=1)
    first = catalog.missing_bytes(held, start=1, end=3)
    monkeypatch.delattr(hub_download, "_read_tensors")

    assert catalog.missing_bytes(held, start=1, end=3) == first >= 2 * LAYER_BYTES


async def test_a_partial_models_folder_is_its_own_even_when_it_is_gone(
    hub: FakeHub, cache: Path
) -> None:
    path = await source_of(hub).fetch_layers("ann/tiny", cache, ignore, start=0, end=1)
    (held,) = partial_models(cache)

    shutil.rmtree(path)

    assert held.folder == path, "what is removed is never the folder of all models in part"
