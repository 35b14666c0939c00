"""Dials on their own: what must not be left behind."""

from __future__ import annotations

import contextlib
from typing import cast

import pytest
import trio
import trio.testing
from net_hosts import World

from swarmpy import config
from swarmpy.abc import Address
from swarmpy.errors import DialFailed
from swarmpy.identity import PeerId
from swarmpy.net.connection import NativeConnection
from swarmpy.net.dialing import Dials
from swarmpy.net.host import NativeHost


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


@pytest.mark.parametrize("beyond", [-1, 0, 1])
async def test_so_many_addresses_are_dialled_at_a_time(
    sim: World, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, beyond: int
) -> None:
    """Goal: a flood of addresses takes a bounded number of sockets. One that ends lets one more."""
    monkeypatch.setattr(config, "DIALS_MAX", 3)
    under_way: list[PeerId] = []
    may_end = trio.Event()

    async def dial_one(_: NativeHost, peer: PeerId, address: Address) -> NativeConnection:
        under_way.append(peer)
        if peer == "0":
            await may_end.wait()
            raise DialFailed("nobody there")
        await trio.sleep_forever()
        raise AssertionError

    async def dial(peer: PeerId) -> None:
        with contextlib.suppress(DialFailed):
            await host.dial(peer, [Address("/ip4/192.0.2.1/tcp/1")])

    monkeypatch.setattr(NativeHost, "_dial_one", dial_one)
    host = await sim.host("host")
    for index in range(3 + beyond):
        nursery.start_soon(dial, PeerId(str(index)))
        await trio.testing.wait_all_tasks_blocked()
    assert len(under_way) == min(3, 3 + beyond)
    may_end.set()
    await trio.testing.wait_all_tasks_blocked()
    assert len(under_way) == 3 + beyond
    nursery.cancel_scope.cancel()


async def test_who_joins_a_dial_brings_addresses_along(
    nursery: trio.Nursery, autojump_clock: object
) -> None:
    """Method: one dials where nobody ever answers, the other knows where the peer is."""
    stale, right = Address("/ip4/192.0.2.1/tcp/1"), Address("/ip4/192.0.2.2/tcp/1")
    connection = cast("NativeConnection", object())
    kept: list[NativeConnection] = []
    got: list[NativeConnection] = []

    async def dial_one(peer: PeerId, address: Address) -> NativeConnection:
        await trio.sleep(9 if address == stale else 0.1)
        if address == stale:
            raise DialFailed("nobody answers")
        return connection

    async def dial(*addresses: Address) -> None:
        got.append(await dials.dial(nursery, PeerId("peer"), addresses))

    dials = Dials(dial_one, kept.append)
    with trio.fail_after(1):
        async with trio.open_nursery() as both:
            both.start_soon(dial, stale)
            await trio.sleep(0.1)
            both.start_soon(dial, stale, right)
    assert got == [connection, connection]
    assert kept == [connection]
