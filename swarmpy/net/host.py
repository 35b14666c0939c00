"""The native host: listens and dials, keeps one connection a peer, and answers identify and ping.

Everything runs in the nursery of `run`: nothing outlives it. Spec: protocols/identify.md,
protocols/ping.md.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

import trio

from swarmpy import config
from swarmpy.abc import (
    Address,
    ByteStream,
    Connection,
    ConnectionEvent,
    Gate,
    Host,
    Listener,
    Network,
    Priority,
    ProtocolId,
    Stream,
    StreamHandler,
    WallSeconds,
)
from swarmpy.errors import (
    ConnectionLost,
    DialFailed,
    LocalProtocolError,
    NetworkError,
    PeerTimeout,
    ProtocolError,
    RemoteProtocolError,
)
from swarmpy.identity import Identity, PeerId, RandomBytes
from swarmpy.net.connection import NativeConnection, Scratch
from swarmpy.net.dialing import Dials
from swarmpy.net.events import EventFeed
from swarmpy.net.handshakes import Handshakes
from swarmpy.net.peer_info import IDENTIFY, IDENTIFY_PUSH, PING, PeerInfo
from swarmpy.net.router import Router
from swarmpy.net.table import ConnectionTable
from swarmpy.net.upgrade import upgrade
from swarmpy.proto import multiaddr
from swarmpy.proto.identify import IdentifyInfo
from swarmpy.proto.multistream import Dialer
from swarmpy.proto.noise import StaticKey

logger = logging.getLogger(__name__)

RETIRE_PAUSE_S = 1.0
"""A superseded connection is looked at this often, and lives this long: its other end may just have
opened a stream on it."""

PUSH_PAUSE_S = 0.05
"""Changes this close together are told to the peers at once."""

_ANY = {"0.0.0.0": "ip4", "::": "ip6"}


class NativeHost(Host):
    """A libp2p node over any `Network`: Noise, Yamux, identify, ping. Works while `run` runs."""

    def __init__(
        self,
        identity: Identity,
        network: Network,
        *,
        random: RandomBytes,
        gate: Gate | None = None,
        agent: str = "swarmpy/0.1.0",
        wall_time: Callable[[], WallSeconds] | None = None,
        handshake_timeout_s: float = config.HANDSHAKE_TIMEOUT_S,
    ) -> None:
        """Make a host that neither listens nor dials yet.

        Args:
            random: For Noise keys and pings; a cryptographic source in production.
            gate: Who may connect and ask; without one everybody may.
            wall_time: Dates the signed peer record in identify; without it none is sent.
        """
        self.identity = identity
        self.gate = gate or Gate()
        self._network = network
        self._random = random
        self._handshake_timeout_s = handshake_timeout_s
        self._static = StaticKey.create(identity, random.randbytes(32))
        self._scratch = Scratch()
        self._router = Router(lambda peer, protocol: self.gate.allow_stream(peer, protocol))
        self._table = ConnectionTable(identity.peer_id)
        self._handshakes = Handshakes()
        self._dials = Dials(self._dial_one, self._keep)
        self._feed = EventFeed()
        self._listeners: list[Listener] = []
        self._nursery: trio.Nursery | None = None
        self._is_closed = False
        self._changed = trio.Event()
        self._info = PeerInfo(
            identity,
            agent=agent,
            random=random,
            addresses=lambda: self.addresses,
            protocols_for=self._router.protocols_for,
            wall_time=wall_time,
        )
        self._router.set_handler(IDENTIFY, self._info.answer)
        self._router.set_handler(IDENTIFY_PUSH, self._info.take_push)
        self._router.set_handler(PING, self._info.answer_ping)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the host until `close` or cancellation; then all its connections are closed.

        Started once; `nursery.start(host.run)` returns when it may listen and dial.
        """
        if self._nursery is not None or self._is_closed:
            raise LocalProtocolError("a host runs once")
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._push_changes)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self.close()

    def close(self) -> None:
        self._is_closed = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for connection in self._table.all():
            connection.close()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        self._feed.close()

    # Addresses and connections ---------------------------------------------------

    @property
    def addresses(self) -> Sequence[Address]:
        found: list[Address] = []
        for listener in self._listeners:
            host, port = multiaddr.parse_tcp(listener.address)
            version = _ANY.get(host)
            if version is None:
                found.append(listener.address)
                continue
            for literal in self._network.interface_addresses():
                address = Address(multiaddr.format_tcp(literal, port))
                if address.startswith(f"/{version}/"):
                    found.append(address)
        return found

    @property
    def connections(self) -> Sequence[Connection]:
        return self._table.all()

    def connection_to(self, peer: PeerId) -> NativeConnection | None:
        return self._table.best(peer)

    def identified(self, peer: PeerId) -> IdentifyInfo | None:
        """Return what a connected peer said about itself, None before it did."""
        connection = self._table.best(peer)
        return None if connection is None else self._info.of(connection)

    async def wait_identified(
        self, peer: PeerId, *, after: IdentifyInfo | None = None
    ) -> IdentifyInfo:
        """Wait until a connected peer has said who it is, or something other than `after`.

        Raises:
            ConnectionLost: The peer is not connected, or no longer.
        """
        await trio.lowlevel.checkpoint()
        while (connection := self._table.best(peer)) is not None:
            info = self._info.of(connection)
            if info is not None and info != after:
                return info
            await self._info.wait_news()
        raise ConnectionLost(f"{peer} is not connected")

    def connection_events(self) -> AsyncIterator[ConnectionEvent]:
        return self._feed.subscribe()

    async def listen(self, address: Address) -> Address:
        """Listen on an address and return it with the real port.

        Raises:
            ConfigError: The address is malformed or taken.
        """
        nursery = self._running()
        listener = await self._network.listen(address)
        self._listeners.append(listener)
        nursery.start_soon(self._accept, listener)
        self._changed.set()
        return listener.address

    # Dialling --------------------------------------------------------------------

    async def dial(self, peer: PeerId, addresses: Sequence[Address]) -> NativeConnection:
        nursery = self._running()
        if peer == self.identity.peer_id:
            raise DialFailed("that is this node itself")
        connection = self._table.best(peer)
        if connection is not None:
            await trio.lowlevel.checkpoint()
            return connection
        return await self._dials.dial(nursery, peer, addresses)

    async def _dial_one(self, peer: PeerId, address: Address) -> NativeConnection:
        plain, named = multiaddr.split_peer(address)
        if named not in (None, peer):
            raise DialFailed(f"{address} is an address of another peer")
        if not self.gate.allow_dial(peer, address):
            raise DialFailed(f"the gate forbids dialling {address}")
        try:
            with trio.fail_after(config.DIAL_TIMEOUT_S):
                byte_stream = await self._network.dial(Address(plain))
        except trio.TooSlowError:
            timeout_s = config.DIAL_TIMEOUT_S
            raise DialFailed(f"{address} did not answer within {timeout_s:.0f} s") from None
        connection = await upgrade(
            byte_stream,
            role="initiator",
            static=self._static,
            random=self._random,
            scratch=self._scratch,
            expected_peer=peer,
            timeout_s=self._handshake_timeout_s,
        )
        if not self._may_keep(connection):
            connection.close()
            raise DialFailed(f"a connection to {peer} is not allowed, or one too many")
        return connection

    async def adopt(
        self,
        byte_stream: ByteStream,
        *,
        role: Literal["initiator", "responder"],
        expected_peer: PeerId | None = None,
        path: Literal["direct", "relayed"] = "direct",
        limit: int | None = None,
    ) -> NativeConnection:
        self._running()
        connection = await upgrade(
            byte_stream,
            role=role,
            static=self._static,
            random=self._random,
            scratch=self._scratch,
            expected_peer=expected_peer,
            timeout_s=self._handshake_timeout_s,
        )
        connection.path, connection.limit = path, limit
        if not self._may_keep(connection):
            connection.close()
            raise DialFailed(f"a connection to {connection.peer} is not allowed, or one too many")
        self._keep(connection)
        return connection

    def _keep(self, connection: NativeConnection) -> None:
        """Keep a dialled connection: it is in the table before anybody else runs."""
        if self._is_closed:
            connection.close()
            raise DialFailed("the host was closed")
        self._add(connection)
        self._tasks.start_soon(self._run_connection, connection)

    # Accepting -------------------------------------------------------------------

    async def _accept(self, listener: Listener) -> None:
        while True:
            try:
                byte_stream = await listener.accept()
            except ConnectionLost:
                return
            has_room = len(self._table) < config.CONNECTIONS_MAX or self._make_room()
            if not has_room or not self.gate.allow_address(byte_stream.remote_address):
                byte_stream.close()
                continue
            self._tasks.start_soon(self._serve_inbound, byte_stream)

    def _make_room(self) -> bool:
        """Close the oldest connection that the gate does not mind losing; False if there is none.

        Strangers prove themselves quickly or not at all; they must not shut the members out.
        """
        for connection in self._table.oldest_first():
            if connection.is_alive and self.gate.may_drop(connection.peer):
                connection.close()
                return True
        return False

    async def _serve_inbound(self, byte_stream: ByteStream) -> None:
        remote = byte_stream.remote_address
        connection: NativeConnection | None = None
        with self._handshakes.admit(remote):
            try:
                connection = await upgrade(
                    byte_stream,
                    role="responder",
                    static=self._static,
                    random=self._random,
                    scratch=self._scratch,
                    timeout_s=self._handshake_timeout_s,
                )
            except (NetworkError, ProtocolError) as error:
                logger.debug("handshake.failed", extra={"remote": remote, "error": str(error)})
        if connection is None:
            return
        if self._is_closed or not self._may_keep(connection):
            connection.close()
            return
        self._add(connection)
        await self._run_connection(connection)

    # Connections -----------------------------------------------------------------

    def _may_keep(self, connection: NativeConnection) -> bool:
        """Decide about a connection whose peer is proven.

        That peer is this node itself where somebody carries its own handshake back to it.
        """
        peer = connection.peer
        is_full = self._table.count(peer) >= config.CONNECTIONS_PER_PEER_MAX
        if is_full or peer == self.identity.peer_id:
            return False
        return self.gate.allow_peer(peer, connection.direction)

    def _add(self, connection: NativeConnection) -> None:
        connection.on_closed = self._remove
        self._table.add(connection)
        self._feed.publish(ConnectionEvent(kind="opened", connection=connection))

    def _remove(self, connection: NativeConnection) -> None:
        """Forget a connection at the moment it ends; its handlers may still be tidying up."""
        self._table.remove(connection)
        self._info.forget(connection)
        reason = str(connection.error or "")
        event = ConnectionEvent(kind="closed", connection=connection, reason=reason)
        self._feed.publish(event)

    async def _run_connection(self, connection: NativeConnection) -> None:
        self._tasks.start_soon(self._info.ask, connection)
        if self._table.count(connection.peer) > 1:
            self._tasks.start_soon(self._retire, connection.peer)
        await connection.run(self._router.serve)

    async def _retire(self, peer: PeerId) -> None:
        """Close the superseded connections of a peer once no stream is on them."""
        while self._table.count(peer) > 1:
            await trio.sleep(RETIRE_PAUSE_S)
            superseded = [
                item
                for item in self._table.all()
                if item.peer == peer and self._table.is_superseded(item)
            ]
            if not superseded:
                return
            for connection in superseded:
                if not connection.stream_count:
                    connection.close()

    async def _push_changes(self) -> None:
        """Tell the peers when what this node listens on or serves has changed."""
        while True:
            await self._changed.wait()
            await trio.sleep(PUSH_PAUSE_S)
            self._changed = trio.Event()
            for connection in self._table.all():
                self._tasks.start_soon(self._info.push, connection)

    # Streams ---------------------------------------------------------------------

    def set_handler(
        self, protocol: ProtocolId, handler: StreamHandler, *, allow_limited: bool = False
    ) -> None:
        """Serve a protocol's inbound streams; there are no limited paths yet to allow it on."""
        self._router.set_handler(protocol, handler)
        self._changed.set()

    async def open_stream(
        self,
        peer: PeerId,
        protocols: Sequence[ProtocolId],
        *,
        allow_limited: bool = False,
        priority: Priority = Priority.CONTROL,
    ) -> Stream:
        """Open a stream to a connected peer by the first protocol it speaks.

        Read the stream to its end, or reset it: until then it is kept, with what lies unread.

        Raises:
            ConnectionLost: The peer is not connected.
            RemoteProtocolError: The peer speaks none of the protocols.
            PeerTimeout: It did not answer.
        """
        connection = self._table.best(peer)
        if connection is None:
            raise ConnectionLost(f"{peer} is not connected")
        stream = connection.open_stream(protocols[0], priority)
        dialer = Dialer(protocols)
        if len(protocols) == 1:
            stream.propose(dialer)
            await trio.lowlevel.checkpoint()
            return stream
        try:
            with trio.fail_after(config.STREAM_NEGOTIATION_TIMEOUT_S):
                await stream.send_all(dialer.start())
                while dialer.selected is None:
                    data = await stream.receive_some()
                    if not data:
                        raise RemoteProtocolError(f"{peer} ended the stream unasked", peer=peer)
                    if answer := dialer.receive(data):
                        await stream.send_all(answer)
        except trio.TooSlowError:
            stream.reset()
            raise PeerTimeout(f"{peer} did not agree on a protocol in time") from None
        except BaseException:
            stream.reset()
            raise
        stream.protocol = ProtocolId(dialer.selected)
        stream.push_back(dialer.rest)
        return stream

    async def ping(self, peer: PeerId) -> float:
        """Send a libp2p ping to a connected peer and return its round trip in seconds.

        Raises:
            ConnectionLost: The peer is not connected, or the connection broke.
            PeerTimeout: No answer came in time.
            RemoteProtocolError: Something else came back.
        """
        connection = self._table.best(peer)
        if connection is None:
            raise ConnectionLost(f"{peer} is not connected")
        return await self._info.ping(connection)

    @property
    def _tasks(self) -> trio.Nursery:
        """The nursery of `run`, for its own tasks: open as long as one of them runs."""
        assert self._nursery is not None
        return self._nursery

    def _running(self) -> trio.Nursery:
        if self._nursery is None or self._is_closed:
            raise LocalProtocolError("the host is not running")
        return self._nursery
