"""Clocks ten minutes apart: whoever is refused or not believed is told that it is the clock."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio
from small_nodes import join, small_node, wall_time

from swarmpy.abc import WallSeconds
from swarmpy.errors import NotAMember
from swarmpy.net.tcp import TcpNetwork

TEN_MINUTES_S = 600.0
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def ahead() -> WallSeconds:
    """A clock ten minutes fast."""
    return WallSeconds(wall_time() + TEN_MINUTES_S)


async def test_a_joiner_whose_clock_is_behind_is_told_so(tmp_path: Path) -> None:
    """Its record begins in the future: neither of them can know whose clock is wrong."""
    async with (
        small_node("ann", TcpNetwork(), tmp_path / "ann", listen=LOOPBACK, clock=ahead) as ann,
        small_node("bob", TcpNetwork(), tmp_path / "bob", listen=LOOPBACK) as bob,
    ):
        with pytest.raises(
            NotAMember, match=r"begins in \d+ s by this clock .*check both machines"
        ):
            await join(bob, ann)


async def test_a_member_whose_clock_is_ahead_is_named_where_it_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "swarmpy"):
        async with (
            small_node(
                "ann", TcpNetwork(), tmp_path / "ann", listen=LOOPBACK, with_discovery=True
            ) as ann,
            small_node(
                "bob",
                TcpNetwork(),
                tmp_path / "bob",
                listen=LOOPBACK,
                clock=ahead,
                with_discovery=True,
            ) as bob,
        ):
            await join(bob, ann)
            with trio.fail_after(10):
                while not (told := clock_warnings(caplog)):
                    await trio.lowlevel.checkpoint()
    assert str(bob.peer) in told[0]
    assert "in the future by this clock" in told[0]
    assert len(told) == 1


def clock_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was said of clocks."""
    found = [item for item in caplog.records if item.message == "announce.clock_skew"]
    return [getattr(item, "error", "") for item in found]
