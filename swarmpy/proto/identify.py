"""Identify: what two peers tell each other about themselves once connected, and when it changes.

Sans-IO. The message is libp2p's protobuf; the signed peer record in it is an envelope of addresses.
Nothing in it is believed beyond the peer's own key, which the handshake proved.
Spec: libp2p specs, identify, and RFC 0003 (peer records); protocols/identify.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarmpy.errors import BadMessage, BadSignature, RemoteProtocolError
from swarmpy.identity import PUBLIC_KEY_PROTOBUF_PREFIX, Identity, PeerId, peer_id_bytes
from swarmpy.proto import multiaddr, protobuf
from swarmpy.proto.envelope import open_envelope, seal
from swarmpy.proto.wire import printable
from swarmpy.public_keys import multihash_of

PROTOCOL = "/ipfs/id/1.0.0"
PUSH_PROTOCOL = "/ipfs/id/push/1.0.0"

VERSION = "swarmpy/1"
"""Sent as protocolVersion: which network of peers this is."""

MESSAGE_BYTES_MAX = 64 * 1024
"""All of one identify answer; go-libp2p sends up to ten parts of at most 8 KiB."""

PROTOCOLS_MAX = 256
PARTS_MAX = 16
"""Frames one message may come in, empty ones too; go-libp2p sends at most ten."""

ADDRESSES_MAX = 64
TEXT_MAX = 256
"""Longest agent, version or protocol id kept."""

_RECORD_DOMAIN = "libp2p-peer-record"
_RECORD_TYPE = b"\x03\x01"


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentifyInfo:
    """What a peer says about itself.

    Attributes:
        agent: Its software, "swarmpy/0.1.0".
        version: The network of peers it says it belongs to.
        protocols: Ids it serves to us.
        addresses: Where it says it listens; those in protocols unknown here are left out.
        observed_address: Our address as it sees it, "" if it does not say.
        record_seq: Sequence number of its signed peer record, 0 without one.
    """

    agent: str
    version: str = VERSION
    protocols: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    observed_address: str = ""
    record_seq: int = 0


def seal_peer_record(identity: Identity, addresses: Sequence[str], *, seq: int) -> bytes:
    """Sign a libp2p peer record; `seq` must grow from record to record, also over restarts."""
    entries = [(3, protobuf.encode([(1, multiaddr.to_bytes(item))])) for item in addresses]
    payload = protobuf.encode([(1, peer_id_bytes(identity.peer_id)), (2, seq), *entries])
    return seal(identity, domain=_RECORD_DOMAIN, payload_type=_RECORD_TYPE, payload=payload)


def open_peer_record(data: bytes, *, peer: PeerId) -> tuple[int, tuple[str, ...]]:
    """Verify a peer record signed by `peer`; return its sequence number and addresses.

    Raises:
        BadSignature: Signed by another peer, or not at all.
        BadMessage: Not a peer record.
    """
    envelope = open_envelope(data, domain=_RECORD_DOMAIN, payload_type=_RECORD_TYPE, any_key=True)
    fields = protobuf.decode(envelope.payload)
    if envelope.signer != peer or protobuf.bytes_field(fields, 1) != peer_id_bytes(peer):
        raise BadSignature(f"peer record signed by {envelope.signer}, expected {peer}")
    entries = protobuf.bytes_fields(fields, 3)
    binary = [protobuf.bytes_field(protobuf.decode(entry), 1) for entry in entries]
    return protobuf.int_field(fields, 2), _known_addresses(binary)


def encode(info: IdentifyInfo, *, public_key: bytes, signed_record: bytes = b"") -> bytes:
    """Encode an identify message, without its length.

    Args:
        public_key: The sender's raw Ed25519 key.
        signed_record: From `seal_peer_record`, or nothing.
    """
    fields: list[tuple[int, bytes | int]] = [(1, PUBLIC_KEY_PROTOBUF_PREFIX + public_key)]
    fields += [(2, multiaddr.to_bytes(address)) for address in info.addresses]
    fields += [(3, protocol.encode()) for protocol in info.protocols]
    if info.observed_address:
        fields.append((4, multiaddr.to_bytes(info.observed_address)))
    fields += [(5, info.version.encode()), (6, info.agent.encode())]
    if signed_record:
        fields.append((8, signed_record))
    return protobuf.encode(fields)


def decode(data: bytes, *, peer: PeerId) -> IdentifyInfo:
    """Decode an identify message of a proven peer. Several parts joined decode as one.

    The addresses are those of the signed record where there is one.

    Raises:
        BadMessage: Not one, beyond a bound, or with the key of somebody else.
        BadSignature: The signed record in it is not the peer's.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise BadMessage(f"identify of {len(data)} bytes exceeds {MESSAGE_BYTES_MAX}")
    fields = protobuf.decode(data)
    key = protobuf.bytes_field(fields, 1)
    if key and multihash_of(key) != peer_id_bytes(peer):
        raise BadMessage("identify carries the key of another peer")
    protocols = protobuf.bytes_fields(fields, 3)
    binary = protobuf.bytes_fields(fields, 2)
    if len(protocols) > PROTOCOLS_MAX or len(binary) > ADDRESSES_MAX:
        raise BadMessage(f"identify with {len(protocols)} protocols, {len(binary)} addresses")
    seq, addresses = 0, _known_addresses(binary)
    if record := protobuf.bytes_field(fields, 8):
        seq, addresses = open_peer_record(record, peer=peer)
    observed = _known_addresses([protobuf.bytes_field(fields, 4)])
    return IdentifyInfo(
        agent=printable(protobuf.text_field(fields, 6)[:TEXT_MAX]),
        version=printable(protobuf.text_field(fields, 5)[:TEXT_MAX]),
        protocols=tuple(
            printable(item.decode("utf-8", "replace")[:TEXT_MAX]) for item in protocols
        ),
        addresses=addresses,
        observed_address=observed[0] if observed else "",
        record_seq=seq,
    )


def _known_addresses(binary: Sequence[bytes]) -> tuple[str, ...]:
    """Return the addresses whose protocols are known here; a peer may well speak others."""
    addresses: list[str] = []
    for item in binary[:ADDRESSES_MAX]:
        try:
            addresses.append(multiaddr.from_bytes(item))
        except RemoteProtocolError:
            continue
    return tuple(addresses)
