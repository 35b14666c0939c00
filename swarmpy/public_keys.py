"""Public keys of peers: the four kinds libp2p knows, how they are written, what they can verify.

Our own keys are Ed25519; a peer of another implementation may show any of the four. A key travels
as protobuf {1: kind, 2: data} in its one canonical form, because a PeerId is made of those bytes.
Spec: libp2p specs, peer-ids; protocols/identity.md.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)

from swarmpy.errors import BadSignature, RemoteProtocolError

RSA_BITS_MIN = 2048
"""Shorter RSA keys can be broken; go-libp2p draws the line here too."""

RSA_BITS_MAX = 8192
"""Longer ones cost whoever verifies; go-libp2p's bound."""

RSA_EXPONENT_MAX = 2**31 - 1
"""A verification costs by the exponent's length; all keys in use have 65,537. Go's bound."""

KEY_BYTES_MAX = 1100
"""Longest encoded key: RSA of 8,192 bits has 1,067 bytes."""

SIGNATURE_BYTES_MAX = 1024
"""Longest signature: one of RSA with 8,192 bits."""

INLINE_BYTES_MAX = 42
"""An encoded key up to this long is its PeerId's multihash itself; a longer one is hashed."""

IDENTITY_CODE = b"\x00"
"""Multihash code "identity": the bytes themselves, behind their length."""

SHA256_PREFIX = b"\x12\x20"
"""Multihash code "sha2-256", length 32."""

_FIELD_PRIME = 2**255 - 19
_SMALL_ORDER_Y = frozenset(
    {
        0,
        1,
        _FIELD_PRIME - 1,
        2707385501144840649318225287225658788936804267575313519463743609750303402022,
        _FIELD_PRIME - 2707385501144840649318225287225658788936804267575313519463743609750303402022,
    }
)
"""y coordinates of the eight points whose order divides 8, under which one signature fits every
message; OpenSSL's verifier accepts such keys (RFC 8032 leaves the check to the caller)."""

_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
"""What "ECDSA" may be; P-224 is too short to begin with, and no implementation makes it."""

_Loaded = Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey


class KeyKind(enum.IntEnum):
    """libp2p's KeyType."""

    RSA = 0
    ED25519 = 1
    SECP256K1 = 2
    ECDSA = 3


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A peer's public key; sound, where `decode_public_key` made it.

    Attributes:
        data: The key itself: 32 bytes of Ed25519, 33 of secp256k1 (compressed point), DER
            SubjectPublicKeyInfo of ECDSA and RSA.
    """

    kind: KeyKind
    data: bytes

    @property
    def encoded(self) -> bytes:
        """The key in protobuf, as handshakes, envelopes and identify carry it."""
        return _encode(self.kind, self.data)

    @property
    def multihash(self) -> bytes:
        """The binary PeerId."""
        return multihash_of(self.encoded)


def decode_public_key(encoded: bytes) -> PublicKey:
    """Decode a public key and check that it is a sound one.

    A key without its kind is RSA, whose kind is 0: py-libp2p 0.8 leaves it out in envelopes. Its id
    is made of the canonical form all the same.

    Raises:
        RemoteProtocolError: Not a key in its canonical form, of an unknown kind or curve, beyond a
            bound, or one under which signatures prove nothing.
    """
    if len(encoded) > KEY_BYTES_MAX:
        raise RemoteProtocolError(f"public key of {len(encoded)} bytes exceeds {KEY_BYTES_MAX}")
    if encoded.startswith(b"\x12"):
        encoded = bytes([0x08, KeyKind.RSA]) + encoded
    if len(encoded) < 2 or encoded[1] not in frozenset(KeyKind):
        raise RemoteProtocolError("not a public key of a kind known here")
    kind = KeyKind(encoded[1])
    for length_bytes in (1, 2):
        data = encoded[3 + length_bytes :]
        if _encode(kind, data) == encoded:
            _load(kind, data)
            return PublicKey(kind, data)
    raise RemoteProtocolError("a public key is not in its canonical form")


def multihash_of(encoded: bytes) -> bytes:
    """Return the binary PeerId of an encoded public key, sound or not."""
    if len(encoded) <= INLINE_BYTES_MAX:
        return IDENTITY_CODE + bytes([len(encoded)]) + encoded
    return SHA256_PREFIX + hashlib.sha256(encoded).digest()


def check_multihash(multihash: bytes) -> None:
    """Refuse bytes that are no binary PeerId; a key inside one must be sound.

    Raises:
        RemoteProtocolError: They are not one.
    """
    check_multihash_form(multihash)
    if not multihash.startswith(SHA256_PREFIX):
        decode_public_key(multihash[2:])


def check_multihash_form(multihash: bytes) -> None:
    """Refuse bytes that have not the form of a binary PeerId; a key inside one is not looked at.

    Hundreds of ids may come in one message, and a key on a curve costs 80 us to load.

    Raises:
        RemoteProtocolError: They have another form.
    """
    if multihash.startswith(SHA256_PREFIX):
        if len(multihash) != len(SHA256_PREFIX) + 32:
            raise RemoteProtocolError("a hashed peer id is cut short or too long")
        return
    encoded = multihash[2:]
    if multihash != multihash_of(encoded):
        raise RemoteProtocolError("not a peer id")


def check_ed25519(data: bytes) -> None:
    """Refuse an Ed25519 public key that is not 32 canonical bytes of a large-order point.

    Raises:
        RemoteProtocolError: Wrong length, non-canonical y, or a small-order point.
    """
    if len(data) != 32:
        raise RemoteProtocolError(f"Ed25519 key of {len(data)} bytes, expected 32")
    y = int.from_bytes(data, "little") & ((1 << 255) - 1)
    if y >= _FIELD_PRIME:
        raise RemoteProtocolError("Ed25519 key is not canonical")
    if y in _SMALL_ORDER_Y:
        raise RemoteProtocolError("Ed25519 key has small order")


def verify(key: PublicKey, signature: bytes, message: bytes) -> None:
    """Check a signature; all kinds but Ed25519 sign the SHA-256 of the message.

    Raises:
        BadSignature: The signature does not fit the key and message.
    """
    if len(signature) > SIGNATURE_BYTES_MAX:
        raise BadSignature(f"signature of {len(signature)} bytes exceeds {SIGNATURE_BYTES_MAX}")
    try:
        match _load(key.kind, key.data):
            case Ed25519PublicKey() as loaded:
                loaded.verify(signature, message)
            case rsa.RSAPublicKey() as loaded:
                loaded.verify(signature, message, padding.PKCS1v15(), SHA256())
            case loaded:
                loaded.verify(signature, message, ec.ECDSA(SHA256()))
    except (InvalidSignature, ValueError) as error:
        raise BadSignature("the signature does not match") from error


def _load(kind: KeyKind, data: bytes) -> _Loaded:
    """Return the library's key.

    Raises:
        RemoteProtocolError: It is not a sound key of this kind.
    """
    try:
        match kind:
            case KeyKind.ED25519:
                check_ed25519(data)
                return Ed25519PublicKey.from_public_bytes(data)
            case KeyKind.SECP256K1:
                if len(data) != 33:  # the library takes uncompressed points too: a second PeerId
                    raise RemoteProtocolError(f"secp256k1 key of {len(data)} bytes, expected 33")
                return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), data)
            case KeyKind.ECDSA:
                return _checked_ecdsa(_load_der(data))
            case KeyKind.RSA:
                return _checked_rsa(_load_der(data))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RemoteProtocolError(f"not a {kind.name} key: {error}") from error


def _load_der(data: bytes) -> object:
    """Load a key in DER, in its one form: of two spellings each would be another PeerId."""
    loaded = load_der_public_key(data)
    if loaded.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != data:
        raise RemoteProtocolError("a public key is not in its canonical form")
    return loaded


def _checked_ecdsa(loaded: object) -> ec.EllipticCurvePublicKey:
    if not isinstance(loaded, ec.EllipticCurvePublicKey) or not isinstance(loaded.curve, _CURVES):
        raise RemoteProtocolError("an ECDSA key is on P-256, P-384 or P-521")
    return loaded


def _checked_rsa(loaded: object) -> rsa.RSAPublicKey:
    if not isinstance(loaded, rsa.RSAPublicKey):
        raise RemoteProtocolError("not an RSA key")
    bits = loaded.key_size
    if not RSA_BITS_MIN <= bits <= RSA_BITS_MAX:
        raise RemoteProtocolError(f"RSA key of {bits} bits, not {RSA_BITS_MIN} to {RSA_BITS_MAX}")
    if loaded.public_numbers().e > RSA_EXPONENT_MAX:
        raise RemoteProtocolError("an RSA key's exponent is too large")
    return loaded


def _encode(kind: KeyKind, data: bytes) -> bytes:
    size = len(data)
    length = bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
    return bytes([0x08, kind, 0x12]) + length + data
