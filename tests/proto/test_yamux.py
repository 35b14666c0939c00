"""Yamux: the frames of a session, its streams' ends and bounds, and every rule a peer can break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yamux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    PING,
    RST,
    SYN,
    WINDOW,
    data_frame,
    frame,
    opened,
    receive,
    session,
    take,
)

from swarmpy.errors import LocalProtocolError, RemoteProtocolError, StreamReset
from swarmpy.proto.receive_budget import ReceiveBudget
from swarmpy.proto.yamux import (
    CONTROL_FRAMES_PER_SECOND_MAX,
    HEADER_BYTES,
    INITIAL_WINDOW_BYTES,
    DataReceived,
    Event,
    GoAwayReceived,
    PongReceived,
    StreamEnded,
    StreamOpened,
    StreamWasReset,
    WindowOpened,
    Yamux,
)

VECTORS = Path(__file__).parents[2] / "protocols" / "vectors" / "yamux.json"

# The short ways ---------------------------------------------------------------------


def state(yamux: Yamux) -> tuple[object, ...]:
    """Return what a session knows, its streams and its budget included."""
    known = {key: value for key, value in vars(yamux).items() if key not in ("_budget", "_streams")}
    streams = {
        number: [getattr(stream, name) for name in stream.__slots__]
        for number, stream in yamux._streams.items()
    }
    return known, streams, vars(yamux._budget)


SHORT = {
    "a whole frame": (b"", data_frame(1, b"hello"), 1),
    "one that fills the window": (b"", data_frame(1, bytes(INITIAL_WINDOW_BYTES)), 1),
    "one beyond the window": (b"", data_frame(1, bytes(INITIAL_WINDOW_BYTES + 1)), 0),
    "no data": (b"", data_frame(1, b""), 0),
    "less than a header": (b"", b"hello", 0),
    "the rest of a header": (data_frame(1, b"")[:5], data_frame(1, b"hello"), 0),
    "the rest of a frame": (frame(DATA, 0, 1, 50), data_frame(1, b"hello"), 0),
    "half a frame": (b"", data_frame(1, b"hello")[:-1], 0),
    "two frames": (b"", data_frame(1, b"hello") * 2, 0),
    "an end": (b"", data_frame(1, b"hello", FIN), 0),
    "a window": (b"", frame(WINDOW, 0, 1, 5, b"hello"), 0),
    "a stream unknown": (b"", data_frame(3, b"hello"), 0),
    "a stream that ended": (frame(WINDOW, FIN, 1, 0), data_frame(1, b"hello"), 0),
}


@pytest.mark.parametrize("name", SHORT)
def test_the_short_way_takes_one_whole_data_frame_and_nothing_else(name: str) -> None:
    """What it takes it takes as `receive` does, and what it does not it leaves untouched."""
    before, data, expected = SHORT[name]
    short, long = opened(), opened()
    for yamux in (short, long):
        yamux.receive(before)
    untouched = state(short)
    assert short.receive_whole(memoryview(data)) == expected
    if not expected:
        assert state(short) == untouched
        return
    assert long.receive(data) == [DataReceived(1, data[HEADER_BYTES:])]
    long._data_id = short._data_id  # of a frame that is over
    assert state(short) == state(long)


@pytest.mark.parametrize("unread", [4, 5])
def test_the_short_way_leaves_it_to_the_other_to_give_streams_up(unread: int) -> None:
    for yamux in (opened(unread=unread), opened(budget=ReceiveBudget(unread))):
        taken = yamux.receive_whole(memoryview(data_frame(1, b"hello")))
        assert taken == (1 if unread == 5 else 0)


@pytest.mark.parametrize(
    ("flags", "size", "expected"), [(0, 4, 1), (0, 5, 1), (0, 6, 0), (FIN, 4, 1), (FIN, 5, 0)]
)
def test_the_short_way_takes_pieces_of_a_frame_but_never_its_end(
    flags: int, size: int, expected: int
) -> None:
    short, long = opened(), opened()
    for yamux in (short, long):
        yamux.receive(frame(DATA, flags, 1, 5))
    untouched = state(short)
    assert short.receive_more(size) == expected
    if expected:
        assert long.receive(bytes(size)) == [DataReceived(1, bytes(size))]
        assert state(short) == state(long)
    else:
        assert state(short) == untouched


def test_the_short_way_takes_no_piece_that_nobody_has_room_for() -> None:
    crowded = opened(unread=4)
    crowded.receive(frame(DATA, 0, 1, 5))
    assert crowded.receive_more(5) == 0
    over = opened()
    over.receive(frame(DATA, 0, 1, 5))
    over.reset(1)
    assert over.receive_more(5) == 0


# Vectors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vector", json.loads(VECTORS.read_text())["valid"], ids=lambda item: item["what"]
)
def test_vectors_decode_to_their_events(vector: dict[str, Any]) -> None:
    """As a peer that was dialled receives them."""
    events = session().receive(bytes.fromhex(vector["bytes"]))
    assert [plain(event) for event in events] == vector["events"]


def plain(event: Event) -> list[object]:
    """Return an event as the vectors write it."""
    match event:
        case DataReceived(stream_id, data):
            return ["data", stream_id, data.hex()]
        case StreamOpened(number):
            return ["opened", number]
        case WindowOpened(number):
            return ["window", number]
        case StreamEnded(number):
            return ["end", number]
        case StreamWasReset(number):
            return ["reset", number]
        case PongReceived(number):
            return ["pong", number]
        case GoAwayReceived(number):
            return ["go away", number]


# Opening and data -----------------------------------------------------------------------


def test_ids_are_odd_for_the_initiator_and_even_for_the_other() -> None:
    assert [session(is_initiator=True).open() for _ in range(1)] == [1]
    responder = session()
    assert [responder.open(), responder.open()] == [2, 4]


def test_the_syn_rides_on_the_first_data_and_the_ack_on_the_first_answer() -> None:
    """A stream costs no round trip and no frame of its own."""
    near, far = session(is_initiator=True), session()
    stream_id = near.open()
    header = near.data_header(stream_id, 5)
    assert header == frame(DATA, SYN, 1, 5)
    assert receive(far, header, b"hello") == [StreamOpened(1), DataReceived(1, b"hello")]
    assert far.data_header(1, 2) == frame(DATA, ACK, 1, 2)
    assert far.data_header(1, 2) == frame(DATA, 0, 1, 2)
    assert take(near) == take(far) == b""


@given(st.data())
def test_any_fragmentation_gives_the_same_bytes(data: st.DataObject) -> None:
    """Noise frames cut Yamux frames anywhere."""
    payload = data.draw(st.binary(min_size=1, max_size=100))
    wire = frame(WINDOW, SYN, 1, 0) + data_frame(1, payload) + frame(WINDOW, FIN, 1, 0)
    yamux, received, ends = session(), b"", 0
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        for event in yamux.receive(wire[:size]):
            if isinstance(event, DataReceived):
                received += event.data
            ends += isinstance(event, StreamEnded)
        wire = wire[size:]
    assert received == payload
    assert ends == 1


def test_a_frame_of_data_alone_is_handed_on_uncopied() -> None:
    yamux = opened()
    receive(yamux, frame(DATA, 0, 1, 5))
    data = b"hello"
    (event,) = yamux.receive(data)
    assert isinstance(event, DataReceived)
    assert event.data is data


def test_an_empty_data_frame_is_no_event() -> None:
    assert receive(opened(), data_frame(1, b"")) == []


# Ends --------------------------------------------------------------------------------------


def test_each_direction_ends_by_itself() -> None:
    yamux = opened()
    yamux.close_write(1)
    assert take(yamux) == frame(WINDOW, ACK, 1, 0) + frame(WINDOW, FIN, 1, 0)
    assert yamux.window(1) == 0
    with pytest.raises(StreamReset):
        yamux.data_header(1, 1)
    assert receive(yamux, data_frame(1, b"still", FIN)) == [
        DataReceived(1, b"still"),
        StreamEnded(1),
    ]
    assert yamux.is_known(1)
    yamux.consumed(1, 5)
    assert not yamux.is_known(1)


def test_ending_twice_sends_one_end() -> None:
    yamux = opened()
    yamux.close_write(1)
    take(yamux)
    yamux.close_write(1)
    assert take(yamux) == b""


def test_a_repeated_end_of_the_peer_is_one_event() -> None:
    yamux = opened()
    assert receive(yamux, frame(WINDOW, FIN, 1, 0)) == [StreamEnded(1)]
    assert receive(yamux, frame(WINDOW, FIN, 1, 0), frame(DATA, FIN, 1, 0)) == []


def test_data_after_the_end_costs_the_connection() -> None:
    yamux = opened()
    receive(yamux, frame(WINDOW, FIN, 1, 0))
    with pytest.raises(RemoteProtocolError, match="after the end"):
        receive(yamux, data_frame(1, b"x"))


@pytest.mark.parametrize("kind", [DATA, WINDOW])
def test_a_reset_ends_both_directions(kind: int) -> None:
    yamux = opened()
    assert receive(yamux, frame(kind, RST, 1, 0)) == [StreamWasReset(1, by_peer=True)]
    assert not yamux.is_known(1)
    assert yamux.window(1) == 0
    assert take(yamux) == b""


def test_our_reset_tells_the_peer_once() -> None:
    yamux = opened()
    yamux.reset(1)
    yamux.reset(1)
    assert take(yamux) == frame(WINDOW, RST, 1, 0)


def test_a_stream_the_peer_never_heard_of_is_reset_silently() -> None:
    yamux = session(is_initiator=True)
    yamux.reset(yamux.open())
    assert take(yamux) == b""


def test_what_was_on_its_way_to_a_reset_stream_is_read_past() -> None:
    yamux = opened(2)
    yamux.reset(1)
    events = receive(
        yamux,
        data_frame(1, b"late"),
        frame(WINDOW, 0, 1, 5),
        frame(WINDOW, FIN, 1, 0),
        data_frame(1, b"", FIN),
        data_frame(1, b"later", RST),
        frame(WINDOW, RST, 1, 0),
        data_frame(3, b"ok"),
    )
    assert events == [DataReceived(3, b"ok")]


def test_a_stream_reset_in_the_middle_of_a_frame_is_read_past() -> None:
    yamux = opened()
    receive(yamux, frame(DATA, 0, 1, 4), b"ab")
    yamux.reset(1)
    assert receive(yamux, b"cd") == []
    assert yamux.unread_bytes == 0


def test_reading_from_a_stream_that_is_gone_changes_nothing() -> None:
    yamux = opened()
    receive(yamux, data_frame(1, b"abc"))
    yamux.reset(1)
    yamux.consumed(1, 3)
    assert yamux.unread_bytes == 0


def test_bytes_put_back_are_unread_and_their_window_is_not_granted() -> None:
    yamux = opened()
    half = INITIAL_WINDOW_BYTES // 2
    receive(yamux, data_frame(1, bytes(half)))
    yamux.consumed(1, half - 1)
    yamux.put_back(1, 10)
    assert yamux.unread_bytes == 11
    yamux.consumed(1, 10)
    assert take(yamux) == b""
    yamux.consumed(1, 1)
    assert take(yamux) == frame(WINDOW, ACK, 1, half)


def test_bytes_put_back_on_a_stream_that_is_gone_change_nothing() -> None:
    yamux = opened()
    yamux.reset(1)
    yamux.put_back(1, 10)
    assert yamux.unread_bytes == 0


# Bounds ------------------------------------------------------------------------------------


def test_streams_beyond_the_bound_are_reset() -> None:
    yamux = opened(3)
    assert receive(yamux, data_frame(7, b"x", SYN)) == [StreamOpened(7), DataReceived(7, b"x")]
    assert receive(yamux, data_frame(9, b"x", SYN)) == []
    assert take(yamux) == frame(WINDOW, RST, 9, 0)


def test_a_streams_place_is_free_once_it_is_over_and_its_handler_has_returned() -> None:
    """Else a peer could pile up handlers by resetting its streams."""
    yamux = opened(4)
    receive(yamux, frame(WINDOW, RST, 1, 0))
    assert receive(yamux, frame(WINDOW, SYN, 9, 0)) == []
    yamux.release(1)
    assert receive(yamux, frame(WINDOW, SYN, 11, 0)) == [StreamOpened(11)]
    assert yamux.stream_count == 4


def test_a_flood_of_refused_streams_costs_the_connection() -> None:
    yamux = opened(4, resets=3)
    for index in range(3):
        receive(yamux, frame(WINDOW, SYN, 9 + 2 * index, 0), now_s=10.0)
    with pytest.raises(RemoteProtocolError, match="refused in a second"):
        receive(yamux, frame(WINDOW, SYN, 99, 0), now_s=10.9)


def test_refusals_are_counted_by_the_second() -> None:
    yamux = opened(4, resets=3)
    for index in range(9):
        receive(yamux, frame(WINDOW, SYN, 9 + 2 * index, 0), now_s=float(index // 3))


def test_past_the_unread_budget_the_stream_with_the_oldest_bytes_is_reset() -> None:
    yamux = opened(3, unread=100)
    receive(yamux, data_frame(3, bytes(40)), data_frame(1, bytes(40)))
    yamux.consumed(3, 40)
    receive(yamux, data_frame(3, bytes(30)), data_frame(5, bytes(30)))
    assert yamux.unread_bytes == 100
    assert receive(yamux, data_frame(5, b"x")) == [
        DataReceived(5, b"x"),
        StreamWasReset(1, by_peer=False),
    ]
    assert yamux.unread_bytes == 61
    assert take(yamux) == frame(WINDOW, RST, 1, 0)


def test_past_the_unread_budget_as_many_streams_are_reset_as_it_takes() -> None:
    """Found by fuzzing: the oldest stream may have less than the bytes that just came."""
    yamux = opened(3, unread=100)
    receive(yamux, data_frame(1, b"x"), data_frame(3, bytes(60)))

    events = receive(yamux, data_frame(5, bytes(99)))

    assert [event for event in events if isinstance(event, StreamWasReset)] == [
        StreamWasReset(1, by_peer=False),
        StreamWasReset(3, by_peer=False),
    ]
    assert yamux.unread_bytes == 99


@pytest.mark.parametrize("gone", ["refused", "reset"])
def test_data_for_a_stream_that_is_gone_is_bounded_by_its_window_too(gone: str) -> None:
    """What was granted may be on its way; more is a peer that does not care."""
    yamux = opened(4)
    if gone == "refused":
        receive(yamux, frame(WINDOW, SYN, 9, 0))
    else:
        yamux.reset(1)
    stream_id = 9 if gone == "refused" else 1
    receive(yamux, data_frame(stream_id, bytes(INITIAL_WINDOW_BYTES)))
    with pytest.raises(RemoteProtocolError, match="which is over"):
        receive(yamux, frame(DATA, 0, stream_id, 1))


def test_data_for_a_stream_the_peer_has_ended_or_reset_costs_the_connection() -> None:
    yamux = opened(2)
    receive(yamux, frame(WINDOW, RST, 1, 0), frame(WINDOW, FIN, 3, 0))
    yamux.reset(3)
    for stream_id in (1, 3):
        with pytest.raises(RemoteProtocolError, match="which is over"):
            receive(yamux, frame(DATA, 0, stream_id, 1))


def test_ids_end_at_32_bits() -> None:
    yamux = session(is_initiator=True)
    yamux._next_id = 2**32 - 1
    assert yamux.open() == 2**32 - 1
    with pytest.raises(LocalProtocolError):
        yamux.open()


# Rules a peer can break ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wire",
    [
        b"\x01" + frame(DATA, 0, 1, 0)[1:],
        frame(4, 0, 0, 0),
        frame(DATA, 16, 1, 0),
        frame(PING, SYN, 1, 0),
        frame(GO_AWAY, 0, 1, 0),
        frame(DATA, 0, 0, 0),
        frame(WINDOW, SYN, 0, 0),
        frame(WINDOW, SYN, 2, 0),
        frame(WINDOW, SYN, 1, 0) * 2,
        frame(WINDOW, 0, 2, 0),
        frame(DATA, SYN, 1, INITIAL_WINDOW_BYTES + 1),
    ],
    ids=[
        "version",
        "kind",
        "flags",
        "ping on a stream",
        "go-away on a stream",
        "data on stream 0",
        "stream 0 opened",
        "our id opened",
        "opened twice",
        "our stream, never opened",
        "more than the first window",
    ],
)
def test_a_broken_rule_costs_the_connection(wire: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        receive(session(), wire)
    assert caught.value.penalty == 10


@given(st.binary(max_size=200))
def test_any_bytes_are_taken_or_raise_remote_protocol_error(data: bytes) -> None:
    try:
        session().receive(data)
    except RemoteProtocolError:
        return


# Session frames -----------------------------------------------------------------------------


def test_a_ping_is_answered_with_its_value() -> None:
    near, far = session(is_initiator=True), session()
    near.ping(7)
    assert receive(far, take(near)) == []
    assert receive(near, take(far)) == [PongReceived(7)]


def test_a_ping_that_neither_asks_nor_answers_is_ignored() -> None:
    yamux = session()
    assert receive(yamux, frame(PING, 0, 0, 1)) == []
    assert take(yamux) == b""


def test_after_going_away_no_stream_is_opened_in_either_direction() -> None:
    near, far = session(is_initiator=True), session()
    far.go_away()
    assert receive(near, take(far)) == [GoAwayReceived(0)]
    with pytest.raises(LocalProtocolError):
        far.open()
    receive(far, frame(WINDOW, SYN, 1, 0))
    assert take(far) == frame(WINDOW, RST, 1, 0)


@pytest.mark.parametrize(
    "empty",
    [frame(DATA, 0, 1, 0), frame(WINDOW, 0, 1, 0), frame(PING, ACK, 0, 7)],
    ids=["data", "window", "pong"],
)
def test_a_peer_that_sends_frames_without_data_all_the_time_is_cut(empty: bytes) -> None:
    """So many a second as no honest peer needs; what it sent before that second does not count."""
    yamux = opened()
    for now_s in (1.0, 2.0):
        receive(yamux, empty * CONTROL_FRAMES_PER_SECOND_MAX, now_s=now_s)
    receive(yamux, data_frame(1, b"data"), now_s=2.9)
    with pytest.raises(RemoteProtocolError, match="frames without data"):
        receive(yamux, empty, now_s=2.9)
