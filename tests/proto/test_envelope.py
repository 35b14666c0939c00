"""Signed envelopes: one purpose, one form, verified over the bytes as they came."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, BadSignature, FrameTooLarge, RemoteProtocolError
from swarmpy.identity import Identity, peer_id_of_key
from swarmpy.proto import protobuf
from swarmpy.proto.envelope import ENVELOPE_BYTES_MAX, Envelope, open_envelope, seal
from swarmpy.public_keys import KeyKind, PublicKey, decode_public_key

ALICE = Identity(b"a" * 32)
BOB = Identity(b"b" * 32)


def sealed(payload: bytes = b"hello") -> bytes:
    return seal(ALICE, domain="test", payload_type=b"t", payload=payload)


def opened(data: bytes) -> Envelope:
    return open_envelope(data, domain="test", payload_type=b"t")


def test_an_envelope_gives_back_its_payload_signer_and_bytes() -> None:
    envelope = opened(sealed())

    assert (envelope.payload, envelope.signer) == (b"hello", ALICE.peer_id)
    assert envelope.signed == sealed()


def test_a_signature_made_for_another_domain_does_not_fit() -> None:
    with pytest.raises(BadSignature):
        open_envelope(sealed(), domain="other", payload_type=b"t")


def test_an_envelope_of_another_type_is_refused() -> None:
    with pytest.raises(BadMessage, match="another type"):
        open_envelope(sealed(), domain="test", payload_type=b"u")


def test_an_envelope_relabelled_with_another_key_is_refused() -> None:
    fields = protobuf.decode(sealed())
    key = protobuf.bytes_field(
        protobuf.decode(seal(BOB, domain="", payload_type=b"", payload=b"")), 1
    )
    parts = [(1, key), *((number, fields[number][0]) for number in (2, 3, 5))]

    with pytest.raises(BadSignature):
        opened(protobuf.encode(parts))


@pytest.mark.parametrize("extra", [(3, b"hello"), (4, b"note"), (6, 1)])
def test_an_envelope_with_room_for_more_is_refused(extra: tuple[int, bytes | int]) -> None:
    """Unsigned fields would let anybody make many envelopes of one."""
    with pytest.raises(BadMessage, match="exactly"):
        opened(sealed() + protobuf.encode([extra]))


def test_an_envelope_written_in_another_way_is_refused() -> None:
    """Skipped wire types and another order are room as well."""
    fields = protobuf.decode(sealed())
    turned = protobuf.encode([(number, fields[number][0]) for number in (5, 1, 2, 3)])

    for data in (turned, sealed() + b"\x31" + bytes(8)):
        with pytest.raises(BadMessage, match="exactly"):
            opened(data)


def sealed_by_ecdsa() -> bytes:
    """Return an envelope signed with a P-256 key, as a libp2p peer may have."""
    secret = ec.generate_private_key(ec.SECP256R1())
    der = secret.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    signed = b"\x04test" + b"\x01t" + b"\x05hello"
    signature = secret.sign(signed, ec.ECDSA(SHA256()))
    key = PublicKey(KeyKind.ECDSA, der).encoded
    return protobuf.encode([(1, key), (2, b"t"), (3, b"hello"), (5, signature)])


def test_another_kind_of_key_is_refused_where_it_is_not_asked_for() -> None:
    with pytest.raises(BadMessage, match="not Ed25519"):
        opened(sealed_by_ecdsa())


def test_another_kind_of_key_is_taken_where_it_is_asked_for() -> None:
    data = sealed_by_ecdsa()
    envelope = open_envelope(data, domain="test", payload_type=b"t", any_key=True)
    key = decode_public_key(protobuf.bytes_field(protobuf.decode(data), 1))
    assert (envelope.payload, envelope.signer) == (b"hello", peer_id_of_key(key))
    with pytest.raises(BadSignature):
        open_envelope(data, domain="other", payload_type=b"t", any_key=True)


def test_a_key_that_is_none_is_refused() -> None:
    fields = protobuf.decode(sealed())
    parts = [(1, b"\x08\x02\x12\x20" + bytes(32))]
    parts += [(number, fields[number][0]) for number in (2, 3, 5)]  # type: ignore[misc]

    with pytest.raises(RemoteProtocolError, match="secp256k1 key of 32 bytes"):
        opened(protobuf.encode(parts))


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_an_envelope_may_have_just_its_bound(beyond: int) -> None:
    overhead = len(sealed(b"x" * 10_000)) - 10_000
    data = sealed(b"x" * (ENVELOPE_BYTES_MAX - overhead + beyond))

    if beyond > 0:
        with pytest.raises(FrameTooLarge):
            opened(data)
    else:
        assert len(opened(data).payload) == ENVELOPE_BYTES_MAX - overhead + beyond


@given(st.integers(0, len(sealed()) - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position: int, change: int) -> None:
    data = bytearray(sealed())
    data[position] ^= change

    with pytest.raises(RemoteProtocolError):
        opened(bytes(data))


@given(st.binary(max_size=512))
def test_any_bytes_are_refused_as_a_breach(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        opened(data)
