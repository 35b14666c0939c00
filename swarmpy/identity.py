"""Who a peer is: its PeerId, our own Ed25519 identities, and the signatures made with them.

A PeerId is libp2p's: the base58btc text of a multihash over the protobuf-encoded public key. A
short key (Ed25519, "12D3Koo...") is in the id itself and can be read back; of a long one (RSA,
ECDSA, "Qm...") the id has the SHA-256.
Spec: libp2p specs, peer-ids; protocols/identity.md.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import NewType, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarmpy.errors import ConfigError, RemoteProtocolError
from swarmpy.public_keys import IDENTITY_CODE, PublicKey, check_ed25519, check_multihash

PeerId = NewType("PeerId", str)
"""A peer's id as base58btc text, "12D3KooW..."."""

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS = {character: value for value, character in enumerate(_ALPHABET)}

PUBLIC_KEY_PROTOBUF_PREFIX = bytes.fromhex("08011220")
"""Protobuf of {Type: Ed25519 (1), Data: 32 bytes}; libp2p writes it in exactly this form."""

_ED25519_MULTIHASH_PREFIX = IDENTITY_CODE + b"\x24" + PUBLIC_KEY_PROTOBUF_PREFIX

PEER_ID_TEXT_MAX = 64
"""Longest PeerId in messages of ours: secp256k1's has 53 characters, Ed25519's 52."""

PEER_ID_INPUT_MAX = 80
"""Longest text tried as a PeerId: one written as a CID has up to 67 characters."""

_CID_PREFIX = b"\x01\x72"
"""CID version 1 of content type "libp2p-key": PeerIds as some tools write them."""


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


def peer_id_of(public_key: bytes) -> PeerId:
    """Return the PeerId of a raw Ed25519 public key (32 bytes).

    Raises:
        RemoteProtocolError: The key is malformed or has small order.
    """
    check_ed25519(public_key)
    return PeerId(base58_encode(_ED25519_MULTIHASH_PREFIX + public_key))


def peer_id_of_key(key: PublicKey) -> PeerId:
    """Return the PeerId of a sound public key of any kind."""
    return PeerId(base58_encode(key.multihash))


def peer_id_from_bytes(multihash: bytes) -> PeerId:
    """Return the PeerId of its binary form.

    Raises:
        RemoteProtocolError: It is not one, or the key inside it is not sound.
    """
    check_multihash(multihash)
    return PeerId(base58_encode(multihash))


def peer_id_bytes(peer: PeerId) -> bytes:
    """Return the binary multihash of a PeerId, as multiaddrs and identify carry it."""
    return base58_decode(peer)


def public_key_of(peer: str) -> bytes:
    """Return the raw Ed25519 public key (32 bytes) inside a PeerId.

    Raises:
        RemoteProtocolError: The text is no Ed25519 PeerId, or its key has small order.
    """
    multihash = base58_decode(peer)
    if not multihash.startswith(_ED25519_MULTIHASH_PREFIX):
        raise RemoteProtocolError("not the id of a peer with an Ed25519 key")
    check_multihash(multihash)
    return multihash[len(_ED25519_MULTIHASH_PREFIX) :]


def parse_peer_id(text: str) -> PeerId:
    """Check a text that claims to be a PeerId and return the id in its one form, base58btc.

    A PeerId written as a CID (base32, base36 or base58btc) is taken too.

    Raises:
        RemoteProtocolError: It is not one, or the key inside it is not sound.
    """
    if len(text) > PEER_ID_INPUT_MAX:
        raise RemoteProtocolError(f"peer id of {len(text)} characters is too long")
    if text.startswith(("1", "Qm")):
        return peer_id_from_bytes(base58_decode(text))
    cid = _decode_multibase(text)
    if not cid.startswith(_CID_PREFIX):
        raise RemoteProtocolError("not a peer id")
    return peer_id_from_bytes(cid[len(_CID_PREFIX) :])


def _decode_multibase(text: str) -> bytes:
    """Decode text behind the letter that names its base.

    Raises:
        RemoteProtocolError: The base is not known here, or a character is not of its alphabet.
    """
    base, digits = text[:1], text[1:]
    try:
        match base:
            case "b" if digits.isascii():
                padding = "=" * (-len(digits) % 8)
                return base64.b32decode(digits.upper() + padding)
            case "k" if digits.isascii() and digits.isalnum():
                number = int(digits, 36)
                return number.to_bytes((number.bit_length() + 7) // 8, "big")
            case "z":
                return base58_decode(digits)
    except ValueError as error:
        raise RemoteProtocolError(f"not a peer id: {error}") from error
    raise RemoteProtocolError("not a peer id")


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
