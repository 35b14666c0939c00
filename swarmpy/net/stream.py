"""A stream of a native connection: what its user calls, and what the connection feeds it.

Reading and writing wait only for what is missing: bytes, window, or the connection's turn. With one
protocol the negotiation rides on the first bytes, and its answer is read with the first received.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

from swarmpy.abc import Priority, ProtocolId, Stream
from swarmpy.errors import LocalProtocolError, RemoteProtocolError, StreamReset
from swarmpy.proto.multistream import Dialer

if TYPE_CHECKING:
    from swarmpy.net.connection import NativeConnection

_park = trio.lowlevel.wait_task_rescheduled

PIECE_BYTES_MIN = 4 * 1024
"""Smaller pieces that wait are joined: a window filled with one-byte frames must not cost 100 times
its size in objects."""

PIECE_BYTES_JOINED_MAX = 16 * 1024

LINGER_S = 10.0
"""How long a stream whose handler has returned waits for the peer's end before it is reset."""

YIELD_BYTES = 256 * 1024
"""A task that sends without ever waiting lets others run after this much."""

UNKNOWN = ProtocolId("")
"""The protocol of an inbound stream before it was negotiated."""

_MESSAGE_COST_BYTES = 1024
"""What a small message counts toward `YIELD_BYTES`: its time is not in its bytes."""


class NativeStream(Stream):
    """One Yamux stream. Not for more than one sending and one receiving task at a time."""

    connection: NativeConnection

    def __init__(
        self,
        connection: NativeConnection,
        stream_id: int,
        *,
        protocol: ProtocolId = UNKNOWN,
        priority: Priority = Priority.CONTROL,
    ) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.protocol = protocol
        self.priority = priority
        self._pieces: deque[bytes | bytearray] = deque()
        self._reader: trio.lowlevel.Task | None = None
        self._is_leading = False
        self._window_waiter: trio.lowlevel.Task | None = None
        self._is_sending = False
        self._is_write_closed = False
        self._is_remote_ended = False
        self._is_discarding = False
        self._error: str | None = None  # why it was reset
        self._proposal = b""  # lazy negotiation: goes out with the first bytes
        self._dialer: Dialer | None = None  # lazy negotiation: checks the first bytes received
        self._refusal: RemoteProtocolError | None = None  # its end, where nobody received

    def __repr__(self) -> str:
        return f"<stream {self.stream_id} {self.protocol} to {self.peer}>"

    # For users -----------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_sending:
            raise LocalProtocolError("two tasks send on one stream")
        connection = self.connection
        size = len(data)
        self._is_sending = True
        try:
            # What most messages meet comes first: nothing is in their way.
            if type(data) is bytes and self._may_send(size):
                connection.send_data(self.stream_id, memoryview(data))
            else:
                size = await self._propose_and_send(memoryview(data).cast("B"))
            connection.unyielded += size + _MESSAGE_COST_BYTES
            if connection.unyielded > YIELD_BYTES:
                connection.unyielded = 0
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
        except trio.Cancelled:
            self.reset()
            raise
        finally:
            self._is_sending = False

    def send_nowait(self, data: bytes) -> bool:
        if self._is_sending or not self._may_send(len(data)):
            return False
        self.connection.send_data(self.stream_id, memoryview(data))
        return True

    async def receive_some(self, bytes_max: int | None = None) -> bytes:
        if self._proposal:
            self._propose_now()
        if self._pieces:
            await trio.lowlevel.checkpoint_if_cancelled()
        while self._dialer is not None or not self._pieces:
            if self._pieces:
                self._check_answer()
                continue
            if self._error is not None or self._refusal is not None:
                self._raise_if_reset()
            if self._is_remote_ended:
                if self._dialer is not None:
                    raise self._refused("the peer ended the stream before it agreed")
                await trio.lowlevel.checkpoint()
                return b""
            self.connection.raise_if_lost()
            await self._wait_bytes()
        return self._pop(bytes_max)

    async def close_write(self) -> None:
        if self._is_sending:
            raise LocalProtocolError("close_write while another task sends")
        self._raise_if_broken()
        self._propose_now()
        self._is_write_closed = True
        if self._dialer is None:
            self.connection.close_write(self.stream_id)
        else:
            self._agree()  # The answer may be here already, and unread.
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        if self._error is None:
            self._break("it was reset here")
            self.connection.reset_stream(self.stream_id)

    # For the connection --------------------------------------------------------

    def propose(self, dialer: Dialer) -> None:
        """Negotiate lazily: the proposal goes out with the first bytes sent."""
        self._dialer = dialer
        self._proposal = dialer.start()

    def push_back(self, data: bytes) -> None:
        """Put bytes that were read too far back in front."""
        if data:
            self._pieces.appendleft(data)
            self.connection.put_back(self.stream_id, len(data))

    @property
    def has_news(self) -> bool:
        """Whether who waits to receive need not wait any longer."""
        return bool(self._pieces) or self._is_remote_ended or self._error is not None

    def feed(self, data: bytes) -> None:
        """Take received bytes; the window was checked."""
        if self._is_discarding:
            self.connection.consumed(self.stream_id, len(data))
            return
        pieces = self._pieces
        if not pieces:
            pieces.append(data)
        elif len(data) < PIECE_BYTES_MIN:
            last = pieces[-1]
            if isinstance(last, bytearray) and len(last) < PIECE_BYTES_JOINED_MAX:
                last += data
            else:
                pieces.append(bytearray(data))
        else:
            pieces.append(data)
        if self._is_write_closed and self._dialer is not None:
            self._agree()
        if self._reader is not None:
            self._wake_reader()

    def end(self) -> None:
        """The peer will send no more."""
        self._is_remote_ended = True
        self._wake_reader()

    def window_opened(self) -> None:
        """The peer granted window."""
        task, self._window_waiter = self._window_waiter, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def was_reset(self, reason: str) -> None:
        """The stream is over for a reason that is not its user's."""
        if self._error is None:
            self._break(reason)

    def connection_closed(self) -> None:
        """Wake who waits here; what was received whole can still be read."""
        self._wake_reader()
        self.window_opened()

    async def finish(self) -> None:
        """After the handler: close what is open, and read past what the peer still sends."""
        if self._error is not None:
            return
        if not self._is_write_closed and self.connection.is_alive:
            self._is_write_closed = True
            self.connection.close_write(self.stream_id)
        self._is_discarding = True
        while self._pieces:
            self._pop(None)
        with trio.move_on_after(LINGER_S):
            while self._error is None and self.connection.is_alive and not self._is_remote_ended:
                await self._wait_bytes()
        if not self._is_remote_ended:
            self.reset()

    # Below ---------------------------------------------------------------------

    def _propose_now(self) -> None:
        """Send the proposal alone: nothing is sent behind which it could ride."""
        proposal, self._proposal = self._proposal, b""
        if proposal and self._error is None and self.connection.is_alive:
            self.connection.send_data(self.stream_id, memoryview(proposal))

    def _may_send(self, size: int) -> bool:
        """Whether `size` bytes can go out in one turn, now; `_send` says why they cannot."""
        return (
            size > 0
            and self._error is None
            and not (self._proposal or self._is_write_closed)
            and self.connection.may_send(self.stream_id, size)
        )

    async def _propose_and_send(self, data: memoryview) -> int:
        """Send what may have to wait; return its size."""
        size = len(data)
        proposal, self._proposal = self._proposal, b""
        if proposal and size < PIECE_BYTES_MIN:
            data = memoryview(proposal + bytes(data))
        elif proposal:
            await self._send(memoryview(proposal))
        if len(data):
            await self._send(data)
        return size

    async def _send(self, data: memoryview) -> None:
        connection = self.connection
        offset, total = 0, len(data)
        has_turn = False
        try:
            while offset < total:
                self._raise_if_broken()
                if self._is_write_closed:
                    raise StreamReset("the stream was closed for sending")
                window = connection.window(self.stream_id)
                if not window:
                    if has_turn:
                        has_turn = False
                        connection.pass_turn()
                    await self._wait_window()
                elif connection.is_busy and not has_turn:
                    await connection.wait_turn(self.priority)
                    has_turn = True
                else:
                    size = min(window, connection.pace.turn_bytes, total - offset)
                    connection.send_data(self.stream_id, data[offset : offset + size])
                    offset += size
                    if has_turn and connection.is_turn_wanted(self.priority):
                        has_turn = False
                        connection.pass_turn()
        finally:
            if has_turn:
                connection.pass_turn()

    def _check_answer(self) -> None:
        """Feed received bytes to the negotiation that is still open."""
        assert self._dialer is not None
        try:
            self._dialer.receive(self._pop(None))
        except RemoteProtocolError as error:
            self.reset()
            error.peer = self.peer
            raise
        if self._dialer.selected is not None:
            rest, self._dialer = self._dialer.rest, None
            self.push_back(rest)
            if self._is_write_closed:
                self.connection.close_write(self.stream_id)

    def _agree(self) -> None:
        """Read the peer's answer although nobody receives: the end of this side waits for it.

        js-libp2p resets a stream whose end comes while it still negotiates.
        """
        try:
            while self._dialer is not None and self._pieces:
                self._check_answer()
        except RemoteProtocolError as error:
            self._refusal = error

    def _refused(self, message: str) -> RemoteProtocolError:
        self.reset()
        return RemoteProtocolError(f"{message} to speak {self.protocol}", peer=self.peer)

    def _pop(self, bytes_max: int | None) -> bytes:
        piece = self._pieces.popleft()
        if bytes_max is not None and len(piece) > bytes_max:
            self._pieces.appendleft(piece[bytes_max:])
            piece = piece[:bytes_max]
        self.connection.consumed(self.stream_id, len(piece), is_last=not self._pieces)
        return piece if isinstance(piece, bytes) else bytes(piece)

    def _break(self, error: str) -> None:
        self._error = error
        self._pieces.clear()
        self.connection_closed()
        if self._is_leading:
            self.connection.wake_leader()

    def _raise_if_reset(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        if self._error is not None:
            raise StreamReset(f"stream {self.protocol} to {self.peer} is over: {self._error}")

    def _raise_if_broken(self) -> None:
        self._raise_if_reset()
        self.connection.raise_if_lost()

    async def _wait_bytes(self) -> None:
        if self._reader is not None or self._is_leading:
            raise LocalProtocolError("two tasks receive from one stream")
        connection = self.connection
        connection.flush()
        if not connection.is_alive:  # that was the moment at which its end showed
            await trio.lowlevel.checkpoint()
        elif connection.may_lead:
            self._is_leading = True
            try:
                await connection.lead(self)
            finally:
                self._is_leading = False
        else:
            self._reader = trio.lowlevel.current_task()
            await _park(self._abort_reader)

    def _abort_reader(self, _: object) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake_reader(self) -> None:
        task, self._reader = self._reader, None
        if task is not None:
            trio.lowlevel.reschedule(task)
            self.connection.has_woken = True

    async def _wait_window(self) -> None:
        self._window_waiter = trio.lowlevel.current_task()
        await _park(self._abort_window_waiter)

    def _abort_window_waiter(self, _: object) -> trio.lowlevel.Abort:
        self._window_waiter = None
        return trio.lowlevel.Abort.SUCCEEDED
