"""A stream between two simulated hosts: messages handed over in memory, with a window between them.

A message costs one call at the sender and one wake-up at the reader; nothing is encrypted or
framed, and what is `bytes` already is not copied.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

from swarmpy import config
from swarmpy.abc import Priority, ProtocolId, Stream
from swarmpy.errors import LocalProtocolError, RemoteProtocolError, StreamReset

if TYPE_CHECKING:
    from swarmpy.testing.host_connection import HostConnection

_park = trio.lowlevel.wait_task_rescheduled

FRAME_BYTES_MAX = 64 * 1024
"""Bytes that arrive as one, as in Yamux here."""

SLOW_FRAME_BYTES_MAX = 16 * 1024
"""The same on a link with a bandwidth, so that an urgent message waits for no more than this."""

CREDIT_BYTES = config.STREAM_WINDOW_BYTES // 2
"""The reader tells of so many bytes read at a time."""

LINGER_S = 10.0
"""How long a stream whose handler has returned waits for the peer's end before it is reset."""

YIELD_BYTES = 256 * 1024
"""A task that sends without ever waiting lets others run after this much."""

MESSAGE_COST_BYTES = 1024
"""What a message counts toward `YIELD_BYTES` beyond its bytes."""


class HostStream(Stream):
    """One end of a stream. Not for more than one sending and one receiving task at a time."""

    connection: HostConnection

    def __init__(
        self,
        connection: HostConnection,
        protocols: tuple[ProtocolId, ...],
        *,
        priority: Priority = Priority.CONTROL,
        is_inbound: bool = False,
    ) -> None:
        self.connection = connection
        self.protocol = protocols[0]
        self.priority = priority
        self.far: HostStream
        """The other end; only deliveries touch it."""
        self.scope: trio.CancelScope | None = None
        """Cancels the handler, at the inbound end."""
        self._protocols = protocols
        self._is_announced = is_inbound  # outbound: the peer hears of it with the first bytes
        self._agreed = trio.Event() if len(protocols) > 1 else None
        self._pieces: deque[bytes] = deque()
        self._window = config.STREAM_WINDOW_BYTES
        self._uncredited = 0
        self._reader: trio.lowlevel.Task | None = None
        self._window_waiter: trio.lowlevel.Task | None = None
        self._is_sending = False
        self._is_write_closed = False
        self._is_remote_ended = False
        self._is_discarding = False
        self._error: str | None = None  # why it was reset
        self._refusal: str | None = None  # that the peer speaks none of the protocols

    def __repr__(self) -> str:
        return f"<simulated stream {self.protocol} to {self.peer}>"

    # For users -----------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_sending:
            raise LocalProtocolError("two tasks send on one stream")
        connection = self.connection
        self._is_sending = True
        try:
            if not self._is_announced and self._is_refused_at_once():
                await trio.lowlevel.checkpoint()
                return
            size = len(data)
            if type(data) is bytes and 0 < size <= FRAME_BYTES_MAX and self._may_send(size):
                self._put(data)
            else:
                view = memoryview(data).cast("B")
                size = len(view)
                await self._send(view)
            connection.unyielded += size + MESSAGE_COST_BYTES
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
        is_free = self._is_announced and not self._is_sending and self.connection.error is None
        if not is_free or not 0 < len(data) <= FRAME_BYTES_MAX or not self._may_send(len(data)):
            return False
        self._put(data)
        return True

    async def receive_some(self, bytes_max: int | None = None) -> bytes:
        if not self._is_announced:
            self._announce()
        if self._pieces:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._pieces:
            self._raise_if_refused()
            self._raise_if_reset()
            if self._is_remote_ended:
                await trio.lowlevel.checkpoint()
                return b""
            self.connection.raise_if_lost()
            await self._wait_bytes()
        return self._pop(bytes_max)

    async def close_write(self) -> None:
        if self._is_sending:
            raise LocalProtocolError("close_write while another task sends")
        self._raise_if_broken()
        if not self._is_announced:
            self._announce()
        self._end()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        if self._error is None:
            self._break("it was reset here")
            if self._is_announced:
                self.connection.post("reset", self.far.was_reset)

    # For the connection --------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing more can be sent or received, but what lies here unread."""
        return self._error is not None or (self._is_write_closed and self._is_remote_ended)

    @property
    def unread_bytes(self) -> int:
        """Bytes received and not yet handed out."""
        return sum(len(piece) for piece in self._pieces)

    @property
    def window(self) -> int:
        """Bytes that may be sent before the peer reads."""
        return self._window

    async def wait_agreed(self) -> None:
        """Propose several protocols, and wait for which one it is to be.

        Raises:
            RemoteProtocolError: The peer speaks none of them.
            StreamReset, ConnectionLost: As they say.
        """
        assert self._agreed is not None
        self._announce()
        await self._agreed.wait()
        self._raise_if_refused()
        self._raise_if_broken()

    def agree(self, protocol: ProtocolId) -> None:
        """The peer chose."""
        self.protocol = protocol
        if self._agreed is not None:
            self._agreed.set()

    def refuse(self) -> None:
        """The peer speaks none of the protocols."""
        self._refusal = f"{self.peer} does not serve {', '.join(self._protocols)}"
        self._break("the peer does not serve its protocol")

    def feed(self, data: bytes) -> None:
        """Take received bytes."""
        if self._error is not None:
            return
        connection = self.connection
        if connection.error is not None:
            return
        connection.received_s = trio.current_time()
        if self._is_discarding:
            self._credit(len(data))
            return
        self._pieces.append(data)
        task = self._reader
        if task is not None:
            self._reader = None
            trio.lowlevel.reschedule(task)

    def end(self) -> None:
        """The peer will send no more."""
        self._is_remote_ended = True
        self._wake_reader()
        if self.is_over:
            self.connection.forget(self)

    def open_window(self, size: int) -> None:
        """The peer has read."""
        self._window += size
        self._wake_sender()

    def was_reset(self) -> None:
        """The peer gave the stream up."""
        if self._error is None:
            self._break("the peer gave it up")

    def connection_closed(self) -> None:
        """Wake who waits here; what was received can still be read."""
        self._wake_reader()
        self._wake_sender()
        if self._agreed is not None:
            self._agreed.set()

    async def finish(self) -> None:
        """After the handler: close what is open, and read past what the peer still sends."""
        if self._error is not None:
            return
        if not self._is_write_closed and self.connection.error is None:
            self._end()
        self._is_discarding = True
        while self._pieces:
            self._pop(None)
        if not self._is_remote_ended and self.connection.error is None:
            with trio.move_on_after(LINGER_S):
                while not self.is_over and self.connection.error is None:
                    await self._wait_bytes()
        if not self._is_remote_ended:
            self.reset()

    # Below ---------------------------------------------------------------------

    def _announce(self) -> None:
        """Let the peer know of the stream: what is sent travels behind that."""
        if self._error is None and self.connection.error is None:
            self._is_announced = True
            self.connection.announce(self, self._protocols)

    def _is_refused_at_once(self) -> bool:
        """Announce the stream; on a perfect link its refusal is here before the bytes are sent.

        No real network is as quick: the sender learns it from what it does next.
        """
        self._raise_if_broken()
        self._announce()
        return self._error is not None

    def _may_send(self, size: int) -> bool:
        """Whether nothing stands in the way of `size` bytes; errors are for `_send` to tell."""
        return (
            size <= self._window
            and self._error is None
            and not self._is_write_closed
            and not self.connection.is_congested
        )

    def _put(self, data: bytes) -> None:
        self.connection.raise_if_lost()
        self._window -= len(data)
        self.connection.post_data(data, self.far.feed)

    async def _send(self, data: memoryview) -> None:
        connection = self.connection
        offset, total = 0, len(data)
        try:
            while offset < total:
                self._raise_if_broken()
                if self._is_write_closed:
                    raise StreamReset("the stream was closed for sending")
                if connection.is_congested:
                    await connection.wait_turn(self.priority)
                elif not self._window:
                    await self._wait_window()
                else:
                    limit = SLOW_FRAME_BYTES_MAX if connection.is_slow else FRAME_BYTES_MAX
                    size = min(self._window, limit, total - offset)
                    self._put(bytes(data[offset : offset + size]))
                    offset += size
        finally:
            connection.pass_turn()

    def _end(self) -> None:
        if not self._is_write_closed:
            self._is_write_closed = True
            self.connection.post("end", self.far.end)
            if self.is_over:
                self.connection.forget(self)

    def _pop(self, bytes_max: int | None) -> bytes:
        piece = self._pieces.popleft()
        if bytes_max is not None and len(piece) > bytes_max:
            self._pieces.appendleft(piece[bytes_max:])
            piece = piece[:bytes_max]
        self._credit(len(piece))
        return piece

    def _credit(self, size: int) -> None:
        """Count bytes as read; half a window later the peer is told."""
        self._uncredited += size
        if self._uncredited >= CREDIT_BYTES:
            credit, self._uncredited = self._uncredited, 0
            self.connection.post("", self.far.open_window, credit)

    def _break(self, error: str) -> None:
        self._error = error
        self._pieces.clear()
        self.connection_closed()
        self.connection.forget(self)

    def _raise_if_refused(self) -> None:
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise RemoteProtocolError(refusal, peer=self.peer)

    def _raise_if_reset(self) -> None:
        if self._error is not None:
            raise StreamReset(f"stream {self.protocol} to {self.peer} is over: {self._error}")

    def _raise_if_broken(self) -> None:
        self._raise_if_reset()
        self.connection.raise_if_lost()

    async def _wait_bytes(self) -> None:
        if self._reader is not None:
            raise LocalProtocolError("two tasks receive from one stream")
        self._reader = trio.lowlevel.current_task()
        await _park(self._abort_reader)

    def _abort_reader(self, _: object) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake_reader(self) -> None:
        task, self._reader = self._reader, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def _wait_window(self) -> None:
        self._window_waiter = trio.lowlevel.current_task()
        await _park(self._abort_window_waiter)

    def _abort_window_waiter(self, _: object) -> trio.lowlevel.Abort:
        self._window_waiter = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake_sender(self) -> None:
        task, self._window_waiter = self._window_waiter, None
        if task is not None:
            trio.lowlevel.reschedule(task)
