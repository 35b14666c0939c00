"""SimHost: a host for swarms of hundreds of nodes in one process, without Noise, Yamux or tasks.

It keeps the whole contract of `swarmpy.abc.Host` over the machines and paths of a `SimNetwork`, so
that faults meet it as they meet a native host. What it leaves out are bytes: handshakes take their
round trips and prove the peer, but nothing is signed, encrypted, framed or parsed.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
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
    PeerTimeout,
)
from swarmpy.identity import Identity, PeerId
from swarmpy.net.containment import Containment
from swarmpy.net.dialing import Dials
from swarmpy.net.events import EventFeed
from swarmpy.proto import multiaddr
from swarmpy.testing.host_connection import HostConnection
from swarmpy.testing.host_stream import HostStream
from swarmpy.testing.network import SimMachine

HANDSHAKE_ROUND_TRIPS = 2
"""After the connection stands: one for the proposal and Noise's first message, one for the rest."""

RETIRE_PAUSE_S = 1.0
"""A superseded connection is looked at this often, and lives this long."""

_ANY = {"0.0.0.0": "ip4", "::": "ip6"}


class _Port:
    """An address a simulated host listens on."""

    def __init__(self, host: SimHost, address: Address, number: int) -> None:
        self.host = host
        self.address = address
        self.number = number


class SimHost(Host):
    """A host on a simulated machine. Works while `run` runs."""

    def __init__(
        self, identity: Identity, machine: SimMachine, *, gate: Gate | None = None
    ) -> None:
        """Make a host that neither listens nor dials yet.

        Args:
            machine: `SimNetwork.network(ip)`; several hosts may be on one.
            gate: Who may connect and ask; without one everybody may.
        """
        self.identity = identity
        self.gate = gate or Gate()
        self.machine = machine
        self._handlers: dict[ProtocolId, StreamHandler] = {}
        self._containment = Containment()
        self._by_peer: dict[PeerId, list[HostConnection]] = {}
        self._in_order: list[HostConnection] | None = None
        self._dials = Dials(self._dial_one, self._keep)
        self._feed = EventFeed()
        self._ports: list[_Port] = []
        self._nursery: trio.Nursery | None = None
        self._is_closed = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        if self._nursery is not None or self._is_closed:
            raise LocalProtocolError("a host runs once")
        async with trio.open_nursery() as self._nursery:
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self.close()  # while the nursery still takes tasks: nobody finds it closed

    def close(self) -> None:
        self._is_closed = True
        for port in self._ports:
            self.machine.world.release_port(self.machine.ip, port.number, port)
        self._ports.clear()
        for connection in list(self._connections()):
            connection.close()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        self._feed.close()

    # Addresses and connections ---------------------------------------------------

    @property
    def addresses(self) -> Sequence[Address]:
        found: list[Address] = []
        for port in self._ports:
            literal, number = multiaddr.parse_tcp(port.address)
            version = _ANY.get(literal)
            if version is None:
                found.append(port.address)
                continue
            for own in self.machine.interface_addresses():
                address = Address(multiaddr.format_tcp(own, number))
                if address.startswith(f"/{version}/"):
                    found.append(address)
        return found

    @property
    def connections(self) -> Sequence[Connection]:
        return list(self._connections())

    def connection_to(self, peer: PeerId) -> HostConnection | None:
        items = self._by_peer.get(peer)
        if items is None:
            return None
        if len(items) == 1:
            return items[0]
        # As a native host does: the smaller initiator's, of one initiator's the newest.
        return min(reversed(items), key=self._initiator)

    def connection_events(self) -> AsyncIterator[ConnectionEvent]:
        return self._feed.subscribe()

    async def listen(self, address: Address) -> Address:
        self._running()
        bound, number = self.machine.place(address)
        await trio.lowlevel.checkpoint()
        port = _Port(self, bound, number)
        self.machine.world.bind(self.machine.ip, number, port)
        self._ports.append(port)
        return bound

    # Dialling --------------------------------------------------------------------

    async def dial(self, peer: PeerId, addresses: Sequence[Address]) -> HostConnection:
        await trio.lowlevel.checkpoint_if_cancelled()  # of a node that ends, the host ends first
        nursery = self._running()
        if peer == self.identity.peer_id:
            raise DialFailed("that is this node itself")
        connection = self.connection_to(peer)
        if connection is not None:
            await trio.lowlevel.checkpoint()
            return connection
        return await self._dials.dial(nursery, peer, addresses)

    async def _dial_one(self, peer: PeerId, address: Address) -> HostConnection:
        plain, named = multiaddr.split_peer(address)
        if named not in (None, peer):
            raise DialFailed(f"{address} is an address of another peer")
        if not self.gate.allow_dial(peer, address):
            raise DialFailed(f"the gate forbids dialling {address}")
        target, number = self.machine.target(Address(plain))
        port = await self._reach(target, number)
        local = Address(
            multiaddr.format_tcp(self.machine.ip, self.machine.world.next_port(self.machine.ip))
        )
        await self._prove(port, peer, local, target)
        if not self._may_keep(peer, "outbound"):
            raise DialFailed(f"a connection to {peer} is not allowed, or one too many")
        remote = Address(multiaddr.format_tcp(target, number))
        self.machine.world.observe("dial", local, remote, b"")
        return self._pair(port.host, local, remote, target)

    async def _reach(self, target: str, number: int) -> _Port:
        timeout_s = config.DIAL_TIMEOUT_S
        try:
            with trio.fail_after(timeout_s):
                port = await self.machine.world.reach(self.machine.ip, target, number)
        except trio.TooSlowError:
            raise DialFailed(f"{target} did not answer within {timeout_s:.0f} s") from None
        if not isinstance(port, _Port):
            raise HandshakeFailed(f"{target} port {number} is no simulated host's")
        return port

    async def _prove(self, port: _Port, peer: PeerId, local: Address, target: str) -> None:
        """Take the time of a handshake, and find who is there."""
        if not port.host.admits(local):
            raise ConnectionLost("the peer closed it")
        try:
            with trio.fail_after(config.HANDSHAKE_TIMEOUT_S):
                for _ in range(HANDSHAKE_ROUND_TRIPS):
                    await self.machine.world.cross(self.machine.ip, target)
        except trio.TooSlowError:
            raise PeerTimeout("the handshake took too long") from None
        if not port.host.is_at(port):
            raise ConnectionLost("the peer closed it")
        if port.host.identity.peer_id != peer:
            raise HandshakeFailed(f"expected peer {peer}, found {port.host.identity.peer_id}")

    def _pair(self, host: SimHost, local: Address, remote: Address, target: str) -> HostConnection:
        """Make both ends; the far one opens when the last message of the handshake arrives."""
        number = self.machine.world.next_connection()
        seed = f"{number} {self.identity.peer_id} {host.identity.peer_id}"
        binding = hashlib.sha256(seed.encode()).digest()
        near = HostConnection(
            self,
            host.identity.peer_id,
            direction="outbound",
            local_address=local,
            remote_address=remote,
            remote_machine=target,
            channel_binding=binding,
        )
        far = HostConnection(
            host,
            self.identity.peer_id,
            direction="inbound",
            local_address=remote,
            remote_address=local,
            remote_machine=self.machine.ip,
            channel_binding=binding,
        )
        near.far, far.far = far, near
        near.post("", host.take, far)
        return near

    def _keep(self, connection: HostConnection) -> None:
        if self._is_closed:
            connection.close()
            raise DialFailed("the host was closed")
        if connection.error is None:
            self._add(connection)

    async def adopt(
        self,
        byte_stream: ByteStream,
        *,
        role: Literal["initiator", "responder"],
        expected_peer: PeerId | None = None,
        path: Literal["direct", "relayed"] = "direct",
        limit: int | None = None,
    ) -> Connection:
        """Refuse: a simulated host speaks nothing that a byte stream could carry.

        Raises:
            DialFailed: Always; the byte stream is closed.
        """
        await trio.lowlevel.checkpoint()
        byte_stream.close()
        raise DialFailed("a simulated host adopts no byte streams: use a NativeHost for that")

    # Accepting -------------------------------------------------------------------

    def admits(self, remote: Address) -> bool:
        """Whether a connection from an address is accepted, before anybody is proven."""
        if self._is_closed:
            return False
        count = sum(len(items) for items in self._by_peer.values())
        return (count < config.CONNECTIONS_MAX or self._make_room()) and self.gate.allow_address(
            remote
        )

    def is_at(self, port: _Port) -> bool:
        """Whether this host still listens on a port, and its machine runs."""
        return port in self._ports and self.machine.world.is_up(self.machine.ip)

    def take(self, connection: HostConnection) -> None:
        """Keep an inbound connection whose peer is proven, or close it."""
        if self._is_closed or not self._may_keep(connection.peer, "inbound"):
            connection.close()
        else:
            self._add(connection)

    def _make_room(self) -> bool:
        """Close the oldest connection the gate does not mind losing; False if there is none."""
        for items in self._by_peer.values():
            if self.gate.may_drop(items[0].peer):
                items[0].close()
                return True
        return False

    # Connections -----------------------------------------------------------------

    def _may_keep(self, peer: PeerId, direction: Literal["inbound", "outbound"]) -> bool:
        is_full = len(self._by_peer.get(peer, ())) >= config.CONNECTIONS_PER_PEER_MAX
        if is_full or peer == self.identity.peer_id:
            return False
        return self.gate.allow_peer(peer, direction)

    def _add(self, connection: HostConnection) -> None:
        items = self._by_peer.setdefault(connection.peer, [])
        items.append(connection)
        self._in_order = None
        if len(items) > 1:
            self._look_again(connection.peer)
        self._feed.publish(ConnectionEvent(kind="opened", connection=connection))

    def removed(self, connection: HostConnection) -> None:
        """Forget a connection at the moment it ends; its handlers may still be tidying up."""
        items = self._by_peer.get(connection.peer, [])
        if connection not in items:
            return
        items.remove(connection)
        if not items:
            del self._by_peer[connection.peer]
        self._in_order = None
        reason = str(connection.error or "")
        event = ConnectionEvent(kind="closed", connection=connection, reason=reason)
        self._feed.publish(event)

    def _look_again(self, peer: PeerId) -> None:
        self.machine.world.calendar.post(trio.current_time() + RETIRE_PAUSE_S, self._retire, peer)

    def _retire(self, peer: PeerId) -> None:
        """Close the superseded connections of a peer once no stream is on them."""
        best = self.connection_to(peer)
        items = self._by_peer.get(peer, [])
        if best is None or len(items) < 2:
            return
        for connection in list(items):
            # Of several that one peer initiated only that peer closes the older ones.
            is_ours_to_close = connection.is_initiator or (
                self._initiator(best) != self._initiator(connection)
            )
            if connection is not best and is_ours_to_close and not connection.stream_count:
                connection.close()
        self._look_again(peer)

    def _initiator(self, connection: HostConnection) -> PeerId:
        return self.identity.peer_id if connection.is_initiator else connection.peer

    def _connections(self) -> list[HostConnection]:
        if self._in_order is None:
            self._in_order = [
                item for peer in sorted(self._by_peer) for item in self._by_peer[peer]
            ]
        return self._in_order

    # Streams ---------------------------------------------------------------------

    def set_handler(
        self, protocol: ProtocolId, handler: StreamHandler, *, allow_limited: bool = False
    ) -> None:
        """Serve a protocol's inbound streams; there are no limited paths here to allow it on."""
        if protocol in self._handlers:
            raise ConfigError(f"{protocol} already has a handler")
        self._handlers[protocol] = handler

    async def open_stream(
        self,
        peer: PeerId,
        protocols: Sequence[ProtocolId],
        *,
        allow_limited: bool = False,
        priority: Priority = Priority.CONTROL,
    ) -> Stream:
        connection = self.connection_to(peer)
        if connection is None:
            raise ConnectionLost(f"{peer} is not connected")
        stream = connection.open_stream(tuple(protocols), priority)
        if len(protocols) == 1:
            await trio.lowlevel.checkpoint()
            return stream
        try:
            with trio.fail_after(config.STREAM_NEGOTIATION_TIMEOUT_S):
                await stream.wait_agreed()
        except trio.TooSlowError:
            stream.reset()
            raise PeerTimeout(f"{peer} did not agree on a protocol in time") from None
        except BaseException:
            stream.reset()
            raise
        return stream

    def choose(self, peer: PeerId, protocols: Sequence[ProtocolId]) -> ProtocolId | None:
        """Return the first of a peer's protocols that is served to it, None if none is."""
        for protocol in protocols:
            if protocol in self._handlers and self.gate.allow_stream(peer, protocol):
                return protocol
        return None

    def serve(self, stream: HostStream) -> None:
        """Run the handler of an inbound stream."""
        assert self._nursery is not None
        stream.scope = trio.CancelScope()
        self._nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: HostStream) -> None:
        assert stream.scope is not None
        try:
            with self._containment.around(stream), stream.scope:
                await self._handlers[stream.protocol](stream)
                await stream.finish()
        finally:
            stream.connection.release(stream)

    def _running(self) -> trio.Nursery:
        if self._nursery is None or self._is_closed:
            raise LocalProtocolError("the host is not running")
        return self._nursery
