"""Messages over a stream: frames of a length and bytes, and Structs inside them.

Spec: protocols/README.md, framing.
"""

from __future__ import annotations

from collections import deque
from typing import TypeVar

import msgspec
import trio

from swarmpy.abc import Stream
from swarmpy.errors import ConnectionLost, FrameTooLarge, RemoteProtocolError
from swarmpy.identity import PeerId
from swarmpy.proto import wire

T = TypeVar("T")

JOINED_BYTES_MAX = 32 * 1024
"""Up to here the parts of a frame are joined and sent at once; larger parts are sent uncopied."""


PIECE_BYTES_MIN = 4 * 1024
"""Smaller pieces behind others are joined: a frame that drips in byte by byte must not cost 350
times its size in objects."""

FRAME_TIMEOUT_S = 30.0
FRAME_BYTES_PER_S_MIN = 8 * 1024
"""A frame that has begun is whole within half a minute and what its bytes take at 8 KiB/s: slower
than any link, even below more urgent traffic. Who drips bytes would hold its buffer for ever."""


class MessageStream:
    """Frames and messages over a stream. One sending and one receiving task at a time.

    Attributes:
        stream: The stream below; reset it to give up.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._pieces: deque[memoryview] = deque()
        self._small = bytearray()  # received behind the pieces
        self._size = 0

    @property
    def peer(self) -> PeerId:
        return self.stream.peer

    async def send(self, message: msgspec.Struct) -> None:
        """Send one message.

        Raises:
            StreamReset, ConnectionLost: As for `Stream.send_all`.
        """
        await self.stream.send_all(wire.frame(wire.encode(message)))

    def send_nowait(self, message: msgspec.Struct) -> bool:
        """Send one message if nothing stands in its way; see `Stream.send_nowait`."""
        return self.stream.send_nowait(wire.frame(wire.encode(message)))

    async def receive(self, kind: type[T], *, bytes_max: int = wire.MESSAGE_BYTES_MAX) -> T:
        """Wait for one message of `kind` (a Struct type or a tagged union).

        Raises:
            RemoteProtocolError: Not such a message, or larger than `bytes_max`.
            ConnectionLost: The peer ended the stream instead of sending a message.
            StreamReset: The peer, or this node, gave the stream up.
        """
        frame = await self.receive_frame(bytes_max)
        if frame is None:
            raise ConnectionLost(f"{self.peer} ended the stream before its message")
        return self._decode(frame, kind)

    async def receive_or_end(
        self, kind: type[T], *, bytes_max: int = wire.MESSAGE_BYTES_MAX
    ) -> T | None:
        """Wait for one message as `receive` does; None once the peer ended the stream cleanly."""
        frame = await self.receive_frame(bytes_max)
        return None if frame is None else self._decode(frame, kind)

    async def send_frame(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send one frame whose bytes are `parts` in order; large parts are not copied.

        Raises:
            StreamReset, ConnectionLost: As for `Stream.send_all`.
        """
        sizes = [part.nbytes if isinstance(part, memoryview) else len(part) for part in parts]
        total = sum(sizes)
        small: list[bytes | bytearray | memoryview] = [wire.encode_varint(total)]
        if total <= JOINED_BYTES_MAX:
            await self.stream.send_all(b"".join((*small, *parts)))
            return
        for part, size in zip(parts, sizes, strict=True):
            if size <= JOINED_BYTES_MAX:
                small.append(part)
                continue
            if small:
                await self.stream.send_all(b"".join(small))
                small = []
            await self.stream.send_all(part)
        if small:
            await self.stream.send_all(b"".join(small))

    async def receive_frame(self, bytes_max: int) -> memoryview | None:
        """Wait for one frame and return its bytes; None at a clean end between two frames.

        Raises:
            FrameTooLarge: More than `bytes_max` bytes are announced; none of them is read.
            RemoteProtocolError: The stream ended inside a frame, or its rest did not come in time.
            StreamReset, ConnectionLost: As for `Stream.receive_some`.
        """
        if not self._size and not await self._receive():
            return None
        head = self._decode_head()
        if head is None or self._size < sum(head):
            return await self._receive_rest(bytes_max)
        return self._take(self._take_head(head, bytes_max))

    async def close_write(self) -> None:
        """Say that no more frames follow."""
        await self.stream.close_write()

    def reset(self) -> None:
        """Give the stream up."""
        self.stream.reset()

    def _decode_head(self) -> tuple[int, int] | None:
        """Return the next frame's size and its length's bytes, None while bytes are missing."""
        self._gather()
        head = b""
        for piece in self._pieces:
            head += piece[: wire.VARINT_BYTES_MAX - len(head)]
            if len(head) == wire.VARINT_BYTES_MAX:
                break
        return wire.decode_varint(head)

    async def _receive_rest(self, bytes_max: int) -> memoryview:
        """Wait until a frame that has begun is whole, and return its bytes."""
        try:
            with trio.fail_after(FRAME_TIMEOUT_S) as scope:
                while (head := self._decode_head()) is None:
                    await self._receive_more()
                size = self._take_head(head, bytes_max)
                scope.deadline += size / FRAME_BYTES_PER_S_MIN
                while self._size < size:
                    await self._receive_more()
                return self._take(size)
        except trio.TooSlowError:
            raise RemoteProtocolError(
                f"a frame came more slowly than {FRAME_BYTES_PER_S_MIN} bytes/s", peer=self.peer
            ) from None

    async def _receive_more(self) -> None:
        if not await self._receive():
            raise RemoteProtocolError("the stream ended inside a frame", peer=self.peer)

    def _take_head(self, head: tuple[int, int], bytes_max: int) -> int:
        """Take a frame's length and return its size."""
        size, head_bytes = head
        if size > bytes_max:
            raise FrameTooLarge(f"frame of {size} bytes exceeds {bytes_max}", peer=self.peer)
        self._take(head_bytes)
        return size

    async def _receive(self) -> bool:
        data = await self.stream.receive_some()
        if data:
            self._size += len(data)
            if self._pieces and len(data) < PIECE_BYTES_MIN:
                self._small += data
            else:
                self._gather()
                self._pieces.append(memoryview(data))
        return bool(data)

    def _gather(self) -> None:
        """Make one piece of the small ones that came behind another."""
        if self._small:
            self._pieces.append(memoryview(bytes(self._small)))
            self._small.clear()

    def _take(self, size: int) -> memoryview:
        """Take `size` bytes that are there: uncopied from one piece, else joined once."""
        self._gather()
        self._size -= size
        if not size:
            return memoryview(b"")
        taken: list[memoryview] = []
        while size:
            piece = self._pieces.popleft()
            if len(piece) > size:
                self._pieces.appendleft(piece[size:])
                piece = piece[:size]
            taken.append(piece)
            size -= len(piece)
        return taken[0] if len(taken) == 1 else memoryview(b"".join(taken))

    def _decode(self, frame: memoryview, kind: type[T]) -> T:
        try:
            return wire.decode(frame, kind)
        except RemoteProtocolError as error:
            error.peer = error.peer or self.peer
            raise
