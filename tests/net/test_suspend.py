"""A machine that slept, or whose clock was set: noticed once, and no ghost is left."""

from __future__ import annotations

import pytest
import trio
from net_hosts import World, connect

from swarmpy import config
from swarmpy.abc import WallSeconds
from swarmpy.net.suspend import CHECK_INTERVAL_S, JUMP_S_MIN, ClockWatch
from swarmpy.testing import Link

EIGHT_HOURS_S = 8 * 3600.0


class WallClock:
    """Unix time that passes with the virtual clock, and jumps when a test wants it to.

    While a machine sleeps its monotonic clock stands still and the wall clock goes on: to the
    program that wakes up the wall clock has jumped.
    """

    def __init__(self) -> None:
        self.ahead_s = 1_800_000_000.0
        self.rate = 1.0

    def __call__(self) -> WallSeconds:
        return WallSeconds(self.ahead_s + self.rate * trio.current_time())


async def jumps_seen(clock: WallClock, *, wait_s: float, jump_s: float = 0.0) -> list[float]:
    """Return the jumps that a watch reports of one jump after ten seconds."""
    seen: list[float] = []
    with trio.move_on_after(10 + wait_s):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ClockWatch(clock, seen.append).run)
            await trio.sleep(10)
            clock.ahead_s += jump_s
    return seen


@pytest.mark.parametrize("jump_s", [EIGHT_HOURS_S, JUMP_S_MIN, -JUMP_S_MIN, -3600.0])
async def test_a_jump_is_reported_once_and_soon(jump_s: float, autojump_clock: object) -> None:
    clock = WallClock()
    assert await jumps_seen(clock, wait_s=CHECK_INTERVAL_S + 0.1, jump_s=jump_s) == [
        pytest.approx(jump_s)
    ]
    assert len(await jumps_seen(clock, wait_s=600, jump_s=jump_s)) == 1


@pytest.mark.parametrize("jump_s", [0.0, 0.9 * JUMP_S_MIN, -0.9 * JUMP_S_MIN])
async def test_a_small_step_is_none(jump_s: float, autojump_clock: object) -> None:
    assert await jumps_seen(WallClock(), wait_s=600, jump_s=jump_s) == []


async def test_a_clock_that_drifts_never_jumps(autojump_clock: object) -> None:
    """Time daemons slew by up to half a millisecond a second; that must not add up."""
    clock = WallClock()
    clock.rate = 1.0005
    assert await jumps_seen(clock, wait_s=24 * 3600) == []


# A host ---------------------------------------------------------------------------------


async def test_an_eight_hour_suspend_resumes_without_ghosts(
    sim: World, autojump_clock: object
) -> None:
    """Goal: whoever is gone after the night is gone here soon, whoever is there stays.

    Method: one peer vanishes without a word while the clock jumps; another answers.
    """
    wall = WallClock()
    host = await sim.host("host", wall_time=wall)
    ghost, living = await sim.host("ghost"), await sim.host("living")
    jumps: list[float] = []
    host.on_clock_jump(jumps.append)
    await connect(host, ghost)
    await connect(host, living)
    await trio.sleep(60)

    for ends in (("10.0.0.1", "10.0.0.2"), ("10.0.0.2", "10.0.0.1")):
        sim.sim.set_link(*ends, Link(latency_s=1e9))
    wall.ahead_s += EIGHT_HOURS_S

    await trio.sleep(CHECK_INTERVAL_S + 0.1)
    assert jumps == [pytest.approx(EIGHT_HOURS_S)]
    await trio.sleep(config.KEEPALIVE_TIMEOUT_S)
    assert [item.peer for item in host.connections] == [living.identity.peer_id]
    await trio.sleep(600)
    assert len(jumps) == 1
    assert host.connection_to(living.identity.peer_id) is not None


async def test_every_connection_is_probed_at_once(sim: World, autojump_clock: object) -> None:
    """Method: pings go out at 2, 7, 12 s; the jump at 8 s is noticed, and answered, at 10 s."""
    wall = WallClock()
    host, peer = await sim.host("host", wall_time=wall), await sim.host("peer")
    await trio.sleep(2)
    await connect(host, peer)
    await trio.sleep(6)
    (connection,) = host.connections
    assert connection.heard_s == pytest.approx(7.0)
    wall.ahead_s += EIGHT_HOURS_S
    await trio.sleep(2.5)
    assert connection.heard_s == pytest.approx(10.0)
