"""Announcements: what a member says of itself, signed, so that members it never met can believe it.

An announcement is made for one network and carries its signer's membership of it; whoever gets it,
from whomever, can verify it, store it, dial its signer and pass it on as received.
The messages that carry them, and the other signed records, from neighbour to neighbour are here
too. Sans-IO: `swarmpy/discovery/` keeps and spreads them.
Spec: protocols/announce.md (revision 2).
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from swarmpy.errors import BadMessage, ClockSkew, NotAMember, StaleRecord
from swarmpy.identity import Identity, PeerId
from swarmpy.proto.endpoint import ip_endpoint
from swarmpy.proto.envelope import open_envelope, seal
from swarmpy.proto.membership import (
    CLOCK_SKEW_S,
    REVOCATION_BYTES_MAX,
    KeyHash,
    Membership,
    Name,
    NetworkId,
    PeerIdText,
    Proof,
    WallSecondsInt,
    check_printable,
    open_membership,
    verify_membership,
)
from swarmpy.proto.summary import (
    ENTRY_BYTES,
    KEY_BYTES,
    PREFIX_MAX,
    ROOT_BYTES,
    alive_version,
    record_key,
)
from swarmpy.proto.swim import STATEMENT_BYTES_MAX
from swarmpy.proto.wire import decode, encode

PROTOCOL = "/swarmpy/announce/2"

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

RANGES_MAX = 16
"""Ranges of layers of one model that a member has in part."""

ANNOUNCEMENT_TTL_S = 3600.0
"""An announcement older than this is forgotten: a backstop, the dead are found by `swim`."""

ANNOUNCE_INTERVAL_S = 50 * 60.0
"""Between two announcements of a member that has nothing new to say. At rest they are most of the
traffic of a large network, so they come no more often than the backstop needs."""

ANNOUNCE_JITTER_S = 5 * 60.0
"""Each interval differs by up to so much: a thousand nodes started at once must not speak at once
for ever. With the jitter there are five minutes left to reach everybody."""

ANNOUNCEMENTS_CACHED = 2048
"""Announcements whose signatures are not checked again when another neighbour brings the same
bytes, or a node of the same process; as many as a node keeps."""

Text64 = Annotated[str, Meta(max_length=64)]
Text128 = Annotated[str, Meta(max_length=128)]
Bytes = Annotated[int, Meta(ge=0, lt=2**53)]
"""A size in bytes; exact in a JSON number too."""
LayerIndex = Annotated[int, Meta(ge=0, le=4096)]
Speed = Annotated[float, Meta(ge=0, lt=1e15)]
LayerRanges = Annotated[tuple[tuple[LayerIndex, LayerIndex], ...], Meta(max_length=RANGES_MAX)]
SeqNumber = Annotated[int, Meta(ge=0, lt=2**53)]


class AnnouncedModel(msgspec.Struct, frozen=True, array_like=True):
    """A model that the member has."""

    model_id: Text128
    name: Text128
    display_name: Text64
    size_bytes: Bytes
    layer_count: LayerIndex
    engine: Text64 = ""
    """The one that runs it there; "" before that is known."""
    layers: LayerRanges | None = None
    """Ranges of layers whose files the member has; None: it has all."""
    fetches: bool = False
    """Whether the member fetches the files that it lacks of layers it is to load."""
    speed_bytes_s: Speed = 0.0
    """As the announcement's, of this model's engine."""


class AnnouncedShard(msgspec.Struct, frozen=True, array_like=True):
    """Layers [start, end) the member has loaded."""

    model_id: Text128
    start: LayerIndex
    end: LayerIndex


class Announcement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
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
    speed_bytes_s: Speed = 0.0
    """Weight bytes an engine here passes over in a second of decode; 0 before it was measured."""
    models: Annotated[tuple[AnnouncedModel, ...], Meta(max_length=MODELS_MAX)] = ()
    shards: Annotated[tuple[AnnouncedShard, ...], Meta(max_length=SHARDS_MAX)] = ()


# Messages ---------------------------------------------------------------------

RECORDS_PER_MESSAGE_MAX = 512
ENTRIES_PER_MESSAGE_MAX = 2048
"""Keys, or keys with versions, in one message; a whole table fits."""

RECORDS_BYTES_MAX = 60 * 1024
"""Envelopes in one message, at most; with the headers of `RECORDS_PER_MESSAGE_MAX` of them, three
bytes each, it still fits a frame."""

PARTS_MAX = 256

Keys = Annotated[bytes, Meta(max_length=ENTRIES_PER_MESSAGE_MAX * KEY_BYTES)]
"""Record keys of 8 bytes, one behind the other."""
Entries = Annotated[bytes, Meta(max_length=ENTRIES_PER_MESSAGE_MAX * ENTRY_BYTES)]
"""Keys and versions, 8 bytes each, one behind the other."""
Prefix = Annotated[str, Meta(max_length=PREFIX_MAX)]
"""Hexadecimal digits with which record keys begin."""


class Records(msgspec.Struct, frozen=True, tag="records", omit_defaults=True):
    """Signed records as their signers made them: pushed along the tree, or asked for."""

    announcements: Annotated[
        tuple[Annotated[bytes, Meta(max_length=ANNOUNCEMENT_BYTES_MAX)], ...],
        Meta(max_length=RECORDS_PER_MESSAGE_MAX),
    ] = ()
    statements: Annotated[
        tuple[Annotated[bytes, Meta(max_length=STATEMENT_BYTES_MAX)], ...],
        Meta(max_length=RECORDS_PER_MESSAGE_MAX),
    ] = ()
    revocations: Annotated[
        tuple[Annotated[bytes, Meta(max_length=REVOCATION_BYTES_MAX)], ...],
        Meta(max_length=RECORDS_PER_MESSAGE_MAX),
    ] = ()
    is_answer: bool = False
    """Whether they were asked for: one that is here already then says nothing of the tree."""

    @property
    def count(self) -> int:
        """How many records there are."""
        return len(self.announcements) + len(self.statements) + len(self.revocations)


class Have(msgspec.Struct, frozen=True, tag="have"):
    """What the sender has and has not pushed to the receiver."""

    entries: Entries


class Want(msgspec.Struct, frozen=True, tag="want", omit_defaults=True):
    """The receiver is asked for records, as its answer."""

    keys: Keys
    is_graft: bool = False
    """Whether it is asked to push to the sender from now on: the tree did not bring them."""


class Prune(msgspec.Struct, frozen=True, tag="prune"):
    """The receiver is asked to push no more to the sender, only to tell what it has."""


class Root(msgspec.Struct, frozen=True, tag="root"):
    """The summary of the sender's table of a network; the receiver answers if its own differs."""

    network: KeyHash
    root: Annotated[bytes, Meta(min_length=ROOT_BYTES, max_length=ROOT_BYTES)]


class Branch(msgspec.Struct, frozen=True, array_like=True):
    """The short hashes of the 16 children of a prefix."""

    prefix: Prefix
    hashes: Annotated[bytes, Meta(min_length=16 * KEY_BYTES, max_length=16 * KEY_BYTES)]


class Branches(msgspec.Struct, frozen=True, tag="branches"):
    """One level further down, where the tables differ."""

    network: KeyHash
    branches: Annotated[tuple[Branch, ...], Meta(max_length=PARTS_MAX)]


class Part(msgspec.Struct, frozen=True, array_like=True):
    """All entries of the sender under a prefix."""

    prefix: Prefix
    entries: Entries


class Listing(msgspec.Struct, frozen=True, tag="listing"):
    """What the sender has where the tables differ; the receiver sends and asks for the rest."""

    network: KeyHash
    parts: Annotated[tuple[Part, ...], Meta(max_length=PARTS_MAX)]


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Is this peer alive? Asked of itself, or of somebody who may know better."""

    peer: PeerIdText


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The peer answered just now."""

    peer: PeerIdText


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """The sender gives this connection up because it has enough of them; it lives on."""


Message = Records | Have | Want | Prune | Root | Branches | Listing | Probe | Alive | Leave
"""What either side sends on the stream that it opened; nothing flows back on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedAnnouncement:
    """A verified announcement, its signer's membership, and the bytes to pass on."""

    announcement: Announcement
    membership: Membership
    peer: PeerId
    envelope: bytes
    key: bytes
    version: int
    contents: bytes
    """Digest of what it says: equal in two announcements that differ in time and number alone."""

    @property
    def network_id(self) -> NetworkId:
        return self.membership.network_id

    @property
    def expires_wall_s(self) -> float:
        return self.announcement.issued_wall_s + ANNOUNCEMENT_TTL_S


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
        ClockSkew: The same, because it comes from the future.
    """
    signed = _open(sealed)
    age_s = wall_s - signed.announcement.issued_wall_s
    if age_s < -CLOCK_SKEW_S:
        raise ClockSkew(
            f"{signed.peer} announces itself {-age_s:.0f} s in the future by this clock (clocks may"
            f" differ by {CLOCK_SKEW_S:.0f} s: check both machines' time)"
        )
    if age_s > ANNOUNCEMENT_TTL_S:
        raise StaleRecord(
            f"announcement is {age_s:.0f} s old, expected up to {ANNOUNCEMENT_TTL_S:.0f}"
        )
    membership = signed.membership
    if not membership.not_before_wall_s <= wall_s <= membership.not_after_wall_s:
        try:
            verify_membership(membership.proof, wall_s=wall_s)
        except NotAMember as error:
            raise StaleRecord(str(error)) from error
    return signed


@functools.lru_cache(maxsize=ANNOUNCEMENTS_CACHED)
def _open(sealed: bytes) -> SignedAnnouncement:
    """Check all of an announcement but its times; one that was sound stays so."""
    if len(sealed) > ANNOUNCEMENT_BYTES_MAX:
        raise BadMessage(f"announcement of {len(sealed)} bytes exceeds {ANNOUNCEMENT_BYTES_MAX}")
    envelope = open_envelope(sealed, domain=DOMAIN, payload_type=PAYLOAD_TYPE)
    announcement = decode(envelope.payload, Announcement)
    peer = envelope.signer
    if announcement.peer != peer:
        raise BadMessage(f"announcement of {announcement.peer} signed by {peer}")
    _check_contents(announcement)
    membership = open_membership(announcement.membership)
    if membership.member != peer:
        raise BadMessage(f"the membership is of {membership.member}, expected {peer}")
    undated = msgspec.structs.replace(announcement, seq=0, issued_wall_s=0)
    return SignedAnnouncement(
        announcement=announcement,
        membership=membership,
        peer=peer,
        envelope=envelope.signed,
        key=record_key(membership.network_id, peer),
        version=alive_version(announcement.seq),
        contents=hashlib.sha256(encode(undated)).digest(),
    )


def _check_contents(announcement: Announcement) -> None:
    texts = [announcement.name, announcement.agent, announcement.boot_id, announcement.machine_id]
    texts += [announcement.engine, announcement.build_id]
    for model in announcement.models:
        texts += [model.model_id, model.name, model.display_name, model.engine]
        _check_ranges(model)
    for shard in announcement.shards:
        texts.append(shard.model_id)
        if not shard.start < shard.end:
            raise BadMessage(f"announced layers [{shard.start}, {shard.end}) are none")
    for text in texts:
        check_printable(text, "announcement")
    for address in announcement.addresses:
        ip_endpoint(address)


def _check_ranges(model: AnnouncedModel) -> None:
    """Ranges of layers are in order, apart from each other, and of the model."""
    before = -1
    for start, end in model.layers or ():
        if not before < start < end <= model.layer_count:
            raise BadMessage(f"announced layers {model.layers} of {model.layer_count}")
        before = end
