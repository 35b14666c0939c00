"""The few bytes of protobuf that libp2p's messages need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage
from swarmpy.proto import protobuf

VALUES = st.one_of(st.binary(max_size=40), st.integers(0, 2**63 - 1))


@given(st.lists(st.tuples(st.integers(1, 2**20), VALUES), max_size=20))
def test_any_fields_survive_in_order(pairs: list[tuple[int, bytes | int]]) -> None:
    expected: dict[int, list[bytes | int]] = {}
    for number, value in pairs:
        expected.setdefault(number, []).append(value)

    assert protobuf.decode(protobuf.encode(pairs)) == expected


def test_unknown_fixed_width_fields_are_skipped() -> None:
    data = b"\x0d\x01\x02\x03\x04" + b"\x11" + b"\x00" * 8 + protobuf.encode([(3, b"kept")])

    assert protobuf.decode(data) == {3: [b"kept"]}


@pytest.mark.parametrize(
    "data",
    [b"\x0a\x05abc", b"\x08", b"\x0b", b"\x02\x00", b"\x0a\xff\xff\xff\xff\x0f", b"\x08\x01" * 513],
    ids=["short bytes", "no value", "group", "field 0", "huge length", "too many fields"],
)
def test_malformed_message_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        protobuf.decode(data)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_a_bad_message(data: bytes) -> None:
    try:
        protobuf.decode(data)
    except BadMessage:
        pass


def test_field_of_the_wrong_kind_is_refused() -> None:
    fields = protobuf.decode(protobuf.encode([(1, 5), (2, b"\xff")]))

    with pytest.raises(BadMessage, match="not bytes"):
        protobuf.bytes_field(fields, 1)
    with pytest.raises(BadMessage, match="not a varint"):
        protobuf.int_field(fields, 2)
    with pytest.raises(BadMessage, match="UTF-8"):
        protobuf.text_field(fields, 2)
    with pytest.raises(BadMessage, match="not bytes"):
        protobuf.bytes_fields(fields, 1)


def test_absent_field_reads_as_empty() -> None:
    assert protobuf.bytes_field({}, 1) == b""
    assert protobuf.bytes_fields({}, 1) == []
    assert protobuf.text_field({}, 1) == ""
    assert protobuf.int_field({}, 1) == 0


def test_last_value_of_a_repeated_field_wins() -> None:
    fields = protobuf.decode(protobuf.encode([(1, b"a"), (1, b"b"), (2, 1), (2, 2)]))

    assert protobuf.bytes_field(fields, 1) == b"b"
    assert protobuf.int_field(fields, 2) == 2
