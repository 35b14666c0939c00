"""The default model, through the project's own cache."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs
import pytest
import trio

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
