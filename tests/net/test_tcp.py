"""The TCP network: what its byte streams promise, and what its errors become."""

from __future__ import annotations

import errno
import resource
import socket
import sys
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


# The port dials leave from -----------------------------------------------------------------


shares_ports = pytest.mark.skipif(
    sys.platform != "linux", reason="other systems may refuse to share a port that listens"
)


def port_of(address: Address) -> int:
    return int(address.rpartition("/")[2])


@shares_ports
@pytest.mark.parametrize("listened", ["127.0.0.1", "0.0.0.0"])
async def test_a_dial_leaves_from_the_port_that_is_listened_on(
    listener: Listener, listened: str
) -> None:
    """What the peer sees of us is then an address at which we answer."""
    network = TcpNetwork()
    own = await network.listen(Address(f"/ip4/{listened}/tcp/0"))
    near = await network.dial(listener.address)
    far = await listener.accept()
    assert far.remote_address == f"/ip4/127.0.0.1/tcp/{port_of(own.address)}"
    back = await TcpNetwork().dial(far.remote_address)
    accepted = await own.accept()
    for item in (near, far, back, accepted, own):
        item.close()


@shares_ports
async def test_a_second_dial_to_one_address_leaves_from_another_port(listener: Listener) -> None:
    """Two connections between the same two ports there cannot be."""
    network = TcpNetwork()
    own = await network.listen(LOOPBACK)
    dialled = [await network.dial(listener.address) for _ in range(2)]
    ports = [port_of(item.local_address) for item in dialled]
    assert ports[0] == port_of(own.address) != ports[1]
    for item in (*dialled, own):
        item.close()


async def test_a_dial_does_not_leave_from_a_port_of_another_interface(listener: Listener) -> None:
    """What listens elsewhere cannot reach loopback, nor IPv6 IPv4."""
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    network = TcpNetwork()
    own = await network.listen(Address("/ip6/::1/tcp/0"))
    near = await network.dial(listener.address)
    assert port_of(near.local_address) != port_of(own.address)
    near.close()
    own.close()


async def test_a_dial_to_the_outside_does_not_leave_from_a_loopback_port() -> None:
    """A peer elsewhere could not answer to 127.0.0.1."""
    outside = next(item for item in TcpNetwork().interface_addresses() if "." in item)
    if outside == "127.0.0.1":
        pytest.skip("this machine has no IPv4 address but loopback's")
    far = await TcpNetwork().listen(Address(f"/ip4/{outside}/tcp/0"))
    network = TcpNetwork()
    own = await network.listen(LOOPBACK)
    near = await network.dial(far.address)
    assert near.local_address.startswith(f"/ip4/{outside}/")
    for item in (near, own, far):
        item.close()


async def test_after_the_listener_is_closed_dials_leave_from_any_port(listener: Listener) -> None:
    network = TcpNetwork()
    own = await network.listen(LOOPBACK)
    own.close()
    near = await network.dial(listener.address)
    assert port_of(near.local_address) != port_of(own.address)
    near.close()


async def test_where_the_system_does_not_share_ports_dials_leave_from_any(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = TcpNetwork()
    own = await network.listen(LOOPBACK)
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    near = await network.dial(listener.address)
    assert port_of(near.local_address) != port_of(own.address)
    near.close()
    own.close()


async def test_a_port_from_which_was_dialled_is_still_taken(listener: Listener) -> None:
    network = TcpNetwork()
    own = await network.listen(LOOPBACK)
    near = await network.dial(listener.address)
    with pytest.raises(ConfigError, match="cannot listen"):
        await TcpNetwork().listen(own.address)
    near.close()
    own.close()


async def test_a_port_can_be_listened_on_again_while_its_dials_live_and_after(
    listener: Listener,
) -> None:
    """A node that starts again must not wait for the connections it dialled to be forgotten."""
    network = TcpNetwork()
    own = await network.listen(LOOPBACK)
    near = await network.dial(listener.address)
    own.close()
    again = await TcpNetwork().listen(own.address)
    again.close()
    near.close()  # first, so that this side remembers the pair of ports for a while
    again = await TcpNetwork().listen(own.address)
    again.close()


@shares_ports
async def test_the_port_is_shared_only_while_a_dial_binds(listener: Listener) -> None:
    """Method: another socket asks to share it, before any dial and after one.

    After a dial Linux lets a socket of the same user share the very same address and port all the
    same; one that listens on all addresses is refused.
    """
    network = TcpNetwork()
    own = await network.listen(LOOPBACK)
    assert not can_share("127.0.0.1", own)
    near = await network.dial(listener.address)
    assert not can_share("0.0.0.0", own)
    near.close()
    own.close()


def can_share(host: str, listener: Listener) -> bool:
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            thief.bind((host, port_of(listener.address)))
        except OSError:
            return False
        return True


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
