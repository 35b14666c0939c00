"""Announcements: believed from anybody, because they carry all that is needed to check them."""

from __future__ import annotations

from typing import cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, BadSignature, RemoteProtocolError, StaleRecord
from swarmpy.identity import Identity
from swarmpy.proto.announce import (
    ANNOUNCEMENT_BYTES_MAX,
    ANNOUNCEMENT_TTL_S,
    DOMAIN,
    MODELS_MAX,
    PAYLOAD_TYPE,
    RECORDS_BYTES_MAX,
    RECORDS_PER_MESSAGE_MAX,
    SHARDS_MAX,
    AnnouncedModel,
    AnnouncedShard,
    Announcement,
    Message,
    Records,
    open_announcement,
    seal_announcement,
)
from swarmpy.proto.envelope import seal
from swarmpy.proto.membership import (
    CLOCK_SKEW_S,
    MEMBERSHIP_TTL_S,
    REVOCATION_BYTES_MAX,
    issue,
    own_network_id,
)
from swarmpy.proto.swim import STATEMENT_BYTES_MAX
from swarmpy.proto.wire import MESSAGE_BYTES_MAX, decode, encode

NETWORK, ANN, BOB = Identity(b"n" * 32), Identity(b"a" * 32), Identity(b"b" * 32)
NOW_S = 1_700_000_000.0
PROOF = issue(
    NETWORK,
    authority=None,
    network_id=own_network_id(NETWORK),
    network_name="kitchen",
    member=ANN.peer_id,
    can_invite=True,
    serial=1,
    wall_s=NOW_S,
)


def announcement(**changes: object) -> Announcement:
    plain = Announcement(
        peer=ANN.peer_id,
        seq=1,
        issued_wall_s=int(NOW_S),
        membership=PROOF,
        name="ann",
        addresses=("/ip4/192.168.1.20/tcp/4001",),
        speed_bytes_s=1.5e9,
    )
    return msgspec.structs.replace(plain, **changes)


def sign(signer: Identity = ANN, **changes: object) -> bytes:
    payload = encode(announcement(**changes))
    return seal(signer, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=payload)


def held(*layers: tuple[int, int], **changes: object) -> AnnouncedModel:
    """A model of twelve layers, of which some are held."""
    plain = AnnouncedModel(
        model_id="m",
        name="m",
        display_name="m",
        size_bytes=1,
        layer_count=12,
        layers=layers,
    )
    return msgspec.structs.replace(plain, **changes)


def test_an_announcement_reads_back_with_its_signers_membership() -> None:
    sealed = seal_announcement(ANN, announcement())

    signed = open_announcement(sealed, wall_s=NOW_S)

    assert signed.announcement == announcement()
    assert (signed.peer, signed.membership.network_id) == (ANN.peer_id, own_network_id(NETWORK))
    assert signed.envelope == sealed
    assert signed.network_id == own_network_id(NETWORK)
    assert signed.expires_wall_s == NOW_S + ANNOUNCEMENT_TTL_S


def test_models_read_back_with_the_layers_that_are_held() -> None:
    models = (held((0, 1), (2, 12)), held(engine="echo", speed_bytes_s=1e9), held(layers=None))

    signed = open_announcement(sign(models=models), wall_s=NOW_S)

    assert signed.announcement.models == models


def test_two_announcements_that_differ_in_time_alone_have_the_same_contents() -> None:
    first = open_announcement(sign(), wall_s=NOW_S)
    repeated = open_announcement(sign(seq=2, issued_wall_s=int(NOW_S) + 9), wall_s=NOW_S + 9)
    changed = open_announcement(sign(seq=3, engine="echo"), wall_s=NOW_S)

    assert first.contents == repeated.contents != changed.contents
    assert first.key == repeated.key == changed.key
    assert first.version < repeated.version < changed.version


def test_an_announcement_that_is_too_large_leaves_out_the_last_models_first() -> None:
    models = tuple(
        AnnouncedModel(
            model_id=f"{number:064}",
            name="n" * 100,
            display_name="d" * 64,
            size_bytes=2**40,
            layer_count=80,
        )
        for number in range(MODELS_MAX)
    )
    shards = tuple(AnnouncedShard(model_id="m" * 64, start=i, end=i + 1) for i in range(SHARDS_MAX))

    sealed = seal_announcement(ANN, announcement(models=models, shards=shards))

    signed = open_announcement(sealed, wall_s=NOW_S)
    assert len(sealed) <= ANNOUNCEMENT_BYTES_MAX
    assert signed.announcement.shards == shards
    assert 0 < len(signed.announcement.models) < MODELS_MAX
    assert signed.announcement.models == models[: len(signed.announcement.models)]


def test_an_announcement_that_is_too_large_without_models_is_not_signed() -> None:
    wide = "\N{GRINNING FACE}"
    texts = dict.fromkeys(("name", "agent", "boot_id", "machine_id", "engine"), wide * 64)
    addresses = tuple("/ip6/" + "a" * 59 for _ in range(8))
    record = announcement(**texts, build_id=wide * 128, addresses=addresses, membership=PROOF * 8)

    with pytest.raises(BadMessage, match="exceeds 4096"):
        seal_announcement(ANN, record)


def test_an_announcement_beyond_its_bound_is_refused() -> None:
    with pytest.raises(BadMessage, match="exceeds 4096"):
        open_announcement(bytes(ANNOUNCEMENT_BYTES_MAX + 1), wall_s=NOW_S)


def test_an_announcement_signed_by_another_peer_is_refused() -> None:
    with pytest.raises(BadMessage, match="signed by"):
        open_announcement(sign(BOB), wall_s=NOW_S)


def test_an_announcement_with_another_peers_membership_is_refused() -> None:
    with pytest.raises(BadMessage, match="expected"):
        open_announcement(sign(BOB, peer=BOB.peer_id), wall_s=NOW_S)


def test_a_tampered_announcement_is_refused() -> None:
    sealed = sign()

    with pytest.raises(BadSignature):
        open_announcement(sealed[:-1] + bytes([sealed[-1] ^ 1]), wall_s=NOW_S)


@pytest.mark.parametrize(
    "changes",
    [
        {"addresses": ("/dns4/example.org/tcp/1",)},
        {"addresses": ("/ip4/192.168.1.20/tcp/4001/p2p/" + ANN.peer_id,)},
        {"addresses": ("/ip4/224.0.0.1/tcp/1",)},
        {"addresses": ("/ip6/::ffff:7f00:1/tcp/1",)},
        {"addresses": ("nonsense",)},
        {"addresses": ("/ip4/10.0.0.1/tcp/1",) * 9},
        {"name": "a\nb"},
        {"boot_id": "\x07"},
        {"speed_bytes_s": float("nan")},
        {"speed_bytes_s": -1.0},
        {"memory_bytes_free": -1},
        {"seq": 2**53},
        {"shards": (AnnouncedShard(model_id="m", start=3, end=3),)},
        {"models": (held((5, 6), (0, 2)),)},
        {"models": (held((0, 3), (2, 5)),)},
        {"models": (held((0, 3), (3, 5)),)},
        {"models": (held((2, 2)),)},
        {"models": (held((3, 2)),)},
        {"models": (held((10, 13)),)},
        {"models": (held(*((index, index + 1) for index in range(0, 34, 2)), layer_count=40),)},
        {"models": (held(engine="\x1b[2J"),)},
        {"models": (held(speed_bytes_s=-1.0),)},
    ],
)
def test_an_announcement_with_impossible_contents_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        open_announcement(sign(**changes), wall_s=NOW_S)


@pytest.mark.parametrize(
    ("age_s", "is_good"),
    [
        (-CLOCK_SKEW_S - 1, False),
        (-CLOCK_SKEW_S, True),
        (ANNOUNCEMENT_TTL_S, True),
        (ANNOUNCEMENT_TTL_S + 1, False),
    ],
)
def test_an_announcement_is_good_for_an_hour(age_s: float, is_good: bool) -> None:
    if is_good:
        open_announcement(sign(), wall_s=NOW_S + age_s)
    else:
        with pytest.raises(StaleRecord):
            open_announcement(sign(), wall_s=NOW_S + age_s)


def test_an_announcement_of_an_ended_membership_is_stale_and_no_breach() -> None:
    later = NOW_S + MEMBERSHIP_TTL_S + CLOCK_SKEW_S + 1

    with pytest.raises(StaleRecord, match="ended"):
        open_announcement(sign(issued_wall_s=int(later)), wall_s=later)


@pytest.mark.parametrize("envelope_bytes", [120, 255, 256, ANNOUNCEMENT_BYTES_MAX])
def test_the_fullest_message_of_records_fits_a_frame(envelope_bytes: int) -> None:
    """Method: as many records as may be in one message, short ones with the most headers."""
    count = min(RECORDS_PER_MESSAGE_MAX, RECORDS_BYTES_MAX // envelope_bytes)
    message = Records(announcements=(bytes(envelope_bytes),) * count, is_answer=True)

    sent = encode(message)

    assert len(sent) <= MESSAGE_BYTES_MAX
    assert decode(sent, Records) == message


def test_any_one_record_is_less_than_a_message_holds() -> None:
    """Else whoever sends would wait for room for ever."""
    assert max(ANNOUNCEMENT_BYTES_MAX, REVOCATION_BYTES_MAX, STATEMENT_BYTES_MAX) < (
        RECORDS_BYTES_MAX
    )


@given(st.binary(max_size=600))
def test_any_bytes_are_refused_as_a_breach(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_announcement(data, wall_s=NOW_S)


@given(st.binary(max_size=600))
def test_any_payload_of_a_sound_envelope_is_an_announcement_or_a_breach(data: bytes) -> None:
    sealed = seal(ANN, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=data)

    with pytest.raises(RemoteProtocolError):
        open_announcement(sealed, wall_s=NOW_S)


@given(st.binary(max_size=600))
def test_any_bytes_are_a_message_or_a_breach(data: bytes) -> None:
    try:
        decode(data, cast("type[Message]", Message))
    except RemoteProtocolError:
        pass
