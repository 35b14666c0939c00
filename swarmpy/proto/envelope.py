"""Signed envelopes: what a peer signs, verified over the bytes as received and never re-encoded.

libp2p's signed envelope (RFC 0002): protobuf {1: public key, 2: payload type, 3: payload,
5: signature}; the signature covers the length-prefixed domain, type and payload, so that one made
for one purpose fits no other. Spec: protocols/envelope.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarmpy.errors import BadMessage, FrameTooLarge
from swarmpy.identity import PUBLIC_KEY_PROTOBUF_PREFIX, Identity, PeerId, peer_id_of_key
from swarmpy.proto import protobuf
from swarmpy.proto.wire import encode_varint
from swarmpy.public_keys import KeyKind, decode_public_key, verify

ENVELOPE_BYTES_MAX = 16 * 1024
"""Largest envelope: a 4 KiB record with a membership chain in it fits four times."""

_FIELDS = (1, 2, 3, 5)
"""Numbers of key, type, payload and signature, the order in which they stand."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """A verified envelope. `signed` is what came over the wire; keep and forward that."""

    signer: PeerId
    public_key: bytes
    """The signer's key without its protobuf: 32 bytes of Ed25519, unless `any_key` was allowed."""
    payload: bytes
    signed: bytes


def seal(identity: Identity, *, domain: str, payload_type: bytes, payload: bytes) -> bytes:
    """Sign `payload` for one purpose (`domain`) and return the envelope's bytes."""
    signature = identity.sign(_signed_bytes(domain, payload_type, payload))
    key = PUBLIC_KEY_PROTOBUF_PREFIX + identity.public_key
    return _encode(key, payload_type, payload, signature)


def open_envelope(
    data: bytes, *, domain: str, payload_type: bytes, any_key: bool = False
) -> Envelope:
    """Verify an envelope's signature for `domain` and return it.

    Args:
        any_key: Take every kind of key that libp2p has. Not for what is stored and passed on:
            anybody can turn an ECDSA signature into a second one, and so make two envelopes of one.

    Raises:
        FrameTooLarge: More than `ENVELOPE_BYTES_MAX`.
        BadMessage: Not an envelope, or of another payload type, or its key is not Ed25519.
        RemoteProtocolError: Its key is not sound.
        BadSignature: The signature does not fit.
    """
    if len(data) > ENVELOPE_BYTES_MAX:
        raise FrameTooLarge(f"envelope of {len(data)} bytes exceeds {ENVELOPE_BYTES_MAX}")
    fields = protobuf.decode(data)
    key, kind, payload, signature = (protobuf.bytes_field(fields, number) for number in _FIELDS)
    if _encode(key, kind, payload, signature) != data:
        # Unsigned room in an envelope would let anyone make many different ones of it.
        raise BadMessage("an envelope has exactly a key, a type, a payload and a signature")
    if kind != payload_type:
        raise BadMessage("the envelope holds another type of payload")
    public_key = decode_public_key(key)
    if public_key.kind is not KeyKind.ED25519 and not any_key:
        raise BadMessage("the envelope's key is not Ed25519")
    verify(public_key, signature, _signed_bytes(domain, payload_type, payload))
    return Envelope(peer_id_of_key(public_key), public_key.data, payload, bytes(data))


def _encode(key: bytes, payload_type: bytes, payload: bytes, signature: bytes) -> bytes:
    values = (key, payload_type, payload, signature)
    return protobuf.encode(zip(_FIELDS, values, strict=True))


def _signed_bytes(domain: str, payload_type: bytes, payload: bytes) -> bytes:
    out = b""
    for part in (domain.encode(), payload_type, payload):
        out += encode_varint(len(part)) + part
    return out
