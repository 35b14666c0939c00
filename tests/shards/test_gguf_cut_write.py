"""Cuts on disk: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from cut_models import (
    metadata,
    model,
    raw,
    tensors,
    written,
)

from swarmpy.errors import ConfigError, ModelRefused
from swarmpy.shards.gguf import GgufHeader
from swarmpy.shards.gguf_cut import (
    GgufCut,
    cut_layers,
    write_cut,
)


@pytest.fixture
def cut(tmp_path: Path) -> GgufCut:
    return cut_layers(model(metadata(2), tensors(2), tmp_path / "x.gguf"), 0, 1)


def test_progress_grows_to_the_bytes_that_are_fetched(tmp_path: Path, cut: GgufCut) -> None:
    seen: list[tuple[int, int]] = []

    write_cut(cut, tmp_path / "cut.gguf", lambda done, total: seen.append((done, total)))

    assert seen == sorted(seen)
    assert seen[-1] == (cut.fetched_bytes, cut.fetched_bytes)


def assert_untouched(target: Path, cut: GgufCut) -> None:
    assert target.read_bytes() == b"before"
    assert {path.name for path in target.parent.iterdir()} == {
        "cut.gguf",
        cut.pieces[0].source.name,
    }


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"before")
    return path


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    target: Path, cut: GgufCut, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(target.parent)._replace(free=cut.fetched_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    with pytest.raises(ConfigError, match=f"are needed, {cut.fetched_bytes} are free"):
        write_cut(cut, target, lambda done, total: pytest.fail("something was written"))

    assert_untouched(target, cut)


def test_a_disk_that_fills_up_leaves_what_was_there(
    target: Path, cut: GgufCut, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(ConfigError, match="No space left"):
        write_cut(cut, target)

    assert_untouched(target, cut)


def test_writing_ends_with_what_the_report_raises(target: Path, cut: GgufCut) -> None:
    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cut(cut, target, cancel)

    assert_untouched(target, cut)


def test_an_original_that_was_cut_off_meanwhile_is_refused(target: Path, cut: GgufCut) -> None:
    os.truncate(cut.pieces[0].source, cut.pieces[-1].source_offset + 1)

    with pytest.raises(ModelRefused, match="cut while it was read"):
        write_cut(cut, target)

    assert_untouched(target, cut)


def test_an_original_that_is_gone_is_refused(target: Path, cut: GgufCut) -> None:
    cut.pieces[0].source.unlink()

    with pytest.raises(ModelRefused, match="cannot read"):
        write_cut(cut, target)

    assert target.read_bytes() == b"before"


def test_a_folder_that_is_not_there_is_a_plain_error(tmp_path: Path, cut: GgufCut) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        write_cut(cut, tmp_path / "absent" / "cut.gguf")


def test_the_name_that_is_written_under_is_another_each_time(target: Path, cut: GgufCut) -> None:
    """Goal: nobody who can write to the folder puts a link there, for it to be followed."""
    names = []

    def note(done: int, total: int) -> None:
        (path,) = target.parent.glob("*.new")
        assert path.stat().st_mode & 0o777 == 0o600
        names.append(path.name)

    for _ in range(2):
        write_cut(cut, target, note)

    assert names[0] != names[-1]


@pytest.mark.model
def test_three_cuts_of_the_default_model_hold_all_of_it(
    default_model: GgufHeader, tmp_path: Path
) -> None:
    target = tmp_path / "cut.gguf"
    found: dict[str, bool] = {}
    for start, end in ((0, 10), (10, 20), (20, 30)):
        part = written(default_model, start, end, target)
        for name, tensor in part.tensors.items():
            layer, _, short = name.removeprefix("blk.").partition(".")
            whole = f"blk.{int(layer) + start}.{short}" if name.startswith("blk.") else name
            found[whole] = found.get(whole, False) or raw(tensor) == raw(
                default_model.tensors[whole]
            )

    assert found == dict.fromkeys(default_model.tensors, True)
