"""Noise: published vectors, our own, and every way a handshake or a frame can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import HandshakeFailed, LocalProtocolError, RemoteProtocolError
from swarmpy.identity import PUBLIC_KEY_PROTOBUF_PREFIX, Identity, peer_id_of_key
from swarmpy.proto import noise, protobuf
from swarmpy.proto.noise import XX, Handshake, Opener, Payload, Sealer, StaticKey
from swarmpy.public_keys import KEY_BYTES_MAX, SIGNATURE_BYTES_MAX, KeyKind, PublicKey

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT.parent / "shared" / "vectors" / "noise_xx_cacophony.json"
OWN = json.loads((ROOT / "protocols" / "vectors" / "noise.json").read_text())

ALICE = Identity(b"\x01" * 32)
BOB = Identity(b"\x02" * 32)
MUXER = "/yamux/1.0.0"


def play_xx(vector: dict[str, Any]) -> None:
    """Play a vector in the cacophony format: both sides, then transport messages in turn."""
    key = {
        name: bytes.fromhex(vector[name]) for name in vector if name.endswith(("ic", "al", "ue"))
    }
    sides = [
        XX(
            is_initiator=role == "init",
            static=key[f"{role}_static"],
            ephemeral=key[f"{role}_ephemeral"],
            prologue=key[f"{role}_prologue"],
        )
        for role in ("init", "resp")
    ]
    messages = [
        (bytes.fromhex(message["payload"]), message["ciphertext"]) for message in vector["messages"]
    ]
    for index, (payload, ciphertext) in enumerate(messages[:3]):
        message = sides[index % 2].write(payload)
        assert message.hex() == ciphertext
        assert sides[1 - index % 2].read(message) == payload
    assert sides[0].handshake_hash == sides[1].handshake_hash
    assert sides[0].handshake_hash.hex() == vector["handshake_hash"]
    ciphers = [side.split() for side in sides]
    # After three handshake messages the responder speaks next.
    for index, (payload, ciphertext) in enumerate(messages[3:], start=1):
        sealed = seal(ciphers[index % 2][0], payload)
        assert sealed[2:].hex() == ciphertext
        assert ciphers[1 - index % 2][1].open(sealed[2:]) == payload


def seal(sealer: Sealer, plaintext: bytes) -> bytes:
    """Return one sealed frame with its length."""
    out = bytearray(len(plaintext) + 18)
    assert sealer.seal_into(plaintext, memoryview(out), 0) == len(out)
    return bytes(out)


def static_key(identity: Identity) -> StaticKey:
    return StaticKey.create(identity, identity.public_key)


def pair(**changes: Any) -> tuple[Handshake, Handshake]:
    """Return both sides of a libp2p handshake; changes go to the initiator."""
    initiator: dict[str, Any] = {
        "static": static_key(ALICE),
        "ephemeral": b"\x03" * 32,
        "expected_peer": BOB.peer_id,
        "muxers": [MUXER],
    }
    responder = Handshake(
        is_initiator=False, static=static_key(BOB), ephemeral=b"\x04" * 32, muxers=[MUXER]
    )
    return Handshake(is_initiator=True, **(initiator | changes)), responder


def shake(initiator: Handshake, responder: Handshake) -> None:
    """Carry the three messages."""
    second = responder.receive(initiator.start())
    assert second is not None
    third = initiator.receive(second)
    assert third is not None
    assert responder.receive(third) is None


# Vectors ------------------------------------------------------------------------


def test_published_vectors_play_to_the_byte() -> None:
    """Cacophony's vector for this pattern, from another implementation."""
    if not PUBLISHED.exists():
        pytest.skip(f"{PUBLISHED.name} is not beside this checkout; our own vectors always run")
    for vector in json.loads(PUBLISHED.read_text())["vectors"]:
        play_xx(vector)


def test_own_vectors_play_to_the_byte() -> None:
    for vector in OWN["xx"]:
        play_xx(vector)


def test_own_libp2p_handshake_plays_to_the_byte() -> None:
    """Payloads with identity, signature and muxers."""
    for vector in OWN["libp2p"]:
        sides = {
            role: Handshake(
                is_initiator=role == "initiator",
                static=StaticKey.create(
                    Identity(bytes.fromhex(vector[role]["identity_seed"])),
                    bytes.fromhex(vector[role]["static"]),
                ),
                ephemeral=bytes.fromhex(vector[role]["ephemeral"]),
                muxers=vector[role]["muxers"],
            )
            for role in ("initiator", "responder")
        }
        first = sides["initiator"].start()
        second = sides["responder"].receive(first)
        assert second is not None
        third = sides["initiator"].receive(second)
        assert third is not None
        sides["responder"].receive(third)
        assert [item.hex() for item in (first, second, third)] == vector["messages"]
        assert sides["initiator"].channel_binding.hex() == vector["channel_binding"]
        assert sides["initiator"].peer == vector["responder"]["peer"]
        assert sides["responder"].peer == vector["initiator"]["peer"]


# The handshake --------------------------------------------------------------------


def test_both_sides_learn_who_the_other_is() -> None:
    initiator, responder = pair()
    shake(initiator, responder)
    assert initiator.is_finished
    assert responder.is_finished
    assert (initiator.peer, responder.peer) == (BOB.peer_id, ALICE.peer_id)
    assert initiator.channel_binding == responder.channel_binding


def test_channel_bindings_differ_between_handshakes() -> None:
    bindings = []
    for ephemeral in (b"\x05" * 32, b"\x06" * 32):
        initiator, responder = pair(ephemeral=ephemeral)
        shake(initiator, responder)
        bindings.append(initiator.channel_binding)
    assert bindings[0] != bindings[1]


@pytest.mark.parametrize(
    ("muxers", "agreed"),
    [([MUXER], MUXER), (["/mplex/6.7.0", MUXER], MUXER), (["/mplex/6.7.0"], None), ([], None)],
)
def test_the_muxer_is_agreed_on_early_where_both_name_one(
    muxers: list[str], agreed: str | None
) -> None:
    initiator, responder = pair(muxers=muxers)
    shake(initiator, responder)
    assert initiator.muxer == responder.muxer == agreed


def test_another_peer_than_the_dialled_one_is_refused() -> None:
    initiator, responder = pair(expected_peer=ALICE.peer_id)
    second = responder.receive(initiator.start())
    assert second is not None
    with pytest.raises(HandshakeFailed, match="expected peer"):
        initiator.receive(second)
    assert initiator.peer is None


def test_a_signature_over_another_static_key_is_refused() -> None:
    """A man in the middle can repeat Bob's payload, but has no signature for its own static key."""
    stolen = StaticKey(
        private=b"\x07" * 32,
        identity_key=static_key(BOB).identity_key,
        signature=static_key(BOB).signature,
    )
    initiator, _ = pair()
    mallory = Handshake(is_initiator=False, static=stolen, ephemeral=b"\x04" * 32)
    second = mallory.receive(initiator.start())
    assert second is not None
    with pytest.raises(HandshakeFailed, match="did not prove its identity"):
        initiator.receive(second)


@pytest.mark.parametrize(
    "identity_key",
    [
        b"",
        b"\x08\x00\x12\x04rsa!",
        PUBLIC_KEY_PROTOBUF_PREFIX + b"short",
        PUBLIC_KEY_PROTOBUF_PREFIX + b"\x01" + bytes(31),  # small order
    ],
)
def test_an_identity_key_that_is_no_sound_key_is_refused(identity_key: bytes) -> None:
    sound = static_key(BOB)
    unsound = StaticKey(private=sound.private, identity_key=identity_key, signature=b"s" * 64)
    initiator, _ = pair(expected_peer=None)
    responder = Handshake(is_initiator=False, static=unsound, ephemeral=b"\x04" * 32)
    second = responder.receive(initiator.start())
    assert second is not None
    with pytest.raises(HandshakeFailed):
        initiator.receive(second)


def foreign_key(kind: KeyKind, message: bytes) -> tuple[PublicKey, bytes]:
    """Return a new key of another kind than ours, and its signature of a message."""
    spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if kind is KeyKind.RSA:
        secret = rsa.generate_private_key(65_537, 2048)
        signature = secret.sign(message, padding.PKCS1v15(), SHA256())
        return PublicKey(kind, secret.public_key().public_bytes(*spki)), signature
    curve = ec.SECP256R1() if kind is KeyKind.ECDSA else ec.SECP256K1()
    point = ec.generate_private_key(curve)
    compressed = (Encoding.X962, PublicFormat.CompressedPoint)
    form = spki if kind is KeyKind.ECDSA else compressed
    signature = point.sign(message, ec.ECDSA(SHA256()))
    return PublicKey(kind, point.public_key().public_bytes(*form)), signature


def foreign_peer(kind: KeyKind, private: bytes) -> tuple[PublicKey, StaticKey]:
    """Return a peer of another implementation: its identity, and its signed static key."""
    public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    key, signature = foreign_key(kind, b"noise-libp2p-static-key:" + public)
    return key, StaticKey(private=private, identity_key=key.encoded, signature=signature)


@pytest.mark.parametrize("kind", [KeyKind.RSA, KeyKind.SECP256K1, KeyKind.ECDSA])
def test_a_peer_with_another_kind_of_key_is_proven_by_it(kind: KeyKind) -> None:
    key, static = foreign_peer(kind, b"\x07" * 32)
    initiator, _ = pair(expected_peer=peer_id_of_key(key))
    responder = Handshake(is_initiator=False, static=static, ephemeral=b"\x04" * 32)
    shake(initiator, responder)
    assert initiator.peer == peer_id_of_key(key)


@pytest.mark.parametrize("kind", [KeyKind.RSA, KeyKind.SECP256K1, KeyKind.ECDSA])
def test_a_peer_with_another_kind_of_key_must_have_signed_its_static_key(kind: KeyKind) -> None:
    key, static = foreign_peer(kind, b"\x07" * 32)
    stolen = StaticKey(b"\x08" * 32, static.identity_key, static.signature)
    initiator, _ = pair(expected_peer=peer_id_of_key(key))
    responder = Handshake(is_initiator=False, static=stolen, ephemeral=b"\x04" * 32)
    second = responder.receive(initiator.start())
    assert second is not None
    with pytest.raises(HandshakeFailed, match="did not prove its identity"):
        initiator.receive(second)


def test_a_handshake_message_with_the_longest_key_is_within_its_bound() -> None:
    payload = Payload(bytes(KEY_BYTES_MAX), bytes(SIGNATURE_BYTES_MAX), (MUXER,) * 8)
    overhead = 32 + 48 + 16  # an ephemeral key, a static key with its tag, the payload's tag
    assert len(noise.encode_payload(payload)) + overhead <= noise.HANDSHAKE_BYTES_MAX


def both_began(spare: bytes = b"\x09" * 32) -> tuple[Handshake, Handshake]:
    """Return two initiators that dialled each other."""
    alice, _ = pair(spare_ephemeral=spare)
    bob = Handshake(
        is_initiator=True,
        static=static_key(BOB),
        ephemeral=b"\x04" * 32,
        expected_peer=ALICE.peer_id,
        muxers=[MUXER],
        spare_ephemeral=b"\x0a" * 32,
    )
    return alice, bob


def test_where_both_began_one_becomes_responder() -> None:
    alice, bob = both_began()
    firsts = {alice.start(): alice, bob.start(): bob}
    (first, staying), (_, yielding) = sorted(firsts.items())
    assert staying.receive(max(firsts)) is None
    second = yielding.receive(first)
    assert second is not None
    third = staying.receive(second)
    assert third is not None
    assert yielding.receive(third) is None

    assert (staying.is_initiator, yielding.is_initiator) == (True, False)
    assert (alice.peer, bob.peer) == (BOB.peer_id, ALICE.peer_id)
    assert alice.channel_binding == bob.channel_binding
    assert (alice.muxer, bob.muxer) == (MUXER, MUXER)
    sealed = seal(alice.split()[0], b"hello")
    assert bob.split()[1].open(sealed[2:]) == b"hello"


def test_a_first_message_that_comes_back_is_refused() -> None:
    """Nobody may be led to speak with itself."""
    alice, _ = both_began()
    with pytest.raises(HandshakeFailed, match="came back"):
        alice.receive(alice.start())


def test_the_roles_are_settled_once() -> None:
    alice, bob = both_began()
    staying, yielding = sorted((alice, bob), key=lambda side: side.start())
    assert staying.receive(b"\xff" * 32) is None
    assert yielding.receive(bytes(31) + b"\x09") is not None
    for side in (staying, yielding):
        with pytest.raises(HandshakeFailed):
            side.receive(b"\xff" * 32)


def test_without_a_spare_key_a_handshake_that_both_began_fails() -> None:
    alice, bob = both_began(spare=b"")
    alice.start()
    with pytest.raises(HandshakeFailed, match="truncated"):
        alice.receive(bob.start())


def test_a_low_order_key_fails_the_handshake() -> None:
    """With it the shared secret would be known to everybody."""
    _, responder = pair()
    with pytest.raises(HandshakeFailed, match="low order"):
        responder.receive(bytes(32))


def test_the_responder_signs_and_verifies_nothing_for_a_stranger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only message 3, which decrypts under fresh keys, makes it work for anybody."""
    initiator, responder = pair()

    def fail(*_: object) -> None:
        raise AssertionError("a signature before message 3 decrypted")

    monkeypatch.setattr(Identity, "sign", fail)
    monkeypatch.setattr(noise, "verify", fail)
    assert responder.receive(initiator.start()) is not None
    with pytest.raises(HandshakeFailed, match="does not verify"):
        responder.receive(bytes(200))


@pytest.mark.parametrize("index", [0, 31, 32, 79, 80, 100, -1])
def test_any_changed_byte_of_the_second_message_fails(index: int) -> None:
    initiator, responder = pair()
    second = bytearray(responder.receive(initiator.start()) or b"")
    second[index] ^= 1
    with pytest.raises(HandshakeFailed):
        initiator.receive(bytes(second))


def test_any_changed_byte_of_the_third_message_fails() -> None:
    initiator, responder = pair()
    third = bytearray(initiator.receive(responder.receive(initiator.start()) or b"") or b"")
    for index in range(0, len(third), 16):
        changed = bytearray(third)
        changed[index] ^= 1
        fresh_initiator, fresh = pair()
        fresh.receive(fresh_initiator.start())
        with pytest.raises(HandshakeFailed):
            fresh.receive(bytes(changed))


@pytest.mark.parametrize("size", [0, 31])
def test_a_truncated_first_message_fails(size: int) -> None:
    _, responder = pair()
    with pytest.raises(HandshakeFailed, match="truncated"):
        responder.receive(bytes(size))


def test_messages_out_of_turn_are_our_own_mistake() -> None:
    initiator, responder = pair()
    with pytest.raises(LocalProtocolError):
        responder.start()
    with pytest.raises(LocalProtocolError):
        initiator.split()
    shake(initiator, responder)
    with pytest.raises(LocalProtocolError):
        responder.receive(b"")


@given(st.binary(max_size=300))
def test_any_first_message_is_answered_or_fails(data: bytes) -> None:
    _, responder = pair()
    try:
        responder.receive(data)
    except HandshakeFailed:
        return
    assert len(data) >= 32


@given(st.binary(max_size=200))
def test_any_payload_decodes_or_raises_remote_protocol_error(data: bytes) -> None:
    try:
        noise.decode_payload(data)
    except RemoteProtocolError:
        return


def test_a_payload_survives_encoding() -> None:
    payload = Payload(b"key", b"signature", (MUXER, "/other/1"))
    assert noise.decode_payload(noise.encode_payload(payload)) == payload


def test_unknown_payload_extensions_are_skipped() -> None:
    """Browsers send certificate hashes in field 1."""
    extensions = protobuf.encode([(1, b"certhash"), (2, MUXER.encode())])
    data = protobuf.encode([(1, b"key"), (2, b"signature"), (4, extensions)])
    assert noise.decode_payload(data).muxers == (MUXER,)


# Frames -----------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_any_frames_arrive_in_order(plaintexts: list[bytes]) -> None:
    sealer, opener = Sealer(b"k" * 32), Opener(b"k" * 32)
    sealed = [seal(sealer, plaintext) for plaintext in plaintexts]
    assert [opener.open(frame[2:]) for frame in sealed] == plaintexts


def test_the_largest_frame_fits_its_length() -> None:
    frame = seal(Sealer(b"k" * 32), bytes(noise.PLAINTEXT_BYTES_MAX))
    assert frame[:2] == b"\xff\xff"
    assert len(frame) == 2 + noise.FRAME_BYTES_MAX


def test_a_repeated_frame_is_refused() -> None:
    sealer, opener = Sealer(b"k" * 32), Opener(b"k" * 32)
    frame = seal(sealer, b"once")
    opener.open(frame[2:])
    with pytest.raises(RemoteProtocolError, match="does not verify"):
        opener.open(frame[2:])


def test_a_changed_frame_is_refused() -> None:
    frame = bytearray(seal(Sealer(b"k" * 32), b"text"))
    frame[-1] ^= 1
    with pytest.raises(RemoteProtocolError):
        Opener(b"k" * 32).open(bytes(frame[2:]))


@pytest.mark.parametrize("size", [0, 15])
def test_a_frame_shorter_than_its_tag_is_refused(size: int) -> None:
    with pytest.raises(RemoteProtocolError):
        Opener(b"k" * 32).open(bytes(size))


def test_the_last_nonce_is_used_and_the_reserved_one_never() -> None:
    """2**64 - 1 belongs to rekeying, which libp2p does not have: the direction ends before it."""
    sealer, opener = Sealer(b"k" * 32), Opener(b"k" * 32)
    sealer.nonce = opener.nonce = noise.NONCE_MAX - 1
    assert opener.open(seal(sealer, b"last")[2:]) == b"last"
    with pytest.raises(LocalProtocolError, match="used up"):
        seal(sealer, b"one too many")
    with pytest.raises(RemoteProtocolError, match="used up"):
        opener.open(bytes(32))


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_frame_is_opened_in_place_as_elsewhere(plaintext: bytes, cut: int) -> None:
    """Whole, or torn anywhere."""
    frame = seal(Sealer(b"k" * 32), plaintext)[2:]
    opener, whole = Opener(b"k" * 32), memoryview(frame)
    torn = whole[: min(cut, len(frame) - 1)]
    with pytest.raises(RemoteProtocolError, match="does not verify"):
        opener.open_into(torn, memoryview(bytearray(max(0, len(torn) - noise.TAG_BYTES))))
    assert opener.nonce == 0
    out = bytearray(len(plaintext))
    opener.open_into(whole, memoryview(out))
    assert bytes(out) == plaintext
    assert opener.nonce == 1
