"""One Noise and Yamux connection of a py-libp2p host, as the node sees it.

Three methods of the py-libp2p objects are wrapped on the instance while the node uses it: reading,
which shows signs of life, and the two ways a connection ends, because py-libp2p then forgets what
was received and tells a lost connection from a clean end no more.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal, TypeVar

import trio
from libp2p.abc import ConnectionType
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.yamux import yamux

from swarmpy import config
from swarmpy.abc import Address, Connection
from swarmpy.errors import ConnectionLost, PeerTimeout
from swarmpy.identity import parse_peer_id
from swarmpy.net.connection import HANDLER_GRACE_S
from swarmpy.net.peer_info import IDENTIFY, IDENTIFY_PUSH, PING
from swarmpy.proto import multiaddr

if TYPE_CHECKING:
    from swarmpy.plugins.libp2p.stream import LibP2PStream

T = TypeVar("T")

RELAYED_BYTES_MAX = 128 * 1024
"""What a relayed connection is taken to carry: py-libp2p does not tell a public relay's limit."""

OF_LIBP2P = frozenset({None, IDENTIFY, IDENTIFY_PUSH, PING})
"""Protocols of streams for whose sake no connection is kept."""

UNKNOWN = Address("/ip4/0.0.0.0/tcp/0")
"""Where py-libp2p cannot tell an address."""


def is_usable(swarm_conn: SwarmConn) -> bool:
    """Whether a connection is Noise and Yamux, the one kind a node uses, and open."""
    muxed = swarm_conn.muxed_conn
    return (
        isinstance(muxed, yamux.Yamux)
        and isinstance(muxed.secured_conn, SecureSession)
        and hasattr(muxed.secured_conn.conn, "noise_state")
        and not muxed.event_shutting_down.is_set()
    )


class LibP2PConnection(Connection):
    """A connection of the application's host that the node uses too.

    Closing it ends the node's use. The connection itself is closed only if the node dialled it and
    nothing of the application runs on it, or for a breach (`close_for`).
    """

    limit: int | None
    path: Literal["direct", "relayed"]

    def __init__(
        self,
        swarm_conn: SwarmConn,
        *,
        on_closed: Callable[[LibP2PConnection], None],
        is_dialled: bool,
    ) -> None:
        """Begin to use a usable connection.

        Args:
            on_closed: Called once, at the moment it ends for the node.
            is_dialled: Whether the node made it; otherwise the application, or the peer.
        """
        muxed = swarm_conn.muxed_conn
        self.swarm_conn = swarm_conn
        self.muxed = muxed
        self.peer = parse_peer_id(str(muxed.peer_id))
        self.direction = "outbound" if muxed.is_initiator else "inbound"
        is_relayed = swarm_conn.get_connection_type() == ConnectionType.RELAYED
        self.path = "relayed" if is_relayed else "direct"
        self.limit = RELAYED_BYTES_MAX if is_relayed else None
        self.remote_address = _address(muxed.get_remote_address())
        self.local_address = _local_address(muxed.secured_conn)
        self.channel_binding = bytes(muxed.secured_conn.conn.noise_state.get_handshake_hash())
        self.streams: set[LibP2PStream] = set()
        self.inbound_count = 0
        self._handlers: set[trio.CancelScope] = set()
        self.on_closed = on_closed
        self._is_dialled = is_dialled
        self._heard_s = trio.current_time()
        self._error: Exception | None = None
        self._watch()

    def __repr__(self) -> str:
        state = "closed" if self._error else "open"
        return f"<{self.direction} py-libp2p connection to {self.peer}, {state}>"

    # For users -----------------------------------------------------------------

    @property
    def rtt_s(self) -> float | None:  # type: ignore[override]
        return self.muxed.rtt() or None

    @property
    def is_open(self) -> bool:
        return self._error is None and not self.muxed.event_shutting_down.is_set()

    @property
    def heard_s(self) -> float:
        return self._heard_s

    @property
    def stream_count(self) -> int:
        return len(self.streams)

    @property
    def error(self) -> Exception | None:
        """Why it ended for the node, None while it lives."""
        return self._error

    def close(self) -> None:
        is_needed = self._carries_the_applications_streams()
        really = self._is_dialled and not is_needed
        self._let_go(ConnectionLost("it was closed here"), really=really)

    def close_for(self, error: Exception) -> None:
        """Close because of an error of the peer's; the application loses it too."""
        self._let_go(error, really=True)

    # For streams ---------------------------------------------------------------

    def raise_if_lost(self) -> None:
        """Raise `ConnectionLost`, naming what ended the connection, if it has ended."""
        if self._error is None and self.muxed.event_shutting_down.is_set():
            self._end(ConnectionLost("the peer closed it"))
        if self._error is not None:
            raise ConnectionLost(f"connection to {self.peer}: {self._error}") from self._error

    def start(self, work: Callable[[], Awaitable[object]]) -> None:
        """Do something in the application's host, which no cancellation of the node's may tear.

        py-libp2p writes a frame in several steps; cancelled between two of them, every later frame
        of the connection is unreadable. An error of the work ends the connection.
        """
        nursery = self.swarm_conn.swarm.background_nursery
        if nursery is None:
            self._end(ConnectionLost("the py-libp2p host is not running"))
            return

        async def run() -> None:
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the host
                self._end(ConnectionLost(f"{type(error).__name__}: {error}"))

        nursery.start_soon(run)

    async def open_net_stream(self) -> NetStream:
        """Open a stream of py-libp2p's; one that nobody waits for any more is reset.

        Raises:
            ConnectionLost: The connection has ended, or ended meanwhile.
        """
        opened: list[NetStream] = []
        is_wanted = True

        async def work() -> None:
            opened.append(await self.swarm_conn.new_stream())
            if not is_wanted:
                await opened[0].reset()

        try:
            await self.complete(work)
            self.raise_if_lost()
        except BaseException:
            is_wanted = False
            for net_stream in opened:
                self.start(net_stream.reset)
            raise
        return opened[0]

    async def complete(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something as `start` does, and wait for it; cancelled, it goes on all the same.

        Raises:
            ConnectionLost: It failed, or could not be begun.
        """
        done = trio.Event()
        results: list[T] = []

        async def run() -> None:
            try:
                results.append(await work())
            finally:
                done.set()

        self.start(run)
        if self._error is None:
            await done.wait()
        if not results:
            self.raise_if_lost()
            raise ConnectionLost(f"{self.peer}: the py-libp2p host stopped")
        return results[0]

    def handler_scope(self) -> trio.CancelScope:
        """Return a scope for an inbound stream's handler; it ends with the connection."""
        scope = trio.CancelScope()
        self._handlers.add(scope)
        return scope

    def handler_returned(self, scope: trio.CancelScope) -> None:
        """Forget the scope of a handler."""
        self._handlers.discard(scope)

    # Keeping watch -------------------------------------------------------------

    def look(self, now_s: float) -> None:
        """Give up on a peer that has been silent too long, and ask it for a sign of life."""
        if now_s - self._heard_s >= config.KEEPALIVE_TIMEOUT_S:
            timeout_s = config.KEEPALIVE_TIMEOUT_S
            self.close_for(PeerTimeout(f"nothing was heard for {timeout_s:.0f} s"))
            return
        self.start(self._ping)

    async def _ping(self) -> None:
        """Send a Yamux ping, whose answer py-libp2p measures as the round trip."""
        self.muxed._ping_id += 1
        self.muxed._ping_sent_time = trio.current_time()
        header = struct.pack(
            yamux.YAMUX_HEADER_FORMAT, 0, yamux.TYPE_PING, yamux.FLAG_SYN, 0, self.muxed._ping_id
        )
        await self.muxed._write_frame(header)

    def _watch(self) -> None:
        muxed, secured = self.muxed, self.muxed.secured_conn
        read, lose, close = secured.read, muxed._cleanup_on_error, muxed.close

        async def heard(size: int | None = None) -> bytes:
            data: bytes = await read(size)
            self._heard_s = trio.current_time()
            return data

        async def lost() -> None:
            self._end(ConnectionLost("the peer closed it"))
            await lose()

        async def closed(*arguments: int) -> None:
            self._end(ConnectionLost("it was closed here"))
            await close(*arguments)

        secured.read, muxed._cleanup_on_error, muxed.close = heard, lost, closed

    def _unwatch(self) -> None:
        for owner, name in (
            (self.muxed.secured_conn, "read"),
            (self.muxed, "_cleanup_on_error"),
            (self.muxed, "close"),
        ):
            vars(owner).pop(name, None)

    # The end -------------------------------------------------------------------

    def _carries_the_applications_streams(self) -> bool:
        own = {stream.net_stream for stream in self.streams}
        return any(
            item.get_protocol() not in OF_LIBP2P
            and item.muxed_stream.stream_id in self.muxed.streams
            for item in self.swarm_conn.streams - own
        )

    def _let_go(self, error: Exception, *, really: bool) -> None:
        if self._error is not None:
            return
        for stream in list(self.streams):
            if not really:
                stream.give_up()
        self._end(error)
        if really:
            nursery = self.swarm_conn.swarm.background_nursery
            if nursery is not None:
                nursery.start_soon(self.swarm_conn.close)

    def _end(self, error: Exception) -> None:
        """End it for the node: everybody who waits on it wakes and finds it ended."""
        if self._error is not None:
            return
        self._error = error
        self._unwatch()
        for stream in list(self.streams):
            stream.connection_ended()
        self.streams.clear()
        for scope in self._handlers:
            scope.deadline = trio.current_time() + HANDLER_GRACE_S
        self.on_closed(self)


def _address(endpoint: tuple[str, int] | None) -> Address:
    if endpoint is None:
        return UNKNOWN
    return Address(multiaddr.format_tcp(endpoint[0], endpoint[1]))


def _local_address(secured: SecureSession) -> Address:
    """Find the socket under a secured connection, and its own end."""
    layer: object = secured.conn.read_writer.read_write_closer
    while layer is not None:
        socket = getattr(layer, "socket", None)
        if socket is not None:
            try:
                host, port, *_ = socket.getsockname()
            except OSError:
                return UNKNOWN
            return _address((host, port))
        layer = getattr(layer, "stream", None)
    return UNKNOWN
