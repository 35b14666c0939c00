"""Pace: turns as long as the link makes them, and nothing concluded from an idle one."""

from __future__ import annotations

import sys

import pytest

from swarmpy.abc import Address
from swarmpy.net.pace import (
    MEASURE_S,
    NEAR_RTT_S,
    TURN_BYTES_FIRST,
    TURN_BYTES_MAX,
    TURN_BYTES_MIN,
    TURN_S,
    UNSENT_BYTES_MAX,
    UNSENT_BYTES_MIN,
    UNSENT_BYTES_NEAR,
    UNSENT_S,
    Pace,
)
from swarmpy.net.tcp import TcpNetwork, TcpStream


def drained(pace: Pace, bytes_per_s: float, *, rounds: int = 40) -> Pace:
    """Let the kernel's buffer drain at a rate, and be full again every `MEASURE_S`."""
    for index in range(rounds):
        pace.was_full(index * MEASURE_S)
        pace.took(round(bytes_per_s * MEASURE_S))
    return pace


@pytest.mark.parametrize(
    ("bytes_per_s", "turn_bytes"),
    [
        (1, TURN_BYTES_MIN),
        (TURN_BYTES_MIN / TURN_S * 0.9, TURN_BYTES_MIN),
        (2.5e6, 2.5e6 * TURN_S),
        (12.5e6, 12.5e6 * TURN_S),
        (TURN_BYTES_MAX / TURN_S * 1.1, TURN_BYTES_MAX),
        (UNSENT_BYTES_MAX / UNSENT_S * 1.1, TURN_BYTES_MAX),
        (1e12, TURN_BYTES_MAX),
    ],
)
def test_a_turn_is_what_drains_in_its_time_within_bounds(
    bytes_per_s: float, turn_bytes: float
) -> None:
    """Changes below an eighth are not worth a system call, so the last one may not show."""
    pace = drained(Pace(), bytes_per_s)
    assert pace.bytes_per_s == pytest.approx(bytes_per_s, rel=0.01, abs=1)
    assert pace.turn_bytes == pytest.approx(turn_bytes, rel=0.126)
    assert TURN_BYTES_MIN <= pace.turn_bytes <= TURN_BYTES_MAX
    unsent_bytes = min(max(bytes_per_s * UNSENT_S, UNSENT_BYTES_MIN), UNSENT_BYTES_MAX)
    assert pace.unsent_bytes == pytest.approx(unsent_bytes, rel=0.126)
    assert UNSENT_BYTES_MIN <= pace.unsent_bytes <= UNSENT_BYTES_MAX


def test_an_urgent_frame_waits_for_less_than_a_16_kib_frame_on_20_mbit_s() -> None:
    """What the kernel holds unsent, the turn it takes then, and the one that is encrypted; with
    4 packets that Linux has at the interface."""
    pace = drained(Pace(), 2.5e6)
    assert pace.unsent_bytes + 2 * pace.turn_bytes + 4 * 1500 <= 16 * 1024 * 1.05


def test_a_link_is_taken_for_slow_until_it_is_known() -> None:
    pace = Pace()
    assert pace.turn_bytes == pace.unsent_bytes == TURN_BYTES_FIRST
    assert not pace.is_near(NEAR_RTT_S * 1.01)
    assert pace.turn_bytes == TURN_BYTES_FIRST


def test_a_near_peer_is_taken_for_fast_until_measured() -> None:
    pace = Pace()
    assert pace.is_near(NEAR_RTT_S)
    assert pace.turn_bytes == TURN_BYTES_MAX
    assert pace.unsent_bytes == UNSENT_BYTES_NEAR
    drained(pace, 2.5e6)
    assert pace.turn_bytes < 10_000
    assert not pace.is_near(NEAR_RTT_S)


def test_no_rate_is_concluded_from_less_than_the_shortest_time() -> None:
    pace = Pace()
    pace.was_full(0.0)
    pace.took(10**6)
    assert not pace.was_full(MEASURE_S * 0.99)
    assert pace.bytes_per_s is None
    assert pace.was_full(MEASURE_S)
    assert pace.bytes_per_s == 10**6 / MEASURE_S


def test_nothing_is_concluded_from_an_idle_time() -> None:
    """The kernel had nothing to send, so how much it took says nothing about the link."""
    pace = drained(Pace(), 12.5e6)
    before = pace.bytes_per_s
    pace.was_idle()
    pace.took(100)
    assert not pace.was_full(1000.0)
    assert pace.bytes_per_s == before


def test_a_small_change_is_none() -> None:
    pace = drained(Pace(), 10e6)
    turn_bytes = pace.turn_bytes
    drained(pace, 10.5e6)
    assert pace.turn_bytes == turn_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much is unsent")
@pytest.mark.parametrize("limit", [8 * 1024, 16 * 1024, 24 * 1024])
async def test_a_socket_takes_no_more_than_a_turn_beyond_what_may_lie_unsent(limit: int) -> None:
    """Goal: the bound is kept where the kernel alone would fill a segment it has begun.

    Method: a peer that never reads, so that what is sent stays in the sender's kernel.
    """
    listener = await TcpNetwork().listen(Address("/ip4/127.0.0.1/tcp/0"))
    near = await TcpNetwork().dial(listener.address)
    far = await listener.accept()
    assert isinstance(near, TcpStream)
    near.limit_unsent(limit)
    turn = memoryview(bytes(1000))
    while near.send_nowait(turn):
        pass
    assert limit <= near._unsent_bytes() < limit + len(turn)
    near.limit_unsent(2 * limit)
    while near.send_nowait(turn):
        pass
    assert 2 * limit <= near._unsent_bytes() < 2 * limit + len(turn)
    for closed in (near, far, listener):
        closed.close()
    near.limit_unsent(limit)
