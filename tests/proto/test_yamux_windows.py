"""Yamux: windows, how they grow and shrink, and the node's budget for what is unread."""

from __future__ import annotations

import struct

import pytest
from yamux_frames import (
    ACK,
    DATA,
    FIN,
    MIB,
    RST,
    RTT_S,
    WINDOW,
    data_frame,
    frame,
    opened,
    receive,
    take,
)

from swarmpy.errors import LocalProtocolError, RemoteProtocolError
from swarmpy.proto.receive_budget import ReceiveBudget
from swarmpy.proto.yamux import (
    FRAME_DATA_BYTES_MAX,
    GROWTH_BYTES_MAX,
    GROWTH_RTT_S_MIN,
    INITIAL_WINDOW_BYTES,
    NEAR_RTT_S,
    WINDOW_BYTES_MAX,
    WINDOW_BYTES_NEAR_MAX,
    WINDOW_IDLE_S,
    DataReceived,
    WindowOpened,
    Yamux,
)

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


@pytest.mark.parametrize(
    ("rtt_s", "expected"),
    [(NEAR_RTT_S - 1e-6, WINDOW_BYTES_NEAR_MAX), (NEAR_RTT_S, WINDOW_BYTES_MAX)],
)
def test_a_window_to_a_peer_nearby_stops_growing_earlier(rtt_s: float, expected: int) -> None:
    """Method: half of it is read at once, more often than it could double."""
    yamux = opened()
    yamux.rtt_s = rtt_s
    for _ in range(10):
        read_half(yamux, now_s=0.0)
    assert yamux._streams[1].receive_window == expected


def test_a_window_that_grew_far_away_does_not_grow_nearby() -> None:
    """The path became shorter meanwhile: what was granted stays granted."""
    yamux = grown(to=2 * WINDOW_BYTES_NEAR_MAX)
    yamux.rtt_s = NEAR_RTT_S / 2
    assert read_half(yamux, now_s=0.0) == WINDOW_BYTES_NEAR_MAX
    assert yamux._streams[1].receive_window == 2 * WINDOW_BYTES_NEAR_MAX


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
