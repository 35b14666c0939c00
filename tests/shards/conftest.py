"""The default model through the project's own cache, and hubs on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest
import trio
from hub_models import gguf_file, tiny_hub
from hub_server import FakeHub, serving

from swarmpy.shards.catalog import Catalog, ModelEntry
from swarmpy.shards.gguf import GgufHeader, read_header
from swarmpy.shards.sources import DEFAULT_MODEL


@pytest.fixture(scope="session")
def default_entry() -> ModelEntry:
    """The default model, fetched once into the machine-wide cache."""
    folder = Path(os.environ.get("SWARMPY_CACHE") or platformdirs.user_cache_path("swarmpy"))
    return trio.run(Catalog(folder).pull, DEFAULT_MODEL)


@pytest.fixture(scope="session")
def default_model(default_entry: ModelEntry) -> GgufHeader:
    """The header of the default model's file."""
    return read_header(default_entry.path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one model as a folder."""
    with serving(tiny_hub(tmp_path, monkeypatch)) as hub:
        yield hub


@pytest.fixture
def gguf_hub(hub: FakeHub) -> FakeHub:
    """The hub with the model as a GGUF instead."""
    hub.files = {"tiny-F32.gguf": gguf_file(), "README.md": b"# Tiny"}
    hub.lfs = frozenset({"tiny-F32.gguf"})
    return hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
