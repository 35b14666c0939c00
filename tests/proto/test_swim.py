"""Statements that a member is gone: signed, bounded, and over after an hour."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, BadSignature, RemoteProtocolError, StaleRecord
from swarmpy.identity import Identity
from swarmpy.proto.envelope import seal
from swarmpy.proto.membership import CLOCK_SKEW_S, own_network_id
from swarmpy.proto.summary import gone_version, record_key
from swarmpy.proto.swim import (
    DOMAIN,
    PAYLOAD_TYPE,
    STATEMENT_BYTES_MAX,
    STATEMENT_TTL_S,
    Statement,
    is_plausible,
    open_statement,
    seal_statement,
)
from swarmpy.proto.wire import encode

NETWORK = own_network_id(Identity(b"n" * 32))
ANN, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
NOW_S = 1_700_000_000.0


def said(signer: Identity = ANN, *, seq: int = 7) -> bytes:
    return seal_statement(
        signer, network_id=NETWORK, accused=BOB.peer_id, seq=seq, wall_s=NOW_S + 0.9
    )


def test_a_statement_reads_back() -> None:
    signed = open_statement(said(), wall_s=NOW_S)

    assert (signed.network_id, signed.peer, signed.signer) == (NETWORK, BOB.peer_id, ANN.peer_id)
    assert (signed.seq, signed.version) == (7, gone_version(7))
    assert signed.key == record_key(NETWORK, BOB.peer_id)
    assert signed.expires_wall_s == NOW_S + STATEMENT_TTL_S
    assert signed.envelope == said()


def test_only_a_member_itself_says_farewell() -> None:
    assert open_statement(said(BOB), wall_s=NOW_S).is_farewell
    assert not open_statement(said(ANN), wall_s=NOW_S).is_farewell


def test_the_largest_statement_fits() -> None:
    assert len(said(seq=2**53 - 1)) <= STATEMENT_BYTES_MAX


@pytest.mark.parametrize(
    ("age_s", "is_good"),
    [
        (-CLOCK_SKEW_S - 1, False),
        (-CLOCK_SKEW_S, True),
        (STATEMENT_TTL_S, True),
        (STATEMENT_TTL_S + 1, False),
    ],
)
def test_a_statement_is_good_for_an_hour(age_s: float, is_good: bool) -> None:
    if is_good:
        open_statement(said(), wall_s=NOW_S + age_s)
    else:
        with pytest.raises(StaleRecord):
            open_statement(said(), wall_s=NOW_S + age_s)


def test_a_tampered_statement_is_refused() -> None:
    sealed = said()

    with pytest.raises(BadSignature):
        open_statement(sealed[:-1] + bytes([sealed[-1] ^ 1]), wall_s=NOW_S)


def test_a_statement_beyond_its_bound_is_refused() -> None:
    with pytest.raises(BadMessage, match="exceeds 320"):
        open_statement(bytes(STATEMENT_BYTES_MAX + 1), wall_s=NOW_S)


@pytest.mark.parametrize("changes", [{"version": 2}, {"accused": "nobody"}, {"seq": 2**53}])
def test_a_statement_with_impossible_contents_is_refused(changes: dict[str, object]) -> None:
    fields: dict[str, object] = {
        "version": 1,
        "network": b"n" * 20,
        "accused": BOB.peer_id,
        "seq": 1,
        "issued_wall_s": int(NOW_S),
    }
    payload = encode(Statement(**(fields | changes)))  # type: ignore[arg-type]

    with pytest.raises(RemoteProtocolError):
        open_statement(
            seal(ANN, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=payload), wall_s=NOW_S
        )


def test_no_liar_can_drive_a_member_to_the_end_of_its_numbers() -> None:
    """A number is one the member announced, or one its clock can have reached."""
    latest = int((NOW_S + CLOCK_SKEW_S) * 1000)

    assert is_plausible(latest, known_seq=0, wall_s=NOW_S)
    assert not is_plausible(latest + 1, known_seq=0, wall_s=NOW_S)
    assert is_plausible(latest + 1, known_seq=latest + 1, wall_s=NOW_S)


@given(st.binary(max_size=400))
def test_any_payload_of_a_sound_envelope_is_a_statement_or_a_breach(data: bytes) -> None:
    sealed = seal(ANN, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=data)

    with pytest.raises(RemoteProtocolError):
        open_statement(sealed, wall_s=NOW_S)
