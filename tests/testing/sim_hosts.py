"""Two kinds of hosts on simulated machines, for tests of what faults do to either."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import trio

from swarmpy.abc import Address, Host, ProtocolId, Stream
from swarmpy.identity import Identity
from swarmpy.net.host import NativeHost
from swarmpy.testing import SimHost, SimNetwork

Kind = Literal["native", "sim"]

ECHO = ProtocolId("/swarmpy-test/echo/1")
NEAR, FAR = "10.0.0.1", "10.0.0.2"


def identity(name: str) -> Identity:
    """Return the identity that a test's peer of this name always has."""
    return Identity.generate(random.Random(name))


async def echo(stream: Stream) -> None:
    """Handler that sends back what it receives."""
    while data := await stream.receive_some():
        await stream.send_all(data)


async def start_host(kind: Kind, world: SimNetwork, ip: str, nursery: trio.Nursery) -> Host:
    """Start an echoing host on a machine, listening on port 4001."""
    host: Host
    if kind == "native":
        host = NativeHost(identity(ip), world.network(ip), random=random.Random(ip))
    else:
        host = SimHost(identity(ip), world.network(ip))
    host.set_handler(ECHO, echo)
    await nursery.start(host.run)
    await host.listen(Address("/ip4/0.0.0.0/tcp/4001"))
    return host


@asynccontextmanager
async def two_hosts(kind: Kind, world: SimNetwork) -> AsyncIterator[tuple[Host, Host]]:
    """Two hosts, the first connected to the second."""
    async with trio.open_nursery() as nursery:
        near = await start_host(kind, world, NEAR, nursery)
        far = await start_host(kind, world, FAR, nursery)
        await near.dial(far.identity.peer_id, far.addresses)
        await trio.sleep(1)  # both ends have it, and native hosts are through with identify
        yield near, far
        nursery.cancel_scope.cancel()


async def open_echo(near: Host, far: Host) -> Stream:
    """Open a stream whose bytes come back."""
    return await near.open_stream(far.identity.peer_id, [ECHO])


async def receive_exactly(stream: Stream, size: int) -> bytes:
    """Return the next `size` bytes."""
    received = b""
    while len(received) < size:
        data = await stream.receive_some(size - len(received))
        assert data, f"end after {len(received)} of {size} bytes"
        received += data
    return received


async def wait_closed(host: Host) -> str:
    """Wait until a connection of the host closes, and return why."""
    async for event in host.connection_events():
        if event.kind == "closed":
            return event.reason
    raise AssertionError("the host was closed")
