"""Worlds in which hosts meet: the machine's own TCP, and a simulated network."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from net_hosts import identity

from swarmpy.abc import Address, Network
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork
from swarmpy.testing import SimNetwork


class World:
    """Makes hosts that can reach each other."""

    def __init__(self, kind: str, nursery: trio.Nursery) -> None:
        self.kind = kind
        self.sim = SimNetwork()
        self._nursery = nursery
        self._count = 0

    def network(self) -> Network:
        """Return the network of one more machine."""
        self._count += 1
        if self.kind == "tcp":
            return TcpNetwork()
        return self.sim.network(f"10.0.0.{self._count}")

    async def host(self, name: str, **options: Any) -> NativeHost:
        """Return a running host that listens."""
        made = NativeHost(
            identity(name), self.network(), random=random.Random(f"keys of {name}"), **options
        )
        await self._nursery.start(made.run)
        await made.listen(
            Address("/ip4/127.0.0.1/tcp/0" if self.kind == "tcp" else "/ip4/0.0.0.0/tcp/0")
        )
        return made


@pytest.fixture(params=["tcp", "sim"])
async def world(request: pytest.FixtureRequest, nursery: trio.Nursery) -> AsyncIterator[World]:
    """Each test runs over both networks."""
    yield World(request.param, nursery)


@pytest.fixture
async def sim(nursery: trio.Nursery, autojump_clock: object) -> AsyncIterator[World]:
    """A simulated network on virtual time."""
    yield World("sim", nursery)


@pytest.fixture
async def tcp(nursery: trio.Nursery) -> AsyncIterator[World]:
    """The machine's own TCP."""
    yield World("tcp", nursery)
