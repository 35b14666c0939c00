"""The host: authenticated streams to peers, and who is let in."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NewType

import trio

from swarmpy.abc.network import Address, ByteStream
from swarmpy.identity import Identity, PeerId

ProtocolId = NewType("ProtocolId", str)
"""A protocol's name on the wire, "/swarmpy/pipeline/1"."""


class Priority(enum.IntEnum):
    """Classes in which a connection's writer serves streams, first to last."""

    CONTROL = 0
    DECODE = 1
    PREFILL = 2
    BULK = 3


class Connection(ABC):
    """An authenticated, encrypted connection to one peer."""

    peer: PeerId
    direction: Literal["inbound", "outbound"]
    path: Literal["direct", "relayed"]
    limit: int | None
    """Bytes the path may carry in all, None where it is unlimited. A limited connection carries
    only streams that were opened and handlers that were set with `allow_limited`."""
    local_address: Address
    remote_address: Address
    rtt_s: float | None
    """Smoothed round trip in seconds, None before the first measurement."""
    channel_binding: bytes | None
    """The Noise handshake hash (32 bytes): equal at both ends of this connection alone."""

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether streams can still be opened."""

    @property
    @abstractmethod
    def heard_s(self) -> float:
        """When anything was last heard from the peer (`trio.current_time`): a sign of life."""

    @property
    @abstractmethod
    def stream_count(self) -> int:
        """Streams open now, in either direction: what would be lost with the connection."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection and all its streams now."""


class Stream(ABC):
    """One two-way stream to a peer, by one protocol."""

    connection: Connection
    protocol: ProtocolId

    @property
    def peer(self) -> PeerId:
        return self.connection.peer

    @abstractmethod
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, waiting for the receiver's window.

        A cancelled call leaves only this stream undefined: reset it.

        Raises:
            StreamReset: The peer reset the stream, or it was closed here.
            ConnectionLost: The connection broke.
        """

    def send_nowait(self, data: bytes) -> bool:
        """Send a message if nothing stands in its way: a window, another sender, a full line.

        Returns:
            Whether it was taken, all of it. If not, nothing was, and `send_all` will wait, or tell
            what is wrong. A stream that cannot do this never takes anything; this one does not.
        """
        del data
        return False

    @abstractmethod
    async def receive_some(self, bytes_max: int | None = None) -> bytes:
        """Return the next bytes, b"" once the peer has closed its side cleanly.

        Raises:
            StreamReset: The peer reset the stream, or it was reset here.
            ConnectionLost: The connection broke; never mistaken for a clean end.
        """

    @abstractmethod
    async def close_write(self) -> None:
        """Say that no more bytes follow; receiving goes on."""

    @abstractmethod
    def reset(self) -> None:
        """Give up both directions at once; the peer is told."""


StreamHandler = Callable[[Stream], Awaitable[None]]
"""Serves one inbound stream. Its error resets the stream; its return closes what is still open."""


class Gate:
    """Who may connect and what they may ask; asked four times, and when full. This lets all in."""

    def allow_dial(self, peer: PeerId, address: Address) -> bool:
        """Before a dial."""
        return True

    def allow_address(self, address: Address) -> bool:
        """At accept, when only the remote address is known."""
        return True

    def allow_peer(self, peer: PeerId, direction: Literal["inbound", "outbound"]) -> bool:
        """After the handshake, when the peer is proven."""
        return True

    def allow_stream(self, peer: PeerId, protocol: ProtocolId) -> bool:
        """Per inbound stream, before its handler runs."""
        return True

    def may_drop(self, peer: PeerId) -> bool:
        """Whether a connection to the peer may be closed to make room in a full node."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionEvent:
    """A connection was opened or closed."""

    kind: Literal["opened", "closed"]
    connection: Connection
    reason: str = ""


class Host(ABC):
    """How a node reaches peers: one identity, many connections, streams by protocol."""

    identity: Identity
    gate: Gate

    @abstractmethod
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the host until `close` or cancellation; then all its connections are closed.

        Started once; `nursery.start(host.run)` returns when it may listen and dial.
        """

    @property
    @abstractmethod
    def addresses(self) -> Sequence[Address]:
        """Addresses others can dial, each listened one with 0.0.0.0 expanded."""

    @property
    @abstractmethod
    def connections(self) -> Sequence[Connection]:
        """Open connections in PeerId order."""

    @abstractmethod
    def connection_to(self, peer: PeerId) -> Connection | None:
        """The best open connection to a peer, one with a limited path where there is no other."""

    @abstractmethod
    async def listen(self, address: Address) -> Address:
        """Listen on an address and return it with the real port."""

    @abstractmethod
    async def dial(self, peer: PeerId, addresses: Sequence[Address]) -> Connection:
        """Return a connection to the peer: an open one, else the first address that answers.

        A connection whose path is limited does not count: a better one is dialled for.

        Raises:
            DialFailed: No address answered.
            HandshakeFailed: Whoever answered is not that peer.
        """

    @abstractmethod
    async def adopt(
        self,
        byte_stream: ByteStream,
        *,
        role: Literal["initiator", "responder"],
        expected_peer: PeerId | None = None,
        path: Literal["direct", "relayed"] = "direct",
        limit: int | None = None,
    ) -> Connection:
        """Make a connection of a byte stream that came about elsewhere, and keep it.

        A relayed circuit is one more byte stream, and a punched socket may be responder although it
        dialled; so the role is the caller's to say. The byte stream is closed on any error.

        Args:
            expected_peer: Who must be at the other end; anybody else is refused.
            limit: Bytes the path may carry in all, None where it is unlimited.

        Raises:
            HandshakeFailed: The other side is not the expected peer, or proved nothing.
            DialFailed: The gate or a limit forbids the connection.
            ConnectionLost: The byte stream ended.
            PeerTimeout: The other side was silent or slow.
        """

    @abstractmethod
    async def open_stream(
        self,
        peer: PeerId,
        protocols: Sequence[ProtocolId],
        *,
        allow_limited: bool = False,
        priority: Priority = Priority.CONTROL,
    ) -> Stream:
        """Open a stream to a connected peer by the first protocol it speaks.

        With one protocol the negotiation is lazy and costs no round trip. It takes the best path: a
        direct one, else a relayed one; one with a byte limit only with `allow_limited`.

        Raises:
            ConnectionLost: The peer is not connected, or by a limited path alone.
            RemoteProtocolError: The peer speaks none of the protocols.
        """

    @abstractmethod
    def set_handler(
        self, protocol: ProtocolId, handler: StreamHandler, *, allow_limited: bool = False
    ) -> None:
        """Serve a protocol's inbound streams with `handler`, from now on.

        Raises:
            ConfigError: The protocol already has a handler.
        """

    @abstractmethod
    def connection_events(self) -> AsyncIterator[ConnectionEvent]:
        """Iterate over connections opened and closed from now on (bounded: the oldest drop out)."""

    def on_clock_jump(self, callback: Callable[[float], None]) -> None:
        """Call back when the machine slept or its clock was set, with the seconds of the jump.

        By then the connections are being probed; what else rests on time is the caller's to check.
        A host that does not watch the clocks never calls; this one does not.
        """
        del callback

    @abstractmethod
    def close(self) -> None:
        """Close all connections and listeners now."""
