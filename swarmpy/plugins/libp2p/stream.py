"""One Yamux stream of a py-libp2p connection, with what the contract asks and py-libp2p lacks.

Bytes are taken from py-libp2p's own buffers and its window is watched from here, so that a
cancelled call tears no frame, a slow reader stalls its sender for as long as it likes, a reset is
told from an end, and both from a lost connection. Frames are written by `LibP2PConnection.start`.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import trio
from libp2p.network.stream.net_stream import NetStream
from libp2p.stream_muxer.yamux import yamux

from swarmpy.abc import ProtocolId, Stream
from swarmpy.errors import LocalProtocolError, RemoteProtocolError, StreamReset
from swarmpy.net.stream import LINGER_S
from swarmpy.proto.multistream import Dialer

if TYPE_CHECKING:
    from swarmpy.plugins.libp2p.connection import LibP2PConnection

FRAME_DATA_BYTES_MAX = 65_519 - yamux.HEADER_SIZE
"""So that a frame with its header is one Noise message."""

WINDOW_POLL_S = 0.005
"""How often a sender without window looks for some: py-libp2p wakes nobody, and looks every 10 ms
itself."""


class LibP2PStream(Stream):
    """One stream. Not for more than one sending and one receiving task at a time."""

    connection: LibP2PConnection

    def __init__(
        self, connection: LibP2PConnection, net_stream: NetStream, *, protocol: ProtocolId
    ) -> None:
        self.connection = connection
        self.protocol = protocol
        self.net_stream = net_stream
        self._yamux = net_stream.muxed_stream
        self._pieces: deque[bytes] = deque()  # read too far, or saved from a lost connection
        self._is_sending = False
        self._is_receiving = False
        self._is_write_closed = False
        self._is_remote_ended = False
        self._is_forgotten = False
        self._error: str | None = None  # why it was reset
        self._uncredited_bytes = 0
        self._is_crediting = False
        self._written: trio.Event | None = None  # when what was begun last is on the wire
        self._proposal = b""  # lazy negotiation: goes out with the first bytes
        self._dialer: Dialer | None = None  # lazy negotiation: checks the first bytes received
        connection.streams.add(self)

    def __repr__(self) -> str:
        return f"<stream {self._yamux.stream_id} {self.protocol} to {self.peer}>"

    # For users -----------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_sending:
            raise LocalProtocolError("two tasks send on one stream")
        self._is_sending = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            proposal, self._proposal = self._proposal, b""
            await self._send(proposal + bytes(data) if proposal else bytes(data))
        except trio.Cancelled:
            self.reset()
            raise
        finally:
            self._is_sending = False

    async def receive_some(self, bytes_max: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._is_receiving:
            raise LocalProtocolError("two tasks receive from one stream")
        self._is_receiving = True
        try:
            self._propose_now()
            while self._dialer is not None:
                data = await self._receive(None)
                if not data:
                    raise self._refused("the peer ended the stream before it agreed")
                self._check_answer(data)
            return await self._receive(bytes_max)
        finally:
            self._is_receiving = False

    async def close_write(self) -> None:
        if self._is_sending:
            raise LocalProtocolError("close_write while another task sends")
        self._raise_if_broken()
        self._propose_now()
        if not self._is_write_closed:
            self._is_write_closed = True
            self._start_in_turn(self.net_stream.close_write)
            self._forget_if_over()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        if self._error is None:
            self._error = "it was reset here"
            self.give_up()

    # For the host --------------------------------------------------------------

    def propose(self, dialer: Dialer) -> None:
        """Negotiate lazily: the proposal goes out with the first bytes sent."""
        self._dialer = dialer
        self._proposal = dialer.start()

    def push_back(self, data: bytes) -> None:
        """Put bytes that were read too far back in front."""
        if data:
            self._pieces.appendleft(data)

    def give_up(self) -> None:
        """Reset the stream on the wire; whoever waits on it wakes."""
        self._pieces.clear()
        self._is_forgotten = True
        self.connection.streams.discard(self)
        self._wake()
        if self.connection.is_open:
            self._start_in_turn(self.net_stream.reset)

    def connection_ended(self) -> None:
        """Save what was received, and whether its end was, before py-libp2p forgets both."""
        if self._error is None and self._yamux.reset_received:
            self._error = "the peer gave it up"
        if self._error is None:
            buffer = self._buffer
            if buffer:
                self._pieces.append(bytes(buffer))
                buffer.clear()
            self._is_remote_ended = self._is_remote_ended or self._yamux.recv_closed
        self._wake()

    async def finish(self) -> None:
        """After the handler: close what is open, and read past what the peer still sends."""
        if self._error is not None or not self.connection.is_open:
            return
        if not self._is_write_closed:
            await self.close_write()
        with trio.move_on_after(LINGER_S):
            while await self._receive(None):
                pass
        if not self._is_remote_ended:
            self.reset()

    # Sending -------------------------------------------------------------------

    async def _send(self, data: bytes) -> None:
        offset = 0
        while offset < len(data):
            self._raise_if_broken()
            if self._is_write_closed:
                raise StreamReset("the stream was closed for sending")
            size = min(self._yamux.send_window, FRAME_DATA_BYTES_MAX, len(data) - offset)
            if size <= 0:
                await trio.sleep(WINDOW_POLL_S)
                continue
            work = self._in_turn(self._writing(data[offset : offset + size]))
            await self.connection.complete(work)
            offset += size

    def _writing(self, data: bytes) -> partial[Awaitable[object]]:
        """Take window for a frame now, and return what writes it."""
        self._yamux.send_window -= len(data)
        header = struct.pack(
            yamux.YAMUX_HEADER_FORMAT, 0, yamux.TYPE_DATA, 0, self._yamux.stream_id, len(data)
        )
        return partial(self.connection.muxed._write_frame, header + data)

    def _propose_now(self) -> None:
        """Send the proposal alone: nothing is sent behind which it could ride."""
        proposal, self._proposal = self._proposal, b""
        if proposal and self._error is None and self.connection.is_open:
            self._start_in_turn(self._writing(proposal))

    def _start_in_turn(self, work: Callable[[], Awaitable[object]]) -> None:
        self.connection.start(self._in_turn(work))

    def _in_turn(self, work: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
        """Return work, to be started at once, that waits for what was begun before it.

        Tasks started together run in any order: without this the first bytes may overtake the
        proposal that they belong behind.
        """
        before, self._written = self._written, trio.Event()
        written = self._written

        async def run() -> None:
            try:
                if before is not None:
                    await before.wait()
                await work()
            finally:
                written.set()

        return run

    # Receiving -----------------------------------------------------------------

    @property
    def unread_bytes(self) -> int:
        """Bytes received and not yet handed out."""
        return len(self._buffer or b"") + sum(len(piece) for piece in self._pieces)

    @property
    def _buffer(self) -> bytearray | None:
        buffer: bytearray | None = self.connection.muxed.stream_buffers.get(self._yamux.stream_id)
        return buffer

    async def _receive(self, bytes_max: int | None) -> bytes:
        while True:
            if self._error is None and self._yamux.reset_received and self.connection.is_open:
                self._error = "the peer gave it up"
                self._forget()
            self._raise_if_reset()
            if self._pieces or self._buffer:
                return self._take(bytes_max)
            if self._is_remote_ended or (self._yamux.recv_closed and self.connection.is_open):
                self._is_remote_ended = True
                self._forget_if_over()
                await trio.lowlevel.checkpoint()
                return b""
            self.connection.raise_if_lost()
            await self._wait_bytes()

    def _take(self, bytes_max: int | None) -> bytes:
        if self._pieces:
            piece = self._pieces.popleft()
            if bytes_max is not None and len(piece) > bytes_max:
                self._pieces.appendleft(piece[bytes_max:])
                piece = piece[:bytes_max]
            return piece
        buffer = self._buffer
        assert buffer is not None
        data = bytes(buffer[:bytes_max])
        del buffer[: len(data)]
        self._credit(len(data))
        return data

    def _credit(self, size: int) -> None:
        """Grant the peer window for what was read."""
        self._uncredited_bytes += size
        if not self._is_crediting and self.connection.is_open:
            self._is_crediting = True
            self.connection.start(self._send_credit)

    async def _send_credit(self) -> None:
        try:
            while self._uncredited_bytes and not self._yamux.closed:
                size, self._uncredited_bytes = self._uncredited_bytes, 0
                await self._yamux._auto_tune_and_send_window_update(bytes_read=size)
        finally:
            self._is_crediting = False

    async def _wait_bytes(self) -> None:
        """Wait until py-libp2p says that something happened to the stream."""
        events, stream_id = self.connection.muxed.stream_events, self._yamux.stream_id
        event = events.get(stream_id)
        if event is None:
            # py-libp2p has forgotten it although neither an end nor a reset was seen.
            self._error = "the peer gave it up"
            return
        if event.is_set():
            event = events[stream_id] = trio.Event()
        await event.wait()

    def _wake(self) -> None:
        event = self.connection.muxed.stream_events.get(self._yamux.stream_id)
        if event is not None:
            event.set()

    def _check_answer(self, data: bytes) -> None:
        """Feed received bytes to the negotiation that is still open."""
        assert self._dialer is not None
        try:
            self._dialer.receive(data)
        except RemoteProtocolError as error:
            self.reset()
            error.peer = self.peer
            raise
        if self._dialer.selected is not None:
            rest, self._dialer = self._dialer.rest, None
            self.push_back(rest)

    def _refused(self, message: str) -> RemoteProtocolError:
        self.reset()
        return RemoteProtocolError(f"{message} to speak {self.protocol}", peer=self.peer)

    # The end -------------------------------------------------------------------

    def _raise_if_reset(self) -> None:
        if self._error is not None:
            raise StreamReset(f"stream {self.protocol} to {self.peer} is over: {self._error}")

    def _raise_if_broken(self) -> None:
        if self._error is None and self._yamux.reset_received and self.connection.is_open:
            self._error = "the peer gave it up"
            self._forget()
        self._raise_if_reset()
        self.connection.raise_if_lost()

    def _forget_if_over(self) -> None:
        if self._is_write_closed and self._is_remote_ended:
            self._forget()

    def _forget(self) -> None:
        """Let py-libp2p drop what it keeps of a stream that is over at both ends."""
        if not self._is_forgotten:
            self._is_forgotten = True
            self.connection.streams.discard(self)
            self._start_in_turn(self._drop)

    async def _drop(self) -> None:
        await self.connection.muxed._finalize_stream(self._yamux, fully_closed=True)
        await self.net_stream.remove()
