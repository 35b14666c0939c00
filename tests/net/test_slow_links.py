"""Links that are long, slow or stalled: throughput, what urgent frames wait for, keepalive."""

from __future__ import annotations

import statistics

import pytest
import trio
import trio.testing
from net_hosts import (
    ECHO,
    World,
    connect,
    echo,
    exchange,
    receive_all,
)

from swarmpy.abc import Priority, ProtocolId, Stream
from swarmpy.errors import ConnectionLost, StreamReset
from swarmpy.identity import PeerId
from swarmpy.net.connection import HANDLER_GRACE_S
from swarmpy.net.host import NativeHost
from swarmpy.proto.yamux import INITIAL_WINDOW_BYTES, WINDOW_BYTES_MAX, WINDOW_IDLE_S
from swarmpy.testing import Link

SINK = ProtocolId("/swarmpy-test/sink/1")
PAUSE = ProtocolId("/swarmpy-test/pause/1")
ALICE, BOB = "10.0.0.1", "10.0.0.2"
MIB = 1024 * 1024
MBIT = 125_000.0
"""Bytes per second."""


async def sink(stream: Stream) -> None:
    """Handler that reads everything and says when that is done."""
    while await stream.receive_some():
        pass
    await stream.send_all(b"done")


async def hosts_over(
    sim: World, *, there: Link, back: Link | None = None
) -> tuple[NativeHost, NativeHost, PeerId]:
    """Return two connected hosts, once the round trip is known, and the second one's id."""
    alice, bob = await sim.host("alice"), await sim.host("bob")
    for host in (alice, bob):
        host.set_handler(ECHO, echo)
        host.set_handler(SINK, sink)
    sim.sim.set_link(ALICE, BOB, there)
    sim.sim.set_link(BOB, ALICE, back or there)
    peer = await connect(alice, bob)
    await trio.sleep(1)
    return alice, bob, peer


async def transfer(host: NativeHost, peer: PeerId, size: int, priority: Priority) -> float:
    """Send bytes that the other end reads to their end, and return the seconds it took."""
    start_s = trio.current_time()
    stream = await host.open_stream(peer, [SINK], priority=priority)
    await stream.send_all(bytes(size))
    await stream.close_write()
    assert await receive_all(stream) == b"done"
    return trio.current_time() - start_s


# Windows ---------------------------------------------------------------------------------------


async def test_a_long_fast_link_is_filled(sim: World, autojump_clock: object) -> None:
    """Goal: 0.9 of 100 Mbit/s over 30 ms. A window of 256 KiB alone would carry 0.7."""
    link = Link(latency_s=0.015, bytes_per_s=100 * MBIT)
    alice, bob, peer = await hosts_over(sim, there=link)
    size = 32 * MIB
    time_s = await transfer(alice, peer, size, Priority.BULK)
    assert size / time_s > 0.9 * link.bytes_per_s
    # What the windows grew by went back to the budget with the stream.
    assert bob._scratch.budget.grown_bytes == 0


async def test_an_idle_window_goes_back_to_the_budget(sim: World, autojump_clock: object) -> None:
    link = Link(latency_s=0.015, bytes_per_s=100 * MBIT)
    alice, bob, peer = await hosts_over(sim, there=link)
    stream = await alice.open_stream(peer, [SINK])
    await stream.send_all(bytes(8 * MIB))
    await trio.sleep(1)
    budget = bob._scratch.budget
    assert INITIAL_WINDOW_BYTES <= budget.grown_bytes < WINDOW_BYTES_MAX
    await trio.sleep(WINDOW_IDLE_S + 6)
    assert budget.grown_bytes == 0
    await stream.send_all(bytes(8 * MIB))
    await stream.close_write()
    assert await receive_all(stream) == b"done"


async def test_past_the_nodes_budget_the_oldest_unread_stream_of_any_peer_is_reset(
    sim: World, autojump_clock: object
) -> None:
    """Its handler is told, its peer is told, and the newer ones go on."""
    told: list[str] = []
    bob = await sim.host("bob")
    bob._scratch.budget.bytes_max = INITIAL_WINDOW_BYTES + 100_000

    async def dawdle(stream: Stream) -> None:
        await trio.sleep(10)
        try:
            told.append(str(len(await receive_all(stream))))
        except StreamReset as error:
            told.append(str(error))

    bob.set_handler(SINK, dawdle)
    streams = []
    for name in ("carol", "dave"):
        host = await sim.host(name)
        stream = await host.open_stream(await connect(host, bob), [SINK])
        await stream.send_all(bytes(200_000))
        await stream.close_write()
        await trio.sleep(1)
        streams.append(stream)
    first, second = streams
    with pytest.raises(StreamReset):
        await first.receive_some()
    assert await receive_all(second) == b""
    assert sorted(told)[0] == "200000"
    assert "too many bytes lay unread" in sorted(told)[1]
    assert bob._scratch.budget.unread_bytes == 0


async def test_what_a_connection_left_unread_counts_until_its_handlers_are_gone(
    sim: World, autojump_clock: object
) -> None:
    """Else a peer could fill the memory of one handler after the other by reconnecting."""
    alice, bob = await sim.host("alice"), await sim.host("bob")

    async def hang(_: Stream) -> None:
        await trio.sleep_forever()

    bob.set_handler(PAUSE, hang)
    stream = await alice.open_stream(await connect(alice, bob), [PAUSE])
    await stream.send_all(bytes(100_000))
    await trio.sleep(1)
    alice.close()
    await trio.sleep(1)
    budget = bob._scratch.budget
    assert not bob.connections
    assert budget.unread_bytes >= 100_000
    await trio.sleep(HANDLER_GRACE_S)
    assert budget.unread_bytes == 0


async def test_a_reader_that_pauses_stalls_only_its_own_stream(
    sim: World, autojump_clock: object
) -> None:
    """Goal: 60 s of not reading cost the other streams nothing, and no byte is lost."""
    link = Link(latency_s=0.001)
    alice, bob, peer = await hosts_over(sim, there=link)

    async def pause(stream: Stream) -> None:
        received = 0
        while received < MIB:
            received += len(await stream.receive_some())
        await trio.sleep(60)
        rest = len(await receive_all(stream))
        await stream.send_all(str(received + rest).encode())

    bob.set_handler(PAUSE, pause)
    urgent = await alice.open_stream(peer, [ECHO])
    idle_s = await round_trip(urgent)
    async with trio.open_nursery() as nursery:
        stalled = await alice.open_stream(peer, [PAUSE], priority=Priority.BULK)
        nursery.start_soon(stalled.send_all, bytes(16 * MIB))
        await trio.sleep(5)
        assert bob._scratch.budget.unread_bytes > 0
        for _ in range(50):
            assert await round_trip(urgent) == pytest.approx(idle_s)
            await trio.sleep(1)
    await stalled.close_write()
    assert await receive_all(stalled) == str(16 * MIB).encode()


# Priorities ------------------------------------------------------------------------------------


async def round_trip(stream: Stream, size: int = 64) -> float:
    start_s = trio.current_time()
    await exchange(stream, bytes(size))
    return trio.current_time() - start_s


@pytest.mark.parametrize("latency_s", [0.001, 0.015])
@pytest.mark.parametrize("size", [64, 8192, 16384])
async def test_a_token_waits_for_less_than_a_frame_of_the_prefill_beside_it(
    sim: World, autojump_clock: object, latency_s: float, size: int
) -> None:
    """Goal: over 20 Mbit/s, p99 of a decode step beside a 4 MiB prefill and a shard's download is
    at most one 16 KiB frame (6.6 ms) and 1.2 of the idle time."""
    link = Link(latency_s=latency_s, bytes_per_s=20 * MBIT)
    alice, _, peer = await hosts_over(sim, there=link)
    decode = await alice.open_stream(peer, [ECHO], priority=Priority.DECODE)
    idle_s = statistics.median([await round_trip(decode, size) for _ in range(20)])
    steps: list[float] = []

    async def prefill() -> None:
        while True:
            await transfer(alice, peer, 4 * MIB, Priority.PREFILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(prefill)
        nursery.start_soon(transfer, alice, peer, 256 * MIB, Priority.BULK)
        for _ in range(200):
            steps.append(await round_trip(decode, size))
            await trio.sleep(0.0137)
        nursery.cancel_scope.cancel()
    p99_s = statistics.quantiles(steps, n=100)[98]
    assert p99_s <= 16 * 1024 / link.bytes_per_s + 1.2 * idle_s
    # The link was not left idle for it.
    sent = sim.sim.traffic(ALICE).bytes
    assert sent > 0.8 * link.bytes_per_s * sum(steps)


async def test_an_urgent_message_of_many_turns_shares_none_of_them_with_bulk(
    sim: World, autojump_clock: object
) -> None:
    """Goal: what is less urgent does not slip in between its turns. Method: 64 KiB, 30 turns."""
    link = Link(latency_s=0.001, bytes_per_s=20 * MBIT)
    alice, _, peer = await hosts_over(sim, there=link, back=Link(latency_s=0.001))
    decode = await alice.open_stream(peer, [ECHO], priority=Priority.DECODE)
    size = 64 * 1024
    idle_s = await round_trip(decode, size)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transfer, alice, peer, 64 * MIB, Priority.BULK)
        await trio.sleep(2)
        for _ in range(10):
            assert await round_trip(decode, size) < idle_s + 16 * 1024 / link.bytes_per_s
        nursery.cancel_scope.cancel()


async def test_senders_of_one_class_share_the_link_to_the_turn(
    sim: World, autojump_clock: object
) -> None:
    """Each fits its window, so nothing but the turns keeps the first from going all the way."""
    link = Link(latency_s=0.01, bytes_per_s=MBIT)
    alice, _, peer = await hosts_over(sim, there=link)
    finished_s: list[float] = []

    async def send() -> None:
        finished_s.append(await transfer(alice, peer, 200_000, Priority.PREFILL))

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(send)
    # One after the other would be done at 1.6 and 3.2 s.
    assert finished_s[0] > 0.8 * finished_s[1]


# Keepalive -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stall_at_s", [2.0, 4.9, 7.3, 9.9, 14.5])
async def test_a_slow_uplink_and_a_stalled_peer_are_no_reason_to_cut(
    sim: World, autojump_clock: object, stall_at_s: float
) -> None:
    """4 MiB through 1 Mbit/s take 34 s; for 5 of them the peer neither reads nor answers."""
    uplink = Link(latency_s=0.03, bytes_per_s=MBIT)
    alice, bob, peer = await hosts_over(sim, there=uplink, back=Link(latency_s=0.03))
    connection = alice.connections[0]

    async def stall() -> None:
        await trio.sleep(stall_at_s)
        sim.sim.freeze(BOB)
        await trio.sleep(5)
        sim.sim.thaw(BOB)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stall)
        time_s = await transfer(alice, peer, 4 * MIB, Priority.PREFILL)
    assert time_s > 33
    assert alice.connections == [connection]
    assert len(bob.connections) == 1


async def test_pings_do_not_wait_behind_a_backlog(sim: World, autojump_clock: object) -> None:
    """The round trip measured beside a transfer tells of the link, not of what is queued."""
    uplink = Link(latency_s=0.03, bytes_per_s=MBIT)
    alice, _, peer = await hosts_over(sim, there=uplink)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transfer, alice, peer, 4 * MIB, Priority.BULK)
        await trio.sleep(30)
        rtt_s = alice.connections[0].rtt_s
        assert rtt_s is not None
        assert rtt_s < 0.06 + 0.2  # the link's own, and a few frames of 33 ms
        nursery.cancel_scope.cancel()


async def test_after_a_stall_of_our_own_nobody_is_blamed(
    sim: World, mock_clock: trio.testing.MockClock
) -> None:
    """Goal: a process that was held up for 20 s reads what came before it judges its peers.

    Method: the clock leaps, as it does for a process that did not run.
    """
    alice, bob, peer = await hosts_over_at_once(sim)
    stream = await alice.open_stream(peer, [ECHO])
    assert await exchange(stream, b"before") == b"before"
    for _ in range(3):
        mock_clock.jump(20.0)
        await trio.testing.wait_all_tasks_blocked()
    assert await exchange(stream, b"after") == b"after"
    assert len(alice.connections) == len(bob.connections) == 1


async def hosts_over_at_once(sim: World) -> tuple[NativeHost, NativeHost, PeerId]:
    alice, bob = await sim.host("alice"), await sim.host("bob")
    bob.set_handler(ECHO, echo)
    return alice, bob, await connect(alice, bob)


# The end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("closed", "the peer closed it"),
        ("killed", "reset"),
        ("frozen", "nothing was heard"),
    ],
)
async def test_each_end_of_a_peer_is_told_apart(
    sim: World, autojump_clock: object, how: str, expected: str
) -> None:
    """A stream that the peer did not end is lost in each case, and never looks ended."""
    alice, bob, peer = await hosts_over(sim, there=Link(latency_s=0.01))
    stream = await alice.open_stream(peer, [ECHO])
    await exchange(stream, b"hello")
    if how == "closed":
        bob.close()
    elif how == "killed":
        sim.sim.reset(ALICE, BOB)
    else:
        sim.sim.freeze(BOB)
    with pytest.raises(ConnectionLost, match=expected):
        await receive_all(stream)
