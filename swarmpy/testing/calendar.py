"""What is to happen when: the one timer of a simulated world, and the clock that jumps to it.

A delivery costs no trio timer and no task of its own; what is due at one time happens in the order
in which it was posted. Under a `SimClock` the clock itself makes the calls; under any other clock a
task does, which lives only while something is due.
"""

from __future__ import annotations

import heapq
import importlib
import math
from collections.abc import Callable

import trio

Call = tuple[Callable[..., object], tuple[object, ...]]

WALL_START_S = 1_800_000_000.0
"""Unix time at which every simulation starts."""

_NEVER_S = 999_999_999.0
"""Real seconds to sleep where only another task could go on: there is none."""


class Calendar:
    """Calls to make at times of `trio.current_time`."""

    def __init__(self, *, tick_s: float = 0.0) -> None:
        """Make an empty calendar.

        Args:
            tick_s: Times are rounded up to its multiples, 0 for none: where thousands of deliveries
                fall into a second, those of one tick cost one step of the clock together.
        """
        self._tick_s = tick_s
        self._times: list[float] = []
        self._calls: dict[float, list[Call]] = {}
        self._scope: trio.CancelScope | None = None
        self._is_served = False

    @property
    def next_s(self) -> float:
        """When the next call is due, inf if none is."""
        return self._times[0] if self._times else math.inf

    def post(self, at_s: float, call: Callable[..., object], *args: object) -> None:
        """Call at a time; one that has passed comes as soon as tasks run again."""
        if self._tick_s:
            at_s = math.ceil(at_s / self._tick_s) * self._tick_s
        calls = self._calls.get(at_s)
        if calls is not None:
            calls.append((call, args))
            return
        self._calls[at_s] = [(call, args)]
        heapq.heappush(self._times, at_s)
        if not self._is_served:
            self._find_server()
        elif self._scope is not None and self._times[0] == at_s:
            self._scope.deadline = at_s

    def catch_up(self) -> None:
        """Make the calls that are due now, whichever task the scheduler happened to run first."""
        if self._times and self._times[0] <= trio.current_time():
            self.make_due_calls(trio.current_time())

    def make_due_calls(self, now_s: float) -> None:
        """Make the calls that are due."""
        times = self._times
        while times and times[0] <= now_s:
            for call, args in self._calls.pop(heapq.heappop(times)):
                call(*args)

    def _find_server(self) -> None:
        self._is_served = True
        clock = trio.lowlevel.current_clock()
        if isinstance(clock, SimClock):
            clock.calendars.append(self)
        else:
            trio.lowlevel.spawn_system_task(self._run)

    async def _run(self) -> None:
        try:
            while self._times:
                self.make_due_calls(trio.current_time())
                if self._times:
                    with trio.CancelScope(deadline=self._times[0]) as self._scope:
                        await trio.sleep_forever()
                    self._scope = None
        finally:
            self._scope = None
            self._is_served = False


class SimClock(trio.abc.Clock):
    """Virtual time: when no task can run, it jumps to the next deadline or call.

    As `trio.testing.MockClock` with `autojump_threshold=0`, in one turn of the run loop instead of
    two, and without a task for the calendars. It uses private names of trio (`_context`).
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.calendars: list[Calendar] = []
        self._context = importlib.import_module("trio._core._run").GLOBAL_RUN_CONTEXT

    def start_clock(self) -> None:
        """Nothing: time stands still until it jumps."""

    def current_time(self) -> float:
        return self.now_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Jump; the run loop asks this when nothing can run, and sleeps as long as it is told."""
        if deadline <= self.now_s:
            return 0.0
        runner = self._context.runner
        if runner.waiting_for_idle:
            return _NEVER_S  # they go first, as with a MockClock
        while not runner.runq:
            due = min(self.calendars, key=_next_s, default=None)
            due_s = math.inf if due is None else due.next_s
            if deadline == due_s == math.inf:
                return _NEVER_S
            self.now_s = max(self.now_s, min(deadline, due_s))
            if due is None or deadline < due_s:
                break
            due.make_due_calls(self.now_s)
            deadline = runner.deadlines.next_deadline()
        return 0.0


def _next_s(calendar: Calendar) -> float:
    return calendar.next_s
