"""Multistream-select: both sides, byte by byte, and what breaks it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, FrameTooLarge, RemoteProtocolError
from swarmpy.proto.multistream import (
    HEADER,
    LINE_BYTES_MAX,
    PROPOSALS_MAX,
    Dialer,
    Selector,
    encode_line,
)

HEADER_LINE = b"\x13/multistream/1.0.0\n"


def converse(dialer: Dialer, selector: Selector, *, piece: int = 10**6) -> None:
    """Carry bytes to and fro in pieces until nobody has more to say."""
    sent = dialer.start()
    while sent:
        answer = b"".join(
            selector.receive(sent[start : start + piece]) for start in range(0, len(sent), piece)
        )
        sent = b"".join(
            dialer.receive(answer[start : start + piece]) for start in range(0, len(answer), piece)
        )


def test_a_dialer_starts_with_header_and_first_proposal() -> None:
    assert Dialer(["/a/1"]).start() == HEADER_LINE + b"\x05/a/1\n"


def test_a_selector_echoes_what_it_serves() -> None:
    selector = Selector(lambda protocol: protocol == "/a/1")
    assert selector.receive(HEADER_LINE + b"\x05/a/1\n") == HEADER_LINE + b"\x05/a/1\n"
    assert selector.selected == "/a/1"


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
def test_the_first_common_protocol_is_agreed_on_in_pieces_of_any_size(piece: int) -> None:
    dialer, selector = Dialer(["/a/3", "/a/2", "/a/1"]), Selector({"/a/2", "/a/1"}.__contains__)
    converse(dialer, selector, piece=piece)
    assert dialer.selected == selector.selected == "/a/2"


def test_bytes_behind_the_agreement_stay_for_the_protocol() -> None:
    selector = Selector(lambda _: True)
    selector.receive(Dialer(["/a/1"]).start() + b"early data")
    assert selector.rest == b"early data"

    dialer = Dialer(["/a/1"])
    dialer.receive(HEADER_LINE + encode_line("/a/1") + b"answer")
    assert dialer.rest == b"answer"


def test_a_dialer_whose_protocols_are_all_refused_says_so() -> None:
    with pytest.raises(RemoteProtocolError, match="does not serve /a/1"):
        converse(Dialer(["/a/2", "/a/1"]), Selector(lambda _: False))


def test_listing_protocols_is_refused() -> None:
    """The list would tell a stranger what is served."""
    selector = Selector(lambda _: True)
    answer = selector.receive(encode_line(HEADER) + encode_line("ls"))
    assert answer == HEADER_LINE + encode_line("na")
    assert selector.selected is None


@pytest.mark.parametrize(
    "answer",
    [
        encode_line("/multistream/2.0.0"),
        encode_line(HEADER) + encode_line("/other/1"),
        b"\x00",
        encode_line(HEADER) + b"\x03abc",
        encode_line(HEADER) + b"\x03\xff\xff\n",
        encode_line(HEADER) + b"\x00",
    ],
)
def test_a_dialer_refuses_a_listener_that_answers_something_else(answer: bytes) -> None:
    with pytest.raises(BadMessage):
        Dialer(["/a/1"]).receive(answer)


@pytest.mark.parametrize("data", [b"G", b"\x13GET", encode_line("/multistream/2.0.0")])
def test_another_header_is_refused_at_its_first_wrong_byte(data: bytes) -> None:
    """An HTTP client must not be waited for."""
    with pytest.raises(BadMessage):
        Selector(lambda _: True).receive(data)


@pytest.mark.parametrize("size", [LINE_BYTES_MAX - 1, LINE_BYTES_MAX])
def test_a_line_up_to_the_bound_is_read(size: int) -> None:
    selector = Selector(lambda _: True)
    selector.receive(encode_line(HEADER) + encode_line("a" * (size - 1)))
    assert selector.selected == "a" * (size - 1)


def test_a_line_beyond_the_bound_is_refused_before_it_is_there() -> None:
    head = encode_line(HEADER) + encode_line("a" * LINE_BYTES_MAX)[:2]
    with pytest.raises(FrameTooLarge):
        Selector(lambda _: True).receive(head)


def test_a_dialer_that_proposes_without_end_is_refused() -> None:
    selector = Selector(lambda _: False)
    selector.receive(encode_line(HEADER) + encode_line("/a/1") * PROPOSALS_MAX)
    with pytest.raises(RemoteProtocolError, match="more than"):
        selector.receive(encode_line("/a/1"))


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_taken_or_raise_remote_protocol_error(data: bytes, behind: bool) -> None:
    data = HEADER_LINE + data if behind else data
    for side in (Dialer(["/a/1"]), Selector(lambda _: True)):
        try:
            side.receive(data)
        except RemoteProtocolError:
            continue
