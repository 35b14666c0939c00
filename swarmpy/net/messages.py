"""Messages over a stream: frames of a length and bytes, and Structs inside them.

Spec: protocols/README.md, framing.
"""

from __future__ import annotations

from collections import deque
from typing import TypeVar

import msgspec

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
            RemoteProtocolError: The stream ended inside a frame.
            StreamReset, ConnectionLost: As for `Stream.receive_some`.
        """
        while (head := self._decode_head()) is None:
            if not await self._receive():
                if self._size:
                    raise self._cut()
                return None
        size, head_bytes = head
        if size > bytes_max:
            raise FrameTooLarge(f"frame of {size} bytes exceeds {bytes_max}", peer=self.peer)
        self._take(head_bytes)
        while self._size < size:
            if not await self._receive():
                raise self._cut()
        return self._take(size)

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

    def _cut(self) -> RemoteProtocolError:
        return RemoteProtocolError("the stream ended inside a frame", peer=self.peer)
