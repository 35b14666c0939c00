"""Noise XX as libp2p uses it: who is at the other end, and the two keys of a connection.

Sans-IO. Pattern XX, Curve25519, ChaCha20-Poly1305, SHA-256; the handshake payloads carry the
identity key and its signature over the static key. libp2p's Noise has no rekey: a direction ends at
nonce 2**64 - 1. Spec: libp2p specs, noise; protocols/noise.md.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from swarmpy.errors import HandshakeFailed, LocalProtocolError, RemoteProtocolError
from swarmpy.identity import PUBLIC_KEY_PROTOBUF_PREFIX, Identity, PeerId, peer_id_of_key
from swarmpy.proto import protobuf
from swarmpy.public_keys import decode_public_key, verify

PROTOCOL = "/noise"

TAG_BYTES = 16
LENGTH_BYTES = 2
"""Every Noise message is sent behind its length, two bytes, big endian."""

FRAME_BYTES_MAX = 65535
"""Largest Noise message, by the Noise specification."""

PLAINTEXT_BYTES_MAX = FRAME_BYTES_MAX - TAG_BYTES

PLAINTEXT_BYTES_BULK = PLAINTEXT_BYTES_MAX // 256 * 256
"""What large data is cut into. OpenSSL's ChaCha20-Poly1305 takes 256 bytes at a time: a full frame,
which ends in the midst of that, costs it 30 % more (AVX-512; `benchmarks/README.md`)."""

HANDSHAKE_BYTES_MAX = 3072
"""Largest handshake message taken: ours have 200 bytes, one with an RSA key of 8,192 bits 2,400;
more would be memory for a stranger."""

NONCE_MAX = 2**64 - 1
"""Reserved by Noise; the counter never gets there: the connection is closed instead."""

_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"
_SIGNATURE_PREFIX = b"noise-libp2p-static-key:"
_KEY_BYTES = 32
_MUXERS_MAX = 32
_pack_nonce = struct.Struct("<4xQ").pack


class Sealer:
    """Encrypts one direction, frame by frame."""

    __slots__ = ("_encrypt_into", "nonce")

    def __init__(self, key: bytes) -> None:
        self._encrypt_into = ChaCha20Poly1305(key).encrypt_into
        self.nonce = 0

    def seal_into(self, plaintext: bytes | memoryview, out: memoryview, offset: int) -> int:
        """Write length, ciphertext and tag of one frame to `out` at `offset`; return its end.

        Args:
            plaintext: At most `PLAINTEXT_BYTES_MAX` bytes.

        Raises:
            LocalProtocolError: The nonces of this direction are used up.
        """
        nonce = self.nonce
        if nonce >= NONCE_MAX:
            raise LocalProtocolError("the Noise nonces of this connection are used up")
        size = len(plaintext) + TAG_BYTES
        body = offset + LENGTH_BYTES
        end = body + size
        out[offset] = size >> 8
        out[offset + 1] = size & 0xFF
        self._encrypt_into(_pack_nonce(nonce), plaintext, None, out[body:end])
        self.nonce = nonce + 1
        return end


class Opener:
    """Decrypts one direction, frame by frame."""

    __slots__ = ("_decrypt", "_decrypt_into", "nonce")

    def __init__(self, key: bytes) -> None:
        cipher = ChaCha20Poly1305(key)
        self._decrypt = cipher.decrypt
        self._decrypt_into = cipher.decrypt_into
        self.nonce = 0

    def open(self, ciphertext: bytes | memoryview) -> bytes:
        """Return the plaintext of one frame (without its length).

        Raises:
            RemoteProtocolError: Forged, repeated, reordered or torn; or the nonces are used up.
        """
        nonce = self.nonce
        if nonce >= NONCE_MAX:
            raise _nonces_used_up()
        try:
            plaintext = self._decrypt(_pack_nonce(nonce), ciphertext, None)
        except InvalidTag as error:
            raise RemoteProtocolError("a Noise frame does not verify", penalty=10) from error
        self.nonce = nonce + 1
        return plaintext

    def open_into(self, ciphertext: memoryview, out: memoryview) -> None:
        """Write the plaintext of one frame to `out`, which has exactly its size; raises as `open`.

        What is written where it raises is not to be read.
        """
        nonce = self.nonce
        if len(ciphertext) < TAG_BYTES:
            raise RemoteProtocolError("a Noise frame does not verify", penalty=10)
        if nonce >= NONCE_MAX:
            raise _nonces_used_up()
        try:
            self._decrypt_into(_pack_nonce(nonce), ciphertext, None, out)
        except InvalidTag as error:
            raise RemoteProtocolError("a Noise frame does not verify", penalty=10) from error
        self.nonce = nonce + 1


def _nonces_used_up() -> RemoteProtocolError:
    return RemoteProtocolError("the peer used up the Noise nonces", penalty=10)


class XX:
    """The three messages of Noise XX, without libp2p's payloads.

    Attributes:
        remote_static: The other side's static key once it is known, else None.
    """

    def __init__(
        self, *, is_initiator: bool, static: bytes, ephemeral: bytes, prologue: bytes = b""
    ) -> None:
        """Args: static, ephemeral: X25519 private keys, 32 bytes."""
        self._is_initiator = is_initiator
        self._static = X25519PrivateKey.from_private_bytes(static)
        self._ephemeral = X25519PrivateKey.from_private_bytes(ephemeral)
        self._remote_ephemeral = b""
        self.remote_static: bytes | None = None
        self._hash = _NAME  # exactly 32 bytes, so it is its own hash
        self._chain = _NAME
        self._key: bytes | None = None
        self._nonce = 0
        self._message = 0
        self._mix_hash(prologue)

    @property
    def is_finished(self) -> bool:
        return self._message == 3

    @property
    def handshake_hash(self) -> bytes:
        """Hash of all that was said, 32 bytes: equal at both ends and in no other handshake."""
        return self._hash

    def write(self, payload: bytes) -> bytes:
        """Return the next message, when it is this side's turn.

        Raises:
            HandshakeFailed: The other side's key has low order.
        """
        self._check_turn(writing=True)
        match self._message:
            case 0:
                message = self._write_ephemeral()
            case 1:
                message = self._write_ephemeral()
                self._mix_exchange(self._ephemeral, self._remote_ephemeral)
                message += self._write_static()
                self._mix_exchange(self._static, self._remote_ephemeral)
            case _:
                message = self._write_static()
                self._mix_exchange(self._static, self._remote_ephemeral)
        self._message += 1
        return message + self._encrypt(payload)

    def read(self, message: bytes) -> bytes:
        """Take the other side's next message and return its payload.

        Raises:
            HandshakeFailed: Truncated, does not verify, or a key has low order.
        """
        self._check_turn(writing=False)
        match self._message:
            case 0:
                message = self._read_ephemeral(message)
            case 1:
                message = self._read_ephemeral(message)
                self._mix_exchange(self._ephemeral, self._remote_ephemeral)
                message = self._read_static(message)
                self._mix_exchange(self._ephemeral, self._known_static())
            case _:
                message = self._read_static(message)
                self._mix_exchange(self._ephemeral, self._known_static())
        self._message += 1
        return self._decrypt(message)

    def split(self) -> tuple[Sealer, Opener]:
        """Return this side's sending and receiving ciphers, once the handshake is finished."""
        if not self.is_finished:
            raise LocalProtocolError("Noise handshake is not finished")
        first, second = _hkdf(self._chain, b"")
        if self._is_initiator:
            return Sealer(first), Opener(second)
        return Sealer(second), Opener(first)

    def _check_turn(self, *, writing: bool) -> None:
        initiators_turn = self._message % 2 == 0
        if self.is_finished or (initiators_turn == self._is_initiator) != writing:
            raise LocalProtocolError("Noise handshake message out of turn")

    def _write_ephemeral(self) -> bytes:
        public = self._ephemeral.public_key().public_bytes_raw()
        self._mix_hash(public)
        return public

    def _write_static(self) -> bytes:
        return self._encrypt(self._static.public_key().public_bytes_raw())

    def _read_ephemeral(self, message: bytes) -> bytes:
        self._remote_ephemeral, rest = _take(message, _KEY_BYTES)
        self._mix_hash(self._remote_ephemeral)
        return rest

    def _read_static(self, message: bytes) -> bytes:
        ciphertext, rest = _take(message, _KEY_BYTES + TAG_BYTES)
        self.remote_static = self._decrypt(ciphertext)
        return rest

    def _known_static(self) -> bytes:
        assert self.remote_static is not None
        return self.remote_static

    def _mix_hash(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def _mix_exchange(self, private: X25519PrivateKey, public: bytes) -> None:
        try:
            shared = private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:  # an all-zero secret: the key has low order
            raise HandshakeFailed("the peer's Noise key has low order") from error
        self._chain, self._key = _hkdf(self._chain, shared)
        self._nonce = 0

    def _encrypt(self, plaintext: bytes) -> bytes:
        data = plaintext
        if self._key is not None:
            nonce = _pack_nonce(self._nonce)
            data = ChaCha20Poly1305(self._key).encrypt(nonce, plaintext, self._hash)
            self._nonce += 1
        self._mix_hash(data)
        return data

    def _decrypt(self, data: bytes) -> bytes:
        plaintext = data
        if self._key is not None:
            nonce = _pack_nonce(self._nonce)
            try:
                plaintext = ChaCha20Poly1305(self._key).decrypt(nonce, data, self._hash)
            except InvalidTag as error:
                raise HandshakeFailed("a Noise handshake message does not verify") from error
            self._nonce += 1
        self._mix_hash(data)
        return plaintext


@dataclass(frozen=True, slots=True)
class StaticKey:
    """A node's Noise static key with the identity's signature over it, made once at start.

    A responder reuses the signature, so an unproven dialer cannot make it sign anything.
    """

    private: bytes
    identity_key: bytes
    signature: bytes

    @classmethod
    def create(cls, identity: Identity, private: bytes) -> StaticKey:
        """Sign a fresh static key; `private` are 32 random bytes."""
        public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
        return cls(
            private=private,
            identity_key=PUBLIC_KEY_PROTOBUF_PREFIX + identity.public_key,
            signature=identity.sign(_SIGNATURE_PREFIX + public),
        )


@dataclass(frozen=True, slots=True)
class Payload:
    """What a libp2p handshake payload says: an identity, its signature, the muxers spoken."""

    identity_key: bytes
    signature: bytes
    muxers: tuple[str, ...] = ()


def encode_payload(payload: Payload) -> bytes:
    """Encode a handshake payload (protobuf NoiseHandshakePayload)."""
    extensions = protobuf.encode([(2, muxer.encode()) for muxer in payload.muxers])
    return protobuf.encode([(1, payload.identity_key), (2, payload.signature), (4, extensions)])


def decode_payload(data: bytes) -> Payload:
    """Decode a handshake payload.

    Raises:
        BadMessage: Not one, or with more muxers than anybody speaks.
    """
    fields = protobuf.decode(data)
    extensions = protobuf.decode(protobuf.bytes_field(fields, 4))
    muxers = protobuf.bytes_fields(extensions, 2)[:_MUXERS_MAX]
    return Payload(
        identity_key=protobuf.bytes_field(fields, 1),
        signature=protobuf.bytes_field(fields, 2),
        muxers=tuple(muxer.decode("utf-8", "replace") for muxer in muxers),
    )


class Handshake:
    """libp2p's Noise handshake, message by message, each without its two length bytes.

    Attributes:
        is_initiator: This side's role; it may change once, where both sides began (`receive`).
        peer: The proven peer, None until its message verified.
        muxer: The stream muxer both sides named early, None if it must still be negotiated.
    """

    def __init__(
        self,
        *,
        is_initiator: bool,
        static: StaticKey,
        ephemeral: bytes,
        expected_peer: PeerId | None = None,
        muxers: Sequence[str] = (),
        spare_ephemeral: bytes = b"",
    ) -> None:
        """Prepare a handshake.

        Args:
            ephemeral: 32 random bytes, used for this handshake only.
            spare_ephemeral: 32 more for an initiator that may have to become responder, because the
                other side began too; without them such a handshake fails.
            expected_peer: Who was dialled; anybody else is refused.
            muxers: Stream muxers spoken here, in order of preference.
        """
        self.is_initiator = is_initiator
        self._static = static
        self._spare_ephemeral = spare_ephemeral if is_initiator else b""
        self._first_message = b""
        self._expected_peer = expected_peer
        self._muxers = tuple(muxers)
        self._noise = XX(is_initiator=is_initiator, static=static.private, ephemeral=ephemeral)
        self.peer: PeerId | None = None
        self.muxer: str | None = None

    @property
    def is_finished(self) -> bool:
        return self._noise.is_finished

    @property
    def channel_binding(self) -> bytes:
        """The handshake hash, 32 bytes."""
        return self._noise.handshake_hash

    def start(self) -> bytes:
        """Return the initiator's first message."""
        self._first_message = self._noise.write(b"")
        return self._first_message

    def receive(self, message: bytes) -> bytes | None:
        """Take the other side's message and return the answer, None if none is due.

        A first message where the second was due means that both sides dialled at once and TCP made
        one connection of it. Whose key is smaller stays initiator; the other answers as responder.

        Raises:
            HandshakeFailed: The other side could not prove an identity, or not the expected one.
        """
        ephemeral, self._spare_ephemeral = self._spare_ephemeral, b""
        if ephemeral and len(message) == len(self._first_message):
            if message == self._first_message:
                raise HandshakeFailed("the first handshake message came back as it was sent")
            if self._first_message < message:
                return None
            private = self._static.private
            self._noise = XX(is_initiator=False, static=private, ephemeral=ephemeral)
            self.is_initiator = False
        payload = self._noise.read(message)
        if self._noise.remote_static is None:
            # Message 1 proves nothing: answer with the prepared signature, verify nothing yet.
            return self._noise.write(self._own_payload())
        self._prove(payload)
        return None if self._noise.is_finished else self._noise.write(self._own_payload())

    def split(self) -> tuple[Sealer, Opener]:
        """Return the ciphers for sending and receiving."""
        return self._noise.split()

    def _own_payload(self) -> bytes:
        static = self._static
        return encode_payload(Payload(static.identity_key, static.signature, self._muxers))

    def _prove(self, data: bytes) -> None:
        """Check the identity in a payload against the static key and the expected peer."""
        try:
            payload = decode_payload(data)
            public_key = decode_public_key(payload.identity_key)
            peer = peer_id_of_key(public_key)
            assert self._noise.remote_static is not None
            verify(public_key, payload.signature, _SIGNATURE_PREFIX + self._noise.remote_static)
        except RemoteProtocolError as error:
            raise HandshakeFailed(f"the peer did not prove its identity: {error}") from error
        if self._expected_peer not in (None, peer):
            raise HandshakeFailed(f"expected peer {self._expected_peer}, but {peer} answered")
        self.peer = peer
        preferences, others = self._muxers, payload.muxers
        if not self.is_initiator:
            preferences, others = others, preferences
        self.muxer = next((muxer for muxer in preferences if muxer in others), None)


def _take(message: bytes, size: int) -> tuple[bytes, bytes]:
    if len(message) < size:
        raise HandshakeFailed("a Noise handshake message is truncated")
    return message[:size], message[size:]


def _hkdf(chain: bytes, material: bytes) -> tuple[bytes, bytes]:
    """Noise's HKDF with two outputs."""
    secret = hmac.digest(chain, material, "sha256")
    first = hmac.digest(secret, b"\x01", "sha256")
    return first, hmac.digest(secret, first + b"\x02", "sha256")
