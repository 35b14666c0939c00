"""Hosts for the network tests, and a peer that says on the wire whatever a test wants."""

from __future__ import annotations

import random
import struct
from typing import Any

import trio

from swarmpy.abc import Address, ByteStream, Network, ProtocolId, Stream
from swarmpy.errors import ConnectionLost, NetworkError
from swarmpy.identity import Identity, PeerId
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork
from swarmpy.proto import noise
from swarmpy.proto.multistream import Dialer
from swarmpy.proto.noise import Handshake, StaticKey
from swarmpy.testing import SimNetwork

ECHO = ProtocolId("/swarmpy-test/echo/1")
DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


def identity(name: str) -> Identity:
    """Return the identity that a test's peer of this name always has."""
    return Identity.generate(random.Random(name))


async def echo(stream: Stream) -> None:
    """Handler that sends back what it receives."""
    while data := await stream.receive_some():
        await stream.send_all(data)


async def receive_exactly(stream: Stream, size: int) -> bytes:
    """Return the next `size` bytes."""
    received = bytearray()
    while len(received) < size:
        data = await stream.receive_some(size - len(received))
        assert data, f"end after {len(received)} of {size} bytes"
        received += data
    return bytes(received)


async def receive_all(stream: Stream) -> bytes:
    """Return everything up to the end."""
    received = bytearray()
    while data := await stream.receive_some():
        received += data
    return bytes(received)


async def exchange(stream: Stream, data: bytes) -> bytes:
    """Send bytes and return as many that come back."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
        return await receive_exactly(stream, len(data))


async def connect(near: NativeHost, far: NativeHost) -> PeerId:
    """Let one host dial the other, and return the other's id."""
    await near.dial(far.identity.peer_id, far.addresses)
    return far.identity.peer_id


async def wait_until_closed(host: NativeHost, *, within_s: float = 5.0) -> None:
    """Wait until a host has no connection left."""
    events = host.connection_events()
    with trio.fail_after(within_s):
        while host.connections:
            await anext(events)


def frame(kind: int, flags: int, stream_id: int, value: int, data: bytes = b"") -> bytes:
    """Return a Yamux frame."""
    return struct.pack("!BBHII", 0, kind, flags, stream_id, value) + data


class RawPeer:
    """The initiator's end of a proven connection, below Yamux."""

    def __init__(self, byte_stream: ByteStream, handshake: Handshake) -> None:
        self.byte_stream = byte_stream
        self._handshake = handshake
        self._received = b""

    async def send(self, plaintext: bytes) -> None:
        """Send bytes as one Noise frame."""
        out = bytearray(len(plaintext) + noise.LENGTH_BYTES + noise.TAG_BYTES)
        self._sealer.seal_into(plaintext, memoryview(out), 0)
        await send_raw(self.byte_stream, bytes(out))

    async def receive(self) -> bytes:
        """Return the next Noise frame's bytes.

        Raises:
            ConnectionLost: The other side closed the connection.
        """
        return self._opener.open(await self._receive_message())

    async def wait_closed(self) -> None:
        """Read until the other side closes the connection."""
        try:
            while True:
                await self.receive()
        except NetworkError:
            return

    async def shake(self) -> None:
        """Agree on Noise and run the handshake."""
        dialer = Dialer([noise.PROTOCOL])
        await send_raw(self.byte_stream, dialer.start())
        while dialer.selected is None:
            await self._more()
            dialer.receive(self._received)
            self._received = b""
        self._received = dialer.rest
        answer: bytes | None = self._handshake.start()
        while answer is not None:
            await send_raw(self.byte_stream, len(answer).to_bytes(2, "big") + answer)
            if self._handshake.is_finished:
                break
            answer = self._handshake.receive(await self._receive_message())
        self._sealer, self._opener = self._handshake.split()

    async def _receive_message(self) -> bytes:
        while len(self._received) < 2:
            await self._more()
        end = 2 + int.from_bytes(self._received[:2], "big")
        while len(self._received) < end:
            await self._more()
        message, self._received = self._received[2:end], self._received[end:]
        return message

    async def _more(self) -> None:
        data = await receive_raw(self.byte_stream)
        if not data:
            raise ConnectionLost("closed by the other side")
        self._received += data


async def raw_peer(byte_stream: ByteStream, name: str) -> RawPeer:
    """Prove an identity to a host at the other end."""
    own = identity(name)
    handshake = Handshake(
        is_initiator=True,
        static=StaticKey.create(own, b"\x11" * 32),
        ephemeral=random.Random(1).randbytes(32),
        muxers=["/yamux/1.0.0"],
    )
    peer = RawPeer(byte_stream, handshake)
    await peer.shake()
    return peer


class World:
    """Makes hosts that can reach each other."""

    def __init__(self, kind: str, nursery: trio.Nursery) -> None:
        self.kind = kind
        self.sim = SimNetwork()
        self._nursery = nursery
        self._count = 0
        self._strangers: list[ByteStream] = []

    def network(self) -> Network:
        """Return the network of one more machine."""
        self._count += 1
        if self.kind == "tcp":
            return TcpNetwork()
        return self.sim.network(f"10.0.0.{self._count}")

    async def stranger(self, host: NativeHost) -> ByteStream:
        """Return a bare byte stream to a host, from a machine of its own."""
        byte_stream = await self.network().dial(host.addresses[0])
        self._strangers.append(byte_stream)
        return byte_stream

    async def raw_peer(self, host: NativeHost, *, name: str = "raw") -> RawPeer:
        """Return a proven connection to a host, below Yamux."""
        return await raw_peer(await self.stranger(host), name)

    def close(self) -> None:
        """Close the bare byte streams; hosts end with the test's nursery."""
        for byte_stream in self._strangers:
            byte_stream.close()

    async def host(self, name: str, **options: Any) -> NativeHost:
        """Return a running host that listens."""
        made = NativeHost(
            identity(name), self.network(), random=random.Random(f"keys of {name}"), **options
        )
        await self._nursery.start(made.run)
        await made.listen(
            Address("/ip4/127.0.0.1/tcp/0" if self.kind == "tcp" else "/ip4/0.0.0.0/tcp/0")
        )
        return made


async def send_raw(byte_stream: ByteStream, data: bytes) -> None:
    """Send all bytes."""
    view = memoryview(data)
    while view:
        view = view[byte_stream.send_nowait(view) :]
        if view:
            await byte_stream.wait_writable()


async def receive_raw(byte_stream: ByteStream, size: int = 65536) -> bytes:
    """Return the next bytes, b"" at the end."""
    buffer = memoryview(bytearray(size))
    while (count := byte_stream.receive_into_nowait(buffer)) is None:
        await byte_stream.wait_readable()
    return bytes(buffer[:count])


async def wait_raw_end(byte_stream: ByteStream) -> None:
    """Read until the other side closes, in whatever way."""
    try:
        while await receive_raw(byte_stream):
            pass
    except NetworkError:
        return
