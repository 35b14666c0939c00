"""From a byte stream to a connection: agree on Noise, prove both peers, agree on Yamux.

Takes any byte stream and an explicit role: a relayed circuit is one more byte stream, and a punched
socket may be responder although it dialled. Spec: protocols/noise.md, protocols/multistream.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import trio

from swarmpy import config
from swarmpy.abc import ByteStream
from swarmpy.errors import (
    ConnectionLost,
    FrameTooLarge,
    HandshakeFailed,
    PeerTimeout,
    RemoteProtocolError,
)
from swarmpy.identity import PeerId, RandomBytes
from swarmpy.net.connection import NativeConnection
from swarmpy.net.secured import Scratch, Secured
from swarmpy.proto import noise, yamux
from swarmpy.proto.multistream import Dialer, Selector

READ_BYTES = 512
"""Read at a time before the peer is proven: with the largest handshake message a stranger is held
3.5 KiB, however much it sends."""


async def upgrade(
    byte_stream: ByteStream,
    *,
    role: Literal["initiator", "responder"],
    static: noise.StaticKey,
    random: RandomBytes,
    scratch: Scratch,
    expected_peer: PeerId | None = None,
    early_muxers: Sequence[str] = (yamux.PROTOCOL,),
    timeout_s: float = config.HANDSHAKE_TIMEOUT_S,
) -> NativeConnection:
    """Turn a byte stream into an authenticated connection, whose `run` the caller then runs.

    The byte stream is closed on any error and on cancellation.

    Args:
        expected_peer: Who was dialled; anybody else is refused.
        early_muxers: Named in the handshake, to save a round trip; without a common one Yamux is
            negotiated behind it.

    Raises:
        HandshakeFailed: The other side is not the expected peer, proved nothing, or spoke nothing
            we know.
        ConnectionLost: The byte stream ended.
        PeerTimeout: The other side was silent or slow.
    """
    wire = _Wire(byte_stream, scratch)
    try:
        with trio.fail_after(timeout_s):
            await _negotiate(wire, noise.PROTOCOL, is_initiator=role == "initiator")
            handshake = noise.Handshake(  # not before: a stranger that says nothing costs no keys
                is_initiator=role == "initiator",
                static=static,
                ephemeral=random.randbytes(32),
                expected_peer=expected_peer,
                muxers=early_muxers,
                spare_ephemeral=random.randbytes(32),
            )
            secured = await _secure(wire, handshake)
        return NativeConnection(
            byte_stream,
            secured,
            is_initiator=handshake.is_initiator,
            direction="outbound" if handshake.is_initiator else "inbound",
            scratch=scratch,
        )
    except trio.TooSlowError:
        byte_stream.close()
        where = byte_stream.remote_address
        raise PeerTimeout(f"no handshake from {where} within {timeout_s:.0f} s") from None
    except HandshakeFailed:
        byte_stream.close()
        raise
    except RemoteProtocolError as error:
        byte_stream.close()
        raise HandshakeFailed(str(error)) from error
    except BaseException:
        byte_stream.close()
        raise


async def _secure(wire: _Wire, handshake: noise.Handshake) -> Secured:
    if handshake.is_initiator:
        await wire.send_message(handshake.start())
    while not handshake.is_finished:
        answer = handshake.receive(await wire.receive_message())
        if answer is not None:
            await wire.send_message(answer)
    sealer, opener = handshake.split()
    early_plaintext = b""
    if handshake.muxer is None:
        sealed = _SealedWire(wire, sealer, opener)
        await _negotiate(sealed, yamux.PROTOCOL, is_initiator=handshake.is_initiator)
        early_plaintext = sealed.received
    assert handshake.peer is not None
    return Secured(
        peer=handshake.peer,
        sealer=sealer,
        opener=opener,
        channel_binding=handshake.channel_binding,
        early_ciphertext=wire.received,
        early_plaintext=early_plaintext,
    )


class _Wire:
    """A byte stream that is no connection yet; `received` keeps what came too early."""

    def __init__(self, byte_stream: ByteStream, scratch: Scratch) -> None:
        self._byte_stream = byte_stream
        self._buffer = scratch.received[:READ_BYTES]  # the node's, never held across an await
        self.received = b""

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._byte_stream.send_nowait(view) :]
            if view:
                await self._byte_stream.wait_writable()

    async def receive(self) -> None:
        """Wait for at least one more byte."""
        while (count := self._byte_stream.receive_into_nowait(self._buffer)) is None:
            await self._byte_stream.wait_readable()
        if not count:
            raise ConnectionLost("the peer closed the connection during the handshake")
        self.received += self._buffer[:count]

    async def send_message(self, message: bytes) -> None:
        await self.send(len(message).to_bytes(noise.LENGTH_BYTES, "big") + message)

    async def receive_message(self, bytes_max: int = noise.HANDSHAKE_BYTES_MAX) -> bytes:
        """Wait for one Noise message and return it without its length."""
        while len(self.received) < noise.LENGTH_BYTES:
            await self.receive()
        size = int.from_bytes(self.received[: noise.LENGTH_BYTES], "big")
        if size > bytes_max:
            raise FrameTooLarge(f"Noise handshake message of {size} bytes exceeds {bytes_max}")
        end = noise.LENGTH_BYTES + size
        while len(self.received) < end:
            await self.receive()
        message, self.received = self.received[noise.LENGTH_BYTES : end], self.received[end:]
        return message


class _SealedWire:
    """The same through Noise, for a peer that did not name its muxers in the handshake."""

    def __init__(self, wire: _Wire, sealer: noise.Sealer, opener: noise.Opener) -> None:
        self._wire = wire
        self._sealer = sealer
        self._opener = opener
        self.received = b""

    async def send(self, data: bytes) -> None:
        out = bytearray(len(data) + noise.LENGTH_BYTES + noise.TAG_BYTES)
        self._sealer.seal_into(data, memoryview(out), 0)
        await self._wire.send(bytes(out))

    async def receive(self) -> None:
        message = await self._wire.receive_message(noise.FRAME_BYTES_MAX)
        self.received += self._opener.open(message)


async def _negotiate(wire: _Wire | _SealedWire, protocol: str, *, is_initiator: bool) -> None:
    """Agree on the one protocol spoken at this place."""
    negotiation: Dialer | Selector
    if is_initiator:
        dialer = negotiation = Dialer([protocol])
        await wire.send(dialer.start())
    else:
        negotiation = Selector(_equals(protocol))
    while True:
        if wire.received:
            data, wire.received = wire.received, b""
            if answer := negotiation.receive(data):
                await wire.send(answer)
            if negotiation.selected is not None:
                wire.received = negotiation.rest
                return
        await wire.receive()


def _equals(expected: str) -> Callable[[str], bool]:
    return lambda protocol: protocol == expected
