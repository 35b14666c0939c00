"""Revocations: the network's key, or whoever signed a member in, says that it is one no more.

A revocation verifies by itself: it carries a chain in which its signer stands above the member. By
the network's key it voids every chain in which the member stands, its own and those it signed; by a
member only those in which the signer stands before it: anybody who may invite can sign a chain in
which it stands above anybody, but not those that others show.
Sans-IO: `swarmpy/trust/` keeps them, `swarmpy/discovery/` spreads them.
Spec: protocols/membership.md (revision 2), section 5.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from swarmpy.errors import BadMessage, NotAMember, StaleRecord
from swarmpy.identity import Identity, PeerId
from swarmpy.proto.envelope import open_envelope, seal
from swarmpy.proto.membership import (
    CHAIN_MAX,
    CLOCK_SKEW_S,
    MEMBERSHIP_TTL_S,
    REVOCATION_BYTES_MAX,
    EnvelopeBytes,
    KeyHash,
    Membership,
    NetworkId,
    PeerIdText,
    WallSecondsInt,
    check_version,
    key_hash,
    key_hash_of,
    network_id_of,
    open_membership,
    read_peer_id,
    verify_membership,
    voucher_of,
)
from swarmpy.proto.summary import REVOKED_VERSION, record_key, revocation_key
from swarmpy.proto.wire import decode, encode

DOMAIN = "swarmpy-revocation"
PAYLOAD_TYPE = b"r"
VERSION = 1

REVOCATION_TTL_S = MEMBERSHIP_TTL_S + 2 * CLOCK_SKEW_S
"""No record signed before a revocation lasts longer, whatever the clocks."""

REVOCATIONS_CACHED = 256


class RevocationRecord(msgspec.Struct, frozen=True, array_like=True):
    """What the revoking key signs."""

    version: int
    network: KeyHash
    member: PeerIdText
    issued_wall_s: WallSecondsInt
    chain: Annotated[tuple[EnvelopeBytes, ...], Meta(max_length=CHAIN_MAX)]
    """The member's proof, in which the signer stands above it; empty where the network's key
    signed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedRevocation:
    """A verified revocation and the bytes to keep and pass on."""

    network_id: NetworkId
    peer: PeerId
    """Who is revoked."""
    signer: PeerId
    """A member, or the network key's own id."""
    is_by_key: bool
    """Whether the network's key signed it."""
    issued_wall_s: float
    envelope: bytes
    key: bytes
    version: int = REVOKED_VERSION

    @property
    def expires_wall_s(self) -> float:
        return self.issued_wall_s + REVOCATION_TTL_S


def seal_revocation(
    signer: Identity,
    *,
    network_id: NetworkId,
    member: PeerId,
    chain: Sequence[bytes],
    wall_s: float,
) -> bytes:
    """Sign a revocation.

    Args:
        signer: The network's key, or an identity that stands above the member in its chain.
        chain: The member's proof; empty with the network's key.
    """
    record = RevocationRecord(
        version=VERSION,
        network=key_hash_of(network_id),
        member=member,
        issued_wall_s=int(wall_s),
        chain=tuple(chain),
    )
    return seal(signer, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=encode(record))


def open_revocation(sealed: bytes, *, wall_s: float) -> SignedRevocation:
    """Verify a revocation, whoever delivered it.

    Raises:
        BadMessage: Oversized, malformed, or its signer does not stand above the member.
        BadSignature: Forged, in itself or in its chain.
        StaleRecord: It is over, or not yet valid, by this clock.
    """
    signed = _open(sealed)
    age_s = wall_s - signed.issued_wall_s
    if not -CLOCK_SKEW_S <= age_s <= REVOCATION_TTL_S:
        raise StaleRecord(f"revocation is {age_s:.0f} s old, expected up to {REVOCATION_TTL_S:.0f}")
    return signed


@functools.lru_cache(maxsize=REVOCATIONS_CACHED)
def _open(sealed: bytes) -> SignedRevocation:
    if len(sealed) > REVOCATION_BYTES_MAX:
        raise BadMessage(f"revocation of {len(sealed)} bytes exceeds {REVOCATION_BYTES_MAX}")
    envelope = open_envelope(sealed, domain=DOMAIN, payload_type=PAYLOAD_TYPE)
    record = decode(envelope.payload, RevocationRecord)
    check_version(record.version, "revocation")
    member = read_peer_id(record.member)
    network_id = network_id_of(record.network)
    is_by_key = key_hash(envelope.public_key) == record.network
    if not is_by_key:
        _check_authority(record, member=member, signer=envelope.signer)
    return SignedRevocation(
        network_id=network_id,
        peer=member,
        signer=envelope.signer,
        is_by_key=is_by_key,
        issued_wall_s=float(record.issued_wall_s),
        envelope=envelope.signed,
        # The key's word takes the place of all others about the member; a member's stands beside.
        key=record_key(network_id, member)
        if is_by_key
        else revocation_key(network_id, member, envelope.signer),
    )


def voids(revocation: SignedRevocation, membership: Membership) -> bool:
    """Whether a revocation, while it lasts, makes a membership void.

    The key's does where the revoked one stands in the line; a member's where the signer stands
    there too, before it.
    """
    if revocation.network_id != membership.network_id:
        return False
    revoked, signer = voucher_of(revocation.peer), voucher_of(revocation.signer)
    line = membership.line
    last = max((at for at, item in enumerate(line) if item == revoked), default=-1)
    return last >= 0 and (revocation.is_by_key or signer in line[:last])


def _check_authority(record: RevocationRecord, *, member: PeerId, signer: PeerId) -> None:
    """Check that the signer stood above the member when it signed."""
    membership = open_membership(record.chain)
    if key_hash_of(membership.network_id) != record.network or membership.member != member:
        raise BadMessage("a revocation shows the membership of somebody else")
    if voucher_of(signer) not in membership.line[:-1] or signer == member:
        raise BadMessage(f"{signer} did not sign {member} into the network")
    try:
        verify_membership(record.chain, wall_s=float(record.issued_wall_s))
    except NotAMember as error:
        raise BadMessage("a revocation of a membership that was over") from error


def opened_again(sealed: bytes) -> SignedRevocation:
    """Verify a revocation that was kept, whatever the time is: a clock may be wrong at a start.

    Raises:
        BadMessage, BadSignature: As for `open_revocation`.
    """
    return _open(sealed)
