"""What the plugins' tests share: the default model, one machine-wide download of it."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs
import pytest
import trio

from swarmpy.shards.catalog import Catalog
from swarmpy.shards.sources import DEFAULT_MODEL


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The default model's GGUF file."""
    folder = Path(os.environ.get("SWARMPY_CACHE") or platformdirs.user_cache_path("swarmpy"))
    return trio.run(Catalog(folder).pull, DEFAULT_MODEL).path
