"""The door to the world: how much memory there is to give."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmpy import environment
from swarmpy.environment import available_memory_bytes, measured_memory_bytes


def test_a_machine_has_some_memory_to_give() -> None:
    assert available_memory_bytes() > 0


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups that this process is in: a limited one inside one without a limit."""
    (tmp_path / "own").write_text("4:memory:/old\n0::/pod/box\n")
    monkeypatch.setattr(environment, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(environment, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(environment, "_machine_bytes", lambda: 10_000)
    write_group(tmp_path / "groups" / "pod" / "box", limit="5000", used=1000, cached=0)
    write_group(tmp_path / "groups" / "pod", limit="max", used=9000, cached=0)
    return tmp_path / "groups"


def write_group(folder: Path, *, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")


@pytest.mark.usefixtures("groups")
def test_a_containers_limit_counts_not_the_machines_memory() -> None:
    assert available_memory_bytes() == measured_memory_bytes() == 4000


def test_the_limit_of_a_group_further_out_counts_too(groups: Path) -> None:
    write_group(groups / "pod", limit="9500", used=9000, cached=0)

    assert measured_memory_bytes() == 500


def test_files_that_were_read_take_no_memory_from_a_model(groups: Path) -> None:
    """Reading a model fills the page cache; a fit check must not refuse the next load for it."""
    write_group(groups / "pod" / "box", limit="5000", used=4900, cached=3900)

    assert measured_memory_bytes() == 4000


def test_without_a_limit_the_machine_decides(groups: Path) -> None:
    write_group(groups / "pod" / "box", limit="max", used=1000, cached=0)

    assert measured_memory_bytes() == 10_000
