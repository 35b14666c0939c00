"""What is to be done later, by one task however much it is."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count

import trio


class Agenda:
    """Calls back at times of trio's clock, in their order, while `run` runs."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._earlier = trio.Event()

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        """Call `work` in so many seconds. It must not raise, and bound what it puts down here."""
        time_s = trio.current_time() + seconds
        if time_s < self._next_s:
            self._earlier.set()
        heapq.heappush(self._due, (time_s, next(self._numbers), work))

    async def run(self) -> None:
        """Do what is due, until cancelled."""
        while True:
            self._earlier = trio.Event()
            with trio.move_on_at(self._next_s):
                await self._earlier.wait()
            now_s = trio.current_time()
            while self._due and self._due[0][0] <= now_s:
                heapq.heappop(self._due)[2]()

    @property
    def _next_s(self) -> float:
        return self._due[0][0] if self._due else math.inf
