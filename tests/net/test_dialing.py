"""Dials on their own: what must not be left behind."""

from __future__ import annotations

from typing import cast

import pytest
import trio

from swarmpy.abc import Address
from swarmpy.identity import PeerId
from swarmpy.net.connection import NativeConnection
from swarmpy.net.dialing import Dials


async def test_a_connection_proven_as_the_last_one_gives_up_is_closed(
    nursery: trio.Nursery,
) -> None:
    """Goal: nobody keeps it, so it must end. Method: the dial succeeds in the very step in which
    whoever waits for it is cancelled."""
    closed: list[str] = []
    waiting = trio.CancelScope()

    class Proven:
        def close(self) -> None:
            closed.append("closed")

    async def dial_one(peer: PeerId, address: Address) -> NativeConnection:
        await trio.lowlevel.checkpoint()
        waiting.cancel()
        return cast("NativeConnection", Proven())

    def keep(connection: NativeConnection) -> None:
        pytest.fail("kept for nobody")

    dials = Dials(dial_one, keep)
    with waiting:
        await dials.dial(nursery, PeerId("peer"), [Address("/ip4/192.0.2.1/tcp/1")])
    await trio.testing.wait_all_tasks_blocked()

    assert closed == ["closed"]
