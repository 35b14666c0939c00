"""What may go wrong between the Hub and a model: the network, the disk, the Hub, and who asks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import struct
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import trio
from hub_models import (
    CONFIG,
    LAYERS,
    RELEASE,
    WEIGHTS,
    asked_files,
    catalog_of,
    gguf_file,
    ignore,
    source_of,
)
from hub_server import COMMIT, FakeHub, serving
from shard_files import gguf_bytes, safetensors_bytes

from swarmpy.errors import DownloadFailed, ExtensionNotFound, ModelNotFound, ModelRefused
from swarmpy.shards import hub_download, partial
from swarmpy.shards.hub import HubSource
from swarmpy.shards.partial import PartialFolder, read_holding

pytest.importorskip("huggingface_hub", reason="needs the extra 'hub'")


# Interruptions --------------------------------------------------------------------------------


async def test_a_connection_cut_in_the_middle_is_taken_up_where_it_broke(
    hub: FakeHub, cache: Path
) -> None:
    hub.cuts = {WEIGHTS: [8, 100, 50_000, 70_000]}

    path = await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert (path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])


async def test_a_lost_network_loses_nothing_and_says_what_to_do(hub: FakeHub, cache: Path) -> None:
    hub.cuts = {WEIGHTS: [8, 10_000, 100_000, 0, 0, 0]}
    with pytest.raises(DownloadFailed, match="connection to the Hub") as caught:
        await source_of(hub).fetch("ann/tiny", cache, ignore)
    assert "the same command goes on from there" in caught.value.fix

    path = await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert (path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])


async def test_a_cancelled_download_ends_at_once_and_goes_on_later(
    hub: FakeHub, cache: Path
) -> None:
    hub.stalls_after = 65_536
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source_of(hub).fetch, "ann/tiny", cache, ignore)
            await trio.to_thread.run_sync(hub.stalled.wait, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()
    assert read_holding(cache / "partial" / RELEASE) is not None

    hub.stalls_after = -1
    path = await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert (path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


async def test_what_was_not_saved_before_a_crash_does_not_count(hub: FakeHub, cache: Path) -> None:
    """Goal: only bytes on the disk count. Method: write without a save, as before a kill."""
    await source_of(hub).fetch_layers("ann/tiny", cache, ignore, start=0, end=1)
    folder = cache / "partial" / RELEASE
    holding = read_holding(folder)
    assert holding is not None
    crashed = PartialFolder(folder, holding)
    crashed.write(WEIGHTS, 200_000, b"x" * 1000)

    assert read_holding(folder) == holding


async def test_a_full_disk_is_known_before_the_tensors(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(0, 0, 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    with pytest.raises(DownloadFailed, match=r"more bytes are needed .* 100000 are free") as caught:
        await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert "SWARMPY_CACHE" in caught.value.fix
    assert hub.sent[WEIGHTS] < 2000


async def test_a_disk_that_fills_up_keeps_what_came(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PartialFolder.write

    def write_until_full(self: PartialFolder, name: str, offset: int, data: bytes) -> None:
        if offset + len(data) > 150_000:
            with partial.disk_errors(self.path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, offset, data)

    monkeypatch.setattr(PartialFolder, "write", write_until_full)
    with pytest.raises(DownloadFailed, match=r"is full; what came so far is kept"):
        await source_of(hub).fetch("ann/tiny", cache, ignore)
    monkeypatch.undo()
    holding = read_holding(cache / "partial" / RELEASE)
    assert holding is not None
    kept = {file.name: file.ranges for file in holding.files}[WEIGHTS]

    hub.forget()
    path = await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert (path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert hub.ranges_of(WEIGHTS) == [(kept[-1][1], len(hub.files[WEIGHTS]))]


async def test_two_pulls_at_once_fetch_the_bytes_once(hub: FakeHub, cache: Path) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(source_of(hub).fetch, "ann/tiny", cache, ignore)

    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])


# What the Hub may send ------------------------------------------------------------------------


async def test_wrong_bytes_do_not_become_a_model_and_are_fetched_anew(
    hub: FakeHub, cache: Path
) -> None:
    data = hub.files[WEIGHTS]
    hub.wrong = {WEIGHTS: data[:-1] + b"x"}
    with pytest.raises(DownloadFailed, match="which is not the hub's") as caught:
        await source_of(hub).fetch("ann/tiny", cache, ignore)
    assert "fetches this file anew" in caught.value.fix
    assert not (cache / "models").exists()

    hub.wrong = {}
    path = await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert (path / WEIGHTS).read_bytes() == data


async def test_a_wrong_configuration_is_found_before_any_weight(hub: FakeHub, cache: Path) -> None:
    hub.wrong = {"config.json": hub.files["config.json"].replace(b"llama", b"qwen2")}

    with pytest.raises(DownloadFailed, match=r"config.json of ann/tiny"):
        await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert WEIGHTS not in asked_files(hub)


async def test_a_hub_that_ignores_ranges_is_refused(hub: FakeHub, cache: Path) -> None:
    hub.ignores_ranges = True

    with pytest.raises(DownloadFailed, match=r"answered 200 to bytes 0-7 .*, expected 206"):
        await source_of(hub).fetch("ann/tiny", cache, ignore)


async def test_another_range_than_the_one_asked_for_is_refused(hub: FakeHub, cache: Path) -> None:
    await source_of(hub).fetch_layers("ann/tiny", cache, ignore, start=0, end=1)
    hub.shifted_by = -4

    with pytest.raises(DownloadFailed, match=r"asked for bytes .* the Hub sent 'bytes "):
        await source_of(hub).fetch("ann/tiny", cache, ignore)


async def test_a_configuration_that_names_code_is_refused_before_any_tensor(
    hub: FakeHub, cache: Path
) -> None:
    hub.files["config.json"] = json.dumps({**CONFIG, "auto_map": {"AutoModel": "x.Y"}}).encode()

    with pytest.raises(ModelRefused, match="auto_map"):
        await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert hub.sent[WEIGHTS] < 2000


async def test_a_hostile_header_is_refused_before_any_tensor(hub: FakeHub, cache: Path) -> None:
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}
    hub.files[WEIGHTS] = safetensors_bytes({"a": entry}, bytes(500_000))

    with pytest.raises(ModelRefused, match="needs 4398046511104 bytes"):
        await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert hub.sent[WEIGHTS] < 2000


async def test_a_header_as_long_as_it_likes_is_not_fetched(hub: FakeHub, cache: Path) -> None:
    hub.files[WEIGHTS] = struct.pack("<Q", 1 << 60) + bytes(500_000)

    with pytest.raises(ModelRefused, match="header of 1152921504606846976 bytes"):
        await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert hub.sent[WEIGHTS] == 8


async def test_a_hostile_gguf_is_refused_before_any_tensor(gguf_hub: FakeHub, cache: Path) -> None:
    data = gguf_hub.files["tiny-F32.gguf"]
    gguf_hub.files["tiny-F32.gguf"] = data[:8] + struct.pack("<Q", 1 << 40) + data[16:]

    with pytest.raises(ModelRefused, match="tensors, at most 200000"):
        await source_of(gguf_hub).fetch("ann/tiny", cache, ignore)

    assert gguf_hub.sent["tiny-F32.gguf"] == hub_download.HEADER_STEP_BYTES


async def test_a_repository_of_pickles_is_refused_unseen(hub: FakeHub, cache: Path) -> None:
    del hub.files[WEIGHTS]

    with pytest.raises(ModelRefused, match=r"no \*.safetensors and no \*.gguf") as caught:
        await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert "can hold code" in caught.value.fix
    assert asked_files(hub) == set()


async def test_a_file_name_that_is_more_than_one_is_never_used(hub: FakeHub, cache: Path) -> None:
    hub.files["..\\evil.safetensors"] = b"x"

    with pytest.raises(ModelRefused, match="not a plain file name"):
        await source_of(hub).fetch("ann/tiny", cache, ignore)


async def test_one_of_several_ggufs_must_be_named(gguf_hub: FakeHub, cache: Path) -> None:
    gguf_hub.files["tiny-Q8_0.gguf"] = gguf_hub.files["tiny-F32.gguf"]
    with pytest.raises(ModelNotFound, match="has 2 GGUFs, and each is a model") as caught:
        await source_of(gguf_hub).fetch("ann/tiny", cache, ignore)
    assert caught.value.fix == "Name one: swarmpy models pull ann/tiny:tiny-F32.gguf"
    with pytest.raises(ModelNotFound, match=r"has no other.gguf \(its GGUFs: tiny-F32.gguf"):
        await source_of(gguf_hub).fetch("ann/tiny:other.gguf", cache, ignore)

    entry = await catalog_of(gguf_hub, cache).pull("ann/tiny:tiny-Q8_0.gguf")

    assert (entry.name, entry.format) == ("tiny-q8_0", "gguf")


async def test_ggufs_whose_names_differ_by_case_alone_are_two_models(
    gguf_hub: FakeHub, cache: Path
) -> None:
    metadata = {"general.architecture": "llama", "llama.block_count": 1}
    gguf_hub.files["TINY-f32.gguf"] = gguf_bytes(metadata, {})
    catalog = catalog_of(gguf_hub, cache)

    first = await catalog.pull("ann/tiny:tiny-F32.gguf")
    second = await catalog.pull("ann/tiny:TINY-f32.gguf")

    assert (first.layer_count, second.layer_count) == (LAYERS, 1)
    assert await catalog.verify(first) == first


async def test_a_file_of_another_etag_than_listed_is_refused(hub: FakeHub, cache: Path) -> None:
    with serving(FakeHub(hub.files)) as store:
        hub.elsewhere = store.url
        hub.etag = "0" * 64

        with pytest.raises(DownloadFailed, match="has ETag 0000"):
            await source_of(hub).fetch("ann/tiny", cache, ignore)


async def test_a_folder_and_a_gguf_of_one_repository_are_two_models(
    hub: FakeHub, cache: Path
) -> None:
    hub.files["tiny-F32.gguf"] = gguf_file()
    catalog = catalog_of(hub, cache)

    gguf = await catalog.pull("ann/tiny:tiny-F32.gguf")
    folder = await catalog.pull(f"ann/tiny@{COMMIT}")

    assert (gguf.format, folder.format) == ("gguf", "safetensors")
    assert await catalog.verify(gguf) == gguf
    await catalog.remove(gguf.name)
    assert catalog.list() == [folder]


# Who may --------------------------------------------------------------------------------------


async def test_a_private_model_comes_with_the_token_of_the_environment(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with pytest.raises(ModelNotFound, match="or does not show it to you") as caught:
        await HubSource().fetch("ann/tiny", cache, ignore)
    assert "HF_TOKEN" in caught.value.fix

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    path = await HubSource().fetch("ann/tiny", cache, ignore)

    assert (path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


@pytest.mark.parametrize(("token", "fix"), [("", "set HF_TOKEN"), ("hf_x", "another user's token")])
async def test_a_gated_model_says_where_its_terms_are(
    hub: FakeHub, cache: Path, token: str, fix: str
) -> None:
    hub.is_gated = True

    with pytest.raises(DownloadFailed) as caught:
        await HubSource(endpoint=hub.url, token=token).fetch("ann/tiny", cache, ignore)

    assert fix in caught.value.fix
    assert "/ann/tiny" in caught.value.fix


async def test_the_token_is_not_sent_to_where_the_hub_redirects(hub: FakeHub, cache: Path) -> None:
    hub.token = "hf_secret"
    with serving(FakeHub(hub.files)) as store:
        hub.elsewhere = store.url
        path = await HubSource(endpoint=hub.url, token="hf_secret").fetch("ann/tiny", cache, ignore)

        assert (path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
        assert {item.authorization for item in hub.asked} == {"Bearer hf_secret"}
        assert {item.authorization for item in store.asked} == {""}
        assert all(item.range for item in store.asked)


async def test_a_repository_or_revision_that_is_not_there_is_named(
    hub: FakeHub, cache: Path
) -> None:
    with pytest.raises(ModelNotFound, match="has no model ann/other"):
        await source_of(hub).fetch("ann/other", cache, ignore)
    with pytest.raises(ModelNotFound, match="ann/tiny has no revision 'v9'"):
        await source_of(hub).fetch("ann/tiny@v9", cache, ignore)


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_hub_is_told_from_a_broken_network(
    hub: FakeHub, cache: Path, status: int
) -> None:
    await source_of(hub).fetch_layers("ann/tiny", cache, ignore, start=0, end=1)
    hub.status = status

    with pytest.raises(DownloadFailed, match=f"busy or out of order: it answered {status}") as told:
        await source_of(hub).fetch("ann/tiny", cache, ignore)

    assert "again in some minutes" in told.value.fix


async def test_the_library_that_is_not_installed_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with pytest.raises(ExtensionNotFound) as caught:
        await HubSource().fetch("ann/tiny", cache, ignore)

    assert caught.value.fix == "Install it: pip install 'swarmpy[hub]'"


async def test_a_hub_that_is_not_there_says_so(cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        source = HubSource(endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}", token="")

        with pytest.raises(DownloadFailed, match=r"connection to the Hub at 127.0.0.1:\d+ failed"):
            await source.fetch("ann/tiny", cache, ignore)
