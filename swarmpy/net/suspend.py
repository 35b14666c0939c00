"""Notice that the machine slept, or that its clock was set: wall time jumped against monotonic.

While a machine sleeps its monotonic clock stands still (Linux, macOS), so no timer of ours has run
out afterwards, although every peer may have given this node up hours ago.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from swarmpy.abc import WallSeconds

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 5.0
"""Pause between two looks at both clocks, and so the longest a jump goes unnoticed."""

JUMP_S_MIN = 5.0
"""Smallest jump that counts. Time daemons slew by 0.5 ms a second and step by tenths; a sleep
shorter than this is within every timeout of the peers."""


class ClockWatch:
    """Compares the two clocks for as long as `run` runs."""

    def __init__(
        self, wall_time: Callable[[], WallSeconds], on_jump: Callable[[float], None]
    ) -> None:
        """Prepare to watch.

        Args:
            on_jump: Called once for each jump, with the seconds by which wall time moved ahead
                (negative where it was set back).
        """
        self._wall_time = wall_time
        self._on_jump = on_jump

    async def run(self) -> None:
        """Watch until cancelled."""
        lead_s = self._lead_s()
        while True:
            await trio.sleep(CHECK_INTERVAL_S)
            before_s, lead_s = lead_s, self._lead_s()
            jump_s = lead_s - before_s
            if abs(jump_s) >= JUMP_S_MIN:
                logger.info("clock.jumped", extra={"jump_s": round(jump_s, 3)})
                self._on_jump(jump_s)

    def _lead_s(self) -> float:
        # Monotonic first: where the machine falls asleep in between, the jump shows at once.
        now_s = trio.current_time()
        return self._wall_time() - now_s
