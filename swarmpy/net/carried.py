"""A byte stream over a stream of another connection, as a relay's circuit is one.

What it takes waits in a bounded buffer for the carrying stream's window; what it gives is read from
that stream only as it is asked for, so back-pressure reaches through both connections.
"""

from __future__ import annotations

import trio

from swarmpy.abc import Address, ByteStream, Stream
from swarmpy.errors import ConnectionLost, NetworkError, RemoteProtocolError

UNSENT_BYTES_MAX = 64 * 1024
"""Bytes taken and not yet sent: as much as a socket is let take, for the same reason."""

LINGER_S = 2.0
"""What the last bytes and both ends get to arrive after `close`; then the stream is reset."""


class CarriedStream(ByteStream):
    """One end of a byte stream inside a `Stream`. `run` must run for anything to be sent."""

    def __init__(
        self,
        stream: Stream,
        *,
        local_address: Address | None = None,
        remote_address: Address | None = None,
    ) -> None:
        """Take over a stream.

        Args:
            local_address, remote_address: Of the two ends; those of the carrying connection
                unless said.
        """
        self._stream = stream
        self.local_address = local_address or stream.connection.local_address
        self.remote_address = remote_address or stream.connection.remote_address
        self._unsent = bytearray()
        self._unsent_bytes_max = UNSENT_BYTES_MAX
        self._received: bytes | None = b""  # None once the peer has ended
        self._error: Exception | None = None
        self._is_closed = False
        self._writable = trio.lowlevel.ParkingLot()
        self._work = trio.Event()
        self._running = trio.CancelScope()
        self._reading = trio.CancelScope()

    async def run(self) -> None:
        """Send what is taken until the stream is closed or breaks; then both ends are closed."""
        try:
            with self._running:
                await self._send()
                await self._stream.close_write()
                while await self._stream.receive_some():  # what nobody will read any more
                    pass
                return
        except (NetworkError, RemoteProtocolError) as error:
            self._break(error)
        finally:
            self.close()
            self._stream.reset()

    def send_nowait(self, data: memoryview) -> int:
        self._raise_if_over()
        taken = max(0, min(len(data), self._unsent_bytes_max - len(self._unsent)))
        self._unsent += data[:taken]
        self._work.set()
        return taken

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while len(self._unsent) >= self._unsent_bytes_max and not self._is_over:
            await self._writable.park()

    def limit_unsent(self, bytes_max: int) -> None:
        self._unsent_bytes_max = max(1, min(bytes_max, UNSENT_BYTES_MAX))
        self._writable.unpark_all()

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        if self._received:
            size = min(len(self._received), len(buffer))
            buffer[:size] = self._received[:size]
            self._received = self._received[size:]
            return size
        self._raise_if_over()
        return 0 if self._received is None else None

    async def wait_readable(self) -> None:
        if self._received != b"" or self._is_over:
            return await trio.lowlevel.checkpoint()
        try:
            with trio.CancelScope() as self._reading:
                # None stands for the end from here on: b"" says here that nothing is there yet.
                self._received = await self._stream.receive_some() or None
        except (NetworkError, RemoteProtocolError) as error:
            self._break(error)

    def wake_reader(self) -> None:
        self._reading.cancel()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._received = b""
        self._reading.cancel()
        self._running.deadline = trio.current_time() + LINGER_S
        self._wake()

    @property
    def _is_over(self) -> bool:
        return self._is_closed or self._error is not None

    async def _send(self) -> None:
        """Send until it is over, and what was taken until it was closed."""
        while self._error is None:
            if self._unsent:
                data = bytes(self._unsent)
                await self._stream.send_all(data)
                del self._unsent[: len(data)]
                self._writable.unpark_all()
            elif self._is_closed:
                return
            else:
                self._work = trio.Event()
                await self._work.wait()
        raise self._error

    def _break(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        self._work.set()
        self._writable.unpark_all()

    def _raise_if_over(self) -> None:
        if self._error is not None:
            raise ConnectionLost(f"the carrying stream broke: {self._error}") from self._error
        if self._is_closed:
            raise ConnectionLost("the carried byte stream was closed here")
