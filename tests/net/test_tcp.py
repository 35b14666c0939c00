"""The TCP network: what its byte streams promise, and what its errors become."""

from __future__ import annotations

import errno
import resource
import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from net_hosts import receive_raw, send_raw

from swarmpy.abc import Address, ByteStream, Listener
from swarmpy.errors import ConfigError, ConnectionLost, DialFailed
from swarmpy.net.tcp import TcpNetwork

LOOPBACK = Address("/ip4/127.0.0.1/tcp/0")


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    made = await TcpNetwork().listen(LOOPBACK)
    yield made
    made.close()


@pytest.fixture
async def pair(listener: Listener) -> AsyncIterator[tuple[ByteStream, ByteStream]]:
    """Both ends of a connection."""
    near = await TcpNetwork().dial(listener.address)
    far = await listener.accept()
    yield near, far
    near.close()
    far.close()


async def test_bytes_and_addresses_cross(pair: tuple[ByteStream, ByteStream]) -> None:
    near, far = pair
    assert near.local_address == far.remote_address
    assert near.remote_address == far.local_address
    await send_raw(near, b"hello")
    assert await receive_raw(far) == b"hello"


async def test_nothing_there_is_none_and_an_end_is_nothing(
    pair: tuple[ByteStream, ByteStream],
) -> None:
    near, far = pair
    assert far.receive_into_nowait(memoryview(bytearray(1))) is None
    near.close()
    assert await receive_raw(far) == b""


async def test_a_full_kernel_takes_no_more_until_the_peer_reads(
    pair: tuple[ByteStream, ByteStream],
) -> None:
    near, far = pair
    block = memoryview(bytes(1 << 20))
    sent = 0
    while taken := near.send_nowait(block):
        sent += taken
    received = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.wait_writable)
        while received < sent:
            received += len(await receive_raw(far))
    assert near.send_nowait(block[:1]) == 1


@pytest.mark.parametrize("waiting", ["wait_readable", "wait_writable"])
async def test_closing_wakes_who_waits(pair: tuple[ByteStream, ByteStream], waiting: str) -> None:
    near, _ = pair
    while near.send_nowait(memoryview(bytes(1 << 20))):
        pass
    async with trio.open_nursery() as nursery:
        nursery.start_soon(getattr(near, waiting))
        await trio.testing.wait_all_tasks_blocked()
        near.close()
        near.close()
    await getattr(near, waiting)()
    with pytest.raises(ConnectionLost):
        near.send_nowait(memoryview(b"x"))
    with pytest.raises(ConnectionLost):
        near.receive_into_nowait(memoryview(bytearray(1)))


async def test_a_reset_is_a_lost_connection(pair: tuple[ByteStream, ByteStream]) -> None:
    near, far = pair
    await send_raw(far, b"unread")
    await near.wait_readable()
    near.close()  # with unread bytes: the kernel sends a reset
    with pytest.raises(ConnectionLost):
        await receive_raw(far)


async def test_ipv6_works_as_well() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    listener = await TcpNetwork().listen(Address("/ip6/::1/tcp/0"))
    near = await TcpNetwork().dial(listener.address)
    far = await listener.accept()
    assert far.local_address == listener.address
    for item in (near, far, listener):
        item.close()


async def test_a_name_is_resolved(listener: Listener) -> None:
    port = listener.address.rpartition("/")[2]
    near = await TcpNetwork().dial(Address(f"/dns4/localhost/tcp/{port}"))
    far = await listener.accept()
    near.close()
    far.close()


async def test_nobody_there_is_a_failed_dial(listener: Listener) -> None:
    listener.close()
    with pytest.raises(DialFailed, match="cannot dial"):
        await TcpNetwork().dial(listener.address)


async def test_a_cancelled_dial_leaves_no_socket(listener: Listener) -> None:
    """A leaked socket is a ResourceWarning, which is an error here."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await TcpNetwork().dial(listener.address)
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    "address", ["nonsense", "/dns4/localhost/tcp/0", "/ip4/192.0.2.1/tcp/0", "/ip4/127.0.0.1"]
)
async def test_an_address_to_listen_on_must_be_ours(address: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        await TcpNetwork().listen(Address(address))


async def test_a_closed_listener_wakes_who_accepts(listener: Listener) -> None:
    async def accept() -> None:
        with pytest.raises(ConnectionLost, match="no longer listening"):
            await listener.accept()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        listener.close()
    await accept()


async def test_a_listener_survives_running_out_of_file_descriptors(listener: Listener) -> None:
    """Method: lower the limit to what is open, let it fail to accept, then raise it again."""
    near = await TcpNetwork().dial(listener.address)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with trio.open_nursery() as nursery:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            with pytest.raises(OSError) as caught:
                socket.socket().close()
            assert caught.value.errno == errno.EMFILE
            accepted: list[ByteStream] = []

            async def accept() -> None:
                accepted.append(await listener.accept())

            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked()
            assert not accepted
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    accepted[0].close()
    near.close()


def test_loopback_is_the_last_of_this_machines_addresses() -> None:
    addresses = TcpNetwork().interface_addresses()
    assert "127.0.0.1" in addresses
    assert addresses[-1] in ("127.0.0.1", "::1")
    assert not any(address.startswith("fe80") for address in addresses)
