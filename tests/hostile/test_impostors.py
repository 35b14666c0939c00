"""Nobody is taken for another: impostors of every kind, in both roles, on a real socket."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress

import pytest
import trio
from hostile.attackers import (
    ACK,
    PING,
    End,
    Secure,
    Wire,
    agree_on_noise,
    attacker,
    dial,
    frame,
    handshake_of,
    identity,
    listener,
    secure,
    shake,
)
from hostile.keys import ED25519, SMALL_ORDER_ED25519, SMALL_ORDER_X25519, encoded
from hostile.victim import ECHO

from swarmpy.abc import ConnectionEvent
from swarmpy.errors import DialFailed, HandshakeFailed, RemoteProtocolError
from swarmpy.net.host import NativeHost
from swarmpy.proto import noise
from swarmpy.proto.multistream import HEADER, Dialer, encode_line

VICTIM = identity("victim")


async def still_serves(host: NativeHost) -> None:
    """Check that an honest peer is served as ever."""
    async with attacker(host.addresses[0], "honest", source="127.0.0.3") as honest:
        stream_id = await honest.open(ECHO, b"hello")
        with trio.fail_after(5):
            await honest.wait(lambda: honest.content(stream_id) == b"hello")
        assert honest.content(stream_id) == b"hello"


# Dialled: whoever answers ------------------------------------------------------------------


async def refuse_noise(wire: Wire) -> None:
    """Speak no Noise."""
    await wire.receive()
    await wire.send(encode_line(HEADER) + encode_line("na"))
    await wire.wait_end()


async def speak_plaintext(wire: Wire) -> None:
    """Answer with libp2p's insecure transport, as if it had been proposed."""
    await wire.receive()
    await wire.send(encode_line(HEADER) + encode_line("/plaintext/2.0.0") + bytes(100))
    await wire.wait_end()


async def go_on_in_plaintext(wire: Wire) -> None:
    """Agree on Noise and then do without."""
    await agree_on_noise(wire, is_initiator=False)
    await wire.send(encode_line(HEADER) + encode_line("/yamux/1.0.0"))
    await wire.wait_end()


async def reflect(wire: Wire) -> None:
    """Send back whatever comes."""
    while True:
        await wire.send(await wire.receive())


async def prove_another(wire: Wire) -> None:
    """Prove an identity honestly: not the one that was dialled."""
    await secure(wire, "mallory", is_initiator=False)
    await wire.wait_end()


def answer_with(payload: bytes) -> Callable[[Wire], Awaitable[None]]:
    """Return an impostor that shows any payload in the second message."""

    async def serve(wire: Wire) -> None:
        await agree_on_noise(wire, is_initiator=False)
        xx = noise.XX(is_initiator=False, static=b"\x11" * 32, ephemeral=b"\x22" * 32)
        xx.read(await wire.receive_message())
        await wire.send_message(xx.write(payload))
        await wire.wait_end()

    return serve


def victims_payload() -> bytes:
    """What the victim itself would show: its key, and its signature over its own static key."""
    static = noise.StaticKey.create(VICTIM, b"\x33" * 32)
    return noise.encode_payload(noise.Payload(static.identity_key, static.signature))


IMPOSTORS: dict[str, Callable[[Wire], Awaitable[None]]] = {
    "refuses Noise": refuse_noise,
    "plaintext": speak_plaintext,
    "plaintext behind Noise": go_on_in_plaintext,
    "mirror": reflect,
    "another's key": prove_another,
    "no signature": answer_with(
        noise.encode_payload(noise.Payload(encoded(ED25519, VICTIM.public_key), b""))
    ),
    "the victim's old signature": answer_with(victims_payload()),
    "nothing": answer_with(b""),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
async def test_an_impostor_that_is_dialled_is_refused(host: NativeHost, kind: str) -> None:
    with trio.fail_after(10):
        async with listener(IMPOSTORS[kind]) as address:
            with pytest.raises((HandshakeFailed, DialFailed)):
                await host.dial(VICTIM.peer_id, [address])
    assert not host.connections


@pytest.mark.parametrize("point", SMALL_ORDER_X25519, ids=range(7))
async def test_a_key_of_low_order_in_an_answer_fails_the_dial(
    host: NativeHost, point: bytes
) -> None:
    """With it the secret would be known to everybody."""

    async def serve(wire: Wire) -> None:
        await agree_on_noise(wire, is_initiator=False)
        await wire.receive_message()
        await wire.send_message(point + bytes(200))
        await wire.wait_end()

    with trio.fail_after(10):
        async with listener(serve) as address:
            with pytest.raises(HandshakeFailed, match="low order"):
                await host.dial(VICTIM.peer_id, [address])


# Dialling: whoever comes --------------------------------------------------------------------


async def expect_refused(
    host: NativeHost, messages: Sequence[bytes | None], payload: bytes
) -> None:
    """Run a handshake as initiator with some messages replaced, and wait to be thrown out."""
    wire = await dial(host.addresses[0])
    try:
        with suppress(End):
            await agree_on_noise(wire)
            xx = noise.XX(is_initiator=True, static=b"\x11" * 32, ephemeral=b"\x22" * 32)
            first = xx.write(b"")
            await wire.send_message(messages[0] or first)
            xx.read(await wire.receive_message())
            await wire.send_message(messages[1] or xx.write(payload))
            with trio.fail_after(5):
                await wire.wait_end()
    finally:
        wire.close()
    assert not host.connections


@pytest.mark.parametrize("point", SMALL_ORDER_X25519, ids=range(7))
async def test_a_first_message_of_low_order_is_refused(host: NativeHost, point: bytes) -> None:
    await expect_refused(host, [point, None], b"")
    await still_serves(host)


@pytest.mark.parametrize("point", SMALL_ORDER_X25519, ids=range(7))
async def test_a_static_key_of_low_order_is_refused(host: NativeHost, point: bytes) -> None:
    """Method: the third message carries the point, encrypted as it should be."""
    wire = await dial(host.addresses[0])
    try:
        with suppress(End):
            await agree_on_noise(wire)
            xx = noise.XX(is_initiator=True, static=b"\x11" * 32, ephemeral=b"\x22" * 32)
            await wire.send_message(xx.write(b""))
            xx.read(await wire.receive_message())
            await wire.send_message(xx._encrypt(point) + bytes(16))
            with trio.fail_after(5):
                await wire.wait_end()
    finally:
        wire.close()
    assert not host.connections
    await still_serves(host)


@pytest.mark.parametrize("point", SMALL_ORDER_ED25519, ids=range(8))
async def test_an_identity_of_small_order_is_refused(host: NativeHost, point: bytes) -> None:
    """Under the neutral point this one signature fits every message."""
    neutral = b"\x01" + bytes(31)
    forged = noise.Payload(encoded(ED25519, point), neutral + bytes(32), ("/yamux/1.0.0",))
    await expect_refused(host, [None, None], noise.encode_payload(forged))
    await still_serves(host)


@pytest.mark.parametrize("payload", [victims_payload(), b""], ids=["another's proof", "no proof"])
async def test_a_peer_that_does_not_prove_what_it_says_is_refused(
    host: NativeHost, payload: bytes
) -> None:
    await expect_refused(host, [None, None], payload)


async def test_a_recorded_handshake_cannot_be_replayed(host: NativeHost) -> None:
    """Method: an honest peer's messages, byte by byte, on a second connection."""
    said: list[bytes] = []

    def record(_: int, message: bytes) -> bytes:
        said.append(message)
        return message

    wire = await dial(host.addresses[0])
    await agree_on_noise(wire)
    await shake(wire, handshake_of("honest"), record)
    wire.close()
    with trio.fail_after(5):
        while host.connections:
            await trio.lowlevel.checkpoint()
    again = await dial(host.addresses[0])
    await agree_on_noise(again)
    await again.send_message(said[0])
    await again.receive_message()
    await again.send_message(said[1])
    with trio.fail_after(5):
        await again.wait_end()
    again.close()
    assert not host.connections
    await still_serves(host)


@pytest.mark.parametrize("step", [0, 1])
async def test_a_handshake_cut_at_any_byte_leaves_nothing(host: NativeHost, step: int) -> None:
    """Goal: no half-open connection is kept. Method: the first and third message at any length."""
    lengths = range(33) if step == 0 else range(0, 200, 5)
    for length in lengths:
        wire = await dial(host.addresses[0])

        def cut(index: int, message: bytes, length: int = length) -> bytes:
            return message[:length] if index == step else message

        with suppress(End, RemoteProtocolError), trio.move_on_after(0.02):
            await agree_on_noise(wire)
            await shake(wire, handshake_of("mallory", seed=length), cut)
        wire.close()
    with trio.fail_after(5):
        while host._handshakes.count or host.connections:
            await trio.lowlevel.checkpoint()
    await still_serves(host)


# On a proven connection -----------------------------------------------------------------------


PONG = frame(PING, ACK, 0, 2**32 - 1)
"""A frame that means nothing: the answer to a ping that nobody sent."""


async def reason_of(events: AsyncIterator[ConnectionEvent]) -> str:
    """Wait for a connection to be closed, and return why."""
    with trio.fail_after(5):
        while (event := await anext(events)).kind != "closed":
            pass
    return event.reason


def replayed(peer: Secure) -> bytes:
    """The same frame twice."""
    sealed = peer.seal(PONG)
    return sealed + sealed


def reordered(peer: Secure) -> bytes:
    """Two frames in the wrong order."""
    first, second = peer.seal(PONG), peer.seal(PONG)
    return second + first


def left_out(peer: Secure) -> bytes:
    """A frame is missing."""
    peer.seal(PONG)
    return peer.seal(PONG)


def shortened(peer: Secure) -> bytes:
    """A frame without its last byte, under a length that says so."""
    sealed = peer.seal(PONG)
    return (len(sealed) - 3).to_bytes(2, "big") + sealed[2:-1]


def flipped(peer: Secure) -> bytes:
    """One bit is wrong."""
    sealed = peer.seal(PONG)
    return sealed[:5] + bytes([sealed[5] ^ 1]) + sealed[6:]


def empty(peer: Secure) -> bytes:
    """A frame of no bytes, not even a tag."""
    return bytes(2)


def foreign(peer: Secure) -> bytes:
    """A frame under another key."""
    out = bytearray(len(PONG) + noise.LENGTH_BYTES + noise.TAG_BYTES)
    noise.Sealer(bytes(32)).seal_into(PONG, memoryview(out), 0)
    return bytes(out)


@pytest.mark.parametrize(
    "spoiled", [replayed, reordered, left_out, shortened, flipped, empty, foreign]
)
async def test_a_spoiled_frame_costs_the_connection(
    host: NativeHost, spoiled: Callable[[Secure], bytes]
) -> None:
    events = host.connection_events()
    async with attacker(host.addresses[0]) as peer:
        await peer.secure.wire.send(spoiled(peer.secure))
        with trio.fail_after(5):
            await peer.wait_over()
    assert "does not verify" in await reason_of(events)
    await still_serves(host)


async def test_a_cut_frame_is_a_lost_connection(host: NativeHost) -> None:
    events = host.connection_events()
    async with attacker(host.addresses[0]) as peer:
        await peer.secure.wire.send(peer.secure.seal(bytes(12))[:-1])
    assert "does not verify" not in await reason_of(events)
    await still_serves(host)


async def test_the_dialer_of_the_selected_muxer_cannot_be_downgraded(host: NativeHost) -> None:
    """A peer that names no muxer early must still agree on Yamux inside Noise, or goes."""
    wire = await dial(host.addresses[0])
    handshake = noise.Handshake(
        is_initiator=True,
        static=noise.StaticKey.create(identity("old"), b"\x44" * 32),
        ephemeral=random.Random(1).randbytes(32),
    )
    await agree_on_noise(wire)
    await shake(wire, handshake)
    peer = Secure(wire, handshake)
    await peer.send(Dialer(["/mplex/6.7.0"]).start())
    with trio.fail_after(5):
        assert encode_line("na") in await peer.receive()
    await peer.send(b"\x00" * 24)
    with trio.fail_after(5):
        await wire.wait_end()
    wire.close()
    assert not host.connections
