"""What an attacker makes a node hold: measured in the node's own process, in bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from hostile.attackers import (
    DATA,
    Wire,
    agree_on_noise,
    attacker,
    dial,
    frame,
    handshake_of,
)
from hostile.processes import Child
from hostile.victim import HOLD, victim

from swarmpy.abc import Address
from swarmpy.proto.multistream import HEADER, LINE_BYTES_MAX, PROPOSALS_MAX, Dialer, encode_line
from swarmpy.proto.noise import HANDSHAKE_BYTES_MAX
from swarmpy.proto.wire import encode_varint
from swarmpy.proto.yamux import INITIAL_WINDOW_BYTES

PROPOSAL = Dialer([HOLD]).start()
STRANGERS = 24
"""Half-open connections that share a measurement: fewer than one place may have."""

STRANGER_BYTES_MAX = 4096
"""What a stranger's bytes may make the node hold."""

OBJECTS_BYTES_MAX = 12 * 1024
"""What one more half-open connection holds in all: its task, socket and key objects."""


@pytest.mark.parametrize("size", [2, 100, 4095, 4096, 65_507, INITIAL_WINDOW_BYTES])
async def test_a_sender_that_ignores_its_window_is_cut_at_five_quarters_of_it(size: int) -> None:
    """Method: fill the window of a stream nobody reads with frames of one size, then send more.

    Frames of a few bytes must not cost a multiple of what they carry.
    """
    async with victim("traced") as (child, address), attacker(address) as peer:
        stream_id = await peer.open(HOLD)
        await peer.settle()
        before = await child.ask("memory")
        left = INITIAL_WINDOW_BYTES - len(PROPOSAL)
        frames = [frame(DATA, 0, stream_id, size, bytes(size))] * (left // size)
        rest = left % size
        await peer.secure.send(b"".join(frames) + frame(DATA, 0, stream_id, rest, bytes(rest)))
        with trio.fail_after(10):
            await peer.settle()
        full = await child.ask("memory")
        assert not peer.is_over
        assert full["connections"] == 1
        held = full["traced_bytes"] - before["traced_bytes"]
        assert INITIAL_WINDOW_BYTES // 2 < held <= 1.25 * INITIAL_WINDOW_BYTES
        await peer.send(stream_id, b"1")
        with trio.fail_after(10):
            await peer.wait_over()
        cut = await child.ask("memory")
        assert cut["connections"] == 0
        assert cut["traced_bytes"] - before["traced_bytes"] <= 1.25 * INITIAL_WINDOW_BYTES


async def silent(_: Wire) -> None:
    """Say nothing: what everybody costs who connects."""


async def half_a_line(wire: Wire) -> None:
    """The longest line of multistream, but for its end."""
    await wire.send(encode_line(HEADER) + encode_varint(LINE_BYTES_MAX))
    await wire.send(b"a" * (LINE_BYTES_MAX - 1))


async def many_proposals(wire: Wire) -> None:
    """As many protocols as are answered, the last but for its end."""
    line = encode_line("/a" * 400)
    await wire.send(encode_line(HEADER) + line * PROPOSALS_MAX + line[:-1])


async def begun(wire: Wire) -> None:
    """Agree on Noise, and say nothing more."""
    await agree_on_noise(wire)


async def half_a_message(wire: Wire) -> None:
    """The longest first handshake message, but for its end."""
    await agree_on_noise(wire)
    size = HANDSHAKE_BYTES_MAX
    await wire.send(size.to_bytes(2, "big") + bytes(size - 1))


async def answered(wire: Wire) -> None:
    """Say the first message, be answered, and say nothing more."""
    await agree_on_noise(wire)
    await wire.send_message(handshake_of("mallory").start())
    await wire.receive_message()


async def half_a_proof(wire: Wire) -> None:
    """The longest third message, but for its end."""
    await answered(wire)
    size = HANDSHAKE_BYTES_MAX
    await wire.send(size.to_bytes(2, "big") + bytes(size - 1))


Say = Callable[[Wire], Awaitable[None]]


async def bytes_held(child: Child, address: Address, say: Say) -> float:
    """Return what one stranger that says this makes the node hold, the mean of a crowd of them."""
    before = await child.ask("memory")
    wires = [await dial(address) for _ in range(STRANGERS)]
    try:
        for wire in wires:
            await say(wire)
        numbers = before
        with trio.fail_after(10):
            while numbers["half_open"] < STRANGERS:
                numbers = await child.ask("memory")
            # A second look: the last bytes may have come with the first.
            numbers = await child.ask("memory")
    finally:
        for wire in wires:
            wire.close()
    with trio.fail_after(10):
        while (await child.ask("count"))["half_open"]:
            pass
    held: float = (numbers["traced_bytes"] - before["traced_bytes"]) / STRANGERS
    return held


@pytest.mark.parametrize(
    ("little", "much"),
    [
        (silent, half_a_line),
        (silent, many_proposals),
        (begun, half_a_message),
        (answered, half_a_proof),
    ],
)
async def test_before_a_peer_is_proven_its_bytes_cost_four_kilobytes(
    little: Say, much: Say
) -> None:
    """Method: two crowds of strangers at the same step, of which one says all that it may."""
    async with victim("traced") as (child, address):
        await bytes_held(child, address, much)  # fills caches that are filled once
        objects = await bytes_held(child, address, little)
        in_all = await bytes_held(child, address, much)
    assert in_all - objects <= STRANGER_BYTES_MAX
    assert objects <= OBJECTS_BYTES_MAX
