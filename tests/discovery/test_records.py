"""The table of announcements."""

from __future__ import annotations

import pytest

from swarmpy.abc import NowSeconds
from swarmpy.config import RECORDS_MAX
from swarmpy.discovery import records
from swarmpy.discovery.records import RecordTable
from swarmpy.identity import Identity
from swarmpy.proto.announce import Announcement, SignedAnnouncement
from swarmpy.proto.membership import Membership, NetworkId

HOME, WORK = NetworkId("nhome"), NetworkId("nwork")
PEERS = [Identity(number.to_bytes(32, "big")).peer_id for number in range(3)]


def announced(peer: int, seq: int, network: NetworkId = HOME) -> SignedAnnouncement:
    """An announcement as it is after its signatures were checked."""
    membership = Membership(
        network_id=network,
        network_name="",
        member=PEERS[peer],
        can_invite=True,
        not_after_wall_s=0.0,
        issuer=PEERS[0],
        proof=(),
    )
    announcement = Announcement(
        peer=PEERS[peer], seq=seq, issued_wall_s=0, membership=(b"",), name="", addresses=()
    )
    return SignedAnnouncement(
        announcement=announcement,
        membership=membership,
        peer=PEERS[peer],
        envelope=f"{peer} {seq} {network}".encode(),
    )


def add(table: RecordTable, signed: SignedAnnouncement, now_s: float = 0.0) -> bool:
    return table.add(signed, age_s=0.0, now_s=NowSeconds(now_s))


def test_only_what_is_newer_is_stored() -> None:
    table = RecordTable()

    assert [add(table, announced(1, seq)) for seq in (5, 4, 5, 6)] == [True, False, False, True]
    assert len(table) == 1


def test_only_what_is_stored_is_recognised() -> None:
    table = RecordTable()
    add(table, announced(1, 5))
    add(table, announced(1, 6))

    assert not table.holds(announced(1, 5).envelope)
    assert table.holds(announced(1, 6).envelope)


def test_a_member_of_two_networks_has_a_record_in_each_and_the_newest_counts() -> None:
    table = RecordTable()
    add(table, announced(1, 5, HOME))
    add(table, announced(1, 6, WORK))
    add(table, announced(2, 1, WORK))

    assert [record.seq for record in table.of_networks({HOME})] == [5]
    assert {record.key for record in table.of_networks({WORK})} == {
        (PEERS[1], WORK),
        (PEERS[2], WORK),
    }
    newest = table.newest(PEERS[1])
    assert newest is not None
    assert newest.seq == 6


def test_a_record_is_over_an_hour_after_it_was_signed_not_after_it_was_heard() -> None:
    table = RecordTable()
    table.add(announced(1, 1), age_s=3000.0, now_s=NowSeconds(0.0))
    add(table, announced(2, 1))

    table.expire(now_s=NowSeconds(600.0))

    assert table.peers() == [PEERS[2]]
    assert len(table) == 1


def test_a_full_table_takes_news_of_those_in_it_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "RECORDS_MAX", 2)
    assert RECORDS_MAX > 2
    table = RecordTable()

    taken = [add(table, announced(peer, seq)) for peer, seq in ((0, 1), (1, 1), (2, 1), (0, 2))]

    assert taken == [True, True, False, True]
