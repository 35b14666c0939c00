"""Revocations: who may end whose membership, and that nobody else can."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import (
    BadMessage,
    BadSignature,
    NotAMember,
    RemoteProtocolError,
    StaleRecord,
)
from swarmpy.identity import Identity
from swarmpy.proto.envelope import seal
from swarmpy.proto.membership import (
    CHAIN_MAX,
    CLOCK_SKEW_S,
    MEMBERSHIP_TTL_S,
    RECORD_ENVELOPE_BYTES_MAX,
    REVOCATION_BYTES_MAX,
    VOUCHERS_MAX,
    Membership,
    issue,
    own_network_id,
    verify_membership,
)
from swarmpy.proto.revocation import (
    DOMAIN,
    PAYLOAD_TYPE,
    REVOCATION_TTL_S,
    open_revocation,
    seal_revocation,
    voids,
)
from swarmpy.proto.summary import REVOKED_VERSION, record_key

KEY = Identity(b"n" * 32)
NETWORK = own_network_id(KEY)
ANN, BOB, CID, EVE = (Identity(letter * 32) for letter in (b"a", b"b", b"c", b"e"))
NOW_S = 1_700_000_000.0


def signed_in(
    member: Identity, by: Identity = KEY, authority: Membership | None = None, key: Identity = KEY
) -> Membership:
    proof = issue(
        by,
        authority=authority,
        network_id=own_network_id(key),
        network_name="kitchen" if authority is None else "",
        member=member.peer_id,
        can_invite=True,
        serial=1,
        wall_s=NOW_S,
    )
    return verify_membership(proof, wall_s=NOW_S)


def renewed(membership: Membership, by: Identity, authority: Membership) -> Membership:
    proof = issue(
        by,
        authority=authority,
        network_id=NETWORK,
        network_name="",
        member=membership.member,
        can_invite=True,
        serial=2,
        wall_s=NOW_S,
        replaced=membership,
    )
    return verify_membership(proof, wall_s=NOW_S)


A = signed_in(ANN)
B = signed_in(BOB, ANN, A)
C = signed_in(CID, BOB, B)


def revoked(
    signer: Identity, member: Identity, chain: tuple[bytes, ...], *, wall_s: float = NOW_S
) -> bytes:
    return seal_revocation(
        signer, network_id=NETWORK, member=member.peer_id, chain=chain, wall_s=wall_s
    )


def test_the_networks_key_revokes_anybody_without_a_chain() -> None:
    sealed = revoked(KEY, CID, ())

    signed = open_revocation(sealed, wall_s=NOW_S)

    assert (signed.network_id, signed.peer, signed.signer) == (NETWORK, CID.peer_id, KEY.peer_id)
    assert signed.key == record_key(NETWORK, CID.peer_id)
    assert signed.version == REVOKED_VERSION
    assert signed.envelope == sealed
    assert signed.is_by_key
    assert signed.expires_wall_s == NOW_S + REVOCATION_TTL_S


@pytest.mark.parametrize("signer", [ANN, BOB])
def test_whoever_stands_above_a_member_in_its_chain_revokes_it(signer: Identity) -> None:
    assert open_revocation(revoked(signer, CID, C.proof), wall_s=NOW_S).signer == signer.peer_id


@pytest.mark.parametrize(
    ("signer", "member", "chain"),
    [
        (EVE, CID, C.proof),  # stands in no chain
        (CID, CID, C.proof),  # itself
        (CID, BOB, B.proof),  # below
        (ANN, CID, B.proof),  # another's chain
        (ANN, CID, ()),  # none
        (EVE, BOB, signed_in(BOB, EVE, signed_in(EVE, EVE, None, EVE), EVE).proof),  # elsewhere
    ],
)
def test_nobody_else_revokes(signer: Identity, member: Identity, chain: tuple[bytes, ...]) -> None:
    with pytest.raises(BadMessage):
        open_revocation(revoked(signer, member, chain), wall_s=NOW_S)


def test_a_revocation_reaches_no_other_network() -> None:
    other = Identity(b"o" * 32)
    elsewhere = signed_in(BOB, key=other, by=other)

    signed = open_revocation(revoked(KEY, BOB, ()), wall_s=NOW_S)

    assert voids(signed, B)
    assert not voids(signed, elsewhere)


def test_whoever_renewed_a_member_may_revoke_it_and_who_had_invited_it_still_may() -> None:
    """Method: ann's guest bob let cid in; eve, another guest of ann's, renews him."""
    eve = signed_in(EVE, ANN, A)
    again = renewed(C, EVE, eve)

    for signer in (ANN, BOB, EVE):
        assert voids(open_revocation(revoked(signer, CID, again.proof), wall_s=NOW_S), again)
    assert not voids(open_revocation(revoked(EVE, CID, again.proof), wall_s=NOW_S), C)


def test_a_member_that_too_many_have_vouched_for_is_renewed_by_those_alone() -> None:
    """Method: cid is renewed by one guest of ann's after another."""
    membership = C
    guests = [Identity(bytes([number + 1]) * 32) for number in range(VOUCHERS_MAX + 1)]
    for guest in guests[: VOUCHERS_MAX - 1]:  # bob is one of them
        membership = renewed(membership, guest, signed_in(guest, ANN, A))

    membership = renewed(membership, guests[-2], signed_in(guests[-2], ANN, A))
    one_more = signed_in(guests[-1], ANN, A)
    with pytest.raises(NotAMember, match="more than 16"):
        renewed(membership, guests[-1], one_more)

    first = renewed(membership, guests[0], signed_in(guests[0], ANN, A))
    assert set(first.line) == set(membership.line)
    assert max(len(record) for record in first.proof) <= RECORD_ENVELOPE_BYTES_MAX


def test_a_former_member_revokes_nobody() -> None:
    """Method: ann revokes bob after her own membership, and so his, has ended."""
    later = NOW_S + MEMBERSHIP_TTL_S + CLOCK_SKEW_S + 1

    with pytest.raises(BadMessage, match="was over"):
        open_revocation(revoked(ANN, BOB, B.proof, wall_s=later), wall_s=later)


@pytest.mark.parametrize(
    ("age_s", "is_good"),
    [
        (-CLOCK_SKEW_S - 1, False),
        (-CLOCK_SKEW_S, True),
        (REVOCATION_TTL_S, True),
        (REVOCATION_TTL_S + 1, False),
    ],
)
def test_a_revocation_lasts_as_long_as_what_was_signed_before_it(
    age_s: float, is_good: bool
) -> None:
    assert REVOCATION_TTL_S >= MEMBERSHIP_TTL_S + 2 * CLOCK_SKEW_S
    if is_good:
        open_revocation(revoked(KEY, BOB, ()), wall_s=NOW_S + age_s)
    else:
        with pytest.raises(StaleRecord):
            open_revocation(revoked(KEY, BOB, ()), wall_s=NOW_S + age_s)


def test_the_longest_chain_fits() -> None:
    membership = A
    signer = ANN
    for number in range(CHAIN_MAX - 1):
        member = Identity(bytes([number + 1]) * 32)
        membership, signer = signed_in(member, signer, membership), member

    sealed = revoked(ANN, signer, membership.proof)

    assert len(membership.proof) == CHAIN_MAX
    assert len(sealed) <= REVOCATION_BYTES_MAX
    assert open_revocation(sealed, wall_s=NOW_S).peer == signer.peer_id


def test_a_revocation_beyond_its_bound_is_refused() -> None:
    with pytest.raises(BadMessage, match="exceeds 6144"):
        open_revocation(bytes(REVOCATION_BYTES_MAX + 1), wall_s=NOW_S)


def test_a_tampered_revocation_is_refused() -> None:
    sealed = revoked(KEY, BOB, ())

    with pytest.raises(BadSignature):
        open_revocation(sealed[:-1] + bytes([sealed[-1] ^ 1]), wall_s=NOW_S)


@given(st.binary(max_size=400))
def test_any_payload_of_a_sound_envelope_is_a_revocation_or_a_breach(data: bytes) -> None:
    sealed = seal(KEY, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=data)

    with pytest.raises(RemoteProtocolError):
        open_revocation(sealed, wall_s=NOW_S)
