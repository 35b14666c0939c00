"""A connection: Noise frames around Yamux frames over any byte stream, and the tasks that move it.

Sending is synchronous: a frame is encrypted and offered to the kernel in one go, so no cancellation
falls between its nonce and its bytes; only what the kernel refuses is left to the writer task.
One task reads, one writes what is left over, one keeps watch. Who waits for bytes of the peer may
read in the reader's place: a scheduler's turn between two tasks costs as much as encrypting 16 KiB.
Spec: protocols/yamux.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Literal

import trio

from swarmpy import config
from swarmpy.abc import Address, ByteStream, Connection, Priority, ProtocolId
from swarmpy.errors import (
    ConnectionLost,
    NetworkError,
    ProtocolError,
    RemoteProtocolError,
)
from swarmpy.net.keepalive import Keepalive
from swarmpy.net.pace import Pace, RoundTrips
from swarmpy.net.secured import JOINED_BYTES_MAX, RECEIVE_BYTES, Scratch, Secured
from swarmpy.net.starting import Starts
from swarmpy.net.stream import NativeStream
from swarmpy.proto.noise import LENGTH_BYTES, PLAINTEXT_BYTES_BULK, TAG_BYTES
from swarmpy.proto.yamux import (
    HEADER_BYTES,
    DataReceived,
    Event,
    GoAwayReceived,
    PongReceived,
    StreamEnded,
    StreamOpened,
    StreamWasReset,
    WindowOpened,
    Yamux,
)

BATCH_FRAMES = 2
"""Full Noise frames a `send`: the other end opens the first while the next are encrypted."""

BACKLOG_BYTES_MAX = 1024 * 1024
"""Ciphertext the kernel refused: one turn, and control frames of 128 streams many times over.
Only a peer that asks and asks and never reads gets there."""

UNREAD_BYTES_MAX = config.INBOUND_STREAMS_MAX * config.STREAM_WINDOW_BYTES
"""Unread bytes of one connection: every inbound stream's window, and what windows grew by."""

HANDLER_GRACE_S = 5.0
"""Handlers may tidy up this long after their connection is gone; then they are cancelled."""

_park = trio.lowlevel.wait_task_rescheduled
ServeStream = Callable[[NativeStream], Awaitable[None]]


class NativeConnection(Connection):
    """One authenticated connection. `run` must run for anything to move."""

    def __init__(
        self,
        byte_stream: ByteStream,
        secured: Secured,
        *,
        is_initiator: bool,
        direction: Literal["inbound", "outbound"],
        scratch: Scratch,
    ) -> None:
        self.peer = secured.peer
        self.direction = direction
        self.path = "direct"
        self.limit = None
        self.local_address: Address = byte_stream.local_address
        self.remote_address: Address = byte_stream.remote_address
        self.rtt_s = None
        self._round_trips = RoundTrips()
        self.channel_binding = secured.channel_binding
        self.is_initiator = is_initiator
        self.on_closed: Callable[[NativeConnection], None] = _ignore
        """Called once, at the moment the connection ends."""
        self.unyielded = 0
        """Bytes sent since a sending task last let others run."""
        self._byte_stream = byte_stream
        self._seal_into = secured.sealer.seal_into
        self._open = secured.opener.open
        self._open_into = secured.opener.open_into
        self._yamux = Yamux(
            is_initiator=is_initiator,
            inbound_streams_max=config.INBOUND_STREAMS_MAX,
            unread_bytes_max=UNREAD_BYTES_MAX,
            resets_per_second_max=config.RESETS_PER_SECOND_MAX,
            budget=scratch.budget,
        )
        self._outbox = self._yamux.outbox
        self._scratch = scratch
        self._partial = secured.early_ciphertext
        self._early_plaintext = secured.early_plaintext
        self._streams: dict[int, NativeStream] = {}
        self._backlog = bytearray()
        self._writer: trio.lowlevel.Task | None = None
        self._reader: trio.lowlevel.Task | None = None  # parked while another task reads
        self._is_reading = False  # the reader runs
        self._is_watching = False  # the reader waits for the peer's bytes
        self._is_led = False  # another task reads in the reader's place
        self._is_drained = False  # the last read left nothing in the kernel
        self.has_woken = False
        """Whether somebody was woken for received bytes and has not run yet."""
        self._senders: tuple[deque[trio.lowlevel.Task], ...] = tuple(deque() for _ in Priority)
        self._is_turn_given = False  # to a sender that has not used it yet
        self.pace = Pace()
        byte_stream.limit_unsent(self.pace.unsent_bytes)
        self._error: Exception | None = None
        self._is_going_away = False
        self._starts: Starts | None = None
        self._serve: ServeStream | None = None
        self._heard_s = trio.current_time()
        self._keepalive = Keepalive(self, self._yamux)

    def __repr__(self) -> str:
        state = "open" if self.is_alive else "closed"
        return f"<{self.direction} connection to {self.peer} at {self.remote_address}, {state}>"

    # For users -----------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._error is None and not self._is_going_away

    @property
    def heard_s(self) -> float:
        return self._heard_s

    @property
    def is_alive(self) -> bool:
        """Whether bytes still move; a peer that went away may yet finish its open streams."""
        return self._error is None

    @property
    def error(self) -> Exception | None:
        """Why the connection ended, None while it lives."""
        return self._error

    @property
    def stream_count(self) -> int:
        """Streams open now, in either direction."""
        return self._yamux.stream_count

    def open_stream(self, protocol: ProtocolId, priority: Priority) -> NativeStream:
        """Open a stream; nothing is sent until its first bytes are.

        Raises:
            ConnectionLost: The connection is closed or closing.
        """
        self.raise_if_lost()
        if self._is_going_away:
            raise ConnectionLost(f"{self.peer} takes no new streams on this connection")
        stream_id = self._yamux.open()
        stream = NativeStream(self, stream_id, protocol=protocol, priority=priority)
        self._streams[stream_id] = stream
        return stream

    def close(self) -> None:
        if self._error is None:
            self._yamux.go_away()
            self.flush()
        self._fail(ConnectionLost("it was closed here"))

    def probe(self) -> None:
        """Ping now: a peer that no longer knows this connection says so at once."""
        if self._error is None:
            self._keepalive.ping()

    def close_for(self, error: Exception) -> None:
        """Close for a reason that streams and `error` will name."""
        self._fail(error)

    def measured(self, rtt_s: float) -> None:
        """Take a measured round trip."""
        if self.pace.is_near(rtt_s):
            self._byte_stream.limit_unsent(self.pace.unsent_bytes)
        self._round_trips.take(rtt_s)
        self.rtt_s, self._yamux.rtt_s = self._round_trips.smoothed_s, self._round_trips.shortest_s

    async def run(self, serve: ServeStream) -> None:
        """Move bytes until the connection ends; `serve` is run for each inbound stream.

        Handlers still running then see `ConnectionLost` and are cancelled `HANDLER_GRACE_S` later.
        """
        self._serve = serve
        budget = self._scratch.budget
        budget.join(self._yamux, self._was_shed)
        try:
            async with trio.open_nursery() as handlers:
                self._starts = Starts(handlers, self._serve_stream)
                async with trio.open_nursery() as pumps:
                    pumps.start_soon(self._write)
                    pumps.start_soon(self._keepalive.run)
                    await self._read()
                    pumps.cancel_scope.cancel()
                handlers.cancel_scope.deadline = trio.current_time() + HANDLER_GRACE_S
        finally:
            budget.leave(self._yamux)

    # For streams: receiving ----------------------------------------------------

    def raise_if_lost(self) -> None:
        """Raise `ConnectionLost`, naming what ended the connection, if it has ended."""
        if self._error is not None:
            raise ConnectionLost(f"connection to {self.peer}: {self._error}") from self._error

    def consumed(self, stream_id: int, size: int, *, is_last: bool = False) -> None:
        """Count bytes as read; half a window later the peer is told.

        Args:
            is_last: Nothing more is there to read: what the peer is told rides on what the reader
                sends, or goes out by `flush` when it waits for more.
        """
        if self._yamux.consumed(stream_id, size):
            self._streams.pop(stream_id, None)
        if self._outbox and not is_last:
            self.flush()

    def put_back(self, stream_id: int, size: int) -> None:
        """Count bytes as unread again."""
        self._yamux.put_back(stream_id, size)

    # For streams: sending ------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether who wants to send must wait: for refused bytes, or for another's turn."""
        return bool(self._backlog) or self._is_turn_given

    def may_send(self, stream_id: int, size: int) -> bool:
        """Whether a stream may send so much at once, now."""
        return (
            self._error is None
            and not (self._backlog or self._is_turn_given)
            and size <= self.pace.turn_bytes
            and size <= self._yamux.window(stream_id)
        )

    def window(self, stream_id: int) -> int:
        """Return how many bytes a stream may send now."""
        return self._yamux.window(stream_id)

    def send_data(self, stream_id: int, data: memoryview) -> None:
        """Encrypt a data frame and offer it to the kernel.

        Large data waits for its turn first; only a proposal of some bytes may join a backlog.

        Args:
            data: Within the stream's window and `pace.turn_bytes`; not kept.
        """
        if len(self._outbox) > JOINED_BYTES_MAX:
            self.flush()
        total = len(data)
        head = self._yamux.data_header(stream_id, total)
        if self._outbox:
            # Control frames that gathered ride along: one packet, and one wake-up over there.
            head = b"".join((self._outbox, head))
            self._outbox.clear()
        # What is left over from whole Noise frames goes with the header.
        rest = total % PLAINTEXT_BYTES_BULK
        if rest > JOINED_BYTES_MAX or len(head) + rest > PLAINTEXT_BYTES_BULK:
            rest = 0
        joined, size = self._scratch.joined, len(head)
        joined[:size] = head
        joined[size : size + rest] = data[:rest]
        frames = [joined[: size + rest]]
        for start in range(rest, total, PLAINTEXT_BYTES_BULK):
            if len(frames) > BATCH_FRAMES:
                self._seal_and_send(*frames)
                frames.clear()
            frames.append(data[start : start + PLAINTEXT_BYTES_BULK])
        self._seal_and_send(*frames)

    def close_write(self, stream_id: int) -> None:
        """Send a stream's end."""
        self._yamux.close_write(stream_id)
        self.flush()
        self._forget_if_over(stream_id)

    def reset_stream(self, stream_id: int) -> None:
        """Give a stream up."""
        self._yamux.reset(stream_id)
        self.flush()
        self._streams.pop(stream_id, None)

    async def wait_turn(self, priority: Priority) -> None:
        """Wait until the backlog is gone and nobody more urgent waits, nor in this class longer.

        Whoever was given the turn hands it on with `pass_turn`, whatever happens to it.
        """
        waiting = self._senders[priority]
        task = trio.lowlevel.current_task()
        waiting.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await _park(abort)

    def is_turn_wanted(self, priority: Priority) -> bool:
        """Whether who has sent a turn must stop: for refused bytes, or for somebody as urgent."""
        return bool(self._backlog) or any(self._senders[: priority + 1])

    def pass_turn(self) -> None:
        """End a turn: the next sender goes once the kernel takes bytes."""
        self._is_turn_given = False
        if not self._backlog:
            self._give_turn()

    def _give_turn(self) -> bool:
        """Let the next sender go, the most urgent class first; False if nobody waits."""
        for waiting in self._senders:
            if waiting:
                self._is_turn_given = True
                trio.lowlevel.reschedule(waiting.popleft())
                return True
        return False

    # Receiving -----------------------------------------------------------------

    async def _read(self) -> None:
        """Read whenever there is something, unless another task does."""
        try:
            self._take_early()
            self._is_reading = True
            while self._error is None:
                if self._is_led:
                    self._reader = trio.lowlevel.current_task()
                    await _park(self._abort_reader)
                elif self.has_woken or not self._is_drained:
                    # Let those run who were woken: they may read on.
                    self.has_woken = False
                    await trio.lowlevel.checkpoint()
                    if not self._is_drained and not self._is_led:
                        self._receive()
                else:
                    self._is_watching = True
                    try:
                        await self._byte_stream.wait_readable()
                    finally:
                        self._is_watching = False
                    if self._error is None:
                        self._receive()
        except (NetworkError, ProtocolError) as error:
            self._fail(error)
        finally:
            self._is_reading = False
            self.close()  # cancelled: nobody reads any more, and nobody may wait for it

    @property
    def may_lead(self) -> bool:
        """Whether nobody waits for the peer's bytes, so that who needs them may do it itself."""
        return self._is_reading and not self._is_watching and not self._is_led

    async def lead(self, stream: NativeStream) -> None:
        """Read in the reader's place until there is news for `stream`.

        At any time the reader watches, or is about to look, or somebody leads, and who stops
        leading wakes the reader.
        """
        self._is_led = True
        try:
            while self._error is None and not stream.has_news:
                if self._is_drained:
                    await self._byte_stream.wait_readable()
                else:
                    await trio.lowlevel.checkpoint()
                if self._error is None:
                    self._receive()
        except (NetworkError, ProtocolError) as error:
            self._fail(error)
        finally:
            self._is_led = False
            task, self._reader = self._reader, None
            if task is not None:
                trio.lowlevel.reschedule(task)

    def wake_leader(self) -> None:
        """Let who leads look again: it waits for the socket, where nothing may ever come."""
        self._byte_stream.wake_reader()

    def _abort_reader(self, _: object) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _take_early(self) -> None:
        """Take what came together with the handshake's end."""
        if self._early_plaintext:
            self._take_plaintext(self._early_plaintext)
            self._early_plaintext = b""
        early = self._partial
        if early:
            self._scratch.received[: len(early)] = early
            self._take_frames(len(early))

    def _receive(self) -> None:
        """Read once and take every whole frame."""
        buffer = self._scratch.received
        held = len(self._partial)
        count = self._byte_stream.receive_into_nowait(buffer[held:RECEIVE_BYTES])
        if count is None:
            self._is_drained = True
            return
        if count == 0:
            goodbye = "the peer closed it" if self._is_going_away else "it ended without a goodbye"
            raise ConnectionLost(goodbye)
        self._is_drained = held + count < RECEIVE_BYTES
        if held:
            buffer[:held] = self._partial
        self._heard_s = self._yamux.now_s = trio.current_time()
        if self._starts is not None:
            self._starts.next_read()
        self._take_frames(held + count)

    def _take_frames(self, end: int) -> None:
        buffer = self._scratch.received
        start = 0
        while end - start >= LENGTH_BYTES:
            body = start + LENGTH_BYTES
            following = body + (buffer[start] << 8 | buffer[start + 1])
            if following > end:
                break
            size = following - body - TAG_BYTES
            if size <= JOINED_BYTES_MAX:
                opened = self._scratch.joined[: max(size, 0)]
                self._open_into(buffer[body:following], opened)
                if stream_id := self._yamux.receive_whole(opened):
                    self._streams[stream_id].feed(bytes(opened[HEADER_BYTES:]))
                else:
                    self._take_plaintext(bytes(opened))
            else:
                data = self._open(buffer[body:following])
                if stream_id := self._yamux.receive_more(size):
                    self._streams[stream_id].feed(data)
                else:
                    self._take_plaintext(data)
            start = following
        self._partial = bytes(buffer[start:end]) if start < end else b""
        if self._outbox:
            self.flush()

    def _take_plaintext(self, data: bytes) -> None:
        for event in self._yamux.receive(data):
            if type(event) is DataReceived:
                stream = self._streams.get(event.stream_id)
                if stream is not None:
                    stream.feed(event.data)
            else:
                self._take_event(event)

    def _take_event(self, event: Event) -> None:
        match event:
            case StreamOpened(stream_id):
                if not self._yamux.is_known(stream_id):  # given up in the same breath
                    self._yamux.release(stream_id)
                    return
                stream = self._streams[stream_id] = NativeStream(self, stream_id)
                assert self._starts is not None
                self._starts.start(stream)
            case WindowOpened(stream_id):
                if stream_id in self._streams:
                    self._streams[stream_id].window_opened()
            case StreamEnded(stream_id):
                if stream_id in self._streams:
                    self._streams[stream_id].end()
                    self._forget_if_over(stream_id)
            case StreamWasReset(stream_id, by_peer):
                if not by_peer:
                    self._was_shed(stream_id)
                elif stream_id in self._streams:
                    self._streams.pop(stream_id).was_reset("the peer gave it up")
            case PongReceived(value):
                self._keepalive.take_pong(value)
            case GoAwayReceived():
                self._is_going_away = True

    def _was_shed(self, stream_id: int) -> None:
        """Tell a stream that it was reset for the unread bytes of this connection, or of all."""
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            stream.was_reset("too many bytes lay unread")
        self.flush()

    async def _serve_stream(self, stream: NativeStream) -> None:
        assert self._serve is not None
        try:
            await self._serve(stream)
        finally:
            self._yamux.release(stream.stream_id)

    def _forget_if_over(self, stream_id: int) -> None:
        if not self._yamux.is_known(stream_id):
            self._streams.pop(stream_id, None)

    # Sending -------------------------------------------------------------------

    def flush(self) -> None:
        """Send the control frames that gathered; they go ahead of data that waits for its turn."""
        if self._error is not None:
            self._outbox.clear()
        while self._outbox:
            chunk = bytes(self._outbox[:JOINED_BYTES_MAX])
            del self._outbox[:JOINED_BYTES_MAX]
            self._seal_and_send(chunk)

    def _seal_and_send(self, *frames: bytes | memoryview) -> None:
        """Encrypt frames back to back and send what the kernel takes of them."""
        if self._error is not None:
            return
        sealed = self._scratch.sealed
        end = 0
        try:
            for frame in frames:
                end = self._seal_into(frame, sealed, end)
            sent = 0 if self._backlog else self._byte_stream.send_nowait(sealed[:end])
        except (NetworkError, ProtocolError) as error:
            self._fail(error)
            return
        if sent < end:
            if not self._backlog:
                self.pace.took(sent)
                self._was_full()
            self._backlog += sealed[sent:end]
            if len(self._backlog) > BACKLOG_BYTES_MAX:
                self._fail(RemoteProtocolError("the peer asks but does not read", penalty=10))
            self._wake_writer()
        else:
            self.pace.took(end)

    def _was_full(self) -> None:
        """The kernel takes no more for now: a moment at which the link's pace shows."""
        if self.pace.was_full(trio.current_time()):
            self._byte_stream.limit_unsent(self.pace.unsent_bytes)

    async def _write(self) -> None:
        """Send the backlog whenever there is one, then let waiting senders go on."""
        byte_stream = self._byte_stream
        while self._error is None:
            if not self._backlog:
                if not self._is_turn_given and not self._give_turn():
                    self.pace.was_idle()
                self._writer = trio.lowlevel.current_task()
                await _park(self._abort_writer)
                continue
            await byte_stream.wait_writable()
            try:
                with memoryview(self._backlog) as view:
                    sent = byte_stream.send_nowait(view)
            except NetworkError as error:
                self._fail(error)
                return
            self.pace.took(sent)
            if sent == len(self._backlog):
                self._backlog = bytearray()
            else:
                del self._backlog[:sent]
                self._was_full()

    def _abort_writer(self, _: object) -> trio.lowlevel.Abort:
        self._writer = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake_writer(self) -> None:
        task, self._writer = self._writer, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    # The end -------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        """End the connection: everybody who waits on it wakes and finds it ended."""
        if self._error is not None:
            return
        self._error = error
        self._backlog = bytearray()
        self._partial = b""
        self._byte_stream.close()
        self._wake_writer()
        for waiting in self._senders:
            while waiting:
                trio.lowlevel.reschedule(waiting.popleft())
        self._is_turn_given = False
        for stream in list(self._streams.values()):
            stream.connection_closed()
        self.on_closed(self)


def _ignore(_: NativeConnection) -> None:
    pass
