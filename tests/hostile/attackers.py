"""Attackers: peers that speak TCP, multistream, Noise and Yamux by hand, and break any rule.

They are built of `swarmpy.proto` alone, so that nothing of a host stands between a test and the
wire. All of them talk to loopback; an attacker has an address of its own there.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import trio

from swarmpy.abc import Address, ByteStream
from swarmpy.errors import NetworkError, RemoteProtocolError
from swarmpy.identity import Identity, PeerId
from swarmpy.proto import noise
from swarmpy.proto.multiaddr import parse_tcp
from swarmpy.proto.multistream import HEADER, Dialer, encode_line
from swarmpy.proto.noise import Handshake, StaticKey

HOSTILE_IP = "127.0.0.2"
HONEST_IP = "127.0.0.3"

DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

Tamper = Callable[[int, bytes], bytes | None]
"""Changes the attacker's Noise handshake messages: index from 0 and bytes; None sends nothing."""


def identity(name: str) -> Identity:
    """Return the identity that a test's peer of this name always has."""
    return Identity.generate(random.Random(name))


def frame(kind: int, flags: int, stream_id: int, value: int, data: bytes = b"") -> bytes:
    """Return a Yamux frame."""
    return struct.pack("!BBHII", 0, kind, flags, stream_id, value) + data


class End(Exception):
    """The other side closed or reset the connection."""


class Carrier(Protocol):
    """What carries a wire's bytes."""

    async def send_all(self, data: bytes | memoryview) -> None: ...

    async def receive_some(self) -> bytes | bytearray: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


class Socket:
    """A TCP socket as a carrier."""

    def __init__(self, connected: trio.SocketStream) -> None:
        self._stream = connected
        self.send_all = connected.send_all
        self.receive_some = connected.receive_some

    def close(self) -> None:
        self._stream.socket.close()

    def abort(self) -> None:
        """Reset the connection, as a machine does whose process is gone."""
        with suppress(OSError):  # closed already
            linger = struct.pack("ii", 1, 0)
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()


class Simulated:
    """A byte stream of a simulated network as a carrier: for what takes minutes."""

    def __init__(self, byte_stream: ByteStream) -> None:
        self._byte_stream = byte_stream
        self._buffer = memoryview(bytearray(65536))
        self.close = self.abort = byte_stream.close

    async def send_all(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._byte_stream.send_nowait(view) :]
            if view:
                await self._byte_stream.wait_writable()

    async def receive_some(self) -> bytes:
        while (count := self._byte_stream.receive_into_nowait(self._buffer)) is None:
            await self._byte_stream.wait_readable()
        return bytes(self._buffer[:count])


_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, NetworkError)


class Wire:
    """A connection, byte by byte."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._received = b""
        self.close = carrier.close
        self.abort = carrier.abort

    async def send(self, data: bytes | memoryview) -> None:
        """Send bytes.

        Raises:
            End: The other side is gone.
        """
        try:
            await self._carrier.send_all(data)
        except _GONE as error:
            raise End from error

    async def receive(self) -> bytes:
        """Return the next bytes, at least one.

        Raises:
            End: The other side is gone.
        """
        if self._received:
            data, self._received = self._received, b""
            return data
        try:
            data = bytes(await self._carrier.receive_some())
        except _GONE as error:
            raise End from error
        if not data:
            raise End
        return data

    async def receive_exactly(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        data = b""
        while len(data) < size:
            data += await self.receive()
        self.put_back(data[size:])
        return data[:size]

    def put_back(self, data: bytes) -> None:
        """Let bytes be received again."""
        self._received = data + self._received

    async def receive_message(self) -> bytes:
        """Return the next Noise message without its length."""
        size = int.from_bytes(await self.receive_exactly(noise.LENGTH_BYTES), "big")
        return await self.receive_exactly(size)

    async def send_message(self, message: bytes) -> None:
        """Send a Noise message behind its length."""
        await self.send(len(message).to_bytes(noise.LENGTH_BYTES, "big") + message)

    async def wait_end(self) -> None:
        """Read until the other side closes."""
        with suppress(End):
            while True:
                await self.receive()


async def dial(address: Address, *, source: str = HOSTILE_IP) -> Wire:
    """Connect to a TCP multiaddr from an address of this machine."""
    near = trio.socket.socket()
    try:
        await near.bind((source, 0))
        await near.connect(parse_tcp(address))
    except BaseException:
        near.close()
        raise
    return Wire(Socket(trio.SocketStream(near)))


@asynccontextmanager
async def listener(
    serve: Callable[[Wire], object], *, ip: str = HOSTILE_IP
) -> AsyncIterator[Address]:
    """Listen on `ip` and run `serve` for each connection; gives the address to dial."""
    async with trio.open_nursery() as nursery:

        async def accepted(stream: trio.SocketStream) -> None:
            wire = Wire(Socket(stream))
            try:
                with suppress(End, RemoteProtocolError):
                    await serve(wire)  # type: ignore[misc]
            finally:
                wire.close()

        listeners = await nursery.start(trio.serve_tcp, accepted, 0)  # all interfaces, any port
        port = listeners[0].socket.getsockname()[1]
        yield Address(f"/ip4/{ip}/tcp/{port}")
        nursery.cancel_scope.cancel()


# The handshake -------------------------------------------------------------------------


def handshake_of(
    name: str, *, is_initiator: bool = True, expected_peer: PeerId | None = None, seed: int = 1
) -> Handshake:
    """Return the honest side of a Noise handshake; `seed` decides its ephemeral key."""
    return Handshake(
        is_initiator=is_initiator,
        static=StaticKey.create(identity(name), random.Random(f"{name} static").randbytes(32)),
        ephemeral=random.Random(f"{name} {seed}").randbytes(32),
        expected_peer=expected_peer,
        muxers=["/yamux/1.0.0"],
    )


async def agree_on_noise(wire: Wire, *, is_initiator: bool = True) -> None:
    """Select Noise by multistream."""
    if not is_initiator:
        await wire.receive_exactly(len(Dialer([noise.PROTOCOL]).start()))
        await wire.send(encode_line(HEADER) + encode_line(noise.PROTOCOL))
        return
    dialer = Dialer([noise.PROTOCOL])
    await wire.send(dialer.start())
    while dialer.selected is None:
        dialer.receive(await wire.receive())
    wire.put_back(dialer.rest)


async def shake(
    wire: Wire,
    handshake: Handshake,
    tamper: Tamper = lambda _, message: message,
    *,
    is_initiator: bool = True,
) -> None:
    """Run a handshake to its end; `tamper` changes what this side says."""
    index = 0
    answer = handshake.start() if is_initiator else None
    while True:
        if answer is not None:
            said = tamper(index, answer)
            index += 1
            if said is not None:
                await wire.send_message(said)
        if handshake.is_finished:
            return
        answer = handshake.receive(await wire.receive_message())


# Above Noise ----------------------------------------------------------------------------


class Secure:
    """A proven connection, frame by frame."""

    def __init__(self, wire: Wire, handshake: Handshake) -> None:
        self.wire = wire
        self.peer = handshake.peer
        self.channel_binding = handshake.channel_binding
        self.sealer, self.opener = handshake.split()
        self._sending = trio.Lock()

    def seal(self, plaintext: bytes) -> bytes:
        """Return the next Noise frame with its length."""
        out = bytearray(len(plaintext) + noise.LENGTH_BYTES + noise.TAG_BYTES)
        self.sealer.seal_into(plaintext, memoryview(out), 0)
        return bytes(out)

    async def send(self, plaintext: bytes) -> None:
        """Send bytes, in as many Noise frames as they need."""
        size = noise.PLAINTEXT_BYTES_MAX
        pieces = [plaintext[at : at + size] for at in range(0, len(plaintext), size)]
        async with self._sending:
            await self.wire.send(b"".join(self.seal(piece) for piece in pieces))

    async def receive(self) -> bytes:
        """Return the next Noise frame's bytes."""
        return self.opener.open(await self.wire.receive_message())


class Attacker:
    """A proven peer that says on its streams what it wants.

    Attributes:
        received: What came on each stream.
        flags: All Yamux flags that came on each stream.
        answers_pings: Whether it stays alive as an honest peer does.
    """

    def __init__(self, secure: Secure, *, is_initiator: bool = True) -> None:
        self.secure = secure
        self.received: dict[int, bytearray] = {}
        self.flags: dict[int, int] = {}
        self.windows: dict[int, int] = {}
        self.pings = 0
        self.pongs: set[int] = set()
        self.answers_pings = True
        self.is_over = False
        self.on_stream: Callable[[int, bytes], bytes | None] = lambda _, __: None
        """Told of each byte string on a stream the node opened; its result is sent back."""
        self._next_id = 1 if is_initiator else 2
        self._ours = self._next_id % 2
        self._news = trio.Event()

    async def run(self) -> None:
        """Take what comes until the connection ends."""
        data = b""
        try:
            while True:
                data += await self.secure.receive()
                while len(data) >= 12:
                    _, kind, flags, stream_id, value = struct.unpack_from("!BBHII", data)
                    size = 12 + (value if kind == DATA else 0)
                    if len(data) < size:
                        break
                    body, data = data[12:size], data[size:]
                    await self._take(kind, flags, stream_id, value, body)
        except (End, RemoteProtocolError):
            self.is_over = True
            self._tell()

    async def _take(self, kind: int, flags: int, stream_id: int, value: int, body: bytes) -> None:
        if kind == PING:
            self.pings += bool(flags & SYN)
            if flags & SYN and self.answers_pings:
                await self.secure.send(frame(PING, ACK, 0, value))
            elif flags & ACK:
                self.pongs.add(value)
                self._tell()
            return
        self.flags[stream_id] = self.flags.get(stream_id, 0) | flags
        self.received.setdefault(stream_id, bytearray()).extend(body)
        if kind == WINDOW:
            self.windows[stream_id] = self.windows.get(stream_id, 0) + value
        self._tell()
        if stream_id % 2 != self._ours:
            answer = self.on_stream(stream_id, body)
            if answer is not None:
                with suppress(End):
                    await self.secure.send(answer)

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something that came makes `condition` true, or the connection is over."""
        while not condition() and not self.is_over:
            await self._news.wait()

    async def wait_over(self) -> None:
        """Wait until the node has closed the connection."""
        await self.wait(lambda: False)

    async def wait_reset(self, stream_id: int) -> None:
        """Wait until the node has given a stream up."""
        await self.wait(lambda: self.flags.get(stream_id, 0) & RST != 0)

    async def wait_ended(self, stream_id: int) -> None:
        """Wait until the node has ended a stream, in whatever way."""
        await self.wait(lambda: self.flags.get(stream_id, 0) & (FIN | RST) != 0)

    async def settle(self) -> None:
        """Wait until the node has taken everything sent so far, or closed the connection."""
        value = len(self.pongs) + 1
        with suppress(End):
            await self.secure.send(frame(PING, SYN, 0, value))
        await self.wait(lambda: value in self.pongs)

    def next_id(self) -> int:
        """Return a stream id that was not used yet."""
        stream_id = self._next_id
        self._next_id += 2
        return stream_id

    async def open(self, protocol: str, data: bytes = b"", *, flags: int = 0) -> int:
        """Open a stream, propose a protocol and send bytes behind it; return the stream's id."""
        stream_id = self.next_id()
        body = Dialer([protocol]).start() + data
        await self.secure.send(frame(DATA, SYN | flags, stream_id, len(body), body))
        return stream_id

    async def send(self, stream_id: int, data: bytes, *, flags: int = 0) -> None:
        """Send bytes on a stream, whatever its window is."""
        await self.secure.send(frame(DATA, flags, stream_id, len(data), data))

    async def reset(self, stream_id: int) -> None:
        """Give a stream up."""
        await self.secure.send(frame(WINDOW, RST, stream_id, 0))

    def content(self, stream_id: int) -> bytes:
        """Return what came on a stream behind the agreement on its protocol."""
        data = bytes(self.received.get(stream_id, b""))
        for _ in range(2):
            if data:
                data = data[1 + data[0] :]
        return data


async def secure(
    wire: Wire, name: str, *, is_initiator: bool = True, tamper: Tamper = lambda _, message: message
) -> Secure:
    """Agree on Noise and prove an identity."""
    await agree_on_noise(wire, is_initiator=is_initiator)
    handshake = handshake_of(name, is_initiator=is_initiator)
    await shake(wire, handshake, tamper, is_initiator=is_initiator)
    return Secure(wire, handshake)


@asynccontextmanager
async def attacker(
    address: Address, name: str = "mallory", *, source: str = HOSTILE_IP
) -> AsyncIterator[Attacker]:
    """Connect a proven attacker to a node, which is disconnected at the end."""
    async with attacking(await dial(address, source=source), name) as made:
        yield made


@asynccontextmanager
async def attacking(wire: Wire, name: str = "mallory") -> AsyncIterator[Attacker]:
    """Prove an identity over any wire, and take what comes until the block ends."""
    try:
        made = Attacker(await secure(wire, name))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.run)
            yield made
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None  # the test's own, as it was raised
        raise
    finally:
        wire.close()
