"""What is to be done later, by one task and one timer however much it is."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count

import trio

TICK_S = 0.01
"""Times are put off to its next multiple: what is due at about one time wakes a task once, and work
that finds itself a rounding error too early and tries again cannot do so in the same moment."""

TICK_ERROR = 1e-6
"""Of a multiple of `TICK_S` in ticks, after years."""


class Agenda:
    """Calls back at times of trio's clock, in their order, while `run` runs."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._sleep = trio.CancelScope()

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        """Call `work` in so many seconds. It must not raise, and bound what it puts down here."""
        ticks = (trio.current_time() + seconds) / TICK_S
        time_s = (math.floor(ticks + TICK_ERROR) + 1) * TICK_S
        if time_s < self._next_s:
            self._sleep.deadline = time_s
        heapq.heappush(self._due, (time_s, next(self._numbers), work))

    async def run(self) -> None:
        """Do what is due, until cancelled."""
        while True:
            with trio.CancelScope(deadline=self._next_s) as self._sleep:
                await trio.sleep_forever()
            now_s = trio.current_time()
            while self._due and self._due[0][0] <= now_s:
                heapq.heappop(self._due)[2]()

    @property
    def _next_s(self) -> float:
        return self._due[0][0] if self._due else math.inf
