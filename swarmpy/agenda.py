"""What is to be done later, by one task and one timer however much it is."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from functools import partial
from itertools import count

import trio

TICK_S = 0.01
"""Times are put off to its next multiple: what is due at about one time wakes a task once, and work
that finds itself a rounding error too early and tries again cannot do so in the same moment."""

TICK_ERROR = 1e-6
"""Of a multiple of `TICK_S` in ticks, after years."""


class Agenda:
    """Calls back at times of trio's clock, in their order, while `run` runs."""

    def __init__(self, call_at: Callable[[float, Callable[[], None]], None] | None = None) -> None:
        """Args: call_at: As in `Environment`; where it is None the task of `run` keeps the time."""
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._sleep = trio.CancelScope()
        self._is_running = False
        self._call_at = call_at
        self._called_s = math.inf
        """The earliest time at which `call_at` was told to call."""
        self._asked: set[float] = set()

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        """Call `work` in so many seconds. It must not raise, and bound what it puts down here."""
        ticks = (trio.current_time() + seconds) / TICK_S
        self._put((math.floor(ticks + TICK_ERROR) + 1) * TICK_S, work)

    def soon(self, work: Callable[[], None]) -> None:
        """Call `work` when what runs now has let go: with what it will have put down by then."""
        self._put(trio.current_time(), work)

    def _put(self, time_s: float, work: Callable[[], None]) -> None:
        if self._call_at is not None:
            self._ask(time_s)
        elif time_s < self._next_s:
            self._sleep.deadline = time_s
        heapq.heappush(self._due, (time_s, next(self._numbers), work))

    async def run(self) -> None:
        """Do what is due, until cancelled."""
        self._is_running = True
        try:
            while self._call_at is None:
                with trio.CancelScope(deadline=self._next_s) as self._sleep:
                    await trio.sleep_forever()
                self._do_due()
            self._ask(self._next_s)
            await trio.sleep_forever()
        finally:
            self._is_running = False

    def _ask(self, time_s: float) -> None:
        """Be called at a time, unless an earlier call will ask for it."""
        if time_s < self._called_s and self._call_at is not None:
            self._called_s = time_s
            if time_s not in self._asked:
                self._asked.add(time_s)
                self._call_at(time_s, partial(self._was_called, time_s))

    def _was_called(self, asked_s: float) -> None:
        self._asked.discard(asked_s)
        if asked_s > self._called_s:
            return  # An earlier call is on its way, and will ask for a later one.
        self._called_s = math.inf
        if self._is_running:
            self._do_due()
            self._ask(self._next_s)

    def _do_due(self) -> None:
        now_s = trio.current_time()
        while self._due and self._due[0][0] <= now_s:
            heapq.heappop(self._due)[2]()

    @property
    def _next_s(self) -> float:
        return self._due[0][0] if self._due else math.inf
