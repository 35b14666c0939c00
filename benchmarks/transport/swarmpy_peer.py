"""A swarmpy peer: `NativeHost` over TCP, used as an application uses it."""

from __future__ import annotations

import itertools
import sys
import time
from importlib.metadata import version
from typing import Any

import trio
from workload import (
    TOKEN_BYTES,
    WRITE_BYTES,
    Bytes,
    Channel,
    Peer,
    PieceChannel,
    begin,
    milliseconds,
    payload,
    run,
    serve,
)

from swarmpy.abc import Address, Priority, ProtocolId, Stream, WallSeconds
from swarmpy.environment import system_random
from swarmpy.errors import ConnectionLost, StreamReset
from swarmpy.identity import Identity, PeerId, parse_peer_id
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork

DECODE_BYTES = 8 * 1024
"""A hidden state of 4,096 16-bit numbers: one row of one decode step."""

DECODE_PAUSE_S = 0.04
"""Rows come up to this long after the last token, so that they meet the other classes anywhere."""

PREFILL_BYTES = 4 << 20
SHARD_BYTES = 16 << 30
PROTOCOL = ProtocolId("/swarmpy-bench/load/1")


class SwarmpyChannel(PieceChannel):
    """A stream of a host."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    async def send(self, data: Bytes) -> None:
        await self._stream.send_all(data)

    async def receive_some(self, bytes_max: int) -> bytes:
        return await self._stream.receive_some(bytes_max)

    async def close(self) -> None:
        await self._stream.close_write()
        while await self._stream.receive_some():
            pass


class SwarmpyPeer(Peer):
    """A host in its process."""

    version = version("swarmpy")
    remote: PeerId

    def __init__(self) -> None:
        self.host = new_host()
        self.host.set_handler(PROTOCOL, serve_stream)

    async def listen(self, nursery: trio.Nursery, host: str) -> None:
        self._nursery = nursery
        await nursery.start(self.host.run)
        address = await self.host.listen(Address(f"/ip4/{host}/tcp/0"))
        self.address = f"{address}/p2p/{self.host.identity.peer_id}"

    async def dial(self, address: str) -> None:
        self.remote = await connect(self.host, address)

    async def connect(self, address: str) -> float:
        host = new_host()
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            began = time.perf_counter()
            await connect(host, address)
            took = time.perf_counter() - began
            host.close()
        return took

    async def open(self, priority: Priority = Priority.CONTROL) -> Channel:
        stream = await self.host.open_stream(self.remote, [PROTOCOL], priority=priority)
        return SwarmpyChannel(stream)

    async def special(self, command: dict[str, Any]) -> Any:
        match command:
            case {"do": "hold", "address": address, "count": count}:
                return await self.hold(address, count)
            case {"do": "connections"}:
                return len(self.host.connections)
            case {"do": "decode", "count": count, "is_loaded": is_loaded}:
                return await self.decode(count, is_loaded=is_loaded)
        return await super().special(command)

    async def hold(self, address: str, count: int) -> None:
        """Connect so many new hosts, and keep them."""
        for _ in range(count):
            host = new_host()
            await self._nursery.start(host.run)
            await connect(host, address)

    async def decode(self, count: int, *, is_loaded: bool) -> list[float]:
        """Milliseconds from a decode step's row to its token, alone or beside the other classes."""
        took: list[float] = []
        pauses = system_random()
        sent = payload(DECODE_BYTES)
        async with trio.open_nursery() as nursery:
            if is_loaded:
                nursery.start_soon(self._download)
                await nursery.start(self._prefill)
            channel = await self.open(Priority.DECODE)
            await begin(channel, b"T", DECODE_BYTES)
            for number in range(-2, count):
                began = time.perf_counter()
                await channel.send(sent)
                await channel.receive(TOKEN_BYTES)
                if number >= 0:
                    took.append(milliseconds(began))
                await trio.sleep(pauses.random() * DECODE_PAUSE_S)
            await channel.close()
            nursery.cancel_scope.cancel()
        return took

    async def _prefill(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Send one prefill of 4 MiB after the other; started when the first has arrived."""
        data = payload(PREFILL_BYTES)
        for number in itertools.count():
            channel = await self.open(Priority.PREFILL)
            await begin(channel, b"S", len(data))
            await channel.send(data)
            await channel.receive(1)
            await channel.close()
            if number == 0:
                task_status.started()

    async def _download(self) -> None:
        """Send a shard that never ends."""
        channel = await self.open(Priority.BULK)
        await begin(channel, b"S", SHARD_BYTES)
        data = payload(WRITE_BYTES)
        for _ in range(SHARD_BYTES // WRITE_BYTES):
            await channel.send(data)


def new_host() -> NativeHost:
    random = system_random()
    return NativeHost(
        Identity.generate(random),
        TcpNetwork(),
        random=random,
        wall_time=lambda: WallSeconds(time.time()),
    )


async def connect(host: NativeHost, address: str) -> PeerId:
    """Dial a peer and wait until it has said who it is."""
    plain, _, peer_id = address.rpartition("/p2p/")
    peer = parse_peer_id(peer_id)
    await host.dial(peer, [Address(plain)])
    await host.wait_identified(peer)
    return peer


async def serve_stream(stream: Stream) -> None:
    try:
        await serve(SwarmpyChannel(stream))
    except (StreamReset, ConnectionLost):
        pass  # the other side is done


async def start(nursery: trio.Nursery) -> Peer:
    peer = SwarmpyPeer()
    await peer.listen(nursery, sys.argv[1])
    return peer


if __name__ == "__main__":
    trio.run(run, start)
