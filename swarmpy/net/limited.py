"""A byte stream that carries so many bytes and no more, as a relay grants them.

Unlimited connections pay nothing for it: only a limited path is wrapped.
"""

from __future__ import annotations

from swarmpy.abc import ByteStream
from swarmpy.errors import ConnectionLost


class LimitedStream(ByteStream):
    """Another byte stream, whose bytes of both directions are counted up to a limit.

    Attributes:
        carried_bytes: Counted so far, the handshake's included.
    """

    def __init__(self, byte_stream: ByteStream, *, bytes_max: int) -> None:
        """Wrap a byte stream before anything was said on it.

        Args:
            bytes_max: Once so many bytes were carried in all, the stream is broken.
        """
        self._byte_stream = byte_stream
        self._bytes_max = bytes_max
        self.local_address = byte_stream.local_address
        self.remote_address = byte_stream.remote_address
        self.carried_bytes = 0

    def send_nowait(self, data: memoryview) -> int:
        room = self._room()
        count = self._byte_stream.send_nowait(data[:room])
        self.carried_bytes += count
        self._room()  # what was sent is on its way: who sent it learns at once that it was the last
        return count

    async def wait_writable(self) -> None:
        await self._byte_stream.wait_writable()

    def limit_unsent(self, bytes_max: int) -> None:
        self._byte_stream.limit_unsent(bytes_max)

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        room = self._room()
        count = self._byte_stream.receive_into_nowait(buffer[:room])
        self.carried_bytes += count or 0
        return count

    async def wait_readable(self) -> None:
        if self.carried_bytes < self._bytes_max:
            await self._byte_stream.wait_readable()

    def wake_reader(self) -> None:
        self._byte_stream.wake_reader()

    def close(self) -> None:
        self._byte_stream.close()

    def _room(self) -> int:
        """Return how many more bytes may be carried, at least 1."""
        room = self._bytes_max - self.carried_bytes
        if room <= 0:
            raise ConnectionLost(f"its limit of {self._bytes_max} bytes is used up")
        return room
