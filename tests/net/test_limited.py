"""Connections that may carry so many bytes and no more."""

from __future__ import annotations

import pytest
import trio
from net_hosts import ECHO, World, echo, receive_exactly, wait_until_closed

from swarmpy.abc import ByteStream
from swarmpy.errors import ConnectionLost
from swarmpy.net.limited import LimitedStream

LIMIT = 100


async def ends(sim: World) -> tuple[LimitedStream, ByteStream]:
    """Return a limited byte stream and its far end."""
    listener = await sim.network().listen("/ip4/10.0.0.1/tcp/7")  # type: ignore[arg-type]
    near = await sim.network().dial(listener.address)
    return LimitedStream(near, bytes_max=LIMIT), await listener.accept()


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT, LIMIT + 1])
async def test_sending_ends_at_the_limit(sim: World, autojump_clock: object, size: int) -> None:
    """At cap - 1 the stream lives; the byte that reaches the cap still goes, and is the last."""
    limited, far = await ends(sim)
    if size < LIMIT:
        assert limited.send_nowait(memoryview(bytes(size))) == size
    else:
        with pytest.raises(ConnectionLost, match="limit of 100 bytes is used up"):
            limited.send_nowait(memoryview(bytes(size)))
    await trio.sleep(1)
    assert far.receive_into_nowait(memoryview(bytearray(2 * LIMIT))) == min(size, LIMIT)


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT, LIMIT + 1])
async def test_receiving_ends_at_the_limit(sim: World, autojump_clock: object, size: int) -> None:
    limited, far = await ends(sim)
    far.send_nowait(memoryview(bytes(size)))
    await limited.wait_readable()
    buffer = memoryview(bytearray(2 * LIMIT))
    assert limited.receive_into_nowait(buffer) == min(size, LIMIT)
    if size < LIMIT:
        assert limited.receive_into_nowait(buffer) is None
        return
    with trio.fail_after(1):
        await limited.wait_readable()  # at once: nothing more will ever be read
    with pytest.raises(ConnectionLost, match="limit of 100 bytes is used up"):
        limited.receive_into_nowait(buffer)


async def test_both_directions_count(sim: World, autojump_clock: object) -> None:
    limited, far = await ends(sim)
    far.send_nowait(memoryview(bytes(60)))
    await limited.wait_readable()
    assert limited.receive_into_nowait(memoryview(bytearray(200))) == 60
    assert limited.send_nowait(memoryview(bytes(39))) == 39
    assert limited.carried_bytes == 99
    await limited.wait_writable()
    limited.close()
    assert limited.local_address != limited.remote_address == far.local_address


async def test_a_limited_connection_ends_with_its_reason(
    sim: World, autojump_clock: object
) -> None:
    """Goal: who used the path learns why it ended. Method: echo until 64 KiB were carried."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(ECHO, echo, allow_limited=True)
    byte_stream = await sim.network().dial(bob.addresses[0])
    connection = await alice.adopt(byte_stream, role="initiator", path="relayed", limit=64 * 1024)
    stream = await alice.open_stream(connection.peer, [ECHO], allow_limited=True)
    for _ in range(25):
        await stream.send_all(bytes(1000))
        await receive_exactly(stream, 1000)
    await stream.send_all(bytes(16_000))
    with pytest.raises(ConnectionLost, match="limit of 65536 bytes is used up"):
        await receive_exactly(stream, 16_000)
    await wait_until_closed(bob)
