"""Membership: who was signed into a network by whom, and what two peers show each other.

A network is an Ed25519 key. A membership is a chain of signed records from that key down to one
member; verifying it needs nothing but the chain and a clock, so two members who never met, and
whose invites came from different peers, accept each other.
Sans-IO: `swarmpy/trust/` keeps keys and records and speaks the protocol.
Spec: protocols/membership.md (revision 2).
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NewType

import msgspec
from msgspec import Meta

from swarmpy.errors import BadMessage, NotAMember
from swarmpy.identity import PEER_ID_TEXT_MAX, Identity, PeerId, parse_peer_id
from swarmpy.proto.envelope import Envelope, open_envelope, seal
from swarmpy.proto.wire import decode, encode, encode_elements

PROTOCOL = "/swarmpy/membership/1"

DOMAIN = "swarmpy-membership"
"""What a signature on a record is for; it fits nothing else."""

PAYLOAD_TYPE = b"m"

VERSION = 1

NETWORK_KEY_HASH_BYTES = 20
"""A network id is 160 bits of its key's SHA-256: 32 base32 characters, no padding, and finding a
second key of the same id takes 2^160 hashes."""

CHAIN_MAX = 8
"""Most records between the network key and a member: bounds the signatures a stranger makes us
verify, and a chain of eight still fits in a 4 KiB announcement."""

NETWORKS_MAX = 8
"""Networks one node is a member of; bounds what two peers show each other."""

NAME_MAX = 64
"""Longest name of a network or node, characters."""

VOUCHER_BYTES = 8
"""Of the SHA-256 of a PeerId, by which a record names who vouched for its member: finding a second
peer of the same 8 bytes takes 2^64 tries."""

VOUCHERS_MAX = 16
"""Named so in all records of a chain: two whole chains, of whoever invited and of who renewed."""

RECORD_ENVELOPE_BYTES_MAX = 640
"""Largest signed record: a name of 64 four-byte characters, a PeerId, a key and a signature."""

REVOCATION_BYTES_MAX = 6 * 1024
"""Largest signed revocation: a chain of eight records of 640 bytes, and a little."""

MEMBERSHIP_TTL_S = 30 * 24 * 3600.0
"""Life of a membership record; renewed while connected."""

CLOCK_SKEW_S = 300.0
"""Difference between two machines' clocks that signed times allow for."""

CHAINS_CACHED = 2048
"""Chains whose signatures are not checked again: every repeated announcement brings the same one.
As many as announcements are kept; of eight links at their longest it is 10 MiB."""

RENEW_BELOW_S = 10 * 24 * 3600.0
"""A record with less life left than this is renewed: two thirds of its life are over."""

NetworkId = NewType("NetworkId", str)
"""A network's id as text: "n" and 32 base32 characters."""

Name = Annotated[str, Meta(max_length=NAME_MAX)]
PeerIdText = Annotated[str, Meta(max_length=PEER_ID_TEXT_MAX)]
"""A PeerId as it came; `read_peer_id` checks it."""
KeyHash = Annotated[
    bytes, Meta(min_length=NETWORK_KEY_HASH_BYTES, max_length=NETWORK_KEY_HASH_BYTES)
]
WallSecondsInt = Annotated[int, Meta(ge=0, lt=253_402_300_800)]
"""Whole Unix seconds up to the year 9999: a hostile time can still be written as a date."""


class MembershipRecord(msgspec.Struct, frozen=True, array_like=True):
    """One link of a chain: its signer says that `member` belongs to the network.

    Encoded as an array to stay small in announcements and invites; later fields are added behind.
    """

    version: int
    network: KeyHash
    network_name: Name
    """Counts in the record the network key signed; empty in the others."""
    member: PeerIdText
    can_invite: bool
    """Whether the member may sign records of others: invite and renew."""
    serial: Annotated[int, Meta(ge=0, lt=2**62)]
    issued_wall_s: WallSecondsInt
    not_after_wall_s: WallSecondsInt
    vouchers: Annotated[bytes, Meta(max_length=VOUCHERS_MAX * VOUCHER_BYTES)] = b""
    """On whom the member rests beside those above it in this chain: of a renewed record those of
    the chain it replaces, in their order, `VOUCHER_BYTES` each. Left out where empty."""


EnvelopeBytes = Annotated[bytes, Meta(max_length=RECORD_ENVELOPE_BYTES_MAX)]
Proof = Annotated[tuple[EnvelopeBytes, ...], Meta(min_length=1, max_length=CHAIN_MAX)]
"""Signed records from the network key's own down to the member's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """A verified membership."""

    network_id: NetworkId
    network_name: str
    member: PeerId
    can_invite: bool
    not_after_wall_s: float
    """When the first record of the chain ends: authority does not outlive its source."""
    not_before_wall_s: float
    """When the last record of the chain was issued."""
    issuer: PeerId
    """Whoever signed the member's own record: another member, or the network key's own id."""
    members: tuple[PeerId, ...]
    """The member of each record of the chain: each signed the next, the last is `member`."""
    line: tuple[bytes, ...]
    """`voucher_of` all on whom it rests, in order: of each record the vouchers, then the member."""
    proof: tuple[bytes, ...]


# The conversation -------------------------------------------------------------

Tag = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Initiator, first: a tag for each of its networks, meaningless to whoever is not in them."""

    tags: Annotated[tuple[Tag, ...], Meta(max_length=NETWORKS_MAX)]


class Proofs(msgspec.Struct, frozen=True, tag="proofs"):
    """The sender's memberships of the networks both named; the responder shows its own first."""

    proofs: Annotated[tuple[Proof, ...], Meta(max_length=NETWORKS_MAX)]


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Responder, last: it now serves the initiator as a member, or says why it does not."""

    refusal: Annotated[str, Meta(max_length=200)] = ""
    revocation: Annotated[bytes, Meta(max_length=REVOCATION_BYTES_MAX)] = b""
    """A signed revocation by which one of the proofs shown is void: its owner may not know."""


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """A member asks another that may invite for a new record in place of one that ends soon."""

    proof: Proof


class Renewed(msgspec.Struct, frozen=True, tag="renewed"):
    """The new membership."""

    proof: Proof


class NotRenewed(msgspec.Struct, frozen=True, tag="not_renewed"):
    """The asked peer cannot help: no delegation, or its own authority ends no later."""


MembershipMessage = Hello | Proofs | Done | Renew | Renewed | NotRenewed


def network_tag(
    network_id: NetworkId, *, channel_binding: bytes, role: Literal["initiator", "responder"]
) -> bytes:
    """Return what names a network to its members on one connection, and to nobody else (32 bytes).

    The channel binding makes it worthless on any other connection, the role against reflection.
    """
    message = DOMAIN.encode() + b"\0" + role.encode() + b"\0" + channel_binding
    return hmac.digest(network_id.encode(), message, "sha256")


def matching_networks(
    tags: Iterable[bytes], networks: Iterable[NetworkId], *, channel_binding: bytes
) -> list[NetworkId]:
    """Return those of `networks` that an initiator's tags name."""
    named = set(tags)
    return [
        network_id
        for network_id in networks
        if network_tag(network_id, channel_binding=channel_binding, role="initiator") in named
    ]


# Network ids --------------------------------------------------------------------


def key_hash(public_key: bytes) -> bytes:
    """Return the 20 bytes by which a network key is known."""
    return hashlib.sha256(public_key).digest()[:NETWORK_KEY_HASH_BYTES]


def own_network_id(key: Identity) -> NetworkId:
    """Return the id of the network whose key this is."""
    return network_id_of(key_hash(key.public_key))


def network_id_of(hash_: bytes) -> NetworkId:
    """Return the text of a network key's hash."""
    return NetworkId("n" + base64.b32encode(hash_).decode().lower())


def key_hash_of(network_id: NetworkId) -> bytes:
    """Return the key hash inside a network id.

    Raises:
        BadMessage: The text is no network id.
    """
    try:
        hash_ = base64.b32decode(network_id[1:].upper())
    except (binascii.Error, ValueError) as error:
        raise BadMessage(f"{network_id!r} is not a network id") from error
    if network_id != network_id_of(hash_) or len(hash_) != NETWORK_KEY_HASH_BYTES:
        raise BadMessage(f"{network_id!r} is not a network id")
    return hash_


# Records ------------------------------------------------------------------------


def issue(
    signer: Identity,
    *,
    authority: Membership | None,
    network_id: NetworkId,
    network_name: str,
    member: PeerId,
    can_invite: bool,
    serial: int,
    wall_s: float,
    ttl_s: float = MEMBERSHIP_TTL_S,
    replaced: Membership | None = None,
) -> tuple[bytes, ...]:
    """Sign a member's record and return its proof.

    Args:
        signer: The network key (then `authority` is None), or a member's identity.
        authority: The signer's own verified membership, which becomes the chain.
        replaced: The membership that this renews: the new one rests on whom that rested.

    Raises:
        NotAMember: The authority may not invite, has ended, rests on the member itself, or its
            chain is at its longest; or too many have vouched for the member.
    """
    vouchers = _vouchers(member, authority, replaced)
    not_after = int(wall_s + ttl_s)
    chain: tuple[bytes, ...] = ()
    if authority is not None:
        if not authority.can_invite:
            raise NotAMember(f"this node may not invite into {authority.network_name!r}")
        if len(authority.proof) >= CHAIN_MAX:
            raise NotAMember(
                f"this node is {CHAIN_MAX} invitations away from the network's founder, the most"
                " there may be",
                fix="Ask a member closer to the founder for the invite.",
            )
        not_after = min(not_after, int(authority.not_after_wall_s))
        chain = authority.proof
    if not_after <= wall_s:
        raise NotAMember("this node's own membership has ended and was not renewed")
    record = MembershipRecord(
        version=VERSION,
        network=key_hash_of(network_id),
        network_name=network_name if authority is None else "",
        member=member,
        can_invite=can_invite,
        serial=serial,
        issued_wall_s=int(wall_s),
        not_after_wall_s=not_after,
        vouchers=vouchers,
    )
    payload = encode(record) if vouchers else encode_elements(msgspec.structs.astuple(record)[:-1])
    return (*chain, seal(signer, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=payload))


def _vouchers(member: PeerId, authority: Membership | None, replaced: Membership | None) -> bytes:
    """Return what a record's `vouchers` has to be.

    A member could else be renewed out of the reach of a revocation of whoever signed it in.
    """
    above = authority.line if authority is not None else ()
    if replaced is not None and voucher_of(member) in above:
        # It would give those below the member authority over it, which it never asked for.
        raise NotAMember(f"this node is a member through {member} and cannot vouch for it")
    before = replaced.line[:-1] if replaced is not None else ()
    vouchers = [item for item in dict.fromkeys(before) if item not in above]
    named = len(above) - (len(authority.members) if authority is not None else 0)
    if named + len(vouchers) > VOUCHERS_MAX:
        raise NotAMember(
            f"more than {VOUCHERS_MAX} members have vouched for {member} by now",
            fix="Ask whoever invited it to renew its membership, or for a new invite.",
        )
    return b"".join(vouchers)


def voucher_of(peer: PeerId) -> bytes:
    """Return the 8 bytes by which a record names who vouched for its member."""
    return hashlib.sha256(peer.encode()).digest()[:VOUCHER_BYTES]


def verify_membership(
    proof: Sequence[bytes], *, wall_s: float, expected_member: PeerId | None = None
) -> Membership:
    """Check a chain of records from the network key down to a member.

    Every link must be signed by the member before it, who may invite, and be valid now: authority
    never outlives its source, so a member that was let go cannot sign others in by dating back.

    Args:
        wall_s: Unix time in seconds; five minutes between two clocks are allowed for.
        expected_member: Whose membership it has to be, None where anybody's will do.

    Raises:
        BadMessage: No chain, one that contradicts itself, or another peer's.
        BadSignature: A signature does not fit.
        NotAMember: The chain is sound but over, or not yet valid.
    """
    membership, links = _open_chain(tuple(map(bytes, proof)))
    if expected_member is not None and membership.member != expected_member:
        raise BadMessage(f"the membership is of {membership.member}, expected {expected_member}")
    for link in links:
        _check_time(link, wall_s)
    return membership


def open_membership(proof: Sequence[bytes]) -> Membership:
    """Check a chain as `verify_membership` does, whatever the time is.

    Raises:
        BadMessage, BadSignature: As for `verify_membership`.
    """
    return _open_chain(tuple(map(bytes, proof)))[0]


@functools.lru_cache(maxsize=CHAINS_CACHED)
def _open_chain(proof: tuple[bytes, ...]) -> tuple[Membership, tuple[MembershipRecord, ...]]:
    """Check all of a chain but its times; a chain that was sound stays so."""
    if not 1 <= len(proof) <= CHAIN_MAX:
        raise BadMessage(f"a membership of {len(proof)} records, expected 1 to {CHAIN_MAX}")
    links: list[MembershipRecord] = []
    members: list[PeerId] = []
    line: list[bytes] = []
    for sealed in proof:
        envelope, link = _open_record(sealed)
        if links:
            _check_link(links[-1], link, envelope.signer)
        elif key_hash(envelope.public_key) != link.network:
            raise BadMessage("the first record is not signed by the network's key")
        _check_life(link)
        issuer = envelope.signer
        links.append(link)
        members.append(read_peer_id(link.member))
        line += (*_read_vouchers(link.vouchers), voucher_of(members[-1]))
    if len(line) > len(proof) + VOUCHERS_MAX:
        raise BadMessage(f"a membership with more than {VOUCHERS_MAX} vouchers")
    membership = Membership(
        network_id=network_id_of(links[0].network),
        network_name=links[0].network_name,
        member=members[-1],
        can_invite=links[-1].can_invite,
        not_after_wall_s=float(min(link.not_after_wall_s for link in links)),
        not_before_wall_s=float(max(link.issued_wall_s for link in links)),
        issuer=issuer,
        members=tuple(members),
        line=tuple(line),
        proof=proof,
    )
    return membership, tuple(links)


def _read_vouchers(data: bytes) -> list[bytes]:
    if len(data) % VOUCHER_BYTES:
        raise BadMessage(f"vouchers of {len(data)} bytes, expected a multiple of {VOUCHER_BYTES}")
    return [data[at : at + VOUCHER_BYTES] for at in range(0, len(data), VOUCHER_BYTES)]


def network_name_of(proof: Sequence[bytes]) -> str:
    """Return the name its key gave a network, from a proof that may have ended.

    Raises:
        BadMessage, BadSignature: The proof's first record is malformed or forged.
    """
    return _open_record(proof[0])[1].network_name


def _open_record(sealed: bytes) -> tuple[Envelope, MembershipRecord]:
    if len(sealed) > RECORD_ENVELOPE_BYTES_MAX:
        raise BadMessage(f"record of {len(sealed)} bytes exceeds {RECORD_ENVELOPE_BYTES_MAX}")
    envelope = open_envelope(sealed, domain=DOMAIN, payload_type=PAYLOAD_TYPE)
    record = decode(envelope.payload, MembershipRecord)
    check_version(record.version, "membership record")
    check_printable(record.network_name, "network name")
    return envelope, record


def _check_link(issuer: MembershipRecord, link: MembershipRecord, signer: PeerId) -> None:
    if link.network != issuer.network:
        raise BadMessage("the chain crosses from one network into another")
    if signer != issuer.member:
        raise BadMessage(f"a record is signed by {signer}, expected {issuer.member}")
    if not issuer.can_invite:
        raise BadMessage(f"{signer} may not sign others into the network")


def _check_life(record: MembershipRecord) -> None:
    life_s = record.not_after_wall_s - record.issued_wall_s
    if not 0 < life_s <= MEMBERSHIP_TTL_S:
        raise BadMessage(f"a record that lives {life_s} s, expected 1 to {MEMBERSHIP_TTL_S:.0f}")


def _check_time(record: MembershipRecord, wall_s: float) -> None:
    early_s = record.issued_wall_s - wall_s
    late_s = wall_s - record.not_after_wall_s
    if max(early_s, late_s) <= CLOCK_SKEW_S:
        return
    hint = f"clocks may differ by {CLOCK_SKEW_S:.0f} s: check both machines' time"
    if early_s > CLOCK_SKEW_S:
        raise NotAMember(f"the membership begins in {early_s:.0f} s by this clock ({hint})")
    raise NotAMember(f"the membership ended {late_s:.0f} s ago by this clock ({hint})")


def read_peer_id(text: str) -> PeerId:
    """Return the PeerId in a message or record of ours, which has one spelling only, base58btc.

    Elsewhere a person or another library may spell one as a CID. In what is signed, or is a key of
    a table, a second spelling would make two members of one peer.

    Raises:
        BadMessage: It is spelled otherwise.
        RemoteProtocolError: It is no PeerId.
    """
    peer = parse_peer_id(text)
    if peer != text:
        raise BadMessage(f"peer id {text!r}, expected its base58btc form {peer}")
    return peer


def check_version(version: int, what: str) -> None:
    """Refuse a signed payload of another version.

    Raises:
        BadMessage: It is not the version known here.
    """
    if version != VERSION:
        raise BadMessage(f"{what} of version {version}, this swarmpy knows {VERSION}")


def check_printable(text: str, what: str) -> None:
    """Refuse a name that would do something to the terminal it is shown on.

    Raises:
        BadMessage: It holds control, line-breaking or direction-changing characters.
    """
    if not text.isprintable():
        raise BadMessage(f"the {what} holds characters that cannot be printed")
