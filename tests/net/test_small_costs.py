"""What a peer sends costs what it weighs; what begins to listen is closed or kept."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing
from net_hosts import ECHO, World, connect, echo

from swarmpy.abc import Address
from swarmpy.errors import FrameTooLarge, LocalProtocolError, RemoteProtocolError
from swarmpy.identity import base58_encode, parse_peer_id
from swarmpy.net.host import NativeHost
from swarmpy.net.peer_info import IDENTIFY_PUSH
from swarmpy.net.tcp import TcpNetwork
from swarmpy.proto import multiaddr
from swarmpy.proto.identify import PARTS_MAX
from swarmpy.proto.yamux import INITIAL_WINDOW_BYTES

NOT_ON_THE_CURVE = bytes([0x00, 37, 0x08, 2, 0x12, 33, 2]) + bytes(31) + b"\x05"
"""A PeerId in its proper form, of a secp256k1 key whose x has no point."""


@pytest.mark.parametrize("beyond", [-1, 0, 1], ids=["below", "at", "beyond"])
async def test_an_identify_message_comes_in_so_many_parts(
    sim: World, autojump_clock: object, beyond: int
) -> None:
    """Empty parts count: a window full of them was parsed in one go, a second of computing."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    peer = await connect(alice, bob)
    refused: list[Exception] = []
    take = bob._info._take

    async def noting(stream: object) -> None:
        try:
            await take(stream)  # type: ignore[arg-type]
        except RemoteProtocolError as error:
            refused.append(error)

    bob._router._handlers[IDENTIFY_PUSH] = noting
    stream = await alice.open_stream(peer, [IDENTIFY_PUSH])
    await stream.send_all(bytes(PARTS_MAX + beyond))
    await stream.close_write()
    await trio.sleep(1)
    assert any(isinstance(error, FrameTooLarge) for error in refused) == (beyond > 0)


def test_the_keys_inside_an_addresss_ids_are_not_loaded() -> None:
    """Hundreds fit one message at 80 us each; whoever is dialled proves its key anyway."""
    peer = base58_encode(NOT_ON_THE_CURVE)
    with pytest.raises(RemoteProtocolError):
        parse_peer_id(peer)
    binary = struct.pack("!B4sBH", 4, bytes(4), 6, 1) + b"\xa5\x03\x27" + NOT_ON_THE_CURVE
    assert multiaddr.from_bytes(binary) == f"/ip4/0.0.0.0/tcp/1/p2p/{peer}"


async def test_a_window_grows_by_the_time_between_reads(sim: World, autojump_clock: object) -> None:
    """A reader of 160 KB a second has no use for more than the first window."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(ECHO, echo)
    stream = await alice.open_stream(await connect(alice, bob), [ECHO])
    await trio.sleep(1)
    for _ in range(100):
        await stream.send_all(bytes(16 * 1024))
        left = 16 * 1024
        while left:
            left -= len(await stream.receive_some(left))
        await trio.sleep(0.1)
    far = bob.connections[0]._yamux  # type: ignore[attr-defined]
    assert {each.receive_window for each in far._streams.values()} == {INITIAL_WINDOW_BYTES}


async def test_a_cancelled_listen_leaves_no_socket_open() -> None:
    """Method: the port is free again, or listening on it would fail."""
    network = TcpNetwork()
    probe = await network.listen(Address("/ip4/127.0.0.1/tcp/0"))
    probe.close()
    with trio.CancelScope() as scope:
        scope.cancel()
        await network.listen(probe.address)
    (await network.listen(probe.address)).close()


async def test_a_host_that_closes_while_it_begins_to_listen_does_not(
    tcp: World, nursery: trio.Nursery
) -> None:
    host = await World("tcp", nursery).host("host")
    opened = []
    listen = host._network.listen

    async def listening(address: Address) -> object:
        listener = await listen(address)
        opened.append(listener)
        host.close()
        return listener

    host._network.listen = listening  # type: ignore[assignment, method-assign]
    with pytest.raises((LocalProtocolError, trio.Cancelled)):
        await NativeHost.listen(host, Address("/ip4/127.0.0.1/tcp/0"))
    assert [listener.is_open for listener in opened] == [False]
