"""Worlds in which hosts meet: the machine's own TCP, and a simulated network."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from net_hosts import RawPeer, identity, raw_peer

from swarmpy.abc import Address, ByteStream, Network
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
        self._strangers: list[ByteStream] = []

    def network(self) -> Network:
        """Return the network of one more machine."""
        self._count += 1
        if self.kind == "tcp":
            return TcpNetwork()
        return self.sim.network(f"10.0.0.{self._count}")

    async def stranger(self, host: NativeHost) -> ByteStream:
        """Return a bare byte stream to a host, from a machine of its own."""
        byte_stream = await self.network().dial(host.addresses[0])
        self._strangers.append(byte_stream)
        return byte_stream

    async def raw_peer(self, host: NativeHost) -> RawPeer:
        """Return a proven connection to a host, below Yamux."""
        return await raw_peer(await self.stranger(host))

    def close(self) -> None:
        """Close the bare byte streams; hosts end with the test's nursery."""
        for byte_stream in self._strangers:
            byte_stream.close()

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


async def _world(kind: str, nursery: trio.Nursery) -> AsyncIterator[World]:
    made = World(kind, nursery)
    yield made
    made.close()


@pytest.fixture(params=["tcp", "sim"])
async def world(request: pytest.FixtureRequest, nursery: trio.Nursery) -> AsyncIterator[World]:
    """Each test runs over both networks."""
    async for made in _world(request.param, nursery):
        yield made


@pytest.fixture
async def sim(nursery: trio.Nursery) -> AsyncIterator[World]:
    """A simulated network; with `autojump_clock` on virtual time."""
    async for made in _world("sim", nursery):
        yield made


@pytest.fixture
async def tcp(nursery: trio.Nursery) -> AsyncIterator[World]:
    """The machine's own TCP."""
    async for made in _world("tcp", nursery):
        yield made
