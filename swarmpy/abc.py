"""What may be implemented: the contracts between swarmpy and the world, and between its layers.

Networks give byte streams, hosts give authenticated streams to peers, engines compute rows, sources
find peers and models. Production, simulation and other people's extensions implement these; nothing
else in swarmpy is meant to be subclassed.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NewType

import trio

from swarmpy.identity import Identity, PeerId
from swarmpy.proto.tensor import Hidden, Tensor, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    TokenIds = npt.NDArray[np.int32]

NowSeconds = NewType("NowSeconds", float)
"""Monotonic seconds (`trio.current_time`): deadlines, leases, round trips. Never on the wire."""

WallSeconds = NewType("WallSeconds", float)
"""Unix seconds: signatures and expiry. Never used for waiting."""

Address = NewType("Address", str)
"""A multiaddr as text, "/ip4/192.0.2.1/tcp/4001"."""

ProtocolId = NewType("ProtocolId", str)
"""A protocol's name on the wire, "/swarmpy/pipeline/1"."""


# The network: byte streams by address ---------------------------------------


class ByteStream(ABC):
    """A two-way stream of bytes, shaped like a non-blocking socket.

    Sending and receiving are synchronous so that no cancellation can fall between encrypting a
    frame and handing it on; only waiting is asynchronous.
    """

    local_address: Address
    remote_address: Address

    @abstractmethod
    def send_nowait(self, data: memoryview) -> int:
        """Take as many bytes as fit now and return their count, 0 if none do.

        Raises:
            ConnectionLost: The stream is broken.
        """

    @abstractmethod
    async def wait_writable(self) -> None:
        """Wait until `send_nowait` may take bytes again, or the stream is broken or closed."""

    def limit_unsent(self, bytes_max: int) -> None:
        """Take no more than about `bytes_max` that could not be sent yet; a hint, here ignored.

        What was taken cannot be overtaken by anything more urgent, so a slow link is given little.
        """
        del bytes_max

    @abstractmethod
    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        """Read into `buffer` what is there; return its count, 0 at a clean end, None if none yet.

        Raises:
            ConnectionLost: The stream is broken.
        """

    @abstractmethod
    async def wait_readable(self) -> None:
        """Wait until `receive_into_nowait` will not return None, or for `wake_reader`."""

    @abstractmethod
    def wake_reader(self) -> None:
        """Let who is in `wait_readable` wait no longer, though nothing came."""

    @abstractmethod
    def close(self) -> None:
        """Close both directions at once and wake all waiters; repeated calls do nothing."""


class Listener(ABC):
    """A listening address."""

    address: Address
    """The address with the port really bound."""

    @abstractmethod
    async def accept(self) -> ByteStream:
        """Wait for the next inbound byte stream; survives running out of file descriptors."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening."""


class Network(ABC):
    """The seam under the host: production has TCP here, simulation a simulated network."""

    @abstractmethod
    async def listen(self, address: Address) -> Listener:
        """Listen on an address; port 0 picks a free one.

        Raises:
            ConfigError: The address is malformed or taken.
        """

    @abstractmethod
    async def dial(self, address: Address) -> ByteStream:
        """Connect to an address.

        Raises:
            DialFailed: Nobody answers there.
        """

    @abstractmethod
    def interface_addresses(self) -> Sequence[str]:
        """IP literals of this machine's interfaces, loopback last; to expand 0.0.0.0."""


# The host: authenticated streams to peers -----------------------------------


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


# Discovery ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """Somebody claims that a peer can be reached somewhere; believed only once dialled."""

    peer: PeerId
    addresses: tuple[Address, ...]
    source: str
    """The source's name: "cache", "mdns", "invite", "announce"."""


class DiscoverySource(ABC):
    """One way to hear of peers."""

    name: str

    @abstractmethod
    async def run(self, see: Callable[[Sighting], None]) -> None:
        """Report sightings until cancelled; a source that cannot work says so and returns."""


# Engines: rows and slots ----------------------------------------------------


class StateKind(enum.StrEnum):
    """What a layer range keeps between steps, and so whether it can be cut back."""

    KV = "kv"
    """Keys and values by position: `truncate` to any position works."""
    ROLLING = "rolling"
    """A window over the last positions: cut back only while nothing was overwritten."""
    RECURRENT = "recurrent"
    """A state that only goes forward: use `snapshot` and `restore`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What an engine knows of a model before it loads any of it. Sizes in bytes, as computed in."""

    engine: str
    build_id: str
    """Engine's part of the exactness class: library versions, dtype, BLAS kernel."""
    architecture: str
    layer_count: int
    hidden_size: int
    vocabulary_size: int
    context_max: int
    cuts: tuple[int, ...]
    """Allowed cuts k, 0 < k < layer_count: one shard ends before layer k, another starts there."""
    wire_specs: Mapping[int, tuple[TensorSpec, ...]]
    """By cut: the tensors that cross it."""
    token_layers: tuple[int, ...]
    """Layers whose output depends on the token ids themselves; layer 0 always."""
    layer_weight_bytes: tuple[int, ...]
    embedding_weight_bytes: int
    head_weight_bytes: int
    """Weights only the last stage needs, final norm included; with tied embeddings they are the
    embedding's, held again by the last stage unless it is also the first."""
    is_tied: bool
    kv_bytes_per_token: tuple[int, ...]
    """By layer."""
    state_bytes: tuple[int, ...]
    """By layer: state that does not grow with tokens, per slot."""
    state_kind: StateKind
    slots_max: int
    """1 where the architecture's state cannot live in slots: it runs one session at a time."""
    head_cost_layers: float
    """Cost of final norm and head in units of one average layer, for balancing."""

    def needs_token_ids(self, start: int, end: int) -> bool:
        """Whether what layers [start, end) give depends on token ids beyond the hidden state."""
        return any(start <= layer < end for layer in self.token_layers)

    def weight_bytes(self, start: int, end: int) -> int:
        """Bytes of weights that layers [start, end) keep resident, embedding and head included."""
        size = sum(self.layer_weight_bytes[start:end])
        if start == 0:
            size += self.embedding_weight_bytes
        if end == self.layer_count:
            size += self.head_weight_bytes
            if self.is_tied and start == 0:
                size -= min(self.embedding_weight_bytes, self.head_weight_bytes)
        return size


class Want(enum.StrEnum):
    """What a row's sender needs back."""

    NOTHING = "nothing"
    HIDDEN = "hidden"
    LAST_LOGITS = "last_logits"
    ALL_LOGITS = "all_logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One chunk of one slot: `count` tokens from `position` (index in the sequence, from 0).

    `token_ids` (T,) int32 where the range needs them, else None; `hidden` the state before layer
    `start`, None at the first stage. Both come only where an architecture needs both.
    """

    slot: int
    position: int
    count: int
    token_ids: TokenIds | None
    hidden: Hidden | None
    want: Want


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a row gave: hidden state, logits (V,) or (T, V) float32, nothing, or an error's text."""

    slot: int
    hidden: Hidden | None = None
    logits: Tensor | None = None
    error: str = ""


class Shard(ABC):
    """Layers [start, end) of a model in memory, with a fixed number of slots.

    All methods are synchronous and called from one thread.
    """

    weight_bytes: int
    """Resident bytes of weights as computed in."""
    exactness: str
    """The full exactness class: two shards with equal range and class give equal bits."""

    @abstractmethod
    def step(self, rows: Sequence[Row]) -> Sequence[Output]:
        """Run one batch of rows, one chunk of one slot each, and return one output a row, in order.

        A row whose position lies before the slot's end cuts the slot back first; a gap is an error.
        An error in one row leaves the others untouched.
        """

    @abstractmethod
    def truncate(self, slot: int, position: int) -> None:
        """Forget the slot's state from `position` on.

        Raises:
            RowError: The state cannot be cut back there.
        """

    @abstractmethod
    def snapshot(self, slot: int) -> int:
        """Keep the slot's present state, where `truncate` cannot work; return a number for it."""

    @abstractmethod
    def restore(self, slot: int, snapshot: int) -> None:
        """Return the slot to a snapshot, and forget the snapshot."""

    @abstractmethod
    def export_state(self, slot: int, start: int, end: int) -> Mapping[str, Tensor]:
        """Return the slot's state of positions [start, end) as named tensors."""

    @abstractmethod
    def import_state(self, slot: int, start: int, end: int, state: Mapping[str, Tensor]) -> None:
        """Put an exported state into a slot that ends at `start`."""

    @abstractmethod
    def free(self, slot: int) -> None:
        """Forget everything the slot holds."""

    @abstractmethod
    def close(self) -> None:
        """Release the memory."""


class Engine(ABC):
    """Runs layer ranges of models. Found through the entry-point group `swarmpy.engines`."""

    name: str
    in_process: bool = False
    """True only for engines that cannot crash, hang or use real memory (the test engine): they run
    in the node itself. All others run in a child process."""
    progress: Callable[[Progress], None] | None = None
    """Set by whoever wants to hear how far a `load` is; an engine may call it from there."""

    @abstractmethod
    def inspect(self, folder: Path) -> Inspection:
        """Read a model's headers, and only those.

        Args:
            folder: The model's source files (safetensors folder or one GGUF), already verified.

        Raises:
            ModelRefused: The files ask for what a model must not do, or contradict themselves.
        """

    @abstractmethod
    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        """Load layers [start, end), reading only their tensors.

        Args:
            slots: Sessions whose state the shard can hold at a time.
            context: Most tokens of one slot.
            exact: Make a sequence's bits independent of its neighbours (design: exactness classes).

        Raises:
            DoesNotFit: The weights and slots exceed the memory that is left.
            ModelRefused: As for `inspect`.
        """


# Models ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a long task is: `done` of `total` in `unit` (total 0: not known yet)."""

    step: str
    done: int
    total: int
    unit: str = "bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLabel:
    """What a source calls one of its models."""

    name: str
    """As used in requests; made unique on this machine by whoever lists it."""
    display_name: str
    origin: str
    """Where it comes from, in words."""


class ModelSource(ABC):
    """One place models come from: a folder, a package index, later a hub or a peer."""

    name: str

    @abstractmethod
    def matches(self, model: str) -> bool:
        """Whether a model name as the user wrote it is this source's to resolve."""

    @abstractmethod
    def label(self, model: str) -> ModelLabel:
        """Return what a model that `matches` is called."""

    @abstractmethod
    async def fetch(self, model: str, into: Path, progress: Callable[[Progress], None]) -> Path:
        """Bring the model's files into the machine-wide cache (or leave them where they are).

        Args:
            into: The machine-wide cache folder.

        Returns:
            The folder or GGUF file with the complete, verified source files.

        Raises:
            ModelNotFound: The source has no such model.
            DownloadFailed: The files could not be fetched or did not verify.
        """
