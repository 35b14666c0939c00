"""The catalog: models are found by name and id, survive restarts, and may not change unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from shard_files import (
    gguf_bytes,
    llama_gguf,
    llama_metadata,
    llama_tensors,
    write_model_folder,
    write_safetensors,
)

from swarmpy.abc import ModelLabel, ModelSource, Progress
from swarmpy.errors import DownloadFailed, ModelNotFound, ModelRefused
from swarmpy.shards.catalog import Catalog, ModelEntry
from swarmpy.shards.gguf import GgmlType
from swarmpy.shards.sources import FolderSource


class ShelfSource(ModelSource):
    """Puts one tiny GGUF into the cache under the name "tiny", as a package source would."""

    name = "shelf"

    def __init__(self, *, is_empty: bool = False) -> None:
        self.is_empty = is_empty

    def matches(self, model: str) -> bool:
        return model.lower() == "tiny"

    def label(self, model: str) -> ModelLabel:
        return ModelLabel(name="tiny", display_name="Tiny (Q4_0)", origin="the shelf")

    async def fetch(self, model: str, into: Path, progress: Callable[[Progress], None]) -> Path:
        target = into / "models" / "tiny-1" / "tiny.gguf"
        if target.exists() and target.read_bytes() == llama_gguf():
            return target
        if self.is_empty:
            raise DownloadFailed("the shelf is empty")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(llama_gguf())
        return target


def catalog_of(folder: Path) -> Catalog:
    return Catalog(folder / "cache", sources=[ShelfSource(), FolderSource()])


def names_of(catalog: Catalog) -> list[str]:
    return [entry.name for entry in catalog.list()]


async def test_a_pulled_model_says_what_it_is(tmp_path: Path) -> None:
    entry = await catalog_of(tmp_path).pull("TINY")

    assert entry.name == "tiny"
    assert entry.display_name == "Tiny (Q4_0)"
    assert entry.path == tmp_path / "cache" / "models" / "tiny-1" / "tiny.gguf"
    assert entry.format == "gguf"
    assert entry.size_bytes == len(llama_gguf())
    assert (entry.license, entry.source) == ("apache-2.0", "the shelf")
    assert (entry.architecture, entry.layer_count, entry.context_max) == ("llama", 2, 512)
    assert entry.quantization == "Q4_0"
    assert len(entry.model_id) == 64


async def test_a_pulled_folder_says_what_it_is(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "My Model", config={"model_type": "qwen3"})

    entry = await catalog_of(tmp_path).pull(str(folder))

    assert (entry.name, entry.display_name, entry.path) == ("my-model", "My Model", folder)
    assert (entry.format, entry.architecture, entry.layer_count) == ("safetensors", "qwen3", 2)
    assert (entry.parameter_count, entry.context_max, entry.quantization) == (12, 512, "F32")


async def test_packed_weights_are_counted_as_what_they_stand_for(tmp_path: Path) -> None:
    config = {"quantization": {"bits": 4, "group_size": 64}}
    folder = write_model_folder(tmp_path / "packed", config=config)
    write_safetensors(
        folder / "model.safetensors",
        {
            "a.weight": ("U32", (2, 8), bytes(64)),
            "a.scales": ("F16", (2, 1), bytes(4)),
            "a.biases": ("F16", (2, 1), bytes(4)),
            "norm.weight": ("F16", (5,), bytes(10)),
        },
    )

    entry = await catalog_of(tmp_path).pull(str(folder))

    assert (entry.parameter_count, entry.quantization) == (2 * 64 + 5, "4-bit")


async def test_a_model_is_found_by_name_id_and_first_digits_after_a_restart(tmp_path: Path) -> None:
    entry = await catalog_of(tmp_path).pull("tiny")

    again = catalog_of(tmp_path)

    assert again.list() == [entry]
    assert again.find("Tiny") == entry
    assert again.find(entry.model_id) == entry
    assert again.find(entry.model_id[:8]) == entry
    assert again.by_id(entry.model_id) == entry
    assert again.by_id("0" * 64) is None


async def test_a_model_that_is_not_here_is_answered_with_close_names(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    await catalog.pull(str(write_model_folder(tmp_path / "granite-3b")))

    with pytest.raises(ModelNotFound, match="did you mean granite-3b"):
        catalog.find("granit-3")


def test_a_model_that_could_be_fetched_is_answered_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="not on this machine yet") as caught:
        catalog_of(tmp_path).find("Tiny")

    assert caught.value.fix == "swarmpy models pull tiny"


async def test_a_name_no_source_knows_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model 'organisation/name' is here"):
        await catalog_of(tmp_path).pull("organisation/name")


@pytest.mark.parametrize("key", ["model_file", "auto_map"])
async def test_a_folder_that_brings_code_is_refused_and_not_listed(
    tmp_path: Path, key: str
) -> None:
    catalog = catalog_of(tmp_path)
    folder = write_model_folder(tmp_path / "model", config={key: "evil.py"})

    with pytest.raises(ModelRefused, match=key):
        await catalog.pull(str(folder))

    assert catalog.list() == []


async def test_two_folders_of_one_name_get_two_names(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    for place in ("a", "b"):
        folder = write_model_folder(tmp_path / place / "model", config={"place": place})
        await catalog.pull(str(folder))

    assert names_of(catalog) == ["model", "model-2"]


async def test_a_folder_cannot_take_the_name_of_a_package(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)

    entry = await catalog.pull(str(write_model_folder(tmp_path / "Tiny")))

    assert entry.name == "tiny-2"


async def test_a_copy_in_a_folder_does_not_displace_its_model(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    entry = await catalog.pull("tiny")
    (tmp_path / "copy.gguf").write_bytes(llama_gguf())

    assert await catalog.pull(str(tmp_path / "copy.gguf")) == entry


async def test_a_package_takes_its_name_although_a_copy_was_listed_first(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    (tmp_path / "copy.gguf").write_bytes(llama_gguf())
    await catalog.pull(str(tmp_path / "copy.gguf"))

    await catalog.pull("tiny")

    assert names_of(catalog) == ["tiny"]


async def test_a_changed_folder_is_refused_until_it_is_pulled_again(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    folder = write_model_folder(tmp_path / "model")
    entry = await catalog.pull(str(folder))
    (folder / "tokenizer.json").write_text("{ }")

    with pytest.raises(ModelRefused, match=r"tokenizer.json changed since the model was added"):
        await catalog.verify(entry)

    changed = await catalog.pull("model")
    assert changed.name == "model"
    assert changed.model_id != entry.model_id
    assert await catalog.verify(changed) == changed
    assert catalog.list() == [changed]


async def test_an_unchanged_model_verifies_without_being_read(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    entry = await catalog.pull(str(write_model_folder(tmp_path / "model")))
    told: list[Progress] = []

    await catalog.verify(entry, told.append)

    # One report a file once it is done; none while a file is read.
    assert len(told) == 3


async def test_a_damaged_package_is_repaired_before_it_is_loaded(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    entry = await catalog.pull("tiny")
    entry.path.write_bytes(llama_gguf()[:-1] + b"x")

    assert await catalog.verify(entry) == entry

    assert entry.path.read_bytes() == llama_gguf()


async def test_a_damaged_package_that_cannot_be_repaired_is_an_error(tmp_path: Path) -> None:
    entry = await catalog_of(tmp_path).pull("tiny")
    entry.path.write_bytes(llama_gguf()[:-1] + b"x")

    with pytest.raises(DownloadFailed, match="the shelf is empty"):
        await Catalog(tmp_path / "cache", sources=[ShelfSource(is_empty=True)]).verify(entry)


async def test_a_model_whose_files_are_gone_is_not_listed(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    entry = await catalog.pull(str(write_model_folder(tmp_path / "model")))
    os.truncate(entry.path / "model.safetensors", 10)

    assert catalog.list() == []
    with pytest.raises(ModelNotFound):
        catalog.find("model")


async def test_a_removed_package_leaves_the_cache(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    entry = await catalog.pull("tiny")

    await catalog.remove("tiny")

    assert catalog.list() == []
    assert not entry.path.exists()


async def test_a_removed_folder_stays_where_it_is(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    folder = write_model_folder(tmp_path / "model")
    await catalog.pull(str(folder))

    await catalog.remove("model")

    assert catalog.list() == []
    assert (folder / "model.safetensors").exists()


async def test_removing_an_unknown_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        await catalog_of(tmp_path).remove("nobody")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"version": 2, "models": []}', b"\xff\xfe", b'{"x":' + b"[" * 5000],
    ids=["empty", "cut", "newer", "binary", "nested"],
)
async def test_a_damaged_index_is_set_aside_and_models_are_found_again(
    tmp_path: Path, content: bytes
) -> None:
    catalog = catalog_of(tmp_path)
    entry = await catalog.pull("tiny")
    index = tmp_path / "cache" / "index" / "models.json"
    index.write_bytes(content)

    assert catalog.list() == []
    assert await catalog.pull("tiny") == entry
    assert index.with_suffix(".damaged").read_bytes() == content


async def test_a_hostile_gguf_is_refused_and_not_listed(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    data = bytearray(llama_gguf())
    data[8:16] = b"\xff" * 8
    (tmp_path / "model.gguf").write_bytes(data)

    with pytest.raises(ModelRefused, match="tensors, at most"):
        await catalog.pull(str(tmp_path / "model.gguf"))

    assert catalog.list() == []


@pytest.mark.parametrize("context", [-5, (1 << 28) + 1])
async def test_a_gguf_of_any_family_with_an_absurd_context_is_refused(
    tmp_path: Path, context: int
) -> None:
    metadata = {
        "general.architecture": "gemma",
        "gemma.block_count": 2,
        "gemma.context_length": context,
    }
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(metadata, llama_tensors()))

    with pytest.raises(ModelRefused, match=f"max_position_embeddings is {context}"):
        await catalog_of(tmp_path).pull(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["../llama", "llama\x1b[2J", "", "x" * 65])
async def test_an_architecture_that_is_no_plain_word_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_model_folder(tmp_path / "model", config={"model_type": name})

    with pytest.raises(ModelRefused, match="expected a plain word"):
        await catalog_of(tmp_path).pull(str(folder))


async def test_a_license_cannot_command_the_terminal(tmp_path: Path) -> None:
    metadata = llama_metadata() | {"general.license": "mit\x1b[2J\r\n" + "x" * 1000}
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(metadata, llama_tensors()))

    entry = await catalog_of(tmp_path).pull(str(tmp_path / "model.gguf"))

    assert entry.license == "mit[2J" + "x" * 91


async def test_a_cancelled_pull_lists_nothing(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    folder = write_model_folder(tmp_path / "model")

    with trio.CancelScope() as scope:
        await catalog.pull(str(folder), lambda progress: scope.cancel())

    assert scope.cancelled_caught
    assert catalog.list() == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are always text")
async def test_a_path_that_is_no_text_is_not_found(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf")

    with pytest.raises(ModelNotFound, match="no usable path"):
        await catalog_of(tmp_path).pull(path)


async def test_a_full_list_refuses_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmpy.shards.catalog.MODELS_MAX", 1)
    catalog = catalog_of(tmp_path)
    await catalog.pull("tiny")

    with pytest.raises(ModelRefused, match="1 models are listed"):
        await catalog.pull(str(write_model_folder(tmp_path / "model")))


async def test_one_file_of_a_split_gguf_is_refused(tmp_path: Path) -> None:
    data = gguf_bytes(llama_metadata() | {"split.count": 3}, llama_tensors(GgmlType.F16))
    (tmp_path / "model-1.gguf").write_bytes(data)

    with pytest.raises(ModelRefused, match="one of several files"):
        await catalog_of(tmp_path).pull(str(tmp_path / "model-1.gguf"))


async def test_processes_that_list_models_at_once_lose_none(tmp_path: Path) -> None:
    """Method: four processes list five folders each; all twenty must be there."""
    program = (
        "import sys, trio\n"
        "from pathlib import Path\n"
        "from swarmpy.shards.catalog import Catalog\n"
        "async def main():\n"
        "    for folder in sys.argv[2:]:\n"
        "        await Catalog(Path(sys.argv[1])).pull(folder)\n"
        "trio.run(main)\n"
    )
    folders = [
        str(write_model_folder(tmp_path / f"model-{number:02}", config={"number": number}))
        for number in range(20)
    ]
    children = [
        await trio.lowlevel.open_process(
            [sys.executable, "-c", program, str(tmp_path / "cache"), *folders[start::4]],
            stderr=subprocess.PIPE,
        )
        for start in range(4)
    ]
    with trio.fail_after(60):
        for child in children:
            assert child.stderr is not None
            assert b"".join([chunk async for chunk in child.stderr]) == b""
            assert await child.wait() == 0

    assert names_of(catalog_of(tmp_path)) == [f"model-{number:02}" for number in range(20)]


async def test_the_index_is_plain_json_with_a_version(tmp_path: Path) -> None:
    await catalog_of(tmp_path).pull("tiny")

    index = json.loads((tmp_path / "cache" / "index" / "models.json").read_text())

    assert (index["version"], len(index["models"])) == (1, 1)


@pytest.mark.model
def test_the_default_model_is_listed_as_it_is_known(default_entry: ModelEntry) -> None:
    entry = default_entry

    assert entry.model_id == "f18b79c350b680cf7dd366f34ef84b7394dc3427339de53c4354147d72279bd5"
    assert entry.display_name == "SmolLM2 135M Instruct (Q4_1)"
    assert (entry.parameter_count, entry.context_max, entry.license) == (
        134_515_008,
        8192,
        "apache-2.0",
    )


# Names of one's own -----------------------------------------------------------------------------


async def test_a_renamed_model_is_found_by_its_new_name_and_keeps_it(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    entry = await catalog.pull("tiny")

    renamed = await catalog.rename("tiny", "house-model")

    assert (renamed.name, renamed.model_id) == ("house-model", entry.model_id)
    assert names_of(catalog_of(tmp_path)) == ["house-model"]
    assert (await catalog.verify(renamed)).name == "house-model"


@pytest.mark.parametrize("name", ["", "House", "a b", "../x", "-x", "n" * 101])
async def test_a_name_that_is_no_plain_word_is_refused(tmp_path: Path, name: str) -> None:
    catalog = catalog_of(tmp_path)
    await catalog.pull("tiny")

    with pytest.raises(ModelRefused, match="is no name for a model"):
        await catalog.rename("tiny", name)

    assert names_of(catalog) == ["tiny"]


async def test_a_name_that_is_taken_or_a_sources_is_refused(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path)
    await catalog.pull(str(write_model_folder(tmp_path / "one")))
    await catalog.pull(str(write_model_folder(tmp_path / "two", config={"place": "two"})))

    for name in ("two", "tiny"):
        with pytest.raises(ModelRefused, match="is another model's name"):
            await catalog.rename("one", name)

    assert names_of(catalog) == ["one", "two"]


async def test_a_model_that_is_not_listed_cannot_be_renamed(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        await catalog_of(tmp_path).rename("nothing", "something")


@pytest.mark.parametrize("name", ["deadbeef", "0123456789", "a" * 64])
async def test_a_name_that_looks_like_an_id_is_refused(tmp_path: Path, name: str) -> None:
    catalog = catalog_of(tmp_path)
    await catalog.pull("tiny")

    with pytest.raises(ModelRefused, match="looks like a model's id"):
        await catalog.rename("tiny", name)

    assert names_of(catalog) == ["tiny"]
    assert (await catalog.rename("tiny", "deadbee")).name == "deadbee"


async def test_a_model_removed_while_it_is_renamed_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = catalog_of(tmp_path)
    entry = await catalog.pull(str(write_model_folder(tmp_path / "one")))
    await catalog.remove("one")
    monkeypatch.setattr(catalog, "find", lambda name: entry)

    with pytest.raises(ModelNotFound):
        await catalog.rename("one", "ghost")

    assert catalog.list() == []
