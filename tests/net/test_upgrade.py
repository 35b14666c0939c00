"""From a byte stream to a connection, over any byte stream and in either role."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import pytest
import trio
import trio.testing
from net_hosts import identity, receive_raw, send_raw

from swarmpy.abc import Address, ByteStream, Priority, ProtocolId
from swarmpy.errors import ConnectionLost, HandshakeFailed, PeerTimeout
from swarmpy.net.connection import NativeConnection
from swarmpy.net.secured import Scratch
from swarmpy.net.stream import NativeStream
from swarmpy.net.upgrade import upgrade
from swarmpy.proto.noise import StaticKey
from swarmpy.testing import SimNetwork

YAMUX = ("/yamux/1.0.0",)
Role = Literal["initiator", "responder"]
PROTOCOL = ProtocolId("/swarmpy-test/1")


async def byte_streams() -> tuple[ByteStream, ByteStream]:
    """Return both ends of a byte stream; the first one dialled."""
    world = SimNetwork()
    listener = await world.network("10.0.0.2").listen(Address("/ip4/10.0.0.2/tcp/7"))
    near = await world.network("10.0.0.1").dial(listener.address)
    return near, await listener.accept()


async def upgraded_end(
    role: Role, end: ByteStream, *, muxers: Sequence[str] = YAMUX, name: str = ""
) -> NativeConnection:
    """Return one end's connection, proven as the peer of this name, or that its role names."""
    name = name or role
    return await upgrade(
        end,
        role=role,
        static=StaticKey.create(identity(name), random.Random(name).randbytes(32)),
        random=random.Random(name),
        scratch=Scratch(),
        early_muxers=muxers,
    )


async def upgraded(
    *, near_muxers: Sequence[str] = YAMUX, far_muxers: Sequence[str] = YAMUX, swapped: bool = False
) -> tuple[NativeConnection, NativeConnection]:
    """Return initiator's and responder's connection over one byte stream."""
    ends = await byte_streams()
    if swapped:
        ends = (ends[1], ends[0])
    made: dict[str, NativeConnection] = {}

    async def make(role: Role, end: ByteStream, muxers: Sequence[str]) -> None:
        made[role] = await upgraded_end(role, end, muxers=muxers)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make, "initiator", ends[0], near_muxers)
        nursery.start_soon(make, "responder", ends[1], far_muxers)
    return made["initiator"], made["responder"]


async def check_it_carries(near: NativeConnection, far: NativeConnection) -> None:
    """Send bytes on a stream each way."""

    async def answer(stream: NativeStream) -> None:
        await stream.send_all((await stream.receive_some()).upper())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.run, answer)
        nursery.start_soon(far.run, answer)
        for connection in (near, far):
            stream = connection.open_stream(PROTOCOL, Priority.CONTROL)
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"HELLO"
        near.close()


@pytest.mark.parametrize("near_muxers", [YAMUX, ()])
@pytest.mark.parametrize("far_muxers", [YAMUX, ("/mplex/6.7.0",)])
async def test_yamux_is_agreed_on_early_or_behind_the_handshake(
    near_muxers: Sequence[str], far_muxers: Sequence[str]
) -> None:
    near, far = await upgraded(near_muxers=near_muxers, far_muxers=far_muxers)
    assert near.channel_binding == far.channel_binding
    await check_it_carries(near, far)


async def test_who_dialled_may_be_responder() -> None:
    """A hole-punched socket has no natural initiator: the role is given."""
    near, far = await upgraded(swapped=True)
    assert (near.is_initiator, far.is_initiator) == (True, False)
    assert near.local_address == "/ip4/10.0.0.2/tcp/7"
    await check_it_carries(near, far)


async def test_where_both_dialled_at_once_one_of_them_becomes_responder() -> None:
    """TCP makes one connection of two dials that cross; both ends then begin as initiators."""
    ends = await byte_streams()
    made: list[NativeConnection] = []
    names: tuple[Role, Role] = ("initiator", "responder")

    async def make(name: Role, end: ByteStream) -> None:
        made.append(await upgraded_end("initiator", end, name=name))

    async with trio.open_nursery() as nursery:
        for name, end in zip(names, ends, strict=True):
            nursery.start_soon(make, name, end)
    near, far = made
    assert near.is_initiator != far.is_initiator
    assert {near.direction, far.direction} == {"inbound", "outbound"}
    assert near.channel_binding == far.channel_binding
    assert near.peer != far.peer
    await check_it_carries(near, far)


async def test_what_comes_with_the_handshakes_end_is_not_lost() -> None:
    """An initiator may send at once; its first frames come in one piece with message 3."""
    ends = await byte_streams()
    received: list[bytes] = []

    async def send() -> None:
        near = await upgraded_end("initiator", ends[0])
        await near.open_stream(PROTOCOL, Priority.CONTROL).send_all(b"early")

    async def receive() -> None:
        far = await upgraded_end("responder", ends[1])

        async def read(inbound: NativeStream) -> None:
            received.append(await inbound.receive_some())
            far.close()

        await far.run(read)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(receive)
    assert received == [b"early"]


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", HandshakeFailed),
        (b"\x13/multistream/1.0.0\n\x03na\n", HandshakeFailed),
        (None, ConnectionLost),
        (b"", PeerTimeout),
    ],
    ids=["http", "refused", "closed", "silent"],
)
async def test_an_answer_that_is_no_handshake_fails_and_closes(
    sent: bytes | None, error: type[Exception], autojump_clock: trio.testing.MockClock
) -> None:
    near, far = await byte_streams()
    if sent is None:
        far.close()
    else:
        await send_raw(far, sent)
    with pytest.raises(error):
        await upgraded_end("initiator", near)
    if sent is not None:
        while await receive_raw(far):
            pass


async def test_a_cancelled_handshake_closes_its_byte_stream() -> None:
    near, far = await byte_streams()
    with trio.CancelScope() as scope:
        scope.cancel()
        await upgraded_end("responder", near)
    assert await receive_raw(far) == b""
