"""Peers of other stacks, and a swarmpy host that talks with them over the machine's own TCP."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import trio
from interop_peers import ECHO, RESET, STACKS, UPPER, Peers, require

from swarmpy.abc import Stream, WallSeconds
from swarmpy.identity import Identity
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork


@pytest.fixture(scope="session")
def peers() -> Iterator[Peers]:
    """The peers of other stacks, each started once."""
    made = Peers()
    yield made
    made.close()


@pytest.fixture(params=STACKS)
def stack(request: pytest.FixtureRequest) -> str:
    """The name of another stack, where it is installed."""
    require(str(request.param))
    return str(request.param)


@pytest.fixture
async def host(nursery: trio.Nursery) -> NativeHost:
    """A swarmpy host with the same three protocols as the peers."""
    source = random.SystemRandom()
    made = NativeHost(
        Identity.generate(source),
        TcpNetwork(),
        random=source,
        wall_time=lambda: WallSeconds(1_800_000_000.0),
    )
    made.set_handler(ECHO, _echo)
    made.set_handler(UPPER, _upper)
    made.set_handler(RESET, _reset)
    await nursery.start(made.run)
    return made


async def _echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def _upper(stream: Stream) -> None:
    question = bytearray()
    while data := await stream.receive_some():
        question += data
    await stream.send_all(question.upper())


async def _reset(stream: Stream) -> None:
    await stream.receive_some()
    stream.reset()
