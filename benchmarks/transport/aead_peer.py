"""The ceiling: TCP under trio with bare 64 KiB ChaCha20-Poly1305 frames, and nothing else.

No handshake (fixed keys), no streams, no windows, no limits, no message boundaries: what any secure
transport in Python has to pay, and only that. Frames are encrypted into one buffer and decrypted
out of one, by `encrypt_into` and `decrypt_into`, straight from and to the application's memory; a
batch of frames is one `send`, a buffer of frames one `recv_into`, on the plain socket; trio only
waits, and where it need not wait nobody else gets a turn.

A frame is 4 bytes of length, ciphertext, and a tag of 16 bytes.
"""

from __future__ import annotations

import mmap
import socket
import struct
import sys

import cryptography
import trio
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from raw_peer import RawPeer
from workload import Bytes, Channel, ChannelEnded, Peer, run

FRAME_BYTES = 64 * 1024
LENGTH_BYTES = 4
TAG_BYTES = 16
SEALED_BYTES = LENGTH_BYTES + FRAME_BYTES + TAG_BYTES
BATCH_FRAMES = 4
"""Frames a `send` in the midst of a large write: 6 % more bulk than two, and as much as eight."""

BATCH_FRAMES_FIRST = 2
"""Frames a `send` in a write's first 256 KiB: the other end can only decrypt what was sent, and
four cost a fifth more on an echo of that size."""

FIRST_BYTES = 256 * 1024

RECEIVE_FRAMES = 2
"""Frames a `recv_into`. Whole frames end where the buffer does, so none is ever moved."""

KERNEL_BYTES = 1024 * 1024
"""What the kernel may hold at each end: with what it takes by itself a sender that is faster than
its receiver has megabytes on their way, which fall out of the caches, in one run of three."""

KEYS = (b"\1" * 32, b"\2" * 32)
_nonce = struct.Struct("<4xQ").pack
_length = struct.Struct(">I")


def _pages(size: int) -> memoryview:
    """A buffer of its own pages: what malloc gives depends on what a process did before."""
    return memoryview(mmap.mmap(-1, size))


class AeadChannel(Channel):
    """A TCP connection of encrypted frames."""

    def __init__(self, stream: trio.SocketStream, *, is_dialer: bool) -> None:
        # A call of trio's sockets is a checkpoint, which costs as much as encrypting 8 KiB.
        self._socket = socket.socket(fileno=stream.socket.detach())
        self._socket.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, option, KERNEL_BYTES)
        ours, theirs = KEYS if is_dialer else reversed(KEYS)
        self._encrypt_into = ChaCha20Poly1305(ours).encrypt_into
        self._decrypt_into = ChaCha20Poly1305(theirs).decrypt_into
        self._sent_count = 0
        self._received_count = 0
        self._sealed = _pages(BATCH_FRAMES * SEALED_BYTES)
        self._received = _pages(RECEIVE_FRAMES * SEALED_BYTES)
        self._start = self._end = 0  # what was received and not yet decrypted
        self._is_drained = True  # whether the last read left nothing in the kernel
        self._message = memoryview(bytearray(FRAME_BYTES))
        self._opened = _pages(FRAME_BYTES)
        self._rest = self._opened[:0]  # of a frame that was larger than what was asked for

    async def send(self, data: Bytes) -> None:
        data = memoryview(data)
        sealed, encrypt_into = self._sealed, self._encrypt_into
        end = 0
        for offset in range(0, len(data), FRAME_BYTES):
            frame = data[offset : offset + FRAME_BYTES]
            body = end + LENGTH_BYTES
            following = body + len(frame) + TAG_BYTES
            _length.pack_into(sealed, end, following - body)
            encrypt_into(_nonce(self._sent_count), frame, None, sealed[body:following])
            self._sent_count += 1
            end = following
            frames = BATCH_FRAMES_FIRST if offset < FIRST_BYTES else BATCH_FRAMES
            if end >= frames * SEALED_BYTES:
                await self._send(sealed[:end])
                end = 0
        if end:
            await self._send(sealed[:end])

    async def _send(self, sealed: memoryview) -> None:
        while True:
            try:
                sent = self._socket.send(sealed)
            except BlockingIOError:
                sent = 0
            if sent == len(sealed):
                return
            sealed = sealed[sent:]
            await trio.lowlevel.wait_writable(self._socket)

    async def receive(self, size: int) -> Bytes:
        if len(self._message) < size:
            self._message = memoryview(bytearray(size))
        message = self._message[:size]
        count = 0
        while count < size:
            count += await self._open_next(message[count:])
        return message

    async def discard(self, size: int) -> None:
        while size:
            size -= await self._open_next(self._opened[:size])

    async def _open_next(self, target: memoryview) -> int:
        """Decrypt the next frame, or as much as fits, into `target`, and return how much."""
        if self._rest:
            return self._take_rest(target)
        while self._end - self._start < LENGTH_BYTES:
            await self._receive_more(LENGTH_BYTES)
        size: int
        (size,) = _length.unpack_from(self._received, self._start)
        while self._end - self._start < LENGTH_BYTES + size:
            await self._receive_more(LENGTH_BYTES + size)
        body = self._start + LENGTH_BYTES
        frame = self._received[body : body + size]
        nonce = _nonce(self._received_count)
        self._received_count += 1
        self._start = body + size
        size -= TAG_BYTES
        if size <= len(target):
            self._decrypt_into(nonce, frame, None, target[:size])
            return size
        self._rest = self._opened[:size]
        self._decrypt_into(nonce, frame, None, self._rest)
        return self._take_rest(target)

    def _take_rest(self, target: memoryview) -> int:
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    async def _receive_more(self, needed: int) -> None:
        """Read once, keeping what is there; a frame of `needed` bytes then has room."""
        received = self._received
        held = self._end - self._start
        if not held or self._start + needed > len(received):
            received[:held] = received[self._start : self._end]
            self._start, self._end = 0, held
        while True:
            if self._is_drained:
                await trio.lowlevel.wait_readable(self._socket)
            room = received[self._end :]
            try:
                count = self._socket.recv_into(room)
            except BlockingIOError:
                self._is_drained = True
                continue
            if not count:
                raise ChannelEnded
            self._is_drained = count < len(room)
            self._end += count
            return

    async def close(self) -> None:
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


class AeadPeer(RawPeer):
    """A `RawPeer` whose channels are encrypted."""

    version = f"trio {trio.__version__}, cryptography {cryptography.__version__}"

    def channel(self, stream: trio.SocketStream) -> Channel:
        return AeadChannel(stream, is_dialer=False)

    async def open(self) -> Channel:
        return AeadChannel(await self.dialled(), is_dialer=True)


async def start(nursery: trio.Nursery) -> Peer:
    peer = AeadPeer()
    await peer.listen(nursery, sys.argv[1])
    return peer


if __name__ == "__main__":
    trio.run(run, start)
