"""Yamux: many streams on one connection, each with its own window.

Sans-IO: decrypted bytes go in, events come out, and frames to send gather in `outbox`. Receive
windows are enforced: a peer that sends more than it was granted loses the connection. They grow for
readers that keep up, inside a budget that all sessions of a node share.
Spec: hashicorp yamux specification, libp2p specs, yamux; protocols/yamux.md.
"""

from __future__ import annotations

import math
import struct

import msgspec

from swarmpy.errors import LocalProtocolError, RemoteProtocolError, StreamReset
from swarmpy.proto.receive_budget import ReceiveBudget

PROTOCOL = "/yamux/1.0.0"

INITIAL_WINDOW_BYTES = 256 * 1024
"""Both directions of a stream start with this; the specification fixes it."""

FRAME_DATA_BYTES_MAX = 256 * 1024
"""Most data in one frame sent: an initial window. js-libp2p, go-libp2p and py-libp2p take that;
one header for four Noise frames is less work than one for each."""

WINDOW_BYTES_MAX = 4 * 1024 * 1024
"""Largest receive window: 1 Gbit/s over a round trip of 30 ms."""

WINDOW_BYTES_NEAR_MAX = 1024 * 1024
NEAR_RTT_S = 0.002
"""The same where round trips are shorter than this: it is 4 Gbit/s there, and a sender that is
faster than its reader keeps the whole window on its way. More of that than the processors' caches
hold costs both ends a third of their speed (`benchmarks/README.md`)."""

GROWTH_RTTS_MAX = 2.0
"""A window grows if half of it was read within this many round trips: then the sender waited for
it, or soon would. It stops at four times what the path holds."""

GROWTH_RTT_S_MIN = 0.001
"""Shorter round trips count as this: on a fast path what costs is waking up for every grant."""

WINDOW_IDLE_S = 10.0
"""A grown window of which not even half was read for so long goes back to the initial one."""

GROWTH_BYTES_MAX = 32 * 1024 * 1024
"""Growth of one session's windows: no peer takes more than an eighth of the budget."""

CONTROL_FRAMES_PER_SECOND_MAX = 20_000
"""Frames without data that a peer may send: ten thousand streams a second need no more, and a peer
that sends nothing else keeps a tenth of a core busy, not a whole one."""

HEADER_BYTES = 12

_DATA, _WINDOW, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
_FLAGS = _SYN | _ACK | _FIN | _RST
_UINT32_MAX = 2**32 - 1
_HEADER = struct.Struct("!BBHII")
_pack = _HEADER.pack
_unpack_from = _HEADER.unpack_from
_words_from = struct.Struct("!III").unpack_from


class StreamOpened(msgspec.Struct, frozen=True, gc=False):
    """The peer opened a stream."""

    stream_id: int


class DataReceived(msgspec.Struct, frozen=True, gc=False):
    """Bytes of a stream, in order; a frame may come in several pieces."""

    stream_id: int
    data: bytes


class WindowOpened(msgspec.Struct, frozen=True, gc=False):
    """The peer granted more window."""

    stream_id: int


class StreamEnded(msgspec.Struct, frozen=True, gc=False):
    """The peer will send no more on this stream (FIN)."""

    stream_id: int


class StreamWasReset(msgspec.Struct, frozen=True, gc=False):
    """The peer gave the stream up (RST), or its unread bytes were over the connection's budget."""

    stream_id: int
    by_peer: bool


class PongReceived(msgspec.Struct, frozen=True, gc=False):
    """The peer answered a ping."""

    value: int


class GoAwayReceived(msgspec.Struct, frozen=True, gc=False):
    """The peer takes no new streams; 0 says that all is well."""

    code: int


Event = (
    StreamOpened
    | DataReceived
    | WindowOpened
    | StreamEnded
    | StreamWasReset
    | PongReceived
    | GoAwayReceived
)


class _Stream:
    """What Yamux knows of one stream."""

    __slots__ = (
        "credit",
        "flags",
        "granted",
        "granted_s",
        "is_local_open",
        "is_remote_open",
        "receive_window",
        "unread",
        "unread_since",
        "window",
    )

    def __init__(self, flags: int, now_s: float) -> None:
        self.flags = flags
        """SYN or ACK until the first frame carried it."""
        self.window = INITIAL_WINDOW_BYTES
        """Bytes we may still send."""
        self.granted = INITIAL_WINDOW_BYTES
        """Bytes the peer may still send."""
        self.granted_s = now_s
        """When window was last granted."""
        self.receive_window = INITIAL_WINDOW_BYTES
        """Always `granted + unread + credit` while the peer may send."""
        self.credit = 0
        """Bytes read here and not yet granted anew; negative after the window shrank."""
        self.unread = 0
        self.unread_since = 0
        """Serial of the moment the oldest unread byte came."""
        self.is_local_open = True
        self.is_remote_open = True


class Yamux:
    """One connection's streams.

    Attributes:
        outbox: Frames to send; whoever sends empties it.
        rtt_s: The round trip as its user last measured it, None before; windows grow by it.
        now_s: When bytes were last received; set before they are handed over.
    """

    def __init__(
        self,
        *,
        is_initiator: bool,
        inbound_streams_max: int,
        unread_bytes_max: int,
        resets_per_second_max: int,
        budget: ReceiveBudget | None = None,
    ) -> None:
        """Start a session.

        Args:
            is_initiator: Whether this side dialled: it opens odd ids, the other even ones.
            inbound_streams_max: The peer's streams at a time; further ones are reset.
            unread_bytes_max: Unread bytes of all streams, besides what windows grew by; beyond,
                the stream with the oldest is reset.
            resets_per_second_max: Streams refused within a second before the peer is.
            budget: Shared with the node's other sessions; None: of its own.
        """
        self.outbox = bytearray()
        self.rtt_s: float | None = None
        self._control_since_s = -math.inf
        self._control_count = 0
        self.now_s = 0.0
        self._budget = ReceiveBudget() if budget is None else budget
        self._streams: dict[int, _Stream] = {}
        self._next_id = 1 if is_initiator else 2
        self._inbound: set[int] = set()
        self._inbound_parity = 0 if is_initiator else 1
        self._inbound_streams_max = inbound_streams_max
        self._resets_per_second_max = resets_per_second_max
        self._unread_bytes_max = unread_bytes_max
        self._unread = 0
        self._grown = 0  # what windows grew by, over all streams
        self._refused = 0
        self._refused_since_s = 0.0
        self._late = 0  # bytes that may still be on their way to streams given up here
        self._header = b""  # of a frame whose header is split over two Noise frames
        self._data_id = 0  # the stream of the data frame under way
        self._data_left = 0
        self._data_ends = False
        self._is_open = True

    @property
    def stream_count(self) -> int:
        """Streams open in at least one direction, or whose handler still runs."""
        return len(self._streams.keys() | self._inbound)

    @property
    def unread_bytes(self) -> int:
        """Bytes received and not yet read, over all streams."""
        return self._unread

    def is_known(self, stream_id: int) -> bool:
        """Whether a stream still has an open direction or unread bytes."""
        return stream_id in self._streams

    # Receiving ---------------------------------------------------------------

    def receive(self, data: bytes) -> list[Event]:
        """Take decrypted bytes, in pieces of any size, and return what they mean.

        Raises:
            RemoteProtocolError: A rule is broken; the connection cannot go on.
        """
        events: list[Event] = []
        if self._header:
            data = self._header + data
            self._header = b""
        offset, end = 0, len(data)
        while offset < end:
            if self._data_left:
                size = min(self._data_left, end - offset)
                self._take_data(data[offset : offset + size], events)
                offset += size
                continue
            if end - offset < HEADER_BYTES:
                self._header = data[offset:]
                break
            version, kind, flags, stream_id, value = _unpack_from(data, offset)
            offset += HEADER_BYTES
            if version or flags & ~_FLAGS:
                raise _broken(f"yamux version {version}, flags {flags:#x}")
            if kind != _DATA or not value:
                self._count_control()
            if kind == _DATA:
                self._take_data_header(flags, stream_id, value, events)
            elif kind == _WINDOW:
                self._take_window(flags, stream_id, value, events)
            else:
                self._take_session_frame(kind, flags, stream_id, value, events)
        return events

    def _count_control(self) -> None:
        if self.now_s >= self._control_since_s + 1.0:
            self._control_since_s, self._control_count = self.now_s, 0
        self._control_count += 1
        if self._control_count > CONTROL_FRAMES_PER_SECOND_MAX:
            raise _broken(f"over {CONTROL_FRAMES_PER_SECOND_MAX} frames without data in a second")

    def receive_whole(self, data: memoryview) -> int:
        """Take decrypted bytes if they are what most are: one data frame of an open stream, whole.

        Returns:
            The stream's id, its data following the header; 0 where nothing was taken, and `receive`
            must look closer.
        """
        size = len(data) - HEADER_BYTES
        if size <= 0 or self._data_left or self._header:
            return 0
        plain: int
        stream_id: int
        plain, stream_id, length = _words_from(data)
        if plain or length != size:
            return 0
        stream = self._streams.get(stream_id)
        if stream is None or not stream.is_remote_open:
            return 0
        if size > stream.granted or not self._has_room(size):
            return 0
        stream.granted -= size
        self._count_unread(stream, size)
        return stream_id

    def receive_more(self, size: int) -> int:
        """The same for `size` bytes in the middle of the data frame under way, without its end."""
        left = self._data_left - size
        if left < 0 or (self._data_ends and not left):
            return 0
        stream = self._streams.get(self._data_id)
        if stream is None or not self._has_room(size):
            return 0
        self._data_left = left
        self._count_unread(stream, size)
        return self._data_id

    def _has_room(self, size: int) -> bool:
        """Whether so many more unread bytes are within the bounds, without giving a stream up."""
        budget = self._budget
        is_within = self._unread + size <= self._unread_bytes_max
        return is_within and budget.unread_bytes + size <= budget.bytes_max

    def _count_unread(self, stream: _Stream, size: int) -> None:
        budget = self._budget
        if not stream.unread:
            budget.serial += 1
            stream.unread_since = budget.serial
        stream.unread += size
        self._unread += size
        budget.unread_bytes += size

    def _take_data_header(self, flags: int, stream_id: int, size: int, events: list[Event]) -> None:
        stream = self._find(flags, stream_id, events)
        if stream is None:
            # On its way when its stream was reset or refused: read past it, within its window.
            self._late -= size
            if self._late < 0:
                raise _broken(f"{size} bytes for stream {stream_id}, which is over")
        elif not stream.is_remote_open and size:
            raise _broken(f"data after the end of stream {stream_id}")
        elif size > stream.granted:
            raise _broken(f"{size} bytes on stream {stream_id}, {stream.granted} were granted")
        else:
            stream.granted -= size
        self._data_id, self._data_left = stream_id, size
        self._data_ends = bool(flags & _FIN)
        if flags & _RST:
            self._end_by_reset(stream_id, events)
        elif not size and self._data_ends:
            self._end_remote(stream_id, events)

    def _take_data(self, data: bytes, events: list[Event]) -> None:
        size = len(data)
        self._data_left -= size
        stream_id = self._data_id
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        self._count_unread(stream, size)
        events.append(DataReceived(stream_id, data))
        if self._data_ends and not self._data_left:
            self._end_remote(stream_id, events)
        while self._unread > self._unread_bytes_max + self._grown:
            self._shed(events)  # more than once: the oldest may have less than what just came
        if self._budget.unread_bytes > self._budget.bytes_max:
            self._budget.shed()

    def _take_window(self, flags: int, stream_id: int, value: int, events: list[Event]) -> None:
        stream = self._find(flags, stream_id, events)
        if stream is None:
            return
        if value:
            stream.window += value
            if stream.window > _UINT32_MAX:
                raise _broken(f"window of stream {stream_id} beyond 32 bits")
            events.append(WindowOpened(stream_id))
        if flags & _RST:
            self._end_by_reset(stream_id, events)
        elif flags & _FIN:
            self._end_remote(stream_id, events)

    def _take_session_frame(
        self, kind: int, flags: int, stream_id: int, value: int, events: list[Event]
    ) -> None:
        if stream_id:
            raise _broken(f"frame of kind {kind} on stream {stream_id}")
        if kind == _PING:
            if flags & _SYN:
                self.outbox += _pack(0, _PING, _ACK, 0, value)
            elif flags & _ACK:
                events.append(PongReceived(value))
        elif kind == _GO_AWAY:
            events.append(GoAwayReceived(value))
        else:
            raise _broken(f"yamux frame of kind {kind}")

    def _find(self, flags: int, stream_id: int, events: list[Event]) -> _Stream | None:
        """Return a frame's stream, opened if the frame says so; None for one that is gone."""
        if not flags & _SYN:
            if stream_id == 0 or (self._is_ours(stream_id) and stream_id >= self._next_id):
                raise _broken(f"frame for stream {stream_id}, which was never opened")
            return self._streams.get(stream_id)
        if stream_id == 0 or self._is_ours(stream_id):
            raise _broken(f"peer opened stream {stream_id}, an id of ours")
        if stream_id in self._streams or stream_id in self._inbound:
            raise _broken(f"peer opened stream {stream_id} twice")
        if not self._is_open or len(self._inbound) >= self._inbound_streams_max:
            self._refuse(stream_id)
            return None
        stream = self._streams[stream_id] = _Stream(_ACK, self.now_s)
        self._inbound.add(stream_id)
        events.append(StreamOpened(stream_id))
        return stream

    def _is_ours(self, stream_id: int) -> bool:
        return stream_id % 2 != self._inbound_parity

    def _refuse(self, stream_id: int) -> None:
        if self.now_s - self._refused_since_s >= 1.0:
            self._refused_since_s, self._refused = self.now_s, 0
        self._refused += 1
        self._late += INITIAL_WINDOW_BYTES
        if self._refused > self._resets_per_second_max:
            raise _broken(f"more than {self._resets_per_second_max} streams refused in a second")
        self.outbox += _pack(0, _WINDOW, _RST, stream_id, 0)

    def _end_remote(self, stream_id: int, events: list[Event]) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or not stream.is_remote_open:
            return
        stream.is_remote_open = False
        events.append(StreamEnded(stream_id))
        self._forget_if_ended(stream_id, stream)

    def _end_by_reset(self, stream_id: int, events: list[Event]) -> None:
        if stream_id in self._streams:
            self._forget(stream_id)
            events.append(StreamWasReset(stream_id, by_peer=True))

    def _shed(self, events: list[Event]) -> None:
        """Reset the stream whose unread bytes are the oldest."""
        _, stream_id = min(self.unread_streams())
        self.reset(stream_id)
        events.append(StreamWasReset(stream_id, by_peer=False))

    # Sending -----------------------------------------------------------------

    def open(self) -> int:
        """Open a stream and return its id; the SYN rides on its first frame.

        Raises:
            LocalProtocolError: All ids of this connection are used up, or it is closing.
        """
        if not self._is_open or self._next_id > _UINT32_MAX:
            raise LocalProtocolError("no more streams on this connection")
        stream_id = self._next_id
        self._next_id += 2
        self._streams[stream_id] = _Stream(_SYN, self.now_s)
        return stream_id

    def window(self, stream_id: int) -> int:
        """Return how many bytes may be sent on a stream now, 0 for one that cannot send."""
        stream = self._streams.get(stream_id)
        return stream.window if stream is not None and stream.is_local_open else 0

    def data_header(self, stream_id: int, size: int) -> bytes:
        """Take `size` bytes of window and return the header to send before that much data.

        Args:
            size: 1 to `min(window(stream_id), FRAME_DATA_BYTES_MAX)`.

        Raises:
            StreamReset: The stream is gone, or its sending side was closed.
        """
        stream = self._streams.get(stream_id)
        if stream is None or not stream.is_local_open:
            raise StreamReset(f"stream {stream_id} is closed for sending")
        if not 0 < size <= min(stream.window, FRAME_DATA_BYTES_MAX):
            raise LocalProtocolError(f"{size} bytes to send, window {stream.window}")
        stream.window -= size
        flags, stream.flags = stream.flags, 0
        return _pack(0, _DATA, flags, stream_id, size)

    def consumed(self, stream_id: int, size: int) -> bool:
        """Say that `size` received bytes were read: half a window later they are granted anew.

        Returns:
            Whether the stream is over, and forgotten.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return True
        stream.unread -= size
        self._unread -= size
        self._budget.unread_bytes -= size
        if stream.is_remote_open:
            stream.credit += size
            if stream.credit >= stream.receive_window // 2:
                self._grant(stream_id, stream)
            return False
        self._forget_if_ended(stream_id, stream)
        return not (stream.is_local_open or stream.unread)

    def put_back(self, stream_id: int, size: int) -> None:
        """Say that `size` bytes were not read after all: their reader handed them on."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._count_unread(stream, size)
            stream.credit -= size

    def shrink_idle(self, now_s: float) -> None:
        """Give back what windows grew by that have been of no use for `WINDOW_IDLE_S`.

        What was granted stays granted; but that much is then read without being granted anew.
        """
        if not self._grown:
            return
        for stream in self._streams.values():
            if now_s - stream.granted_s > WINDOW_IDLE_S:
                stream.credit -= self._take_growth_back(stream)

    def unread_streams(self) -> list[tuple[int, int]]:
        """Return the streams with unread bytes: since when (a serial of the budget's), and id."""
        streams = self._streams.items()
        return [(stream.unread_since, number) for number, stream in streams if stream.unread]

    def forget_all(self) -> None:
        """Forget all streams, when the connection is over and nobody will read them."""
        for stream_id in list(self._streams):
            self._forget(stream_id)

    def _grant(self, stream_id: int, stream: _Stream) -> None:
        self._grow(stream)
        stream.granted_s = self.now_s
        flags, stream.flags = stream.flags, 0
        self.outbox += _pack(0, _WINDOW, flags, stream_id, stream.credit)
        stream.granted += stream.credit
        stream.credit = 0

    def _grow(self, stream: _Stream) -> None:
        """Double a stream's window if it holds the sender back, and the reader does not."""
        growth, rtt_s = stream.receive_window, self.rtt_s
        if rtt_s is None or stream.unread > growth // 4:
            return
        if growth >= (WINDOW_BYTES_NEAR_MAX if rtt_s < NEAR_RTT_S else WINDOW_BYTES_MAX):
            return
        time_s = GROWTH_RTTS_MAX * max(rtt_s, GROWTH_RTT_S_MIN)
        is_small = self.now_s - stream.granted_s <= time_s
        may_grow = self._grown + growth <= GROWTH_BYTES_MAX
        if is_small and may_grow and self._budget.take_growth(growth):
            self._grown += growth
            stream.receive_window += growth
            stream.credit += growth

    def _take_growth_back(self, stream: _Stream) -> int:
        """Make a stream's window the initial one again and return by how much it had grown."""
        growth = stream.receive_window - INITIAL_WINDOW_BYTES
        stream.receive_window = INITIAL_WINDOW_BYTES
        self._grown -= growth
        self._budget.grown_bytes -= growth
        return growth

    def close_write(self, stream_id: int) -> None:
        """Send the end of our direction (FIN); nothing happens if it was sent."""
        stream = self._streams.get(stream_id)
        if stream is None or not stream.is_local_open:
            return
        stream.is_local_open = False
        if stream.flags & _ACK:  # nor for an end
            self.outbox += _pack(0, _WINDOW, _ACK, stream_id, 0)
            stream.flags = 0
        self.outbox += _pack(0, _WINDOW, stream.flags | _FIN, stream_id, 0)
        stream.flags = 0
        self._forget_if_ended(stream_id, stream)

    def reset(self, stream_id: int) -> None:
        """Give a stream up and tell the peer, unless it is over or the peer never heard of it."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        self._forget(stream_id)
        if stream.is_remote_open:
            self._late += stream.granted
        if not stream.flags & _SYN:
            # Alone: py-libp2p 0.8 looks for no reset in a frame that acknowledges.
            self.outbox += _pack(0, _WINDOW, _RST, stream_id, 0)

    def release(self, stream_id: int) -> None:
        """Say that an inbound stream's handler has returned: its place is free once it is over."""
        self._inbound.discard(stream_id)

    def ping(self, value: int) -> None:
        """Ask the peer for a sign of life; `PongReceived` will carry `value`."""
        self.outbox += _pack(0, _PING, _SYN, 0, value)

    def go_away(self) -> None:
        """Tell the peer that no new streams are taken; those it opens are reset."""
        self._is_open = False
        self.outbox += _pack(0, _GO_AWAY, 0, 0, 0)

    def _forget_if_ended(self, stream_id: int, stream: _Stream) -> None:
        if not (stream.is_local_open or stream.is_remote_open or stream.unread):
            self._forget(stream_id)

    def _forget(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id)
        self._take_growth_back(stream)
        self._count_unread(stream, -stream.unread)


def _broken(message: str) -> RemoteProtocolError:
    return RemoteProtocolError(message, penalty=10)
