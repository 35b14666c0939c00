"""The calendar of a world, under its own clock and under trio's mock clock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from swarmpy.testing.calendar import Calendar, SimClock

Clock = Callable[[], trio.abc.Clock]


@pytest.fixture(params=[SimClock, lambda: trio.testing.MockClock(autojump_threshold=0)])
def clock(request: pytest.FixtureRequest) -> Clock:
    """Each test runs under both clocks."""
    made: Clock = request.param
    return made


def run(clock: Clock, scenario: Callable[[], Awaitable[None]]) -> None:
    trio.run(scenario, clock=clock())


def test_calls_come_at_their_times_and_in_order(clock: Clock) -> None:
    seen: list[tuple[float, str]] = []

    async def scenario() -> None:
        calendar = Calendar()

        def note(what: str) -> None:
            seen.append((trio.current_time(), what))

        calendar.post(3.0, note, "late")
        calendar.post(1.0, note, "early")
        calendar.post(1.0, note, "early too")
        calendar.post(1.0, calendar.post, 2.0, note, "from a call")
        await trio.sleep(10)
        calendar.post(5.0, note, "in the past")
        await trio.sleep(1)

    run(clock, scenario)
    assert [(round(at_s, 6), what) for at_s, what in seen] == [
        (1.0, "early"),
        (1.0, "early too"),
        (2.0, "from a call"),
        (3.0, "late"),
        (10.0, "in the past"),
    ]


def test_a_call_wakes_a_task_at_its_time(clock: Clock) -> None:
    async def scenario() -> None:
        calendar, event = Calendar(), trio.Event()
        calendar.post(2.5, event.set)
        await event.wait()
        assert trio.current_time() == pytest.approx(2.5)
        calendar.post(3.5, event.set)
        with trio.move_on_after(0.5) as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught
        assert trio.current_time() == pytest.approx(3.0)

    run(clock, scenario)


def test_times_are_rounded_up_to_ticks(clock: Clock) -> None:
    async def scenario() -> None:
        calendar, seen = Calendar(tick_s=0.5), []
        for at_s in (0.1, 0.5, 0.6):
            calendar.post(at_s, lambda: seen.append(trio.current_time()))
        await trio.sleep(2)
        assert seen == pytest.approx([0.5, 0.5, 1.0])

    run(clock, scenario)


def test_what_is_due_can_be_made_up_for_at_once(clock: Clock) -> None:
    """A task that wakes at the very time of a call may ask for it to be made first."""

    async def scenario() -> None:
        calendar, seen = Calendar(), []
        calendar.post(1.0, seen.append, "call")
        await trio.sleep(1.0)
        calendar.catch_up()
        assert seen == ["call"]

    run(clock, scenario)


def test_who_waits_for_all_tasks_to_block_goes_before_the_clock(clock: Clock) -> None:
    async def scenario() -> None:
        calendar = Calendar()
        calendar.post(1.0, lambda: None)
        await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == 0.0

    run(clock, scenario)


def test_two_worlds_share_a_clock(clock: Clock) -> None:
    async def scenario() -> None:
        seen: list[str] = []
        first, second = Calendar(), Calendar()
        second.post(1.0, seen.append, "second")
        first.post(2.0, seen.append, "first")
        await trio.sleep(3)
        assert seen == ["second", "first"]

    run(clock, scenario)
