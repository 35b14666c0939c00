"""What every Python peer of benchmarks/bench_transport.py does: serve a load, make a load, time it.

A stack gives channels (two-way byte streams); the loads over them are the same for all. The first
nine bytes of a channel say what follows: b"E" and a size, echo messages of that size until the end;
b"S" and a total, take so many bytes and answer one; b"T" and a size, answer each message of that
size by a token's worth. The peers in JavaScript and Go speak the same, but for the last.

A peer prints one JSON object when it listens, {"address", "version"}, then answers each line of
standard input, {"do", ...}, by one line, {...} or {"error"}. The end of standard input stops it.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from typing import Any

import trio

Bytes = bytes | bytearray | memoryview

HEADER_BYTES = 9
WRITE_BYTES = 1 << 20
"""What a bulk transfer hands to the stack at a time, as an application with large tensors does."""

OPEN_BYTES = 64
"""Size of the first message of a new channel."""


TOKEN_BYTES = 64
"""Size of the answer to a decode step."""


class ChannelEnded(Exception):
    """The other side closed the channel."""


class Channel(ABC):
    """A two-way byte stream of some stack."""

    @abstractmethod
    async def send(self, data: Bytes) -> None:
        """Send all of `data`."""

    @abstractmethod
    async def receive(self, size: int) -> Bytes:
        """Return exactly `size` bytes, valid until the next call.

        Raises:
            ChannelEnded: The other side closed it.
        """

    @abstractmethod
    async def discard(self, size: int) -> None:
        """Take exactly `size` bytes and drop them."""

    @abstractmethod
    async def close(self) -> None:
        """Close it for both sides."""


class PieceChannel(Channel):
    """A channel over a stack that hands out what came, at most so many bytes at a time."""

    def __init__(self) -> None:
        self._message = memoryview(b"")

    @abstractmethod
    async def receive_some(self, bytes_max: int) -> bytes:
        """Return some bytes, b"" at the end."""

    async def receive(self, size: int) -> Bytes:
        piece = await self.receive_some(size)
        if len(piece) == size:
            return piece
        # Joined in one buffer for all messages, as the other peers do: fresh pages cost more than
        # the copy.
        if len(self._message) < size:
            self._message = memoryview(bytearray(size))
        message = self._message[:size]
        count = 0
        while piece:
            message[count : count + len(piece)] = piece
            count += len(piece)
            if count == size:
                return message
            piece = await self.receive_some(size - count)
        raise ChannelEnded

    async def discard(self, size: int) -> None:
        while size:
            piece = await self.receive_some(min(size, WRITE_BYTES))
            if not piece:
                raise ChannelEnded
            size -= len(piece)


class Peer(ABC):
    """One process's end of a stack: it serves channels and opens them."""

    address: str
    version: str

    @abstractmethod
    async def dial(self, address: str) -> None:
        """Connect to a peer, for the channels opened from now on."""

    @abstractmethod
    async def connect(self, address: str) -> float:
        """Connect once more, until both sides know each other; return the seconds, disconnect."""

    @abstractmethod
    async def open(self) -> Channel:
        """Open a channel to the dialled peer."""

    async def special(self, command: dict[str, Any]) -> Any:
        """Answer a command that only this stack knows."""
        raise ValueError(f"no such command: {command['do']}")


async def serve(channel: Channel) -> None:
    """Do what the channel's first bytes say."""
    try:
        header = bytes(await channel.receive(HEADER_BYTES))
        size = int.from_bytes(header[1:], "big")
        if header[:1] == b"S":
            await channel.discard(size)
            await channel.send(b"k")
            await channel.receive(1)
        while header[:1] == b"T":
            await channel.receive(size)
            await channel.send(bytes(TOKEN_BYTES))
        while True:
            await channel.send(await channel.receive(size))
    except ChannelEnded:
        await channel.close()


async def begin(channel: Channel, kind: bytes, size: int) -> None:
    await channel.send(kind + size.to_bytes(8, "big"))


@cache
def payload(size: int) -> bytes:
    """Bytes that differ everywhere: a reply out of place is seen. Made once, as that takes CPU."""
    return b"".join(index.to_bytes(8, "big") for index in range((size + 7) // 8))[:size]


def milliseconds(began: float) -> float:
    """Return what passed since then, to ten nanoseconds."""
    return round((time.perf_counter() - began) * 1e3, 5)


async def rtt(peer: Peer, size: int, count: int, seconds_max: float) -> list[float]:
    """Milliseconds of echoes, one after the other on one open channel."""
    channel = await peer.open()
    await begin(channel, b"E", size)
    sent = payload(size)
    took: list[float] = []
    for number in range(-2, count):  # the first two open the channel and are not counted
        began = time.perf_counter()
        await channel.send(sent)
        received = await channel.receive(size)
        if number >= 0:
            took.append(milliseconds(began))
        if bytes(received) != sent:  # comparing a memoryview takes 25 times as long
            raise ValueError(f"an echo of {size} bytes came back different")
        if sum(took) > seconds_max * 1e3:
            break
    await channel.close()
    return took


async def bulk(peer: Peer, size: int) -> float:
    """Seconds to send so many bytes, until the other side says that it has them all."""
    channel = await peer.open()
    await begin(channel, b"S", size)
    data = payload(WRITE_BYTES)
    began = time.perf_counter()
    for _ in range(size // WRITE_BYTES):
        await channel.send(data)
    await channel.receive(1)
    took = time.perf_counter() - began
    await channel.close()
    return took


async def rps(peer: Peer, streams: int, size: int, count: int, seconds_max: float) -> float:
    """Echoes a second over so many channels at once."""
    channels = [await peer.open() for _ in range(streams)]
    sent = payload(size)
    done = 0
    for channel in channels:
        await begin(channel, b"E", size)
        await channel.send(sent)
        await channel.receive(size)
    began = time.perf_counter()

    async def work(channel: Channel) -> None:
        nonlocal done
        while done < count and time.perf_counter() - began < seconds_max:
            done += 1
            await channel.send(sent)
            await channel.receive(size)

    async with trio.open_nursery() as nursery:
        for channel in channels:
            nursery.start_soon(work, channel)
    took = time.perf_counter() - began
    for channel in channels:
        await channel.close()
    return done / took


async def opened(peer: Peer, count: int) -> list[float]:
    """Milliseconds from opening a channel to the first reply on it."""
    took = []
    sent = payload(OPEN_BYTES)
    for _ in range(count):
        began = time.perf_counter()
        channel = await peer.open()
        await channel.send(b"E" + OPEN_BYTES.to_bytes(8, "big") + sent)
        await channel.receive(OPEN_BYTES)
        took.append(milliseconds(began))
        await channel.close()
    return took


async def answer(peer: Peer, command: dict[str, Any]) -> Any:
    match command:
        case {"do": "dial", "address": address}:
            return await peer.dial(address)
        case {"do": "rtt", "size": size, "count": count, "seconds_max": seconds_max}:
            return await rtt(peer, size, count, seconds_max)
        case {"do": "bulk", "size": size}:
            return await bulk(peer, size)
        case {"do": "rps", "streams": streams, "size": size, "count": count, "seconds_max": limit}:
            return await rps(peer, streams, size, count, limit)
        case {"do": "open", "count": count}:
            return await opened(peer, count)
        case {"do": "connect", "address": address, "count": count}:
            return [await peer.connect(address) * 1e3 for _ in range(count)]
    return await peer.special(command)


async def run(start: Callable[[trio.Nursery], Awaitable[Peer]]) -> None:
    """Start a peer and obey standard input until it ends."""
    async with trio.open_nursery() as nursery:
        peer = await start(nursery)
        print(json.dumps({"address": peer.address, "version": peer.version}), flush=True)
        async for line in _lines():
            reply: Any
            try:
                reply = {"value": await answer(peer, json.loads(line))}
            except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), flush=True)
        nursery.cancel_scope.cancel()


async def _lines() -> AsyncIterator[bytes]:
    buffer = b""
    async for chunk in trio.lowlevel.FdStream(sys.stdin.fileno()):
        buffer += chunk
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            yield line
