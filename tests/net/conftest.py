"""Worlds in which hosts meet: the machine's own TCP, and a simulated network."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from net_hosts import World


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
