"""A host that is closed in the middle of everything: soon, and with nothing left behind."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from net_hosts import ECHO, World, connect, echo, exchange, identity

from swarmpy.abc import Address, ProtocolId, Stream
from swarmpy.errors import NetworkError, ProtocolError
from swarmpy.net.host import NativeHost

SLEEP = ProtocolId("/swarmpy-test/sleep/1")
PEERS, STREAMS = 5, 8


async def converse(near: NativeHost, far: NativeHost) -> None:
    """Echo as much as goes until the connection is gone."""
    stream = await near.open_stream(far.identity.peer_id, [ECHO])
    try:
        while True:
            await exchange(stream, bytes(200_000))
    except* NetworkError:
        pass


async def sleep(_: Stream) -> None:
    await trio.sleep_forever()


async def dial_nobody(host: NativeHost, address: Address) -> None:
    with pytest.raises(NetworkError):
        await host.dial(identity("nobody").peer_id, [address])


async def wait_tasks(count: int) -> None:
    while trio.lowlevel.current_statistics().tasks_living != count:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("how", ["closed", "cancelled"])
async def test_a_busy_host_ends_within_two_seconds_with_nothing_left(
    tcp: World, nursery: trio.Nursery, how: str
) -> None:
    """Load: bulk echo both ways on forty streams, sleeping handlers, strangers half way, a dial."""
    silent = await tcp.network().listen(Address("/ip4/127.0.0.1/tcp/0"))
    peers = [await tcp.host(f"peer {index}") for index in range(PEERS)]
    before = trio.lowlevel.current_statistics().tasks_living
    async with trio.open_nursery() as work:
        host = await World("tcp", work).host("host")
        for each in (host, *peers):
            each.set_handler(ECHO, echo)
            each.set_handler(SLEEP, sleep)
        for peer in peers:
            await connect(host, peer)
            await (await peer.open_stream(host.identity.peer_id, [SLEEP])).send_all(b"x")
            for _ in range(STREAMS // 2):
                nursery.start_soon(converse, host, peer)
                nursery.start_soon(converse, peer, host)
        for _ in range(10):
            await tcp.stranger(host)
        nursery.start_soon(dial_nobody, host, silent.address)
        for _ in range(50):
            await trio.lowlevel.checkpoint()
        assert len(host.connections) == PEERS
        began_s = trio.current_time()
        if how == "closed":
            host.close()
        else:
            work.cancel_scope.cancel()
    with trio.fail_after(2):
        await wait_tasks(before)
    assert trio.current_time() - began_s < 2
    assert not host.connections
    assert not any(peer.connections for peer in peers)
    silent.close()


async def test_a_host_that_ends_starts_nothing_more(tcp: World) -> None:
    """Method: dial in every step of its end; each dial is refused as such, and none breaks it."""
    far = await tcp.host("far")
    async with trio.open_nursery() as work:
        host = await World("tcp", work).host("host")
        refused: list[Exception] = []

        async def dial_on() -> None:
            while len(refused) < 100:
                try:
                    await host.dial(identity("nobody").peer_id, far.addresses)
                except (NetworkError, ProtocolError) as error:
                    refused.append(error)

        async with trio.open_nursery() as dials:
            for _ in range(5):
                dials.start_soon(dial_on)
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            host._running().cancel_scope.cancel()
    assert not host.connections
