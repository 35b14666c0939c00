"""The Host contract over a py-libp2p host that an application owns and runs.

The node serves its protocols beside the application's and uses a connection once it has dialled the
peer, or the peer has opened a stream of a node's protocol on it; the application's other peers are
none of its business. It neither listens nor closes what is the application's.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import trio
from libp2p.abc import IHost, INetStream
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.transport.exceptions import SecurityUpgradeFailure
from multiaddr import Multiaddr

from swarmpy import config
from swarmpy.abc import (
    Address,
    ByteStream,
    Connection,
    ConnectionEvent,
    Gate,
    Host,
    Priority,
    ProtocolId,
    Stream,
    StreamHandler,
)
from swarmpy.errors import (
    ConfigError,
    ConnectionLost,
    DialFailed,
    HandshakeFailed,
    LocalProtocolError,
    NetworkError,
    PeerTimeout,
    ProtocolError,
    RemoteProtocolError,
)
from swarmpy.identity import PeerId
from swarmpy.net.dialing import first_of
from swarmpy.net.events import EventFeed
from swarmpy.net.tcp import TcpNetwork
from swarmpy.plugins.libp2p.attach import identity_of, require_noise_only, swarm_of
from swarmpy.plugins.libp2p.connection import LibP2PConnection, is_usable
from swarmpy.plugins.libp2p.handlers import Handlers
from swarmpy.plugins.libp2p.stream import LibP2PStream
from swarmpy.proto import multiaddr
from swarmpy.proto.multistream import Dialer

logger = logging.getLogger(__name__)

NetStreamHandler = Callable[[INetStream], Awaitable[None]]

_ANY = {"0.0.0.0": "ip4", "::": "ip6"}


class LibP2PHost(Host):
    """A node's host made of an application's py-libp2p host. Works while both run."""

    def __init__(self, host: IHost, *, gate: Gate | None = None) -> None:
        """Attach to a host; nothing of it is changed before `run`.

        Args:
            host: Runs already when this one is run, and longer.
            gate: Asked about the node's own dials and protocols; without one all are allowed.

        Raises:
            ConfigError: It offers more than Noise, or its key is not an Ed25519 key.
        """
        require_noise_only(host)
        self.identity = identity_of(host)
        self.gate = gate or Gate()
        self._host = host
        self._swarm = swarm_of(host)
        self._network = TcpNetwork()
        self._handlers = Handlers()
        self._offered: dict[ProtocolId, NetStreamHandler] = {}  # what was set in the application's
        self._by_conn: dict[SwarmConn, LibP2PConnection] = {}
        self._dialling: dict[PeerId, trio.Event] = {}
        self._feed = EventFeed()
        self._nursery: trio.Nursery | None = None
        self._is_closed = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Share the application's host until `close` or cancellation, then leave it as it was.

        Meanwhile no exception of a handler ends the application's host, its own handlers' neither.

        Raises:
            ConfigError: The application's host does not run, or serves a protocol of the node's.
        """
        if self._nursery is not None or self._is_closed:
            raise LocalProtocolError("a host runs once")
        if self._swarm.background_nursery is None:
            raise ConfigError(
                "the py-libp2p host does not run",
                fix="Open the node inside `async with host.run(listen_addrs=...):`.",
            )
        before = self._swarm.common_stream_handler
        try:
            for protocol in self._handlers.protocols:
                self._offer(protocol)
            self._swarm.common_stream_handler = partial(self._serve, before)
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await self._keep_watch()
        finally:
            self._swarm.common_stream_handler = before
            self.close()

    def close(self) -> None:
        """End the node's part; the application's host, its connections and streams live on."""
        self._is_closed = True
        for protocol, handler in self._offered.items():
            if self._host.get_mux().handlers.get(protocol) is handler:
                self._host.remove_stream_handler(protocol)
        self._offered.clear()
        for connection in list(self._by_conn.values()):
            connection.close()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        self._feed.close()

    # Addresses and connections ---------------------------------------------------

    @property
    def addresses(self) -> Sequence[Address]:
        found: list[Address] = []
        for listened in self._host.get_transport_addrs():
            try:
                host, port = multiaddr.parse_tcp(multiaddr.split_peer(Address(str(listened)))[0])
            except ProtocolError:
                continue  # a transport that the node does not know
            literals = self._network.interface_addresses() if host in _ANY else [host]
            version = _ANY.get(host, "ip")
            made = [Address(multiaddr.format_tcp(item, port)) for item in literals]
            found += [item for item in made if item.startswith(f"/{version}")]
        return found

    @property
    def connections(self) -> Sequence[Connection]:
        return sorted(self._by_conn.values(), key=lambda item: item.peer)

    def connection_to(self, peer: PeerId) -> LibP2PConnection | None:
        return self._best(peer, allow_limited=True)

    def connection_events(self) -> AsyncIterator[ConnectionEvent]:
        return self._feed.subscribe()

    async def listen(self, address: Address) -> Address:
        """Return where the application's host listens; listening is the application's to do.

        An address with port 0 asks for any place; another must be one of the application's.

        Raises:
            ConfigError: The application does not listen there.
        """
        await trio.lowlevel.checkpoint()
        self._running()
        addresses = self.addresses
        if address.endswith("/tcp/0"):
            return addresses[0] if addresses else address
        if address in addresses:
            return address
        raise ConfigError(
            f"the py-libp2p host does not listen on {address}",
            fix="Add it to the listen_addrs of the application's host.run().",
        )

    def _best(self, peer: PeerId, *, allow_limited: bool) -> LibP2PConnection | None:
        """Return the connection to use: unlimited, direct, then as a native host chooses."""
        items = [
            item
            for item in self._by_conn.values()
            if item.peer == peer and item.is_open and (allow_limited or item.limit is None)
        ]
        return min(reversed(items), key=self._rank, default=None)

    def _rank(self, connection: LibP2PConnection) -> tuple[bool, PeerId]:
        is_ours = connection.direction == "outbound"
        initiator = self.identity.peer_id if is_ours else connection.peer
        return connection.path != "direct", initiator

    def _use(self, swarm_conn: SwarmConn, *, is_dialled: bool) -> LibP2PConnection | None:
        """Return a connection as the node's, from now on if not before; None where it must not."""
        known = self._by_conn.get(swarm_conn)
        if known is not None:
            return known
        if self._is_closed or not is_usable(swarm_conn):
            return None
        made = LibP2PConnection(swarm_conn, on_closed=self._forget, is_dialled=is_dialled)
        self._by_conn[swarm_conn] = made
        if not self._may_use(made):
            del self._by_conn[swarm_conn]
            made.on_closed = _ignore
            made.close()
            return None
        self._feed.publish(ConnectionEvent(kind="opened", connection=made))
        return made

    def _may_use(self, connection: LibP2PConnection) -> bool:
        if connection.peer == self.identity.peer_id:
            return False
        is_inbound = connection.direction == "inbound"
        if is_inbound and not self.gate.allow_address(connection.remote_address):
            return False
        return self.gate.allow_peer(connection.peer, connection.direction)

    def _forget(self, connection: LibP2PConnection) -> None:
        self._by_conn.pop(connection.swarm_conn, None)
        reason = str(connection.error or "")
        event = ConnectionEvent(kind="closed", connection=connection, reason=reason)
        self._feed.publish(event)

    async def _keep_watch(self) -> None:
        """Cut peers that were silent too long: py-libp2p itself waits for a frozen one for ever."""
        while True:
            for connection in list(self._by_conn.values()):
                connection.look(trio.current_time())
            await trio.sleep(config.KEEPALIVE_INTERVAL_S)

    # Dialling --------------------------------------------------------------------

    async def dial(self, peer: PeerId, addresses: Sequence[Address]) -> LibP2PConnection:
        self._running()
        if peer == self.identity.peer_id:
            raise DialFailed("that is this node itself")
        await trio.lowlevel.checkpoint()
        while (under_way := self._dialling.get(peer)) is not None:
            await under_way.wait()
        known = self._best(peer, allow_limited=False) or self._applications(peer)
        if known is not None:
            return known
        self._dialling[peer] = trio.Event()
        try:
            return await first_of(peer, addresses, self._dial_one)
        finally:
            self._dialling.pop(peer).set()

    def _applications(self, peer: PeerId) -> LibP2PConnection | None:
        """Share a connection that the application has to the peer."""
        for swarm_conn in self._swarm.get_connections(ID.from_string(peer)):
            connection = self._use(swarm_conn, is_dialled=False)
            if connection is not None and connection.limit is None:
                return connection
        return None

    async def _dial_one(self, peer: PeerId, address: Address) -> LibP2PConnection:
        """Dial one address, below py-libp2p's pause of 250 ms and its memory of failed peers."""
        plain, named = multiaddr.split_peer(address)
        if named not in (None, peer):
            raise DialFailed(f"{address} is an address of another peer")
        if not self.gate.allow_dial(peer, address):
            raise DialFailed(f"the gate forbids dialling {address}")
        multiaddr.parse_tcp(Address(plain))
        timeout_s = config.DIAL_TIMEOUT_S + config.HANDSHAKE_TIMEOUT_S
        try:
            with trio.fail_after(timeout_s):
                swarm_conn = await self._swarm._dial_addr_single_attempt(
                    Multiaddr(plain), ID.from_string(peer)
                )
        except trio.TooSlowError:
            raise DialFailed(f"{address} did not answer within {timeout_s:.0f} s") from None
        except SwarmException as error:
            raise _dial_error(peer, address, error) from error
        connection = self._use(swarm_conn, is_dialled=True)
        if connection is None:
            raise DialFailed(f"a connection to {peer} is not allowed, or lost already")
        return connection

    async def adopt(
        self,
        byte_stream: ByteStream,
        *,
        role: Literal["initiator", "responder"],
        expected_peer: PeerId | None = None,
        path: Literal["direct", "relayed"] = "direct",
        limit: int | None = None,
    ) -> Connection:
        """Refuse: relaying and hole punching are the application's host's own.

        Raises:
            DialFailed: Always; the byte stream is closed.
        """
        await trio.lowlevel.checkpoint()
        byte_stream.close()
        raise DialFailed("a py-libp2p host adopts no byte streams: give py-libp2p the transport")

    # Streams ---------------------------------------------------------------------

    def set_handler(
        self, protocol: ProtocolId, handler: StreamHandler, *, allow_limited: bool = False
    ) -> None:
        if self._nursery is not None and protocol in self._host.get_mux().handlers:
            raise ConfigError(f"{protocol} already has a handler")
        self._handlers.set_handler(protocol, handler, allow_limited=allow_limited)
        if self._nursery is not None:
            self._offer(protocol)

    def _offer(self, protocol: ProtocolId) -> None:
        if protocol in self._host.get_mux().handlers:
            raise ConfigError(f"the application serves {protocol} itself")
        handler = self._offered[protocol] = partial(self._serve_own, protocol)
        self._host.set_stream_handler(protocol, handler)

    async def open_stream(
        self,
        peer: PeerId,
        protocols: Sequence[ProtocolId],
        *,
        allow_limited: bool = False,
        priority: Priority = Priority.CONTROL,
    ) -> Stream:
        """Open a stream as every host does; py-libp2p knows no classes of `priority`."""
        connection = self._best(peer, allow_limited=allow_limited)
        if connection is None:
            raise ConnectionLost(f"{peer} is not connected")
        net_stream = await connection.open_net_stream()
        stream = LibP2PStream(connection, net_stream, protocol=protocols[0])
        dialer = Dialer(protocols)
        if len(protocols) == 1:
            stream.propose(dialer)
            return stream
        try:
            with trio.fail_after(config.STREAM_NEGOTIATION_TIMEOUT_S):
                await _agree(stream, dialer)
        except trio.TooSlowError:
            stream.reset()
            raise PeerTimeout(f"{peer} did not agree on a protocol in time") from None
        except BaseException:
            stream.reset()
            raise
        return stream

    async def _serve(self, before: NetStreamHandler, net_stream: INetStream) -> None:
        """Serve any inbound stream of the application's host; no error leaves this.

        A stranger learns as little of a protocol that the gate keeps from it as of one not served.
        """
        swarm_conn = net_stream.swarm_conn
        try:
            if not is_usable(swarm_conn):
                await before(net_stream)
                return
            peer = PeerId(str(swarm_conn.muxed_conn.peer_id))
            served = {
                protocol: handler
                for protocol, handler in self._host.get_mux().handlers.items()
                if protocol not in self._handlers or self.gate.allow_stream(peer, protocol)
            }
            timeout_s = int(config.STREAM_NEGOTIATION_TIMEOUT_S)
            protocol, handler = await Multiselect(served).negotiate(
                MultiselectCommunicator(net_stream), timeout_s
            )
            net_stream.set_protocol(protocol)
            await handler(net_stream)
        except MultiselectError:
            await net_stream.reset()
        except Exception as error:
            # It would end the application's host, and with it the process.
            logger.error("handler.failed", exc_info=error)
            await net_stream.reset()

    async def _serve_own(self, protocol: ProtocolId, net_stream: INetStream) -> None:
        """Serve a stream of one of the node's protocols, in a task of the node's."""
        connection = self._use(net_stream.swarm_conn, is_dialled=False)
        if connection is None or self._is_closed or self._nursery is None:
            await net_stream.reset()
            return
        stream = LibP2PStream(connection, net_stream, protocol=protocol)
        done = trio.Event()
        self._nursery.start_soon(self._handlers.serve, stream, done)
        await done.wait()

    def _running(self) -> trio.Nursery:
        if self._nursery is None or self._is_closed:
            raise LocalProtocolError("the host is not running")
        return self._nursery


async def _agree(stream: LibP2PStream, dialer: Dialer) -> None:
    """Find the first protocol both speak."""
    await stream.send_all(dialer.start())
    while dialer.selected is None:
        data = await stream.receive_some()
        if not data:
            raise RemoteProtocolError(f"{stream.peer} ended the stream unasked", peer=stream.peer)
        if answer := dialer.receive(data):
            await stream.send_all(answer)
    stream.protocol = ProtocolId(dialer.selected)
    stream.push_back(dialer.rest)


def _dial_error(
    peer: PeerId, address: Address, error: SwarmException
) -> NetworkError | ProtocolError:
    """Tell who answered as somebody else from who did not answer."""
    causes = list(_causes(error))
    if any(isinstance(item, PeerIDMismatchesPubkey) for item in causes):
        return HandshakeFailed(f"expected peer {peer} at {address}, found another")
    text = "; ".join(str(item) for item in causes if str(item))
    if any(isinstance(item, SecurityUpgradeFailure) for item in causes):
        return HandshakeFailed(f"{address}: {text}")
    return DialFailed(f"{address}: {text}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _ignore(_: LibP2PConnection) -> None:
    pass
