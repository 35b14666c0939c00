"""How many connections a host takes, and of whom."""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing
from circuits import joined
from net_hosts import World, connect

from swarmpy import config
from swarmpy.abc import Gate
from swarmpy.errors import NetworkError
from swarmpy.identity import PeerId

ROOM = 3


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CONNECTIONS_MAX", ROOM)


class Strangers(Gate):
    """Whoever is not named may be dropped."""

    def __init__(self, *members: PeerId) -> None:
        self._members = members

    def may_drop(self, peer: PeerId) -> bool:
        return peer not in self._members


@pytest.mark.parametrize("beyond", [-1, 0, 1])
async def test_a_host_takes_so_many_inbound_connections_and_no_more(
    world: World, beyond: int
) -> None:
    host = await world.host("host")
    refused = 0
    for index in range(ROOM + beyond):
        try:
            await connect(await world.host(f"peer {index}"), host)
        except NetworkError:
            refused += 1
    await trio.testing.wait_all_tasks_blocked()
    assert len(host.connections) == min(ROOM, ROOM + beyond)
    assert refused == max(0, beyond)


async def test_connections_that_are_proven_at_once_do_not_overfill_a_host(sim: World) -> None:
    """Method: all shake hands while there is room; they are counted when they are proven."""
    host = await sim.host("host")
    peers = [await sim.host(f"peer {index}") for index in range(ROOM + 3)]

    async def dial(index: int) -> None:
        with contextlib.suppress(NetworkError):
            await connect(peers[index], host)

    async with trio.open_nursery() as nursery:
        for index in range(len(peers)):
            nursery.start_soon(dial, index)
    await trio.testing.wait_all_tasks_blocked()
    assert len(host.connections) == ROOM


async def test_a_stranger_that_proves_nothing_pushes_nobody_out(sim: World) -> None:
    """Goal: a connection is only closed for another one, not for bytes on the port."""
    host = await sim.host("host", gate=Strangers())
    for index in range(ROOM):
        await connect(await sim.host(f"peer {index}"), host)
    stranger = await sim.stranger(host)
    await trio.testing.wait_all_tasks_blocked()
    assert len(host.connections) == ROOM
    assert stranger.receive_into_nowait(memoryview(bytearray(1))) is None
    await connect(await sim.host("newest"), host)
    await trio.testing.wait_all_tasks_blocked()
    assert len(host.connections) == ROOM


async def test_what_a_full_host_dials_or_adopts_as_initiator_it_keeps(sim: World) -> None:
    host = await sim.host("host")
    for index in range(ROOM):
        await connect(await sim.host(f"peer {index}"), host)
    await connect(host, await sim.host("dialled"))
    await joined(host, await sim.host("adopted"))
    assert len(host.connections) == ROOM + 2
