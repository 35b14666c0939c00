"""Each test of a host's contract runs with every kind of host."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from conformance_worlds import LACKS, WORLDS, HostWorld
from py_libp2p_apps import require_py_libp2p


@pytest.fixture(params=WORLDS)
def kind(request: pytest.FixtureRequest) -> str:
    """A kind of host, where it is installed and can do by its nature what the test needs."""
    kind = str(request.param)
    for marker in request.node.iter_markers("needs"):
        reason = LACKS.get(kind, {}).get(marker.args[0])
        if reason:
            pytest.skip(reason)
    if kind == "py-libp2p":
        require_py_libp2p()
    return kind


@pytest.fixture
async def world(kind: str, nursery: trio.Nursery) -> AsyncIterator[HostWorld]:
    """Hosts of one kind; they end with the test's nursery."""
    made = WORLDS[kind](nursery)
    yield made
    await made.close()
