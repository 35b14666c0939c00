"""A node on an application's py-libp2p host: what it refuses, guards, makes up for, leaves be."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from net_hosts import ECHO, echo, exchange, identity, receive_all
from py_libp2p_apps import Application, attached, needs_py_libp2p  # noqa: F401

from swarmpy.abc import Address, ProtocolId, Stream
from swarmpy.errors import ConfigError, DialFailed, StreamReset
from swarmpy.identity import PeerId
from swarmpy.net.dialing import first_of
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork

if TYPE_CHECKING:
    from swarmpy.plugins.libp2p import LibP2PHost
    from swarmpy.plugins.libp2p.connection import LibP2PConnection

OWN = ProtocolId("/application/own/1")
LOOPBACK = Address("/ip4/127.0.0.1/tcp/0")

FAST = 10.0
"""A clock that runs so much faster lets a test see a minute pass over real sockets; no faster, or
a busy machine's pauses would look like silence."""


@dataclass
class Shared:
    """An application's py-libp2p host, the node's host on it, and a native host elsewhere."""

    application: Application
    host: LibP2PHost
    native: NativeHost

    @property
    def peer(self) -> PeerId:
        return self.host.identity.peer_id


@pytest.fixture
async def shared(nursery: trio.Nursery) -> AsyncIterator[Shared]:
    """All three running; the application serves a protocol of its own."""
    async with shared_hosts(nursery) as made:
        yield made


@asynccontextmanager
async def shared_hosts(nursery: trio.Nursery) -> AsyncIterator[Shared]:
    """Run all three for the block."""
    application = Application.of(identity("application"))
    application.host.set_stream_handler(OWN, greet)  # type: ignore[arg-type]
    await nursery.start(application.run)
    host = attached(application.host)
    await nursery.start(host.run)
    yield Shared(application, host, await native_host(nursery, "native"))
    await application.end()


async def native_host(nursery: trio.Nursery, name: str) -> NativeHost:
    made = NativeHost(identity(name), TcpNetwork(), random=random.Random(name))
    await nursery.start(made.run)
    await made.listen(LOOPBACK)
    return made


async def greet(stream: object) -> None:
    """The application's own handler, written for py-libp2p."""
    await stream.write(b"hello")  # type: ignore[attr-defined]
    await stream.close()  # type: ignore[attr-defined]


# What it refuses --------------------------------------------------------------------


async def test_a_host_that_offers_plaintext_is_refused_with_the_lines_to_change() -> None:
    """The default host of py-libp2p; its security list is what an impostor would choose from."""
    import libp2p

    from swarmpy.plugins.libp2p.attach import NOISE_ONLY

    with pytest.raises(ConfigError, match="plaintext") as refused:
        attached(libp2p.new_host())
    assert NOISE_ONLY in refused.value.fix
    assert len(NOISE_ONLY.splitlines()) == 3


async def test_the_lines_in_the_advice_make_a_host_that_is_accepted() -> None:
    import libp2p
    import libp2p.crypto.ed25519
    import libp2p.crypto.x25519

    from swarmpy.plugins.libp2p.attach import NOISE_ONLY

    names: dict[str, object] = {
        "libp2p": libp2p,
        "keys": libp2p.crypto.ed25519.create_new_key_pair(),
    }
    exec(NOISE_ONLY, names)
    assert attached(names["host"])


async def test_a_host_whose_key_is_not_ed25519_is_refused() -> None:
    import libp2p
    import libp2p.crypto.secp256k1
    import libp2p.crypto.x25519

    from swarmpy.plugins.libp2p.attach import NOISE_ONLY

    names: dict[str, object] = {
        "libp2p": libp2p,
        "keys": libp2p.crypto.secp256k1.create_new_key_pair(),
    }
    exec(NOISE_ONLY, names)
    with pytest.raises(ConfigError, match="expected Ed25519"):
        attached(names["host"])


async def test_a_host_that_does_not_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not run"):
        await attached(Application.of(identity("idle")).host).run()


async def test_a_protocol_that_the_application_serves_is_not_the_nodes(shared: Shared) -> None:
    with pytest.raises(ConfigError, match="already has a handler"):
        shared.host.set_handler(OWN, echo)


async def test_a_refused_node_leaves_the_applications_handlers(nursery: trio.Nursery) -> None:
    """Both serve `OWN`, which shows when the node's host is run; `ECHO` is the node's alone."""
    application = Application.of(identity("application"))
    application.host.set_stream_handler(OWN, greet)  # type: ignore[arg-type]
    await nursery.start(application.run)
    served = dict(application.host.get_mux().handlers)
    host = attached(application.host)
    for protocol in (ECHO, OWN):
        host.set_handler(protocol, echo)
    with pytest.raises(ConfigError, match=f"the application serves {OWN} itself"):
        await host.run()
    assert application.host.get_mux().handlers == served
    await application.end()


async def test_it_listens_where_the_application_does_and_nowhere_else(shared: Shared) -> None:
    (address,) = shared.host.addresses
    assert await shared.host.listen(Address("/ip4/0.0.0.0/tcp/0")) == address
    assert await shared.host.listen(address) == address
    with pytest.raises(ConfigError, match="does not listen"):
        await shared.host.listen(Address("/ip4/127.0.0.1/tcp/1"))


async def test_it_adopts_no_byte_stream(shared: Shared) -> None:
    byte_stream = await TcpNetwork().dial(shared.native.addresses[0])
    with pytest.raises(DialFailed, match="adopts no byte streams"):
        await shared.host.adopt(byte_stream, role="initiator")


# What it leaves to the application ----------------------------------------------------


async def test_the_applications_protocols_and_connections_are_its_own(shared: Shared) -> None:
    """A peer that only talks with the application is none of the node's."""
    await shared.native.dial(shared.peer, shared.host.addresses)
    for _ in range(2):
        stream = await shared.native.open_stream(shared.peer, [OWN])
        assert await receive_all(stream) == b"hello"
    assert not shared.host.connections


async def test_closing_the_nodes_host_leaves_the_applications_open(shared: Shared) -> None:
    """Its protocols are gone then; the application's are served on the same connection."""
    shared.host.set_handler(ECHO, echo)
    await shared.native.dial(shared.peer, shared.host.addresses)
    stream = await shared.native.open_stream(shared.peer, [ECHO])
    assert await exchange(stream, b"hello") == b"hello"
    connection = shared.native.connection_to(shared.peer)

    shared.host.close()

    with pytest.raises(StreamReset):
        await receive_all(stream)
    own = await shared.native.open_stream(shared.peer, [OWN])
    assert await receive_all(own) == b"hello"
    assert shared.native.connection_to(shared.peer) is connection
    assert ECHO not in shared.application.host.get_mux().handlers


async def test_closing_the_nodes_host_leaves_a_handler_the_application_put_over_its(
    shared: Shared,
) -> None:
    shared.host.set_handler(ECHO, echo)
    shared.application.host.set_stream_handler(ECHO, greet)  # type: ignore[arg-type]
    shared.host.close()
    assert shared.application.host.get_mux().handlers[ECHO] is greet


async def test_closing_a_connection_the_application_made_leaves_it_open(shared: Shared) -> None:
    from libp2p.peer.id import ID
    from libp2p.peer.peerinfo import PeerInfo
    from multiaddr import Multiaddr

    shared.native.set_handler(ECHO, echo)
    native = shared.native.identity.peer_id
    info = PeerInfo(ID.from_string(native), [Multiaddr(shared.native.addresses[0])])
    await shared.application.host.connect(info)
    connection = await shared.host.dial(native, [])
    stream = await shared.host.open_stream(native, [ECHO])
    assert await exchange(stream, b"hello") == b"hello"
    connection.close()
    assert not shared.host.connections
    again = await shared.application.host.new_stream(info.peer_id, [ECHO])
    await again.write(b"still here")
    assert await again.read() == b"still here"


async def test_a_connection_the_application_uses_stays_open_although_the_node_made_it(
    shared: Shared,
) -> None:
    from libp2p.peer.id import ID

    shared.native.set_handler(ECHO, echo)
    native = shared.native.identity.peer_id
    connection = await shared.host.dial(native, shared.native.addresses)
    used = await shared.application.host.new_stream(ID.from_string(native), [ECHO])
    connection.close()
    await used.write(b"still here")
    assert await used.read() == b"still here"


# What it guards -----------------------------------------------------------------------


async def test_an_error_in_a_handler_of_the_applications_does_not_end_it(shared: Shared) -> None:
    """Without a node, py-libp2p ends the whole host for it."""
    failing = ProtocolId("/application/failing/1")

    async def fail(_: object) -> None:
        raise ValueError("oops")

    shared.application.host.set_stream_handler(failing, fail)  # type: ignore[arg-type]
    await shared.native.dial(shared.peer, shared.host.addresses)
    for _ in range(3):
        with pytest.raises(StreamReset):
            await receive_all(await shared.native.open_stream(shared.peer, [failing]))
    own = await shared.native.open_stream(shared.peer, [OWN])
    assert await receive_all(own) == b"hello"


# What it makes up for -----------------------------------------------------------------


async def test_a_receive_begun_with_a_send_leaves_the_proposal_in_front(shared: Shared) -> None:
    """Either sends the proposal. Method: both begin in one turn, so often that either is first."""
    received: list[bytes] = []

    async def receive(stream: Stream) -> None:
        received.append(await stream.receive_some())

    shared.native.set_handler(ECHO, echo)
    native = shared.native.identity.peer_id
    await shared.host.dial(native, shared.native.addresses)
    for _ in range(40):
        stream = await shared.host.open_stream(native, [ECHO])
        with trio.fail_after(10):
            async with trio.open_nursery() as both:
                both.start_soon(receive, stream)
                both.start_soon(stream.send_all, b"hello")
            await stream.close_write()
            assert await stream.receive_some() == b""
    assert received == [b"hello"] * 40


async def test_cancelled_openings_leave_no_streams(shared: Shared, nursery: trio.Nursery) -> None:
    """Method: twenty are cancelled, each one turn of trio's loop later; then one is used."""
    shared.native.set_handler(ECHO, echo)
    native = shared.native.identity.peer_id
    connection = await shared.host.dial(native, shared.native.addresses)
    caught = 0
    for turns in range(20):
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_after, scope, turns)
            (await shared.host.open_stream(native, [ECHO])).reset()
        caught += scope.cancelled_caught
    used = await shared.host.open_stream(native, [ECHO])
    assert await exchange(used, b"hello") == b"hello"
    used.reset()
    assert caught > 0
    with trio.fail_after(10):
        while (
            connection.muxed.streams
            or connection.swarm_conn.streams
            or shared.native.connections[0].stream_count
        ):
            await trio.lowlevel.checkpoint()


async def cancel_after(scope: trio.CancelScope, turns: int) -> None:
    """Cancel after so many turns of trio's loop."""
    for _ in range(turns):
        await trio.lowlevel.checkpoint()
    scope.cancel()


async def test_of_two_dials_that_win_at_once_one_connection_stays(
    nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    """Method: whoever is proven first waits for the other."""
    mock_clock.rate = FAST
    proven = trio.Event()
    waiting: list[LibP2PConnection] = []

    async with shared_hosts(nursery) as shared:

        async def dial_one(peer: PeerId, address: Address) -> LibP2PConnection:
            made = await shared.host._dial_one(peer, address)
            if waiting:
                proven.set()
            else:
                waiting.append(made)
                await proven.wait()
            return made

        peer, addresses = shared.native.identity.peer_id, shared.native.addresses
        won = await first_of(peer, [*addresses, *addresses], dial_one)
        assert won not in waiting
        assert list(shared.host.connections) == [won]
        events = shared.native.connection_events()
        with trio.fail_after(60):
            while len(shared.native.connections) > 1:
                await anext(events)


async def test_a_reader_may_pause_longer_than_py_libp2p_waits(
    nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    """A sender of py-libp2p gives up after 5 s without window; the node's waits."""
    mock_clock.rate = 1.0
    received: list[bytes] = []

    async def read_late(stream: Stream) -> None:
        mock_clock.rate = FAST
        await trio.sleep(20)
        mock_clock.rate = 1.0
        received.append(await receive_all(stream))

    async with shared_hosts(nursery) as shared:
        shared.native.set_handler(ECHO, read_late)
        native = shared.native.identity.peer_id
        await shared.host.dial(native, shared.native.addresses)
        stream = await shared.host.open_stream(native, [ECHO])
        sent = random.Random(1).randbytes(2_000_000)
        await stream.send_all(sent)
        await stream.close_write()
        assert await stream.receive_some() == b""
        assert received == [sent]


async def test_a_frozen_peer_is_given_up(
    nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    """py-libp2p itself waits for it for ever. Method: what lies between stops passing bytes on."""
    mock_clock.rate = 1.0
    async with shared_hosts(nursery) as shared:
        frozen = trio.Event()
        address = await nursery.start(relay, shared.native.addresses[0], frozen)
        events = shared.host.connection_events()
        await shared.host.dial(shared.native.identity.peer_id, [address])
        frozen.set()
        mock_clock.rate = FAST
        with trio.fail_after(60):
            while (event := await anext(events)).kind != "closed":
                pass
        mock_clock.rate = 1.0
        assert "nothing was heard for 12 s" in event.reason


async def test_a_live_peer_is_kept_however_idle(
    nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    """Method: a plain py-libp2p program, which says something of itself every 30 s only."""
    mock_clock.rate = 1.0
    async with shared_hosts(nursery) as shared:
        idle = Application.of(identity("idle"))
        await nursery.start(idle.run)
        address = Address(str(idle.host.get_transport_addrs()[0]))
        connection = await shared.host.dial(identity("idle").peer_id, [address])
        mock_clock.rate = FAST
        await trio.sleep(25)
        mock_clock.rate = 1.0
        assert connection.is_open
        assert connection.rtt_s is not None
        await idle.end()


async def test_a_dial_waits_for_no_clock(
    nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    """py-libp2p's own takes 250 ms more than it needs. Method: a clock that stands still."""
    async with shared_hosts(nursery) as shared:
        assert mock_clock.rate == 0.0
        assert await shared.host.dial(shared.native.identity.peer_id, shared.native.addresses)
        mock_clock.rate = 1.0


async def test_a_redial_after_a_failure_is_immediate(shared: Shared) -> None:
    """py-libp2p refuses to dial a peer again for a minute after it has failed once."""
    native = shared.native.identity.peer_id
    with pytest.raises(DialFailed):
        await shared.host.dial(native, [Address("/ip4/127.0.0.1/tcp/1")])
    assert await shared.host.dial(native, shared.native.addresses)


async def relay(
    address: Address, frozen: trio.Event, *, task_status: trio.TaskStatus[Address]
) -> None:
    """Pass bytes to and fro until `frozen`; then hold on to the connections and do nothing."""
    port = int(address.rpartition("/")[2])

    async def pass_on(source: trio.SocketStream, target: trio.SocketStream) -> None:
        async for data in source:
            if frozen.is_set():
                await trio.sleep_forever()
            await target.send_all(data)

    async def serve(near: trio.SocketStream) -> None:
        async with (
            await trio.open_tcp_stream("127.0.0.1", port) as far,
            trio.open_nursery() as both,
        ):
            both.start_soon(pass_on, near, far)
            both.start_soon(pass_on, far, near)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        own = listeners[0].socket.getsockname()[1]
        task_status.started(Address(f"/ip4/127.0.0.1/tcp/{own}"))


async def test_two_that_dial_each_other_at_once_keep_a_connection_both_use(
    shared: Shared,
) -> None:
    """The native host closes one of the two; streams of either side go on, on the other."""
    for host in (shared.host, shared.native):
        host.set_handler(ECHO, echo)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            shared.host.dial, shared.native.identity.peer_id, shared.native.addresses
        )
        nursery.start_soon(shared.native.dial, shared.peer, shared.host.addresses)
    for near, far in ((shared.host, shared.native), (shared.native, shared.host)) * 2:
        stream = await near.open_stream(far.identity.peer_id, [ECHO])
        assert await exchange(stream, b"hello") == b"hello"
        await stream.close_write()
        assert await stream.receive_some() == b""
        await wait_one_connection(shared.native)


async def wait_one_connection(host: NativeHost) -> None:
    """Wait until a host has closed what is superseded."""
    events = host.connection_events()
    while len(host.connections) > 1:
        await anext(events)
