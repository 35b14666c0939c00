"""Invite codes and the four words."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, InviteMalformed, RemoteProtocolError
from swarmpy.identity import Identity
from swarmpy.proto import multiaddr
from swarmpy.proto.envelope import seal
from swarmpy.proto.invite import (
    CODE_CHARACTERS_MAX,
    DOMAIN,
    FIRST_SYLLABLES,
    LAST_SYLLABLES,
    PAYLOAD_TYPE,
    SCHEME,
    Accepted,
    Invite,
    InviteMessage,
    Redeem,
    Refused,
    decode_invite,
    encode_invite,
    open_invite,
    word,
    words_of,
)
from swarmpy.proto.membership import key_hash_of, own_network_id
from swarmpy.proto.wire import decode, encode

NETWORK, ANN = Identity(b"n" * 32), Identity(b"a" * 32)
ADDRESSES = ("/ip4/192.168.1.20/tcp/41234", "/ip6/2001:db8::7/tcp/41234")
VECTORS = Path(__file__).parents[2] / "protocols" / "vectors" / "invite.json"


def make_code(**changes: object) -> str:
    fields: dict[str, object] = {
        "network_id": own_network_id(NETWORK),
        "network_name": "kitchen's network",
        "issuer_name": "kitchen",
        "addresses": ADDRESSES,
        "token": b"t" * 16,
        "expires_wall_s": 1_700_000_000,
        "can_invite": True,
        "uses": 1,
    }
    return encode_invite(ANN, **(fields | changes))  # type: ignore[arg-type]


CODE = make_code()


def sign(**changes: object) -> bytes:
    """An invite with anything in it."""
    invite = Invite(
        version=1,
        network=key_hash_of(own_network_id(NETWORK)),
        network_name="kitchen",
        issuer_name="ann",
        addresses=(multiaddr.to_bytes(ADDRESSES[0]),),
        token=b"t" * 16,
        expires_wall_s=1_700_000_000,
        can_invite=True,
        uses=1,
    )
    payload = encode(msgspec.structs.replace(invite, **changes))
    return seal(ANN, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=payload)


def test_a_code_reads_back() -> None:
    signed = decode_invite(CODE)

    assert (signed.issuer, signed.network_id) == (ANN.peer_id, own_network_id(NETWORK))
    assert signed.addresses == ADDRESSES
    assert signed.invite.token == b"t" * 16


def test_a_code_is_short_enough_for_a_chat_and_a_qr_code() -> None:
    """Two addresses and ordinary names: a QR code of version 12 holds 419 such characters."""
    assert len(CODE) < 400
    assert set(CODE.removeprefix(SCHEME)) <= set("abcdefghijklmnopqrstuvwxyz234567")


def test_white_space_and_capitals_do_not_matter() -> None:
    broken = f"\n {CODE[:7]} {CODE[7:50].upper()}\r\n\t{CODE[50:]}\u00a0"

    assert decode_invite(broken) == decode_invite(CODE)


@given(st.integers(0, len(CODE) - 1), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
def test_any_changed_character_is_noticed(position: int, character: str) -> None:
    changed = CODE[:position] + character + CODE[position + 1 :]

    if changed != CODE:
        with pytest.raises(InviteMalformed):
            decode_invite(changed)


@given(st.integers(0, len(CODE) - 1))
def test_any_truncated_code_is_malformed(count: int) -> None:
    with pytest.raises(InviteMalformed):
        decode_invite(CODE[:count])


def test_a_code_with_something_behind_it_is_malformed() -> None:
    for more in ("a", "aaaaaaaa", CODE.removeprefix(SCHEME), "!", CODE):
        with pytest.raises(InviteMalformed):
            decode_invite(CODE + more)


def test_a_code_beyond_the_bound_is_not_looked_at() -> None:
    with pytest.raises(InviteMalformed, match="exceeds"):
        decode_invite(SCHEME + "a" * CODE_CHARACTERS_MAX)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"network_name": "two\nlines"},
        {"issuer_name": "right\u202eleft"},
        {"addresses": (multiaddr.to_bytes("/dns4/example.org/tcp/1"),)},
        {"addresses": (multiaddr.to_bytes("/ip4/0.0.0.0/tcp/1"),)},
        {"addresses": (multiaddr.to_bytes("/ip4/10.0.0.1/tcp/0"),)},
        {"addresses": (b"",)},
        {"token": b"short"},
        {"uses": 0},
        {"uses": 101},
    ],
)
def test_a_signed_invite_with_impossible_contents_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BadMessage):
        open_invite(sign(**changes))


def test_an_oversized_invite_is_refused() -> None:
    with pytest.raises(BadMessage, match="exceeds"):
        open_invite(bytes(1025))


@given(st.text(max_size=400))
def test_any_text_is_no_code(text: str) -> None:
    for code in (text, SCHEME + text):
        with pytest.raises(InviteMalformed):
            decode_invite(code)


@given(st.binary(max_size=1200))
def test_any_bytes_are_no_invite(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_invite(data)


@given(st.binary(max_size=1024))
def test_any_bytes_are_a_message_or_a_breach(data: bytes) -> None:
    try:
        decode(data, InviteMessage)  # type: ignore[arg-type]
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize(
    "message",
    [Redeem(invite=b"i"), Accepted(proof=(b"r",)), Refused(reason="used", wall_s=1_700_000_000)],
)
def test_messages_read_back(message: msgspec.Struct) -> None:
    assert decode(encode(message), InviteMessage) == message  # type: ignore[arg-type]


def test_a_time_that_no_calendar_has_is_refused() -> None:
    """Both sides write times as dates."""
    with pytest.raises(BadMessage):
        decode(encode(Refused(reason="expired", wall_s=253_402_300_800)), InviteMessage)  # type: ignore[arg-type]


# Words ----------------------------------------------------------------------------------


def test_all_2048_words_are_different_and_short() -> None:
    words = {word(index) for index in range(2048)}

    assert len(words) == 2048 == len(FIRST_SYLLABLES) * len(LAST_SYLLABLES)
    assert max(len(item) for item in words) <= 5


def test_two_networks_have_different_words() -> None:
    assert words_of(own_network_id(NETWORK)) != words_of(own_network_id(ANN))


def test_vectors_decode_and_encode_as_written() -> None:
    vectors = json.loads(VECTORS.read_text())

    for case in vectors["codes"]:
        signed = decode_invite(case["code"])
        assert signed.envelope.hex() == case["envelope"]
        assert list(signed.addresses) == case["addresses"]
        assert (signed.issuer, signed.network_id) == (case["issuer"], case["network_id"])
        assert list(words_of(signed.network_id)) == case["words"]
    assert vectors["codes"][0]["code"] == CODE
    for code in vectors["malformed"]:
        with pytest.raises(InviteMalformed):
            decode_invite(code)
