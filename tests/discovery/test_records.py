"""The table of records."""

from __future__ import annotations

import pytest

from swarmpy.config import RECORDS_MAX
from swarmpy.discovery import records
from swarmpy.discovery.records import SWEEP_INTERVAL_S, Record, RecordTable
from swarmpy.identity import Identity
from swarmpy.proto.announce import ANNOUNCEMENT_TTL_S, Announcement, SignedAnnouncement
from swarmpy.proto.membership import Membership, NetworkId, voucher_of
from swarmpy.proto.revocation import SignedRevocation
from swarmpy.proto.summary import alive_version, gone_version, record_key
from swarmpy.proto.swim import SignedStatement

HOME, WORK = NetworkId("nhome"), NetworkId("nwork")
PEERS = [Identity(number.to_bytes(32, "big")).peer_id for number in range(3)]


def announced(
    peer: int, seq: int, network: NetworkId = HOME, *, wall_s: int = 0
) -> SignedAnnouncement:
    """An announcement as it is after its signatures were checked."""
    membership = Membership(
        network_id=network,
        network_name="",
        member=PEERS[peer],
        can_invite=True,
        not_after_wall_s=0.0,
        not_before_wall_s=0.0,
        issuer=PEERS[0],
        members=(PEERS[peer],),
        line=(voucher_of(PEERS[peer]),),
        proof=(),
    )
    announcement = Announcement(
        peer=PEERS[peer], seq=seq, issued_wall_s=wall_s, membership=(b"",), name="", addresses=()
    )
    return SignedAnnouncement(
        announcement=announcement,
        membership=membership,
        peer=PEERS[peer],
        envelope=b"",
        key=record_key(network, PEERS[peer]),
        version=alive_version(seq),
        contents=b"",
    )


def stated(peer: int, seq: int, network: NetworkId = HOME) -> SignedStatement:
    return SignedStatement(
        network_id=network,
        peer=PEERS[peer],
        signer=PEERS[0],
        seq=seq,
        issued_wall_s=0.0,
        envelope=b"",
        key=record_key(network, PEERS[peer]),
        version=gone_version(seq),
    )


def revoked(peer: int) -> SignedRevocation:
    key = record_key(HOME, PEERS[peer])
    return SignedRevocation(
        network_id=HOME,
        peer=PEERS[peer],
        signer=PEERS[0],
        is_by_key=True,
        issued_wall_s=0.0,
        envelope=b"",
        key=key,
    )


def add_all(table: RecordTable, *items: Record) -> list[bool]:
    return [table.add(item) for item in items]


def test_only_what_is_newer_is_stored() -> None:
    table = RecordTable()

    taken = add_all(table, *(announced(1, seq) for seq in (5, 4, 5, 6)))

    assert taken == [True, False, False, True]
    assert (len(table), table.announcement_count) == (1, 1)


def test_a_member_is_gone_until_it_announces_itself_anew() -> None:
    table = RecordTable()
    key = record_key(HOME, PEERS[1])

    taken = add_all(table, announced(1, 5), stated(1, 5), announced(1, 5), stated(1, 4))
    assert taken == [True, True, False, False]
    assert table.newest(PEERS[1], [HOME], wall_s=0.0) is None
    assert [record.peer for record in table.gone()] == [PEERS[1]]

    assert table.add(announced(1, 6))
    assert table.version(key) == alive_version(6)
    assert table.announcement_count == 1


def test_nothing_takes_the_place_of_a_revocation() -> None:
    table = RecordTable()

    taken = add_all(table, announced(1, 5), revoked(1), announced(1, 2**53 - 1), stated(1, 9))

    assert taken == [True, True, False, False]


def test_a_member_of_two_networks_has_a_record_in_each_and_the_newest_counts() -> None:
    table = RecordTable()
    add_all(table, announced(1, 5, HOME), announced(1, 6, WORK))

    both = table.newest(PEERS[1], [HOME, WORK], wall_s=0.0)
    home = table.newest(PEERS[1], [HOME], wall_s=0.0)

    assert both is not None
    assert home is not None
    assert (both.seq, home.seq) == (6, 5)


def test_a_record_is_over_an_hour_after_it_was_signed_not_after_it_was_heard() -> None:
    table = RecordTable()
    add_all(table, announced(1, 1), announced(2, 1, wall_s=3000))

    assert table.newest(PEERS[1], [HOME], wall_s=ANNOUNCEMENT_TTL_S) is None
    (over,) = table.sweep(wall_s=ANNOUNCEMENT_TTL_S, now_s=0.0)

    assert over.peer == PEERS[1]
    assert [record.peer for record in table.announced()] == [PEERS[2]]


def test_a_sweep_looks_at_all_records_once_in_a_while_only() -> None:
    table = RecordTable()
    add_all(table, announced(1, 1), announced(2, 1, wall_s=10))

    first = table.sweep(wall_s=ANNOUNCEMENT_TTL_S, now_s=0.0)
    soon = table.sweep(wall_s=ANNOUNCEMENT_TTL_S + 11, now_s=11.0)
    later = table.sweep(wall_s=ANNOUNCEMENT_TTL_S + 11, now_s=SWEEP_INTERVAL_S)

    assert [len(first), len(soon), len(later)] == [1, 0, 1]


def test_the_summary_is_that_of_the_records_there_are() -> None:
    """Method: one table was told everything at once, the other in steps and of more networks."""
    one, other = RecordTable(), RecordTable()
    add_all(one, announced(1, 6), announced(2, 3))
    add_all(other, announced(1, 5), announced(2, 3), announced(0, 1), announced(1, 1, WORK))
    add_all(other, announced(1, 6))

    assert one.summary(HOME).root != other.summary(HOME).root
    gone = other.get(record_key(HOME, PEERS[0]))
    assert gone is not None
    other.remove(gone)
    assert one.summary(HOME).root == other.summary(HOME).root
    assert one.entries(HOME, [""]) == other.entries(HOME, [""])


def is_under(prefix: str) -> bool:
    return any(record_key(HOME, peer).hex().startswith(prefix) for peer in PEERS)


def test_entries_are_found_by_their_prefix() -> None:
    table = RecordTable()
    add_all(table, *(announced(peer, 1) for peer in range(3)), announced(0, 1, WORK))
    key = record_key(HOME, PEERS[0])

    other = next(prefix for prefix in ("00", "ff", "7f", "80") if not is_under(prefix))

    found = table.entries(HOME, [key.hex()[:2], other])

    assert (key, alive_version(1)) in found[key.hex()[:2]]
    assert found[other] == []


def test_who_never_heard_of_a_member_and_who_knows_it_is_gone_have_equal_tables() -> None:
    """Else a newcomer would be told of the dead of an hour in each comparison."""
    one, other = RecordTable(), RecordTable()
    add_all(one, announced(1, 6))
    add_all(other, announced(1, 6), announced(2, 3))

    assert one.summary(HOME).root != other.summary(HOME).root
    assert other.add(stated(2, 3))
    assert one.summary(HOME).root == other.summary(HOME).root


def test_a_clock_that_was_ahead_does_not_stop_sweeps() -> None:
    table = RecordTable()
    year_s, day_s = 365 * 86400.0, 86400.0
    add_all(table, announced(1, 1))
    assert len(table.sweep(wall_s=year_s, now_s=0.0)) == 1

    add_all(table, announced(2, 1))

    assert len(table.sweep(wall_s=day_s, now_s=SWEEP_INTERVAL_S)) == 1


def test_statements_leave_revocations_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "TOMBSTONES_MAX", 1)
    table = RecordTable()

    assert add_all(table, stated(0, 1), stated(1, 1), revoked(2)) == [True, False, True]


def test_a_crowded_network_leaves_another_and_this_node_their_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "RECORDS_MAX", 2)
    table = RecordTable(PEERS[0])

    taken = add_all(table, announced(1, 1), announced(2, 1), announced(0, 1))
    taken += add_all(table, announced(0, 1, WORK), announced(1, 1, WORK), announced(2, 1, WORK))

    assert taken == [True, True, True, True, False, False]
    table.drop_networks([WORK])
    assert table.add(announced(1, 1, WORK))


def test_leaving_a_network_forgets_its_records() -> None:
    table = RecordTable()
    add_all(table, announced(1, 5, HOME), announced(1, 6, WORK))

    table.drop_networks([WORK])

    assert [record.network_id for record in table.announced()] == [WORK]


def test_a_full_table_takes_news_of_those_in_it_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "RECORDS_MAX", 2)
    monkeypatch.setattr(records, "TOMBSTONES_MAX", 1)
    assert RECORDS_MAX > 2
    table = RecordTable()

    taken = add_all(table, *(announced(peer, seq) for peer, seq in ((0, 1), (1, 1), (2, 1))))
    assert taken == [True, True, False]
    assert add_all(table, announced(0, 2), stated(0, 2), stated(1, 1)) == [True, True, False]
