"""Yamux: two sessions against each other, then every rule a peer can break."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from swarmpy.errors import LocalProtocolError, RemoteProtocolError, StreamReset
from swarmpy.proto.receive_budget import ReceiveBudget
from swarmpy.proto.yamux import (
    FRAME_DATA_BYTES_MAX,
    GROWTH_BYTES_MAX,
    GROWTH_RTT_S_MIN,
    HEADER_BYTES,
    INITIAL_WINDOW_BYTES,
    WINDOW_BYTES_MAX,
    WINDOW_IDLE_S,
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

DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
VECTORS = Path(__file__).parents[2] / "protocols" / "vectors" / "yamux.json"


def session(
    *,
    is_initiator: bool = False,
    streams: int = 4,
    unread: int = 1 << 24,
    resets: int = 3,
    budget: ReceiveBudget | None = None,
) -> Yamux:
    return Yamux(
        is_initiator=is_initiator,
        inbound_streams_max=streams,
        unread_bytes_max=unread,
        resets_per_second_max=resets,
        budget=budget,
    )


def frame(kind: int, flags: int, stream_id: int, value: int, data: bytes = b"") -> bytes:
    return struct.pack("!BBHII", 0, kind, flags, stream_id, value) + data


def data_frame(stream_id: int, data: bytes, flags: int = 0) -> bytes:
    return frame(DATA, flags, stream_id, len(data), data)


def take(yamux: Yamux) -> bytes:
    """Empty a session's outbox."""
    sent = bytes(yamux.outbox)
    yamux.outbox.clear()
    return sent


def receive(yamux: Yamux, *frames: bytes, now_s: float = 0.0) -> list[Event]:
    yamux.now_s = now_s
    return yamux.receive(b"".join(frames))


def opened(count: int = 1, *, budget: ReceiveBudget | None = None, **bounds: int) -> Yamux:
    """Return the responder's session with streams 1, 3, ... opened by the peer."""
    yamux = session(budget=budget, **bounds)  # type: ignore[arg-type]
    for index in range(count):
        receive(yamux, frame(WINDOW, SYN, 2 * index + 1, 0))
    return yamux


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


# Windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [INITIAL_WINDOW_BYTES - 1, INITIAL_WINDOW_BYTES])
def test_data_within_the_window_is_taken(size: int) -> None:
    receive(opened(), data_frame(1, bytes(size)))


def test_data_beyond_the_window_costs_the_connection_at_the_header() -> None:
    with pytest.raises(RemoteProtocolError, match="were granted") as caught:
        receive(opened(), frame(DATA, 0, 1, INITIAL_WINDOW_BYTES + 1))
    assert caught.value.penalty == 10


def test_many_frames_that_together_pass_the_window_cost_the_connection() -> None:
    yamux = opened()
    for _ in range(4):
        receive(yamux, data_frame(1, bytes(INITIAL_WINDOW_BYTES // 4)))
    with pytest.raises(RemoteProtocolError, match="0 were granted"):
        receive(yamux, data_frame(1, b"x"))


def test_window_is_granted_anew_by_halves() -> None:
    yamux = opened()
    half = INITIAL_WINDOW_BYTES // 2
    receive(yamux, data_frame(1, bytes(INITIAL_WINDOW_BYTES)))
    yamux.consumed(1, half - 1)
    assert take(yamux) == b""
    yamux.consumed(1, 1)
    assert take(yamux) == frame(WINDOW, ACK, 1, half)
    receive(yamux, data_frame(1, bytes(half)))


def test_no_window_is_granted_to_a_peer_that_has_ended() -> None:
    yamux = opened()
    receive(yamux, data_frame(1, bytes(INITIAL_WINDOW_BYTES), FIN))
    yamux.consumed(1, INITIAL_WINDOW_BYTES)
    assert take(yamux) == b""


def test_sending_takes_window_and_an_update_gives_it_back() -> None:
    yamux = opened()
    for _ in range(INITIAL_WINDOW_BYTES // FRAME_DATA_BYTES_MAX):
        yamux.data_header(1, FRAME_DATA_BYTES_MAX)
    rest = yamux.window(1)
    assert rest == INITIAL_WINDOW_BYTES % FRAME_DATA_BYTES_MAX
    with pytest.raises(LocalProtocolError):
        yamux.data_header(1, rest + 1)
    assert receive(yamux, frame(WINDOW, 0, 1, 100)) == [WindowOpened(1)]
    assert yamux.window(1) == rest + 100


@pytest.mark.parametrize("size", [0, FRAME_DATA_BYTES_MAX + 1])
def test_a_frame_that_may_not_be_sent_is_our_own_mistake(size: int) -> None:
    with pytest.raises(LocalProtocolError):
        opened().data_header(1, size)


def test_a_window_beyond_32_bits_costs_the_connection() -> None:
    yamux = opened()
    receive(yamux, frame(WINDOW, 0, 1, 2**32 - 1 - INITIAL_WINDOW_BYTES))
    with pytest.raises(RemoteProtocolError, match="32 bits"):
        receive(yamux, frame(WINDOW, 0, 1, 1))


# Windows that grow --------------------------------------------------------------------------

RTT_S = 0.03
MIB = 1024 * 1024


def granted(yamux: Yamux, stream_id: int = 1) -> int:
    """Return what the session's window updates grant a stream, and check its books."""
    sent = take(yamux)
    total = 0
    for _, kind, flags, number, value in struct.iter_unpack("!BBHII", sent):
        assert kind == WINDOW
        assert not flags & ~ACK
        total += value if number == stream_id else 0
    return total


def read_half(yamux: Yamux, now_s: float, stream_id: int = 1) -> int:
    """Let half of a stream's window come at a time and be read; return what is granted for it."""
    left = yamux._streams[stream_id].receive_window // 2
    while left:
        size = min(left, INITIAL_WINDOW_BYTES // 2)
        receive(yamux, data_frame(stream_id, bytes(size)), now_s=now_s)
        yamux.consumed(stream_id, size)
        left -= size
    return granted(yamux, stream_id)


def grown(budget: ReceiveBudget | None = None, *, to: int = 512 * 1024) -> Yamux:
    """Return a session whose stream 1 has grown its window."""
    yamux = opened(budget=budget)
    yamux.rtt_s = RTT_S
    for _ in range((to // INITIAL_WINDOW_BYTES).bit_length() - 1):
        read_half(yamux, now_s=0.0)
    assert yamux._streams[1].receive_window == to
    return yamux


@pytest.mark.parametrize(("after_s", "expected"), [(0.06, 3), (0.0601, 1)])
def test_a_window_doubles_if_half_of_it_was_read_within_two_round_trips(
    after_s: float, expected: int
) -> None:
    """Then the sender waits for it; else it is large enough."""
    yamux = opened()
    yamux.rtt_s = RTT_S
    assert read_half(yamux, now_s=after_s) == expected * INITIAL_WINDOW_BYTES // 2
    assert yamux._streams[1].granted_s == after_s


@pytest.mark.parametrize(
    ("after_s", "expected"), [(2 * GROWTH_RTT_S_MIN, 3), (2 * GROWTH_RTT_S_MIN + 1e-6, 1)]
)
def test_the_shortest_round_trips_count_as_a_millisecond(after_s: float, expected: int) -> None:
    yamux = opened()
    yamux.rtt_s = 1e-4
    assert read_half(yamux, now_s=after_s) == expected * INITIAL_WINDOW_BYTES // 2


def test_no_window_grows_before_a_round_trip_was_measured() -> None:
    assert read_half(opened(), now_s=0.0) == INITIAL_WINDOW_BYTES // 2


def test_a_grown_window_is_enforced_to_the_byte() -> None:
    """Its reader stops: the peer may fill it, and not one byte more."""
    yamux = grown(to=MIB)
    for _ in range(4):
        receive(yamux, data_frame(1, bytes(MIB // 4)))
    with pytest.raises(RemoteProtocolError, match="0 were granted"):
        receive(yamux, frame(DATA, 0, 1, 1))


def test_a_window_grows_to_four_mib_and_no_further() -> None:
    yamux = grown(to=WINDOW_BYTES_MAX)
    assert read_half(yamux, now_s=0.0) == WINDOW_BYTES_MAX // 2
    assert yamux._streams[1].receive_window == WINDOW_BYTES_MAX


@pytest.mark.parametrize(("behind", "expected"), [(0, 3), (1, 1)])
def test_only_a_reader_that_keeps_up_gets_more(behind: int, expected: int) -> None:
    """Up to a quarter of the window may lie unread when half of it was read."""
    yamux = opened()
    yamux.rtt_s = RTT_S
    half = INITIAL_WINDOW_BYTES // 2
    receive(yamux, data_frame(1, bytes(half + half // 2 + behind)))
    yamux.consumed(1, half)
    assert granted(yamux) == expected * half


@pytest.mark.parametrize(("spare", "expected"), [(-1, 1), (0, 3), (1, 3)])
def test_windows_grow_only_inside_the_nodes_budget(spare: int, expected: int) -> None:
    """Unread bytes and other sessions' windows count: here 100 bytes and 256 KiB."""
    budget = ReceiveBudget(2 * INITIAL_WINDOW_BYTES + 100 + spare)
    grown(budget)
    receive(opened(budget=budget), data_frame(1, bytes(100)))
    yamux = opened(budget=budget)
    yamux.rtt_s = RTT_S
    assert read_half(yamux, now_s=0.0) == expected * INITIAL_WINDOW_BYTES // 2


def test_one_session_takes_no_more_than_its_part_of_the_budget() -> None:
    budget = ReceiveBudget()
    yamux = opened(20, budget=budget, streams=20)
    yamux.rtt_s = RTT_S
    for _ in range(6):
        for index in range(20):
            read_half(yamux, now_s=0.0, stream_id=2 * index + 1)
    assert budget.grown_bytes == GROWTH_BYTES_MAX
    # Another one still gets its own.
    assert grown(budget, to=WINDOW_BYTES_MAX)


def test_what_a_window_grew_by_returns_with_the_stream() -> None:
    budget = ReceiveBudget()
    yamux = grown(budget, to=MIB)
    assert budget.grown_bytes == MIB - INITIAL_WINDOW_BYTES
    receive(yamux, frame(WINDOW, RST, 1, 0))
    assert budget.grown_bytes == 0


def test_an_idle_window_shrinks_and_what_was_granted_stays_granted() -> None:
    """The peer may still send it all; but it is not granted anew until the window is small."""
    budget = ReceiveBudget()
    yamux = grown(budget, to=MIB)
    yamux.shrink_idle(WINDOW_IDLE_S)
    assert budget.grown_bytes == MIB - INITIAL_WINDOW_BYTES
    yamux.shrink_idle(WINDOW_IDLE_S + 0.001)
    assert budget.grown_bytes == 0
    late_s = WINDOW_IDLE_S + 1
    for _ in range(3):
        receive(yamux, data_frame(1, bytes(MIB // 4)), now_s=late_s)
        yamux.consumed(1, MIB // 4)
        assert granted(yamux) == 0
    assert read_half(yamux, now_s=late_s + 1) == INITIAL_WINDOW_BYTES // 2
    assert read_half(yamux, now_s=late_s + 1) == 3 * INITIAL_WINDOW_BYTES // 2


def test_a_window_that_is_used_or_never_grew_does_not_shrink() -> None:
    yamux = grown()
    read_half(yamux, now_s=1.0)
    yamux.shrink_idle(WINDOW_IDLE_S + 0.5)
    assert yamux._streams[1].receive_window == 512 * 1024
    small = opened()
    small.shrink_idle(1000.0)
    assert read_half(small, now_s=1000.0) == INITIAL_WINDOW_BYTES // 2


# The node's budget ---------------------------------------------------------------------------


def test_past_the_nodes_budget_the_oldest_unread_bytes_go_whosever_they_are() -> None:
    """Goal: the newest flood does not push out its own last bytes. Method: three sessions."""
    budget = ReceiveBudget(1600)
    told: list[tuple[str, int]] = []
    sessions = {name: opened(2, budget=budget) for name in ("first", "second", "third")}
    for name, yamux in sessions.items():
        budget.join(yamux, lambda number, name=name: told.append((name, number)))  # type: ignore[misc]
    receive(sessions["second"], data_frame(3, bytes(60)))
    receive(sessions["first"], data_frame(1, bytes(30)))
    receive(sessions["third"], data_frame(1, bytes(1510)))
    assert budget.unread_bytes == 1600
    assert not told

    events = receive(sessions["third"], data_frame(1, b"x"))

    # A sixteenth, 100 bytes, is made free: 1601 - 60 - 30 is still more than 1500.
    assert told == [("second", 3), ("first", 1), ("third", 1)]
    assert events == [DataReceived(1, b"x")]
    assert budget.unread_bytes == sum(yamux.unread_bytes for yamux in sessions.values()) == 0
    assert take(sessions["second"]) == frame(WINDOW, RST, 3, 0)


def test_shedding_stops_once_a_sixteenth_of_the_budget_is_free() -> None:
    budget = ReceiveBudget(1600)
    told: list[int] = []
    yamux = opened(3, budget=budget)
    budget.join(yamux, told.append)
    receive(yamux, data_frame(5, bytes(101)), data_frame(1, bytes(1000)), data_frame(3, bytes(500)))
    assert told == [5]
    assert budget.unread_bytes == 1500


def test_a_session_that_left_holds_nothing_and_is_not_asked() -> None:
    budget = ReceiveBudget(MIB)
    yamux = grown(budget)
    budget.grown_bytes += 5  # another session's
    budget.join(yamux, lambda _: pytest.fail("it has left"))
    receive(yamux, data_frame(1, bytes(1000)))
    budget.leave(yamux)
    assert (budget.unread_bytes, budget.grown_bytes, yamux.unread_bytes) == (0, 5, 0)
    budget.shed()
    budget.leave(yamux)
    yamux.consumed(1, 1000)
    assert budget.unread_bytes == 0


def test_a_connections_unread_bound_leaves_room_for_what_was_granted() -> None:
    """A reader that kept up and then pauses must not be reset for filling its window."""
    yamux = grown(to=MIB)
    yamux._unread_bytes_max = INITIAL_WINDOW_BYTES
    for _ in range(4):
        events = receive(yamux, data_frame(1, bytes(MIB // 4)))
        assert [type(event) for event in events] == [DataReceived]
    assert yamux.unread_bytes == MIB


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


# Two sessions, any order of steps ------------------------------------------------------------


class TwoSessions(RuleBasedStateMachine):
    """Streams opened, written, read, ended and reset in any order, by both sides.

    No rule is ever broken, every byte arrives in order, and the counts add up.
    """

    @initialize()
    def begin(self) -> None:
        self.budget = ReceiveBudget(2 * MIB)
        self.sides = [
            session(is_initiator=True, streams=8, budget=self.budget),
            session(streams=8, budget=self.budget),
        ]
        for side, yamux in enumerate(self.sides):
            yamux.rtt_s = RTT_S
            self.budget.join(yamux, lambda number, side=side: self.was_shed(side, number))  # type: ignore[misc]
        self.wires = [bytearray(), bytearray()]  # to each side
        self.sent: dict[tuple[int, int], bytearray] = {}
        self.received: dict[tuple[int, int], bytearray] = {}
        self.unread: dict[tuple[int, int], int] = {}
        self.counter = 0
        self.now_s = 0.0

    def was_shed(self, side: int, stream_id: int) -> None:
        self.sides[side].release(stream_id)

    def flush(self, side: int) -> None:
        self.wires[1 - side] += take(self.sides[side])

    def known(self, side: int) -> list[int]:
        return sorted(self.sides[side]._streams)

    @rule(side=st.integers(0, 1))
    def open_stream(self, side: int) -> None:
        if len(self.known(side)) < 6:
            self.sides[side].open()

    @rule(side=st.integers(0, 1), pick=st.integers(0, 9), size=st.integers(1, 70_000))
    def send(self, side: int, pick: int, size: int) -> None:
        if not (ids := self.known(side)):
            return
        stream_id, yamux = ids[pick % len(ids)], self.sides[side]
        size = min(size, yamux.window(stream_id), FRAME_DATA_BYTES_MAX)
        if not size:
            return
        self.flush(side)
        self.counter += 1
        data = self.counter.to_bytes(4, "big") * (size // 4 + 1)
        self.wires[1 - side] += yamux.data_header(stream_id, size) + data[:size]
        self.sent.setdefault((side, stream_id), bytearray()).extend(data[:size])

    @rule(side=st.integers(0, 1), pick=st.integers(0, 9), size=st.integers(1, 200_000))
    def read(self, side: int, pick: int, size: int) -> None:
        if not (ids := self.known(side)):
            return
        stream_id = ids[pick % len(ids)]
        size = min(size, self.unread.get((side, stream_id), 0))
        if size:
            self.unread[side, stream_id] -= size
            self.sides[side].consumed(stream_id, size)

    @rule(side=st.integers(0, 1), pick=st.integers(0, 9), how=st.sampled_from(["end", "reset"]))
    def finish(self, side: int, pick: int, how: str) -> None:
        if not (ids := self.known(side)):
            return
        stream_id, yamux = ids[pick % len(ids)], self.sides[side]
        if how == "end":
            yamux.close_write(stream_id)
        else:
            yamux.reset(stream_id)
        yamux.release(stream_id)

    @rule(side=st.integers(0, 1), pick=st.integers(0, 9), size=st.integers(1, 700_000))
    def stream(self, side: int, pick: int, size: int) -> None:
        """Send, deliver and read a lot on one stream, as a reader that keeps up does."""
        for _ in range(-(-size // FRAME_DATA_BYTES_MAX)):
            self.send(side, pick, FRAME_DATA_BYTES_MAX)
            self.deliver(1 - side, 1 << 20)
            self.deliver(side, 1 << 20)
            for stream_id in self.known(1 - side):
                unread = self.unread.get((1 - side, stream_id), 0)
                self.unread[1 - side, stream_id] = 0
                self.sides[1 - side].consumed(stream_id, unread)
            self.deliver(side, 1 << 20)

    @rule(side=st.integers(0, 1), idle_s=st.floats(0, 2 * WINDOW_IDLE_S))
    def idle(self, side: int, idle_s: float) -> None:
        self.now_s += idle_s
        self.sides[side].shrink_idle(self.now_s)

    @rule(side=st.integers(0, 1), size=st.integers(1, 100_000))
    def deliver(self, side: int, size: int) -> None:
        self.flush(1 - side)
        chunk = bytes(self.wires[side][:size])
        del self.wires[side][:size]
        self.sides[side].now_s = self.now_s
        for event in self.sides[side].receive(chunk):
            if isinstance(event, DataReceived):
                key = (side, event.stream_id)
                self.unread[key] = self.unread.get(key, 0) + len(event.data)
                got = self.received.setdefault((1 - side, event.stream_id), bytearray())
                got += event.data
            elif isinstance(event, (StreamWasReset, StreamEnded)):
                self.sides[side].release(event.stream_id)

    @invariant()
    def received_is_a_prefix_of_sent(self) -> None:
        for key, data in getattr(self, "received", {}).items():
            assert self.sent[key].startswith(data)

    @invariant()
    def unread_bytes_add_up(self) -> None:
        for yamux in getattr(self, "sides", ()):
            streams = yamux._streams.values()
            assert yamux.unread_bytes == sum(stream.unread for stream in streams)
            for stream_id, stream in yamux._streams.items():
                assert 0 <= stream.granted <= WINDOW_BYTES_MAX
                held = stream.granted + stream.unread + stream.credit
                held += yamux._data_left if yamux._data_id == stream_id else 0
                assert not stream.is_remote_open or held == stream.receive_window
        if budget := getattr(self, "budget", None):
            assert budget.unread_bytes == sum(yamux.unread_bytes for yamux in self.sides)
            assert budget.grown_bytes == sum(
                stream.receive_window - INITIAL_WINDOW_BYTES
                for yamux in self.sides
                for stream in yamux._streams.values()
            )
            assert budget.unread_bytes <= budget.bytes_max


TestTwoSessions = TwoSessions.TestCase
TestTwoSessions.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
