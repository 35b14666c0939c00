"""Membership chains: who may vouch for whom, for how long, and what a wrong chain is called."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, BadSignature, NotAMember, RemoteProtocolError
from swarmpy.identity import Identity
from swarmpy.proto.envelope import seal
from swarmpy.proto.membership import (
    CHAIN_MAX,
    CLOCK_SKEW_S,
    DOMAIN,
    MEMBERSHIP_TTL_S,
    PAYLOAD_TYPE,
    Done,
    Hello,
    Membership,
    MembershipMessage,
    MembershipRecord,
    NetworkId,
    Proofs,
    issue,
    key_hash_of,
    matching_networks,
    network_id_of,
    network_name_of,
    network_tag,
    own_network_id,
    verify_membership,
)
from swarmpy.proto.wire import decode, encode

NETWORK = Identity(b"n" * 32)
ANN, BOB, CID = Identity(b"a" * 32), Identity(b"b" * 32), Identity(b"c" * 32)
NOW_S = 1_700_000_000.0
VECTORS = Path(__file__).parents[2] / "protocols" / "vectors" / "membership.json"


def founded(
    member: Identity = ANN, *, can_invite: bool = True, wall_s: float = NOW_S
) -> Membership:
    """A membership signed by the network's key."""
    proof = issue(
        NETWORK,
        authority=None,
        network_id=own_network_id(NETWORK),
        network_name="kitchen",
        member=member.peer_id,
        can_invite=can_invite,
        serial=7,
        wall_s=wall_s,
    )
    return verify_membership(proof, wall_s=wall_s)


def invited(
    issuer: Identity, authority: Membership, member: Identity, *, wall_s: float = NOW_S
) -> tuple[bytes, ...]:
    """A membership signed by a member."""
    return issue(
        issuer,
        authority=authority,
        network_id=authority.network_id,
        network_name="ignored",
        member=member.peer_id,
        can_invite=True,
        serial=8,
        wall_s=wall_s,
    )


def signed(signer: Identity, **changes: object) -> bytes:
    """A record with anything in it."""
    record = MembershipRecord(
        version=1,
        network=key_hash_of(own_network_id(NETWORK)),
        network_name="kitchen",
        member=ANN.peer_id,
        can_invite=True,
        serial=1,
        issued_wall_s=int(NOW_S),
        not_after_wall_s=int(NOW_S + 1000),
    )
    record = msgspec.structs.replace(record, **changes)
    return seal(signer, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=encode(record))


def test_a_record_signed_by_the_network_key_is_a_membership() -> None:
    membership = founded()

    assert membership.network_id == own_network_id(NETWORK)
    assert (membership.network_name, membership.member) == ("kitchen", ANN.peer_id)
    assert membership.not_after_wall_s == NOW_S + MEMBERSHIP_TTL_S


def test_a_member_signs_in_another_and_the_founders_name_for_the_network_stays() -> None:
    membership = verify_membership(invited(ANN, founded(), BOB), wall_s=NOW_S)

    assert (membership.network_name, membership.issuer) == ("kitchen", ANN.peer_id)


def test_a_chain_may_have_just_its_bound() -> None:
    identities = [Identity(bytes([number]) * 32) for number in range(CHAIN_MAX)]
    membership = founded(identities[0])
    for issuer, member in itertools.pairwise(identities):
        membership = verify_membership(invited(issuer, membership, member), wall_s=NOW_S)
    assert len(membership.proof) == CHAIN_MAX

    with pytest.raises(NotAMember, match="8 invitations away"):
        invited(identities[-1], membership, CID)
    longer = (*membership.proof, signed(identities[-1], member=CID.peer_id))
    with pytest.raises(BadMessage, match="9 records"):
        verify_membership(longer, wall_s=NOW_S)


def test_a_member_that_may_not_invite_cannot_sign_others_in() -> None:
    membership = founded(can_invite=False)
    with pytest.raises(NotAMember):
        invited(ANN, membership, BOB)

    forced = (*membership.proof, signed(ANN, member=BOB.peer_id))
    with pytest.raises(BadMessage, match="may not sign"):
        verify_membership(forced, wall_s=NOW_S)


def test_a_record_signed_by_another_than_the_member_before_is_refused() -> None:
    with pytest.raises(BadMessage, match="signed by"):
        verify_membership((*founded().proof, signed(CID, member=BOB.peer_id)), wall_s=NOW_S)


def test_a_first_record_not_signed_by_the_network_key_is_refused() -> None:
    with pytest.raises(BadMessage, match="network's key"):
        verify_membership((signed(ANN),), wall_s=NOW_S)


def test_a_chain_that_crosses_networks_is_refused() -> None:
    other = key_hash_of(own_network_id(BOB))

    with pytest.raises(BadMessage, match="crosses"):
        verify_membership((*founded().proof, signed(ANN, network=other)), wall_s=NOW_S)


def test_another_peers_membership_is_refused() -> None:
    with pytest.raises(BadMessage, match="expected"):
        verify_membership(founded().proof, wall_s=NOW_S, expected_member=BOB.peer_id)


def test_a_tampered_record_is_refused() -> None:
    (record,) = founded().proof

    with pytest.raises(BadSignature):
        verify_membership((record[:-1] + bytes([record[-1] ^ 1]),), wall_s=NOW_S)


@pytest.mark.parametrize("proof", [(), (b"x" * 700,), (b"",)])
def test_a_proof_of_the_wrong_size_is_refused(proof: tuple[bytes, ...]) -> None:
    with pytest.raises(BadMessage):
        verify_membership(proof, wall_s=NOW_S)


def test_a_record_of_another_version_is_refused() -> None:
    with pytest.raises(BadMessage, match="version 2"):
        verify_membership((signed(NETWORK, version=2),), wall_s=NOW_S)


def test_a_name_that_would_move_the_cursor_is_refused() -> None:
    with pytest.raises(BadMessage, match="cannot be printed"):
        verify_membership((signed(NETWORK, network_name="a\x1b[2Jb"),), wall_s=NOW_S)


@pytest.mark.parametrize("life_s", [0, int(MEMBERSHIP_TTL_S) + 1])
def test_a_record_of_impossible_life_is_refused(life_s: int) -> None:
    record = signed(NETWORK, not_after_wall_s=int(NOW_S) + life_s)

    with pytest.raises(BadMessage, match="lives"):
        verify_membership((record,), wall_s=NOW_S)


@pytest.mark.parametrize(
    ("wall_s", "is_valid"),
    [
        (NOW_S - CLOCK_SKEW_S - 1, False),
        (NOW_S - CLOCK_SKEW_S, True),
        (NOW_S + MEMBERSHIP_TTL_S + CLOCK_SKEW_S, True),
        (NOW_S + MEMBERSHIP_TTL_S + CLOCK_SKEW_S + 1, False),
    ],
)
def test_times_allow_for_the_skew_and_no_more(wall_s: float, is_valid: bool) -> None:
    proof = founded().proof

    if is_valid:
        verify_membership(proof, wall_s=wall_s)
    else:
        with pytest.raises(NotAMember, match="clocks may differ by 300 s"):
            verify_membership(proof, wall_s=wall_s)


def test_authority_does_not_outlive_its_source() -> None:
    """Goal: a member that was let go cannot sign others in by dating records back."""
    early, late = founded(), NOW_S + 20 * 86400
    proof = invited(ANN, early, BOB, wall_s=late)
    membership = verify_membership(proof, wall_s=late)
    assert membership.not_after_wall_s == early.not_after_wall_s

    dated_back = (*early.proof, signed(ANN, member=BOB.peer_id, not_after_wall_s=int(NOW_S + 2e6)))
    with pytest.raises(NotAMember, match="ended"):
        verify_membership(dated_back, wall_s=early.not_after_wall_s + CLOCK_SKEW_S + 1)


def test_the_name_of_a_network_can_be_read_from_an_ended_proof() -> None:
    assert network_name_of(founded(wall_s=0.0).proof) == "kitchen"


def test_a_member_whose_own_record_is_over_signs_nothing() -> None:
    membership = founded()

    with pytest.raises(NotAMember, match="has ended"):
        invited(ANN, membership, BOB, wall_s=membership.not_after_wall_s + 1)


# Network ids and tags ------------------------------------------------------------------


def test_a_network_id_is_text_that_reads_back() -> None:
    network_id = own_network_id(NETWORK)

    assert network_id.startswith("n")
    assert len(network_id) == 33
    assert network_id_of(key_hash_of(network_id)) == network_id


@pytest.mark.parametrize(
    "text", ["", "n", "x" * 33, "n" + "A" * 32, "n" + "a" * 31, "n" + "0" * 32]
)
def test_other_text_is_no_network_id(text: str) -> None:
    with pytest.raises(BadMessage):
        key_hash_of(NetworkId(text))


def test_tags_name_a_network_on_one_connection_and_in_one_role_only() -> None:
    network_id = own_network_id(NETWORK)
    tag = network_tag(network_id, channel_binding=b"1" * 32, role="initiator")
    known = [own_network_id(ANN), network_id]

    assert matching_networks([b"x" * 32, tag], known, channel_binding=b"1" * 32) == [network_id]
    assert matching_networks([tag], known, channel_binding=b"2" * 32) == []
    reflected = network_tag(network_id, channel_binding=b"1" * 32, role="responder")
    assert matching_networks([reflected], known, channel_binding=b"1" * 32) == []


# Bytes ----------------------------------------------------------------------------------


def test_vectors_verify_and_encode_as_written() -> None:
    vectors = json.loads(VECTORS.read_text())
    keys = {name: Identity(bytes.fromhex(seed)) for name, seed in vectors["seeds"].items()}

    for case in vectors["memberships"]:
        proof = tuple(bytes.fromhex(record) for record in case["proof"])
        membership = verify_membership(proof, wall_s=case["wall_s"])
        assert membership.network_id == own_network_id(keys["network"]) == case["network_id"]
        assert membership.member == keys[case["member"]].peer_id
        assert membership.can_invite is case["can_invite"]
        assert membership.not_after_wall_s == case["not_after_wall_s"]
    for case in vectors["refused"]:
        proof = tuple(bytes.fromhex(record) for record in case["proof"])
        with pytest.raises((RemoteProtocolError, NotAMember)):
            verify_membership(proof, wall_s=case["wall_s"])
    tag = vectors["tag"]
    assert (
        network_tag(
            NetworkId(tag["network_id"]),
            channel_binding=bytes.fromhex(tag["channel_binding"]),
            role=tag["role"],
        ).hex()
        == tag["tag"]
    )


def test_issuing_again_gives_the_vectors_bytes() -> None:
    """Ed25519 and the encoding are deterministic: another implementation must get these bytes."""
    vectors = json.loads(VECTORS.read_text())

    assert [record.hex() for record in founded().proof] == vectors["memberships"][0]["proof"]
    chain = invited(ANN, founded(), BOB)
    assert [record.hex() for record in chain] == vectors["memberships"][1]["proof"]


@pytest.mark.parametrize(
    "message", [Hello(tags=(b"t" * 32,)), Proofs(proofs=()), Done(refusal="no")]
)
def test_messages_read_back(message: msgspec.Struct) -> None:
    assert decode(encode(message), MembershipMessage) == message  # type: ignore[arg-type]


@given(st.binary(max_size=1024))
def test_any_bytes_are_a_message_or_a_breach(data: bytes) -> None:
    try:
        decode(data, MembershipMessage)  # type: ignore[arg-type]
    except RemoteProtocolError:
        pass


@given(st.lists(st.binary(max_size=700), max_size=10))
def test_any_records_are_refused_as_a_breach(proof: list[bytes]) -> None:
    with pytest.raises(RemoteProtocolError):
        verify_membership(proof, wall_s=NOW_S)
