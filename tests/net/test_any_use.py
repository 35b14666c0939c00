"""Any use of a connection's streams, by chance: all bytes arrive, and nobody hangs.

One seed is one run: what the tasks do, how the link tears their bytes, and the order in which the
scheduler lets them run all come from it.
"""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from test_upgrade import Role, upgraded_end

from swarmpy.abc import Address, ByteStream, Priority, ProtocolId
from swarmpy.errors import StreamReset
from swarmpy.net.connection import NativeConnection
from swarmpy.net.stream import NativeStream
from swarmpy.testing import Link, SimNetwork
from swarmpy.testing.determinism import deterministic

ANY = ProtocolId("/swarmpy-test/any/1")
STREAMS_MAX = 6
SENT_BYTES_MAX = 400_000
"""More than a window."""

PAUSE_S_MAX = 0.05
TIME_S_MAX = 120.0
"""Virtual seconds after which somebody hangs: a hundred times what a run takes."""

SEEDS = 50


class Talk:
    """What both ends of one stream say, do and get."""

    def __init__(self, chance: random.Random) -> None:
        self.sent = [chance.randbytes(chance.randrange(1, SENT_BYTES_MAX)) for _ in range(2)]
        self.received = [bytearray(), bytearray()]
        self.is_reset = chance.random() < 0.25
        self.errors: list[Exception] = []


class Run:
    """One seed's run."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.talks: dict[int, Talk] = {}
        self.finished = 0

    async def run(self) -> None:
        chance = self.chance
        link = Link(
            latency_s=chance.choice([0.0, 0.001, 0.02]),
            bytes_per_s=chance.choice([1e6, 1e7, float("inf")]),
            torn=chance.choice([0.0, 0.3]),
        )
        near, far = await self._ends(SimNetwork(link=link, chance=chance))
        with trio.fail_after(TIME_S_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(near.run, self._serve)
                nursery.start_soon(far.run, self._serve)
                async with trio.open_nursery() as talking:
                    for _ in range(chance.randrange(2, STREAMS_MAX)):
                        opener = chance.choice([near, far])
                        priority = chance.choice(list(Priority))
                        stream = opener.open_stream(ANY, priority)
                        self.talks[stream.stream_id] = Talk(chance)
                        talking.start_soon(self._talk, stream, 0)
                await self._wait_until_quiet(near, far)
                near.close()

    async def _ends(self, world: SimNetwork) -> tuple[NativeConnection, NativeConnection]:
        listener = await world.network("10.0.0.2").listen(Address("/ip4/10.0.0.2/tcp/7"))
        made: dict[str, NativeConnection] = {}

        async def make(role: Role, end: ByteStream) -> None:
            made[role] = await upgraded_end(role, end)

        async with trio.open_nursery() as nursery:
            end = await world.network("10.0.0.1").dial(listener.address)
            nursery.start_soon(make, "initiator", end)
            nursery.start_soon(make, "responder", await listener.accept())
        return made["initiator"], made["responder"]

    async def _wait_until_quiet(self, near: NativeConnection, far: NativeConnection) -> None:
        while near.stream_count or far.stream_count:  # noqa: ASYNC110 - virtual time
            await trio.sleep(PAUSE_S_MAX)
        # Nothing is left behind: neither bytes nor room that a stream had taken.
        for connection in (near, far):
            assert connection._yamux.unread_bytes == 0
            assert not connection._streams
            assert not connection._outbox

    async def _serve(self, stream: NativeStream) -> None:
        await self._talk(stream, 1)

    async def _talk(self, stream: NativeStream, end: int) -> None:
        """Send, receive, and perhaps reset, each in its own task."""
        talk = self.talks[stream.stream_id]
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send, stream, talk.sent[end])
                nursery.start_soon(self._receive, stream, talk.received[end])
                if talk.is_reset and self.chance.random() < 0.7:
                    nursery.start_soon(self._reset, stream)
        except* StreamReset as group:
            talk.errors += group.exceptions
        self.finished += 1

    async def _send(self, stream: NativeStream, data: bytes) -> None:
        offset = 0
        while offset < len(data):
            size = self.chance.choice([1, 100, 5000, 70_000, 300_000])
            await stream.send_all(data[offset : offset + size])
            offset += size
            await self._pause()
        await stream.close_write()

    async def _receive(self, stream: NativeStream, received: bytearray) -> None:
        while True:
            with trio.CancelScope() as patience:
                if self.chance.random() < 0.5:
                    patience.deadline = trio.current_time() + self.chance.random() * PAUSE_S_MAX
                data = await stream.receive_some(self.chance.choice([None, None, 1000, 100_000]))
                received += data
                if not data:
                    return
            await self._pause()

    async def _reset(self, stream: NativeStream) -> None:
        await trio.sleep(self.chance.random() * 10 * PAUSE_S_MAX)
        stream.reset()

    async def _pause(self) -> None:
        if self.chance.random() < 0.2:
            await trio.sleep(self.chance.random() * PAUSE_S_MAX)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_use_of_streams_loses_no_byte_and_hangs_nobody(seed: int) -> None:
    """Method: some streams, each with a sender and a receiver at both ends that pause and give up
    waiting at any moment; some are reset."""
    run = Run(seed)
    with deterministic(seed):
        trio.run(run.run, clock=trio.testing.MockClock(autojump_threshold=0.0))
    assert run.finished >= len(run.talks)
    for talk in run.talks.values():
        for end in range(2):
            sent, received = talk.sent[1 - end], bytes(talk.received[end])
            if talk.is_reset:
                assert sent.startswith(received)
            else:
                assert received == sent
                assert not talk.errors
