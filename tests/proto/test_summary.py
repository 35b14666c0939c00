"""Summaries: equal tables have equal roots, and the way down leads to what differs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, RemoteProtocolError
from swarmpy.identity import Identity
from swarmpy.proto.membership import NetworkId
from swarmpy.proto.summary import (
    KEY_BYTES,
    PREFIX_MAX,
    REVOKED_VERSION,
    ROOT_BYTES,
    Entry,
    Summary,
    alive_version,
    check_prefix,
    differing,
    gone_version,
    is_gone,
    pack_entries,
    record_key,
    unpack_entries,
    unpack_keys,
)

ENTRIES = st.dictionaries(
    st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), st.integers(0, 2**54), max_size=40
)


def summary_of(entries: list[Entry]) -> Summary:
    summary = Summary()
    for key, version in entries:
        summary.add(key, version)
    return summary


def test_a_key_is_of_one_peer_in_one_network() -> None:
    ann, bob = (Identity(letter * 32).peer_id for letter in (b"a", b"b"))
    keys = {record_key(NetworkId(network), peer) for network in ("x", "y") for peer in (ann, bob)}

    assert len(keys) == 4
    assert {len(key) for key in keys} == {KEY_BYTES}


def test_news_that_a_member_is_gone_stands_above_its_announcement_and_below_the_next() -> None:
    assert is_gone(gone_version(7))
    assert not any(map(is_gone, (alive_version(7), REVOKED_VERSION)))
    assert alive_version(7) < gone_version(7) < alive_version(8) < REVOKED_VERSION


@given(ENTRIES, st.randoms())
def test_any_order_gives_the_same_root(entries: dict[bytes, int], draw: object) -> None:
    items = list(entries.items())
    shuffled = items.copy()
    draw.shuffle(shuffled)  # type: ignore[attr-defined]

    assert summary_of(items).root == summary_of(shuffled).root
    assert len(summary_of(items).root) == ROOT_BYTES


@given(ENTRIES, st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
def test_any_entry_taken_back_leaves_the_root_as_it_was(
    entries: dict[bytes, int], key: bytes
) -> None:
    summary = summary_of(list(entries.items()))
    before = summary.root

    summary.add(key, 5)
    assert summary.root != before
    summary.remove(key, 5)

    assert summary.root == before


@given(ENTRIES, st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
def test_any_difference_is_found_by_its_prefix(entries: dict[bytes, int], key: bytes) -> None:
    ours, theirs = summary_of(list(entries.items())), summary_of(list(entries.items()))
    theirs.add(key, 5)
    digits = key.hex()

    (first,) = differing("", ours.children(""), theirs.children(""))
    (second,) = differing(first, ours.children(first), theirs.children(first))

    assert second == digits[:PREFIX_MAX]


@given(st.lists(st.tuples(st.binary(min_size=8, max_size=8), st.integers(0, 2**63))))
def test_any_entries_read_back(entries: list[Entry]) -> None:
    assert list(unpack_entries(pack_entries(entries))) == entries


@given(st.binary(max_size=100))
def test_any_bytes_are_entries_and_keys_or_a_breach(data: bytes) -> None:
    for unpack in (unpack_entries, unpack_keys):
        try:
            list(unpack(data))  # type: ignore[operator]
        except RemoteProtocolError:
            pass


def test_keys_read_back() -> None:
    assert unpack_keys(b"a" * 8 + b"b" * 8) == [b"a" * 8, b"b" * 8]


@pytest.mark.parametrize("prefix", ["g", "0G", "-", "é"])
def test_a_prefix_of_no_key_is_refused(prefix: str) -> None:
    with pytest.raises(BadMessage, match="no prefix"):
        check_prefix(prefix)


def test_hexadecimal_digits_are_a_prefix() -> None:
    for prefix in ("", "0", "f7"):
        check_prefix(prefix)
