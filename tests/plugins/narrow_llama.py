"""A llama engine on a machine that has no room for many layers."""

from __future__ import annotations

from pathlib import Path

from swarmpy.abc import Shard
from swarmpy.errors import DoesNotFit
from swarmpy.plugins.llama import LlamaEngine

LAYERS_MAX = 4


class NarrowEngine(LlamaEngine):
    """Loads no more than a few layers."""

    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        if end - start > LAYERS_MAX:
            raise DoesNotFit(f"{end - start} layers, room for {LAYERS_MAX}")
        return super().load(folder, start=start, end=end, slots=slots, context=context, exact=exact)
