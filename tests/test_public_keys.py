"""Public keys of other implementations: their PeerIds, their signatures, and keys to refuse."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadSignature, RemoteProtocolError
from swarmpy.identity import parse_peer_id, peer_id_bytes, peer_id_from_bytes, peer_id_of_key
from swarmpy.public_keys import (
    KEY_BYTES_MAX,
    RSA_BITS_MAX,
    RSA_BITS_MIN,
    RSA_EXPONENT_MAX,
    SIGNATURE_BYTES_MAX,
    KeyKind,
    PublicKey,
    decode_public_key,
    multihash_of,
    verify,
)

VECTORS = json.loads(
    (Path(__file__).parents[1] / "protocols" / "vectors" / "identity.json").read_text()
)["valid"]
each_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda item: item["kind"])


def der(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | dsa.DSAPublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def rsa_key(bits: int, exponent: int = 65_537) -> bytes:
    """Return an encoded RSA key of this length; nobody has its secret, which is not needed."""
    modulus = (1 << bits) - 1
    return PublicKey(KeyKind.RSA, der(rsa.RSAPublicNumbers(exponent, modulus).public_key())).encoded


# What others sign -------------------------------------------------------------------


@each_vector
def test_a_peer_has_the_id_that_other_implementations_give_it(vector: dict[str, Any]) -> None:
    key = decode_public_key(bytes.fromhex(vector["public_key"]))
    assert key.kind.name == vector["kind"]
    assert peer_id_of_key(key) == vector["peer_id"]
    assert parse_peer_id(vector["peer_id"]) == vector["peer_id"]


@each_vector
def test_a_peer_id_written_as_a_cid_is_the_same_id(vector: dict[str, Any]) -> None:
    for cid in vector["cids"]:
        assert parse_peer_id(cid) == vector["peer_id"]


def test_the_specifications_example_of_a_cid_is_its_example_of_an_id() -> None:
    cid = "bafzbeie5745rpv2m6tjyuugywy4d5ewrqgqqhfnf445he3omzpjbx5xqxe"
    assert parse_peer_id(cid) == "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@each_vector
def test_a_signature_verifies_and_over_another_message_does_not(vector: dict[str, Any]) -> None:
    key = decode_public_key(bytes.fromhex(vector["public_key"]))
    signature, message = bytes.fromhex(vector["signature"]), bytes.fromhex(vector["message"])
    verify(key, signature, message)
    with pytest.raises(BadSignature):
        verify(key, signature, message + b"!")


@pytest.mark.parametrize("size", [0, 1, SIGNATURE_BYTES_MAX, SIGNATURE_BYTES_MAX + 1])
@each_vector
def test_a_signature_of_any_length_is_a_bad_signature(vector: dict[str, Any], size: int) -> None:
    key = decode_public_key(bytes.fromhex(vector["public_key"]))
    with pytest.raises(BadSignature):
        verify(key, bytes(size), b"message")


def test_an_rsa_key_may_leave_out_its_kind_and_has_the_same_id() -> None:
    """py-libp2p 0.8 does so in envelopes."""
    vector = next(item for item in VECTORS if item["kind"] == "RSA")
    encoded = bytes.fromhex(vector["public_key"])
    assert decode_public_key(encoded[2:]) == decode_public_key(encoded)
    assert peer_id_of_key(decode_public_key(encoded[2:])) == vector["peer_id"]


# Keys that are refused ----------------------------------------------------------------


@pytest.mark.parametrize("bits", [RSA_BITS_MIN, RSA_BITS_MAX - 1, RSA_BITS_MAX])
def test_an_rsa_key_within_the_bounds_is_taken(bits: int) -> None:
    encoded = rsa_key(bits)
    assert len(encoded) <= KEY_BYTES_MAX
    assert decode_public_key(encoded).kind is KeyKind.RSA


@pytest.mark.parametrize("bits", [1024, RSA_BITS_MIN - 1, RSA_BITS_MAX + 1])
def test_an_rsa_key_beyond_the_bounds_is_refused(bits: int) -> None:
    with pytest.raises(RemoteProtocolError, match="bits"):
        decode_public_key(rsa_key(bits))


def test_an_rsa_key_may_have_just_so_long_an_exponent() -> None:
    """A verification costs by the exponent, which the peer chooses."""
    decode_public_key(rsa_key(2048, RSA_EXPONENT_MAX - 2))
    decode_public_key(rsa_key(2048, RSA_EXPONENT_MAX))
    with pytest.raises(RemoteProtocolError, match="exponent"):
        decode_public_key(rsa_key(2048, RSA_EXPONENT_MAX + 2))


def test_bytes_beyond_the_longest_key_are_not_looked_at() -> None:
    for beyond in (0, 1):
        encoded = b"\x08\x00" + bytes(KEY_BYTES_MAX - 2 + beyond)
        with pytest.raises(RemoteProtocolError, match="exceeds" if beyond else "canonical"):
            decode_public_key(encoded)


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name
)
def test_an_ecdsa_key_is_on_one_of_three_curves(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve).public_key()
    assert decode_public_key(PublicKey(KeyKind.ECDSA, der(key)).encoded).kind is KeyKind.ECDSA


def unsound() -> dict[str, bytes]:
    """Return keys by what is wrong with them."""
    p224 = ec.generate_private_key(ec.SECP224R1()).public_key()
    bitcoin = ec.generate_private_key(ec.SECP256K1()).public_key()
    p256 = der(ec.generate_private_key(ec.SECP256R1()).public_key())
    uncompressed = bitcoin.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    ed25519 = bytes.fromhex(VECTORS[0]["public_key"])
    return {
        "nothing": b"",
        "half a header": b"\x08",
        "a kind nobody knows": b"\x08\x04" + ed25519[2:],
        "a field more": ed25519 + b"\x18\x01",
        "fields in another order": ed25519[2:] + ed25519[:2],
        "a kind of two bytes": b"\x08\x81\x00" + ed25519[2:],
        "a length of two bytes": ed25519[:3] + b"\xa0\x00" + ed25519[4:],
        "one byte too few": ed25519[:-1],
        "no kind": ed25519[2:],
        "a short curve": PublicKey(KeyKind.ECDSA, der(p224)).encoded,
        "bitcoin's curve as ECDSA": PublicKey(KeyKind.ECDSA, der(bitcoin)).encoded,
        "an ECDSA key as RSA": PublicKey(KeyKind.RSA, p256).encoded,
        "an RSA key as ECDSA": PublicKey(
            KeyKind.ECDSA, decode_public_key(rsa_key(2048)).data
        ).encoded,
        "bytes behind the key": PublicKey(KeyKind.ECDSA, p256 + b"\0").encoded,
        "an uncompressed point": PublicKey(KeyKind.SECP256K1, uncompressed).encoded,
        "a point beside the curve": PublicKey(KeyKind.SECP256K1, b"\x02" + b"\xff" * 32).encoded,
        "the point at infinity": PublicKey(KeyKind.SECP256K1, bytes(33)).encoded,
        "an Ed25519 key of small order": PublicKey(KeyKind.ED25519, bytes(32)).encoded,
        "no DER": PublicKey(KeyKind.RSA, b"\x30\x80" + bytes(300)).encoded,
    }


@pytest.mark.parametrize("what", unsound())
def test_an_unsound_key_is_refused(what: str) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_public_key(unsound()[what])


@given(st.binary(max_size=200))
def test_any_bytes_are_a_key_or_a_remote_protocol_error(data: bytes) -> None:
    try:
        assert decode_public_key(data).encoded.endswith(data)
    except RemoteProtocolError:
        pass


@given(st.sampled_from(VECTORS), st.integers(0), st.integers(1, 255))
def test_any_changed_byte_of_a_key_gives_another_key_or_a_remote_protocol_error(
    vector: dict[str, Any], position: int, change: int
) -> None:
    data = bytearray.fromhex(vector["public_key"])
    data[position % len(data)] ^= change
    try:
        assert peer_id_of_key(decode_public_key(bytes(data))) != vector["peer_id"]
    except RemoteProtocolError:
        pass


# Ids ------------------------------------------------------------------------------


def test_the_longest_key_inside_an_id_has_forty_two_bytes() -> None:
    assert multihash_of(bytes(42)) == b"\x00\x2a" + bytes(42)
    assert multihash_of(bytes(43)) == b"\x12\x20" + hashlib.sha256(bytes(43)).digest()


@each_vector
def test_an_id_survives_its_binary_form(vector: dict[str, Any]) -> None:
    peer = parse_peer_id(vector["peer_id"])
    assert peer_id_from_bytes(peer_id_bytes(peer)) == peer


@pytest.mark.parametrize(
    "multihash",
    [
        b"",
        b"\x12",
        b"\x12\x20" + bytes(31),
        b"\x12\x20" + bytes(33),
        b"\x13\x20" + bytes(32),
        b"\x00\x00",
        b"\x00\x25" + bytes.fromhex(VECTORS[0]["public_key"]),
        b"\x00\x2b" + bytes(43),
        multihash_of(PublicKey(KeyKind.ED25519, bytes(32)).encoded),
    ],
    ids=[
        "nothing",
        "half a header",
        "a short hash",
        "a long hash",
        "another hash",
        "no key",
        "another length",
        "a key that should be hashed",
        "an unsound key",
    ],
)
def test_bytes_that_are_no_id_are_refused(multihash: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        peer_id_from_bytes(multihash)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        "k",
        "z",
        "bafy",
        "baf\u00df",
        "k_1",
        "k\u0663",
        "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy",  # a CID of content
        "u" + "A" * 50,  # base64, which nobody writes ids in
        "1" * 81,
    ],
)
def test_text_that_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_peer_id(text)
