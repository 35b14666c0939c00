"""A llama engine whose library ends the process, as it does where an assertion of its own fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from swarmpy.abc import Output, Row, Shard
from swarmpy.plugins.llama import LlamaEngine
from swarmpy.plugins.llama.library import find_library, open_library
from swarmpy.plugins.llama.shard import LlamaShard

NO_SUCH_MODE = 99


class AbortingEngine(LlamaEngine):
    """Loads a shard that aborts in its first step."""

    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        shard = super().load(
            folder, start=start, end=end, slots=slots, context=context, exact=exact
        )
        assert isinstance(shard, LlamaShard)
        shard.step = abort  # type: ignore[method-assign]
        return shard


def abort(rows: Sequence[Row]) -> Sequence[Output]:
    """Ask the library for the name of something it does not have."""
    open_library(find_library()).native.llama_load_mode_name(NO_SUCH_MODE)
    raise AssertionError("the library went on")
