"""Who a peer is: Ed25519 identities, PeerIds, and the signatures made with them.

A PeerId is libp2p's: the base58btc text of the identity multihash over the protobuf-encoded Ed25519
public key (38 bytes, "12D3Koo..."), so the key can be read back out of the id.
Spec: libp2p specs, peer-ids; protocols/identity.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NewType, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarmpy.errors import BadSignature, ConfigError, RemoteProtocolError

PeerId = NewType("PeerId", str)
"""A peer's id as base58btc text, "12D3KooW..."."""

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS = {character: value for value, character in enumerate(_ALPHABET)}

PUBLIC_KEY_PROTOBUF_PREFIX = bytes.fromhex("08011220")
"""Protobuf of {Type: Ed25519 (1), Data: 32 bytes}; libp2p writes it in exactly this form."""

_MULTIHASH_PREFIX = b"\x00\x24"
"""Multihash code "identity", length 36."""

PEER_ID_TEXT_MAX = 64
"""Longest text tried as a PeerId: an Ed25519 id has 52 characters. Bounds the base58 arithmetic."""

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


class RandomBytes(Protocol):
    """The part of `random.Random` an identity needs."""

    def randbytes(self, n: int, /) -> bytes: ...


def base58_encode(data: bytes) -> str:
    """Encode bytes as base58btc text, leading zero bytes as "1"."""
    number = int.from_bytes(data, "big")
    text = ""
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text


def base58_decode(text: str) -> bytes:
    """Decode base58btc text.

    Raises:
        RemoteProtocolError: A character is not of the alphabet, or the text is too long.
    """
    if len(text) > 2 * PEER_ID_TEXT_MAX:
        raise RemoteProtocolError(f"base58 text of {len(text)} characters is too long")
    number = 0
    for character in text:
        digit = _DIGITS.get(character)
        if digit is None:
            raise RemoteProtocolError(f"{character!r} is not a base58 character")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")


def check_public_key(public_key: bytes) -> None:
    """Refuse an Ed25519 public key that is not 32 canonical bytes of a large-order point.

    Raises:
        RemoteProtocolError: Wrong length, non-canonical y, or a small-order point.
    """
    if len(public_key) != 32:
        raise RemoteProtocolError(f"Ed25519 key of {len(public_key)} bytes, expected 32")
    y = int.from_bytes(public_key, "little") & ((1 << 255) - 1)
    if y >= _FIELD_PRIME:
        raise RemoteProtocolError("Ed25519 key is not canonical")
    if y in _SMALL_ORDER_Y:
        raise RemoteProtocolError("Ed25519 key has small order")


def peer_id_of(public_key: bytes) -> PeerId:
    """Return the PeerId of a raw Ed25519 public key (32 bytes).

    Raises:
        RemoteProtocolError: The key is malformed or has small order.
    """
    check_public_key(public_key)
    return PeerId(base58_encode(_MULTIHASH_PREFIX + PUBLIC_KEY_PROTOBUF_PREFIX + public_key))


def public_key_of(peer: str) -> bytes:
    """Return the raw Ed25519 public key (32 bytes) inside a PeerId.

    Raises:
        RemoteProtocolError: The text is no Ed25519 PeerId, or its key has small order.
    """
    return public_key_of_bytes(base58_decode(peer))


def public_key_of_bytes(multihash: bytes) -> bytes:
    """Return the raw Ed25519 public key inside a binary PeerId (38 bytes)."""
    prefix = _MULTIHASH_PREFIX + PUBLIC_KEY_PROTOBUF_PREFIX
    if len(multihash) != 38 or not multihash.startswith(prefix):
        raise RemoteProtocolError("not the id of a peer with an Ed25519 key")
    public_key = multihash[len(prefix) :]
    check_public_key(public_key)
    return public_key


def peer_id_bytes(peer: PeerId) -> bytes:
    """Return the binary multihash of a PeerId (38 bytes), as multiaddrs and identify carry it."""
    return base58_decode(peer)


def parse_peer_id(text: str) -> PeerId:
    """Check a text that claims to be a PeerId and return it.

    Raises:
        RemoteProtocolError: It is not one.
    """
    return peer_id_of(public_key_of(text))


def verify(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Check an Ed25519 signature.

    Raises:
        BadSignature: The signature does not fit the key and message.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise BadSignature("the signature does not match") from error


class Identity:
    """An Ed25519 key pair and the PeerId it proves. The private key leaves it only by `save`."""

    def __init__(self, seed: bytes) -> None:
        """Args: seed: The 32 secret bytes of RFC 8032."""
        if len(seed) != 32:
            raise ConfigError(f"identity key of {len(seed)} bytes, expected 32")
        self._seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: bytes = self._key.public_key().public_bytes_raw()
        self.peer_id: PeerId = peer_id_of(self.public_key)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    @classmethod
    def generate(cls, random: RandomBytes) -> Identity:
        """Make a new identity from 32 random bytes."""
        return cls(random.randbytes(32))

    @classmethod
    def load_or_create(cls, path: Path, random: RandomBytes) -> Identity:
        """Read the key file at `path` (mode 0600), or create it with a new identity.

        Raises:
            ConfigError: The file is damaged, or others may read it.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            identity = cls.generate(random)
            identity.save(path)
            return identity
        with os.fdopen(descriptor, "rb") as file:
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                raise ConfigError(f"{path} can be read by others", fix=f"chmod 600 {path}")
            return cls(file.read(64))

    def save(self, path: Path) -> None:
        """Write the secret key to a new file at `path`, mode 0600 from the first byte.

        The file appears whole or not at all: a crash must not leave half a key.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(path.name + ".new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self._seed)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature of `message`."""
        return self._key.sign(message)
