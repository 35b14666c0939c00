"""Announcements: what a member says of itself, signed, so that members it never met can believe it.

An announcement is made for one network and carries its signer's membership of it; whoever gets it,
from whomever, can verify it, store it, dial its signer and pass it on as received.
Sans-IO: `swarmpy/discovery/` keeps and floods them.
Spec: protocols/announce.md (revision 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from swarmpy.errors import BadMessage, NotAMember, StaleRecord
from swarmpy.identity import Identity, PeerId
from swarmpy.proto.endpoint import ip_endpoint
from swarmpy.proto.envelope import open_envelope, seal
from swarmpy.proto.membership import (
    CLOCK_SKEW_S,
    Membership,
    Name,
    PeerIdText,
    Proof,
    WallSecondsInt,
    check_printable,
    verify_membership,
)
from swarmpy.proto.wire import decode, encode

PROTOCOL = "/swarmpy/announce/1"

DOMAIN = "swarmpy-announce"
PAYLOAD_TYPE = b"a"

ANNOUNCEMENT_BYTES_MAX = 4096
"""Largest signed announcement; times `RECORDS_MAX` it bounds the table to 8 MiB."""

ADDRESSES_MAX = 8
ADDRESS_CHARACTERS_MAX = 64
"""Longest address: an IPv6 literal and a port take 55."""

MODELS_MAX = 16
SHARDS_MAX = 16
"""Models and shards in one announcement; beyond the byte bound the last ones are left out."""

ANNOUNCEMENT_TTL_S = 3600.0
"""An announcement older than this is forgotten; its signer repeats it three times in that time."""

ANNOUNCE_INTERVAL_S = 1200.0

Text64 = Annotated[str, Meta(max_length=64)]
Text128 = Annotated[str, Meta(max_length=128)]
Bytes = Annotated[int, Meta(ge=0, lt=2**53)]
"""A size in bytes; exact in a JSON number too."""
LayerIndex = Annotated[int, Meta(ge=0, le=4096)]
SeqNumber = Annotated[int, Meta(ge=0, lt=2**53)]


class AnnouncedModel(msgspec.Struct, frozen=True, array_like=True):
    """A model whose files the member has."""

    model_id: Text128
    name: Text128
    display_name: Text64
    size_bytes: Bytes
    layer_count: LayerIndex


class AnnouncedShard(msgspec.Struct, frozen=True, array_like=True):
    """Layers [start, end) the member has loaded."""

    model_id: Text128
    start: LayerIndex
    end: LayerIndex


class Announcement(msgspec.Struct, frozen=True, kw_only=True):
    """A member's own word about itself, for one network."""

    peer: PeerIdText
    seq: SeqNumber
    """Newer replaces older: max(last + 1, wall milliseconds)."""
    issued_wall_s: WallSecondsInt
    membership: Proof
    """Of the network this announcement is for."""
    name: Name
    addresses: Annotated[
        tuple[Annotated[str, Meta(max_length=ADDRESS_CHARACTERS_MAX)], ...],
        Meta(max_length=ADDRESSES_MAX),
    ]
    agent: Text64 = ""
    boot_id: Text64 = ""
    """Changes with every start of the node."""
    machine_id: Text64 = ""
    """Equal for the nodes of one machine."""
    engine: Text64 = ""
    build_id: Text128 = ""
    memory_bytes_max: Bytes = 0
    memory_bytes_free: Bytes = 0
    speed_bytes_s: Annotated[float, Meta(ge=0, lt=1e15)] = 0.0
    """Weight bytes an engine here passes over in a second of decode; 0 before it was measured."""
    models: Annotated[tuple[AnnouncedModel, ...], Meta(max_length=MODELS_MAX)] = ()
    shards: Annotated[tuple[AnnouncedShard, ...], Meta(max_length=SHARDS_MAX)] = ()


class Announce(msgspec.Struct, frozen=True, tag="announce"):
    """The protocol's one message, pushed by either side whenever it has a newer announcement."""

    announcement: Annotated[bytes, Meta(max_length=ANNOUNCEMENT_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedAnnouncement:
    """A verified announcement, its signer's membership, and the bytes to pass on."""

    announcement: Announcement
    membership: Membership
    peer: PeerId
    envelope: bytes


def seal_announcement(identity: Identity, announcement: Announcement) -> bytes:
    """Sign an announcement, leaving out the last models and shards where it would be too large.

    Raises:
        BadMessage: Too large even without any.
    """
    while True:
        payload = encode(announcement)
        sealed = seal(identity, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=payload)
        if len(sealed) <= ANNOUNCEMENT_BYTES_MAX:
            return sealed
        models, shards = announcement.models, announcement.shards
        if not models and not shards:
            raise BadMessage(
                f"announcement of {len(sealed)} bytes exceeds {ANNOUNCEMENT_BYTES_MAX}"
            )
        # Shards go last: who computes matters more than who has files.
        announcement = msgspec.structs.replace(
            announcement, models=models[:-1], shards=shards if models else shards[:-1]
        )


def open_announcement(sealed: bytes, *, wall_s: float) -> SignedAnnouncement:
    """Verify an announcement, whoever delivered it.

    Raises:
        BadMessage: Oversized, malformed, or with an address that is no IP literal.
        BadSignature: Forged, in itself or in its membership.
        StaleRecord: Sound but of no use now; no fault of whoever delivered it.
    """
    if len(sealed) > ANNOUNCEMENT_BYTES_MAX:
        raise BadMessage(f"announcement of {len(sealed)} bytes exceeds {ANNOUNCEMENT_BYTES_MAX}")
    envelope = open_envelope(sealed, domain=DOMAIN, payload_type=PAYLOAD_TYPE)
    announcement = decode(envelope.payload, Announcement)
    peer = envelope.signer
    if announcement.peer != peer:
        raise BadMessage(f"announcement of {announcement.peer} signed by {peer}")
    _check_contents(announcement)
    age_s = wall_s - announcement.issued_wall_s
    if not -CLOCK_SKEW_S <= age_s <= ANNOUNCEMENT_TTL_S:
        raise StaleRecord(
            f"announcement is {age_s:.0f} s old, expected up to {ANNOUNCEMENT_TTL_S:.0f}"
        )
    try:
        membership = verify_membership(announcement.membership, wall_s=wall_s, expected_member=peer)
    except NotAMember as error:
        raise StaleRecord(str(error)) from error
    return SignedAnnouncement(
        announcement=announcement,
        membership=membership,
        peer=peer,
        envelope=envelope.signed,
    )


def _check_contents(announcement: Announcement) -> None:
    texts = [announcement.name, announcement.agent, announcement.boot_id, announcement.machine_id]
    texts += [announcement.engine, announcement.build_id]
    for model in announcement.models:
        texts += [model.model_id, model.name, model.display_name]
    for shard in announcement.shards:
        texts.append(shard.model_id)
        if not shard.start < shard.end:
            raise BadMessage(f"announced layers [{shard.start}, {shard.end}) are none")
    for text in texts:
        check_printable(text, "announcement")
    for address in announcement.addresses:
        ip_endpoint(address)
