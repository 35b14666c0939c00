"""A host on a real socket, for the attackers of this package."""

from __future__ import annotations

import random

import pytest
import trio
from hostile.attackers import identity
from hostile.victim import ECHO, HOLD, echo, hold

from swarmpy.abc import Address
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork


@pytest.fixture
async def host(nursery: trio.Nursery) -> NativeHost:
    """A host that listens on loopback, echoes, and has a handler that never reads."""
    made = NativeHost(identity("host"), TcpNetwork(), random=random.SystemRandom())
    made.set_handler(ECHO, echo)
    made.set_handler(HOLD, hold)
    await nursery.start(made.run)
    await made.listen(Address("/ip4/127.0.0.1/tcp/0"))
    return made
