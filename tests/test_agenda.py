"""What is to be done later, by a task of its own or by whoever keeps a simulation's time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from swarmpy.agenda import TICK_S, Agenda
from swarmpy.testing.calendar import Calendar, SimClock

CallAt = Callable[[float, Callable[[], None]], None]


def run(
    scenario: Callable[[Agenda, list[tuple[str, float]], trio.Nursery], object], *, is_called: bool
) -> list[tuple[str, float]]:
    """Run a scenario with an agenda that works; return what it did, with times."""
    done: list[tuple[str, float]] = []

    async def main() -> None:
        agenda = Agenda(Calendar().post if is_called else None)
        async with trio.open_nursery() as nursery:
            scenario(agenda, done, nursery)
            nursery.start_soon(agenda.run)
            await trio.sleep(10)
            nursery.cancel_scope.cancel()
        agenda.soon(lambda: done.append(("after the end", trio.current_time())))
        await trio.sleep(10)

    trio.run(main, clock=SimClock())
    return [(name, round(time_s, 3)) for name, time_s in done]


@pytest.mark.parametrize("is_called", [False, True])
def test_what_is_put_down_is_done_at_its_time_and_in_order(is_called: bool) -> None:
    def scenario(agenda: Agenda, done: list[tuple[str, float]], _: trio.Nursery) -> None:
        for seconds in (3.0, 1.0, 2.0, 1.0):
            agenda.after(seconds, lambda: done.append(("work", trio.current_time())))

    times = [time_s for _, time_s in run(scenario, is_called=is_called)]
    assert times == [1 + TICK_S, 1 + TICK_S, 2 + TICK_S, 3 + TICK_S]


@pytest.mark.parametrize("is_called", [False, True])
def test_what_is_to_be_done_soon_waits_for_what_runs_now_and_no_longer(is_called: bool) -> None:
    def scenario(agenda: Agenda, done: list[tuple[str, float]], nursery: trio.Nursery) -> None:
        def note(name: str) -> None:
            done.append((name, trio.current_time()))

        async def put_down() -> None:
            await trio.sleep(5)
            agenda.soon(lambda: note("soon"))
            note("who put it down")

        agenda.after(8.0, lambda: note("later"))
        nursery.start_soon(put_down)

    told = run(scenario, is_called=is_called)
    assert told == [("who put it down", 5.0), ("soon", 5.0), ("later", 8 + TICK_S)]


@pytest.mark.parametrize("is_called", [False, True])
def test_work_that_goes_on_by_itself_is_done_once_each_time(is_called: bool) -> None:
    """An earlier call asks for the next one again: it must not come twice from then on."""

    def scenario(agenda: Agenda, done: list[tuple[str, float]], _: trio.Nursery) -> None:
        def tick(name: str, every_s: float) -> None:
            done.append((name, trio.current_time()))
            agenda.after(every_s, lambda: tick(name, every_s))

        tick("slow", 3.0)
        tick("quick", 2.0)

    told = run(scenario, is_called=is_called)
    assert [name for name, _ in told].count("slow") == 4
    assert [name for name, _ in told].count("quick") == 5
