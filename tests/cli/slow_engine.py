"""An EchoEngine that takes its time, so that a test can interrupt a reply."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from swarmpy.abc import Output, Row, Shard
from swarmpy.testing.engine import EchoEngine

STEP_S = 0.01


class SlowEngine(EchoEngine):
    """Answers as the EchoEngine does, a hundred tokens a second."""

    name = "slow"

    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        shard = super().load(
            folder, start=start, end=end, slots=slots, context=context, exact=exact
        )
        step = shard.step

        def slow_step(rows: Sequence[Row]) -> Sequence[Output]:
            time.sleep(STEP_S)
            return step(rows)

        shard.step = slow_step  # type: ignore[method-assign]
        return shard
