"""What a crowd at the door costs: unproven peers get little time, no signature and no turn."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
from hostile.attackers import HOSTILE_IP, agree_on_noise, dial, handshake_of, shake

from swarmpy.abc import Address, Gate
from swarmpy.identity import Identity
from swarmpy.net.host import NativeHost
from swarmpy.proto import noise
from swarmpy.proto.multiaddr import parse_tcp


class Counting(Gate):
    """A gate that counts who comes, and lets them in or not."""

    def __init__(self, *, lets_in: bool) -> None:
        self.count = 0
        self._lets_in = lets_in

    def allow_address(self, address: Address) -> bool:
        self.count += 1
        return self._lets_in


def crowd(host: NativeHost, count: int) -> list[socket.socket]:
    """Fill the queue of connections that wait to be accepted, without letting anybody run."""
    made = []
    for _ in range(count):
        near = socket.socket()
        near.bind((HOSTILE_IP, 0))
        near.connect(parse_tcp(host.addresses[0]))
        made.append(near)
    return made


@pytest.mark.parametrize("lets_in", [True, False])
async def test_a_crowd_that_waits_lets_others_run(host: NativeHost, lets_in: bool) -> None:
    """Goal: a flood at the door stops nobody. Method: 150 wait at once; count whose turn it was.

    Without a turn for others between two accepts a flood that refills the queue as fast as it is
    emptied would hold the whole node for as long as it lasts.
    """
    gate = host.gate = Counting(lets_in=lets_in)
    waiting = crowd(host, 150)
    counts = [0]
    try:
        with trio.fail_after(5):
            while counts[-1] < len(waiting):
                await trio.lowlevel.checkpoint()
                counts.append(gate.count)
    finally:
        for near in waiting:
            near.close()
    assert max(after - before for before, after in pairwise(counts)) <= 4


async def test_no_signature_is_made_or_verified_for_a_stranger(
    host: NativeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: count both while strangers get as far as anybody can without a proof."""
    calls: list[str] = []
    sign, verify = Identity.sign, noise.verify
    monkeypatch.setattr(Identity, "sign", lambda *a: calls.append("sign") or sign(*a))
    monkeypatch.setattr(noise, "verify", lambda *a: calls.append("verify") or verify(*a))
    prepared = handshake_of("mallory")  # the stranger's own signature
    calls.clear()
    for _ in range(10):
        wire = await dial(host.addresses[0])
        await agree_on_noise(wire)
        await wire.send_message(b"\x09" * 32)
        await wire.receive_message()
        await wire.send_message(bytes(300))
        with trio.fail_after(5):
            await wire.wait_end()
        wire.close()
    assert calls == []
    async with _proven(host, prepared):
        assert "verify" in calls


@asynccontextmanager
async def _proven(host: NativeHost, handshake: noise.Handshake) -> AsyncIterator[None]:
    wire = await dial(host.addresses[0])
    await agree_on_noise(wire)
    await shake(wire, handshake)
    with trio.fail_after(5):
        while not host.connections:
            await trio.lowlevel.checkpoint()
    yield
    wire.close()


async def test_a_stranger_costs_one_task(host: NativeHost) -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    wires = [await dial(host.addresses[0]) for _ in range(20)]
    for wire in wires:
        await agree_on_noise(wire)
        await wire.send_message(b"\x09" * 32)
        await wire.receive_message()
    living = trio.lowlevel.current_statistics().tasks_living
    for wire in wires:
        wire.close()
    assert living - before == len(wires)
