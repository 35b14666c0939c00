"""A peer that speaks bare TCP with trio's own socket streams: what the machine gives at most."""

from __future__ import annotations

import socket
import sys
import time

import trio
from workload import Bytes, Channel, ChannelEnded, Peer, run, serve

RECEIVE_BYTES = 256 * 1024


class RawChannel(Channel):
    """A TCP connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._socket = stream.socket
        self._message = memoryview(bytearray(RECEIVE_BYTES))

    async def send(self, data: Bytes) -> None:
        await self._stream.send_all(data)

    async def receive(self, size: int) -> Bytes:
        if len(self._message) < size:
            self._message = memoryview(bytearray(size))
        message = self._message[:size]
        count = 0
        while count < size:
            received = await self._socket.recv_into(message[count:])
            if not received:
                raise ChannelEnded
            count += received
        return message

    async def discard(self, size: int) -> None:
        while size:
            received = await self._socket.recv_into(self._message[: min(size, RECEIVE_BYTES)])
            if not received:
                raise ChannelEnded
            size -= received

    async def close(self) -> None:
        await self._stream.aclose()


class RawPeer(Peer):
    """Listens, and makes one TCP connection a channel."""

    version = f"trio {trio.__version__}"

    async def listen(self, nursery: trio.Nursery, host: str) -> None:
        listeners = await nursery.start(self._serve, host)
        self.address = "{}:{}".format(*listeners[0].socket.getsockname())

    async def _serve(self, host: str, *, task_status: trio.TaskStatus[object]) -> None:
        await trio.serve_tcp(self._serve_one, 0, host=host, task_status=task_status)

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        try:
            await serve(self.channel(stream))
        except trio.BrokenResourceError:
            pass  # the other side closed while bytes were on their way

    def channel(self, stream: trio.SocketStream) -> Channel:
        return RawChannel(stream)

    async def dial(self, address: str) -> None:
        self._remote = address

    async def connect(self, address: str) -> float:
        began = time.perf_counter()
        stream = await _connect(address)
        took = time.perf_counter() - began
        await stream.aclose()
        return took

    async def open(self) -> Channel:
        return RawChannel(await self.dialled())

    async def dialled(self) -> trio.SocketStream:
        """Return one more connection to the dialled peer."""
        return await _connect(self._remote)


async def _connect(address: str) -> trio.SocketStream:
    host, _, port = address.rpartition(":")
    made = trio.socket.socket()
    await made.connect((host, int(port)))
    stream = trio.SocketStream(made)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


async def start(nursery: trio.Nursery) -> Peer:
    peer = RawPeer()
    await peer.listen(nursery, sys.argv[1])
    return peer


if __name__ == "__main__":
    trio.run(run, start)
