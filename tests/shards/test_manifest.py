"""Manifests: one id for the same files anywhere, another for all others; remembered hashes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from shard_files import write_model_folder

from swarmpy.errors import DownloadFailed, ModelRefused
from swarmpy.shards import manifest
from swarmpy.shards.manifest import HashCache, Manifest, build_manifest, source_files

VECTORS = Path(__file__).parents[2] / "protocols" / "vectors" / "manifest.json"


def build(path: Path, *, source: str = "") -> Manifest:
    hashes = HashCache(path.parent / "cache")
    return build_manifest(path, hashes, lambda done, total: None, source=source)


@pytest.mark.parametrize(
    "vector", json.loads(VECTORS.read_text())["valid"], ids=lambda item: item["name"]
)
def test_the_published_vectors_give_their_ids(vector: dict[str, str]) -> None:
    manifest = msgspec.convert(vector["manifest"], Manifest)

    assert manifest.canonical_bytes().decode() == vector["canonical"]
    assert manifest.model_id == vector["model_id"]


def test_a_copied_folder_has_the_same_id(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two")

    assert build(folder, source="here").model_id == build(tmp_path / "two").model_id


def test_a_renamed_gguf_has_the_same_id(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF")

    assert build(tmp_path / "one.gguf").model_id == build(tmp_path / "two.GGUF").model_id


def test_files_that_are_never_read_are_no_part_of_the_id(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    before = build(folder).model_id
    (folder / "modeling_custom.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")

    assert build(folder).model_id == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_byte_of_a_source_file_gives_another_id(tmp_path: Path, name: str) -> None:
    folder = write_model_folder(tmp_path / "model")
    before = build(folder).model_id
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)

    assert build(folder).model_id != before


def test_a_changed_file_is_noticed_even_with_its_old_time_and_size(tmp_path: Path) -> None:
    """A tool that restores times must not hide a change."""
    folder = write_model_folder(tmp_path / "model")
    before = build(folder).model_id
    path = folder / "model.safetensors"
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert build(folder).model_id != before


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    reads: list[int] = []
    first = HashCache(tmp_path / "cache").sha256(path, reads.append)

    second = HashCache(tmp_path / "cache").sha256(path, reads.append)

    assert (reads, second) == ([4], first)


def test_a_file_that_changes_once_it_is_hashed_is_not_remembered_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state kept with a hash must be the one the bytes were read in, not a later one."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    hashes = HashCache(tmp_path / "cache")
    looks = 0

    def look(file: Path) -> tuple[int, int, int, int, int]:
        nonlocal looks
        looks += 1
        state = state_of(file)
        if looks == 2:  # once before the bytes are read, once after
            path.write_bytes(b"evil, and longer")
        return state

    state_of = manifest.state_of
    monkeypatch.setattr(manifest, "state_of", look)
    hashes.sha256(path, lambda done: None)
    monkeypatch.undo()

    assert hashes.sha256(path, lambda done: None) == sha256(b"evil, and longer").hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="file names are any bytes on Linux only")
def test_a_link_to_a_file_whose_name_is_no_text_is_hashed(tmp_path: Path) -> None:
    target = os.fsencode(tmp_path) + b"/\xff.bin"
    Path(os.fsdecode(target)).write_bytes(b"GGUF")
    (tmp_path / "model.gguf").symlink_to(os.fsdecode(target))
    reads: list[int] = []
    hashes = HashCache(tmp_path / "cache")

    for _ in range(2):
        assert hashes.sha256(tmp_path / "model.gguf", reads.append) == sha256(b"GGUF").hexdigest()

    assert reads == [4]


@pytest.mark.parametrize(
    "content",
    [b'{"x": [\xff', b'{"x":[[0,0,0,0,0],"%s",%s' % (b"0" * 64, b"[" * 5000)],
    ids=["binary", "nested"],
)
def test_damaged_memory_of_hashes_costs_only_time(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    hashes = HashCache(tmp_path / "cache")
    first = hashes.sha256(path, lambda done: None)
    (tmp_path / "cache" / "index" / "hashes.json").write_bytes(content)

    assert hashes.sha256(path, lambda done: None) == first


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")

    with pytest.raises(ModelRefused, match="changed while it was read"):
        HashCache(tmp_path / "cache").sha256(path, lambda done: os.truncate(path, 2))


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")

    with pytest.raises(DownloadFailed, match="cannot write"):
        HashCache(tmp_path / "cache").sha256(path, lambda done: None)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_without_a_needed_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / name).unlink()

    with pytest.raises(ModelRefused, match=f"has no .*{name.rpartition('.')[2]}"):
        source_files(folder)


def test_a_single_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(ModelRefused, match=r"neither a folder nor a .gguf"):
        source_files(tmp_path / "pytorch_model.bin")
