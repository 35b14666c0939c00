"""Peers that freeze, die or crowd in, as real processes on real sockets."""

from __future__ import annotations

import random
import signal
from collections.abc import AsyncIterator

import pytest
import trio
from hostile.attackers import HONEST_IP, Wire, attacker, dial
from hostile.test_floods import ask
from hostile.victim import ECHO, VICTIM, victim

from swarmpy.abc import Stream
from swarmpy.errors import ConnectionLost
from swarmpy.identity import Identity
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork

FROZEN_S_MAX = 15.0
FILES = 40
"""Open files a victim may have: its own take about 15."""


@pytest.fixture
async def near(nursery: trio.Nursery) -> AsyncIterator[NativeHost]:
    """This process's host: it only dials."""
    identity = Identity.generate(random.Random("near"))
    made = NativeHost(identity, TcpNetwork(), random=random.SystemRandom())
    await nursery.start(made.run)
    yield made
    made.close()


async def greeted(near: NativeHost) -> Stream:
    """Open a stream to the victim over which something has gone both ways."""
    stream = await near.open_stream(VICTIM.peer_id, [ECHO])
    await stream.send_all(b"hello")
    assert await stream.receive_some() == b"hello"
    return stream


@pytest.mark.slow
async def test_a_frozen_process_is_gone_within_fifteen_seconds(near: NativeHost) -> None:
    """Goal: silence is noticed where the kernel still acknowledges. Method: SIGSTOP, real time."""
    async with victim() as (child, address):
        await near.dial(VICTIM.peer_id, [address])
        stream = await greeted(near)
        child.process.send_signal(signal.SIGSTOP)
        frozen_s = trio.current_time()
        try:
            with pytest.raises(ConnectionLost, match="nothing was heard"):
                await stream.receive_some()
            assert trio.current_time() - frozen_s < FROZEN_S_MAX
            assert not near.connections
        finally:
            child.process.send_signal(signal.SIGCONT)


async def test_a_killed_process_is_told_from_one_that_ended(near: NativeHost) -> None:
    """A stream that its peer ended gives an end; one whose peer died gives an error, at once."""
    async with victim() as (child, address):
        await near.dial(VICTIM.peer_id, [address])
        ended, cut = await greeted(near), await greeted(near)
        await ended.close_write()
        with trio.fail_after(5):
            assert await ended.receive_some() == b""
            events = near.connection_events()
            child.process.kill()
            with pytest.raises(ConnectionLost):
                await cut.receive_some()
            assert (await anext(events)).reason
        await child.process.wait()
        child.expects_end = True


async def test_running_out_of_files_costs_strangers_and_nobody_else() -> None:
    """Method: a crowd takes every file descriptor; a connected peer goes on, and then others come.

    The node neither ends nor turns in circles meanwhile.
    """
    async with victim(f"files={FILES}") as (child, address):
        async with attacker(address, "honest", source=HONEST_IP) as honest:
            stream_id = await honest.open(ECHO)
            await ask(honest, stream_id)
            crowd: list[Wire] = [await dial(address) for _ in range(2 * FILES)]
            with trio.fail_after(10):
                while not (await child.ask("count"))["is_out_of_files"]:
                    pass
            before = await child.ask("count")
            start_s = trio.current_time()
            for _ in range(30):
                await ask(honest, stream_id)
            busy_s = (await child.ask("count"))["cpu_s"] - before["cpu_s"]
            assert busy_s < 0.2 + 0.5 * (trio.current_time() - start_s)
            for wire in crowd:
                wire.close()
            await ask(honest, stream_id)
        with trio.fail_after(10):
            async with attacker(address, "newcomer", source=HONEST_IP) as newcomer:
                await ask(newcomer, await newcomer.open(ECHO))
