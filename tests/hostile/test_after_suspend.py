"""A night with the lid closed: whoever is there again is a member at once, and no ghost stays."""

from __future__ import annotations

from pathlib import Path

import trio
from small_nodes import Clock, is_member, join, machine, small_node, until

from swarmpy.config import KEEPALIVE_TIMEOUT_S
from swarmpy.net.suspend import CHECK_INTERVAL_S
from swarmpy.testing.network import Link, SimNetwork

EIGHT_HOURS_S = 8 * 3600.0


async def test_eight_hours_later_the_living_are_members_and_the_dead_are_not(
    tmp_path: Path, autojump_clock: object
) -> None:
    """Method: three nodes; all clocks jump as after a sleep, and one node never wakes again.

    What the others said of themselves was over hours ago by the new time; the links look alive.
    """
    world = SimNetwork()
    clock = Clock()
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", clock=clock, with_discovery=True) as a,
        small_node("bob", machine(world, 2), tmp_path / "b", clock=clock, with_discovery=True) as b,
        small_node("cyd", machine(world, 3), tmp_path / "c", clock=clock, with_discovery=True) as c,
    ):
        await join(b, a)
        await join(c, a)
        await until(lambda: is_member(b, c) and is_member(c, b))
        await trio.sleep(60)
        for number in (1, 2):
            for ends in ((f"10.0.0.{number}", "10.0.0.3"), ("10.0.0.3", f"10.0.0.{number}")):
                world.set_link(*ends, Link(latency_s=1e9))
        clock.offset_s += EIGHT_HOURS_S

        await until(
            lambda: not is_member(a, c) and not is_member(b, c),
            within_s=CHECK_INTERVAL_S + KEEPALIVE_TIMEOUT_S + 1,
        )
        await trio.sleep(60)
        assert is_member(a, b)
        assert is_member(b, a)
        for node, other in ((a, b), (b, a)):
            assert node.discovery is not None
            announced = {item.peer: item for item in node.discovery.announcements()}
            assert list(announced) == [other.peer]
            assert clock() - announced[other.peer].issued_wall_s < 120
            assert node.host.connection_to(c.peer) is None
