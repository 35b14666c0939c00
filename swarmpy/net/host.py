"""The native host: listens and dials, keeps connections to peers, answers identify and ping.

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
from swarmpy.net.addresses import Interfaces, expanded, observed
from swarmpy.net.admission import Admission
from swarmpy.net.connection import NativeConnection
from swarmpy.net.dialing import Dials
from swarmpy.net.events import EventFeed
from swarmpy.net.limited import LimitedStream
from swarmpy.net.paths import Paths
from swarmpy.net.peer_info import IDENTIFY, IDENTIFY_PUSH, PING, PeerInfo
from swarmpy.net.router import Router
from swarmpy.net.secured import Scratch
from swarmpy.net.suspend import ClockWatch
from swarmpy.net.table import ConnectionTable
from swarmpy.net.upgrade import upgrade
from swarmpy.proto import multiaddr
from swarmpy.proto.identify import IdentifyInfo
from swarmpy.proto.multistream import Dialer
from swarmpy.proto.noise import StaticKey

logger = logging.getLogger(__name__)

PUSH_PAUSE_S = 0.05
"""Changes this close together are told to the peers at once."""


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
            wall_time: Dates the signed peer record in identify, and shows that the machine slept;
                without it no record is sent and no sleep is noticed.
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
        self._admission = Admission(self._table, local=identity.peer_id, gate=lambda: self.gate)
        self._handshakes = self._admission.handshakes
        self._paths = Paths(self._table)
        places = trio.CapacityLimiter(config.DIALS_MAX)
        self._dials = Dials(self._dial_one, self._keep, places=places)
        self._feed = EventFeed()
        self._listeners: list[Listener] = []
        self._interfaces = Interfaces(network.interface_addresses)
        self._nursery: trio.Nursery | None = None
        self._is_closed = False
        self._changed = trio.Event()
        self._wall_time = wall_time
        self._on_clock_jump: list[Callable[[float], None]] = []
        self._info = PeerInfo(
            identity,
            agent=agent,
            random=random,
            addresses=lambda: self.addresses,
            protocols_for=self._router.protocols_for,
            wall_time=wall_time,
        )
        self._router.set_handler(IDENTIFY, self._info.answer, allow_limited=True)
        self._router.set_handler(IDENTIFY_PUSH, self._info.take_push, allow_limited=True)
        self._router.set_handler(PING, self._info.answer_ping, allow_limited=True)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the host until `close` or cancellation; then all its connections are closed.

        Started once; `nursery.start(host.run)` returns when it may listen and dial.
        """
        if self._nursery is not None or self._is_closed:
            raise LocalProtocolError("a host runs once")
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                nursery.start_soon(self._push_changes)
                nursery.start_soon(self._paths.renew_forever, self._redial)
                if self._wall_time is not None:
                    nursery.start_soon(ClockWatch(self._wall_time, self._clock_jumped).run)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self.close()  # before the last task ends: nothing is started in a closed nursery

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
        listened = [listener.address for listener in self._listeners]
        return expanded(listened, self._interfaces)

    @property
    def observed_addresses(self) -> Sequence[Address]:
        """Addresses at which connected peers see this node, the most often seen first; bounded.

        Claims, not facts: dial back before believing one.
        """
        return observed(self._info.observations(), [item.address for item in self._listeners])

    async def wait_observed(self, *, after: Sequence[Address] = ()) -> Sequence[Address]:
        """Wait until the observed addresses are other than `after`, and return them."""
        await trio.lowlevel.checkpoint()
        while tuple(found := self.observed_addresses) == tuple(after):
            await self._info.wait_news()
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

    def on_clock_jump(self, callback: Callable[[float], None]) -> None:
        """Call back when the machine slept or its clock was set, with the seconds of the jump.

        Connections are probed by then; what else rests on time is for whoever calls this.
        """
        self._on_clock_jump.append(callback)

    def _clock_jumped(self, jump_s: float) -> None:
        """Ask every peer for a sign of life: those that gave this node up say so at once."""
        for connection in self._table.all():
            connection.probe()
        for callback in self._on_clock_jump:
            callback(jump_s)

    async def listen(self, address: Address) -> Address:
        """Listen on an address and return it with the real port.

        Raises:
            ConfigError: The address is malformed or taken.
        """
        self._running()
        listener = await self._network.listen(address)
        try:
            nursery = self._running()
        except LocalProtocolError:
            listener.close()
            raise
        self._listeners.append(listener)
        nursery.start_soon(self._accept, listener)
        self._changed.set()
        return listener.address

    # Dialling --------------------------------------------------------------------

    async def dial(self, peer: PeerId, addresses: Sequence[Address]) -> NativeConnection:
        await trio.lowlevel.checkpoint()  # whoever is cancelled together with the host ends here
        nursery = self._running()
        if peer == self.identity.peer_id:
            raise DialFailed("that is this node itself")
        connection = self._table.best(peer, allow_limited=False)
        if connection is not None:
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
        connection = await self._upgrade(byte_stream, "initiator", peer)
        self._admission.check(connection)
        return connection

    async def _redial(self, peer: PeerId, address: Address) -> None:
        self._keep(await self._dial_one(peer, address))

    async def adopt(
        self,
        byte_stream: ByteStream,
        *,
        role: Literal["initiator", "responder"],
        expected_peer: PeerId | None = None,
        path: Literal["direct", "relayed"] = "direct",
        limit: int | None = None,
    ) -> NativeConnection:
        try:
            self._running()
            self._ask_gate(byte_stream.remote_address, role, expected_peer)
        except BaseException:
            byte_stream.close()
            raise
        if limit is not None:
            byte_stream = LimitedStream(byte_stream, bytes_max=limit)
        if role == "initiator":
            connection = await self._upgrade(byte_stream, role, expected_peer)
        else:
            connection = await self._respond(byte_stream, expected_peer)
        connection.path, connection.limit = path, limit
        self._admission.check(connection)
        self._keep(connection)
        return connection

    def _ask_gate(self, remote: Address, role: str, expected_peer: PeerId | None) -> None:
        """Ask what is asked of a dial where the peer is chosen here, else what a stranger is."""
        if role == "initiator" and expected_peer is not None:
            is_allowed = self.gate.allow_dial(expected_peer, remote)
        else:
            is_allowed = self.gate.allow_address(remote)
        if not is_allowed:
            raise DialFailed(f"the gate forbids a connection with {remote}")

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
            if self._admission.admits(byte_stream.remote_address):
                self._tasks.start_soon(self._serve_inbound, byte_stream)
            else:
                byte_stream.close()

    async def _serve_inbound(self, byte_stream: ByteStream) -> None:
        try:
            connection = await self._respond(byte_stream, None)
            self._admission.check(connection)
        except (NetworkError, ProtocolError) as error:
            fields = {"remote": byte_stream.remote_address, "error": str(error)}
            logger.debug("handshake.failed", extra=fields)
            return
        if self._is_closed:
            connection.close()
            return
        self._add(connection)
        await self._run_connection(connection)

    async def _respond(
        self, byte_stream: ByteStream, expected_peer: PeerId | None
    ) -> NativeConnection:
        """Answer a handshake, in one of the places there are for that."""
        with self._handshakes.admit(byte_stream.remote_address):
            return await self._upgrade(byte_stream, "responder", expected_peer)
        raise DialFailed("newer handshakes took the place of this one")

    async def _upgrade(
        self,
        byte_stream: ByteStream,
        role: Literal["initiator", "responder"],
        expected_peer: PeerId | None,
    ) -> NativeConnection:
        return await upgrade(
            byte_stream,
            role=role,
            static=self._static,
            random=self._random,
            scratch=self._scratch,
            expected_peer=expected_peer,
            timeout_s=self._handshake_timeout_s,
        )

    # Connections -----------------------------------------------------------------

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
        self._tasks.start_soon(self._paths.retire, connection.peer)
        await connection.run(self._router.serve)

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
        self._router.set_handler(protocol, handler, allow_limited=allow_limited)
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
            ConnectionLost: The peer is not connected, or by a limited path alone.
            RemoteProtocolError: The peer speaks none of the protocols.
            PeerTimeout: It did not answer.
        """
        connection = self._table.best(peer, allow_limited=allow_limited)
        if connection is None:
            is_limited = self._table.best(peer) is not None
            how = "connected by a limited path alone" if is_limited else "not connected"
            raise ConnectionLost(f"{peer} is {how}")
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
