"""Engines that touch no memory: what a warm hop costs, and the pipe to an engine child alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from swarmpy.abc import Output, Row, Shard
from swarmpy.testing.engine import EchoEngine

STEP_S = 0.02
"""One third of the default model takes MLX this long on the machine that was measured."""


class ChildEchoEngine(EchoEngine):
    """The EchoEngine in a child process."""

    name = "child-echo"
    in_process = False


class SpinEngine(ChildEchoEngine):
    """The same, 20 ms a step."""

    name = "spin"

    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        shard = super().load(
            folder, start=start, end=end, slots=slots, context=context, exact=exact
        )
        echo = shard.step

        def step(rows: Sequence[Row]) -> Sequence[Output]:
            ends_s = perf_counter() + STEP_S
            while perf_counter() < ends_s:
                pass
            return echo(rows)

        shard.step = step  # type: ignore[method-assign]
        return shard
