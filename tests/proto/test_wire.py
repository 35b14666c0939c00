"""Framing and strict decoding."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, FrameTooLarge, RemoteProtocolError
from swarmpy.proto.wire import (
    MESSAGE_BYTES_MAX,
    decode,
    decode_varint,
    encode,
    encode_varint,
    frame,
)


class Example(msgspec.Struct, frozen=True):
    """A message with every kind of bound."""

    name: Annotated[str, msgspec.Meta(max_length=8)]
    values: Annotated[tuple[float, ...], msgspec.Meta(max_length=4)] = ()


def test_message_survives_the_wire() -> None:
    message = Example("name", (1.0, 2.5))

    assert decode(encode(message), Example) == message


class Nested(msgspec.Struct, frozen=True):
    """A message with floats at every place a float can hide, and fields without any."""

    count: int = 0
    inner: Example = Example("inner")
    by_name: Annotated[dict[str, Example], msgspec.Meta(max_length=4)] = {}
    pairs: Annotated[tuple[tuple[int, float], ...], msgspec.Meta(max_length=4)] = ()
    maybe: float | None = None


@pytest.mark.parametrize(
    "message",
    [
        Nested(inner=Example("x", (math.inf,))),
        Nested(by_name={"a": Example("x", (math.nan,))}),
        Nested(pairs=((1, math.nan),)),
        Nested(maybe=-math.inf),
    ],
)
def test_number_that_is_not_finite_is_found_wherever_it_hides(message: Nested) -> None:
    with pytest.raises(BadMessage, match="NaN or infinite"):
        decode(encode(message), Nested)


def test_nested_message_with_finite_numbers_survives() -> None:
    message = Nested(3, Example("x", (1.0,)), {"a": Example("y")}, ((1, 2.0),), 0.5)

    assert decode(encode(message), Nested) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_number_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(BadMessage, match="NaN or infinite"):
        decode(encode(Example("name", (0.0, value))), Example)


def test_field_beyond_its_bound_is_refused() -> None:
    with pytest.raises(BadMessage, match="length <= 8"):
        decode(encode(Example("a name too long")), Example)


def test_oversize_message_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameTooLarge):
        decode(b"\xc1" * (MESSAGE_BYTES_MAX + 1), Example)


def test_deep_nesting_is_a_bad_message_not_a_crash() -> None:
    """msgspec raises RecursionError on skipped unknown fields nested this deep."""
    nested = b"\x82\xa4name\xa1a\xa1x" + b"\x91" * 60_000 + b"\xc0"

    with pytest.raises(BadMessage):
        decode(nested, Example)


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_raise_remote_protocol_error(data: bytes) -> None:
    try:
        assert isinstance(decode(data, Example), Example)
    except RemoteProtocolError:
        pass


@given(st.integers(0, 2**63 - 1))
def test_any_number_survives_as_varint(value: int) -> None:
    encoded = encode_varint(value)

    assert decode_varint(b"x" + encoded, 1) == (value, 1 + len(encoded))


@given(st.integers(0, 2**63 - 1))
def test_any_varint_cut_short_asks_for_more(value: int) -> None:
    assert decode_varint(encode_varint(value)[:-1]) is None


@pytest.mark.parametrize("data", [b"\x80\x00", b"\xff" * 9, b"\xff" * 20])
def test_varint_too_long_or_padded_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_varint(data)


def test_frame_is_length_and_payload() -> None:
    assert frame(b"x" * 200) == b"\xc8\x01" + b"x" * 200
