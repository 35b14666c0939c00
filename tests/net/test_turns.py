"""Turns: who sends next on a connection that could not send for a while.

The link refuses everything until all senders wait, and then takes all of it at once: only the turns
decide the order, never a full kernel.
"""

from __future__ import annotations

from contextlib import suppress

import trio
import trio.testing
from test_cancelled_sends import Tap
from test_upgrade import Role, byte_streams, upgraded_end

from swarmpy import config
from swarmpy.abc import ByteStream, Priority, ProtocolId
from swarmpy.errors import ConnectionLost
from swarmpy.net.connection import NativeConnection
from swarmpy.net.pace import TURN_BYTES_FIRST
from swarmpy.net.stream import NativeStream

SINK = ProtocolId("/swarmpy-test/sink/1")

TIME_S_MAX = 60.0
"""Virtual seconds after which who has not sent never will."""

Sender = tuple[str, Priority, int, int]
"""A name of one letter, a class, messages sent back to back, and turns in each of them."""


async def order_of(*senders: Sender, is_read: bool = True) -> str:
    """Return whose turns went out, in order, where all of them came one after the other.

    Args:
        is_read: Whether the peer reads, and so grants more than a window.
    """
    ends = await byte_streams()
    tap = Tap(ends[0])
    made: dict[str, NativeConnection] = {}

    async def make(role: Role, end: ByteStream) -> None:
        made[role] = await upgraded_end(role, end)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make, "initiator", tap)
        nursery.start_soon(make, "responder", ends[1])
    near, far = made["initiator"], made["responder"]
    names: dict[int, str] = {}
    order: list[str] = []
    send_data = near.send_data

    def note(stream_id: int, data: memoryview) -> None:
        order.append(names.get(stream_id, ""))
        send_data(stream_id, data)

    async def drain(stream: NativeStream) -> None:
        with suppress(ConnectionLost):  # the other end is cancelled first, now and then
            while is_read and await stream.receive_some():
                pass
        await trio.sleep_forever()

    async def send(stream: NativeStream, messages: int, size: int) -> None:
        for _ in range(messages):
            await stream.send_all(bytes(size))

    near.send_data = note  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.run, drain)
        nursery.start_soon(far.run, drain)
        await trio.testing.wait_all_tasks_blocked()
        tap.shut_after(0)
        await near.open_stream(SINK, Priority.CONTROL).send_all(b"refused")
        async with trio.open_nursery() as sending:
            sending.cancel_scope.deadline = trio.current_time() + TIME_S_MAX
            for name, priority, messages, turns in senders:
                stream = near.open_stream(SINK, priority)
                names[stream.stream_id] = name
                sending.start_soon(send, stream, messages, turns * near.pace.turn_bytes)
                await trio.testing.wait_all_tasks_blocked()
            assert not any(order)
            tap.open()
        nursery.cancel_scope.cancel()
    return "".join(order)


async def test_what_is_less_urgent_waits_for_all_turns_of_a_message(
    autojump_clock: object,
) -> None:
    """Else a token of many turns would wait for as many of a prefill."""
    bulk, urgent = ("b", Priority.BULK, 1, 3), ("u", Priority.DECODE, 1, 3)
    assert await order_of(bulk, urgent) == "uuubbb"


async def test_what_is_more_urgent_goes_first_whoever_waited_longer(
    autojump_clock: object,
) -> None:
    classes = [(str(int(item)), item, 1, 2) for item in Priority]
    expected = "".join(name * 2 for name, *_ in classes)
    assert await order_of(*reversed(classes)) == expected


async def test_senders_of_one_class_take_turn_by_turn(autojump_clock: object) -> None:
    senders = [(name, Priority.PREFILL, 1, 3) for name in "abc"]
    assert await order_of(*senders) == "abcabcabc"


async def test_who_sends_message_after_message_waits_in_between(autojump_clock: object) -> None:
    """Goal: a sender that never waits does not go before those that do. The next one was given the
    turn and has not run yet: until it did, the connection is busy."""
    busy, other = ("a", Priority.DECODE, 3, 1), ("b", Priority.DECODE, 3, 1)
    assert await order_of(busy, other) == "ababab"


async def test_who_waits_for_the_peer_to_read_hands_its_turn_on(autojump_clock: object) -> None:
    """Goal: a stream that its peer leaves unread holds up no other, however urgent it is."""
    turns = config.STREAM_WINDOW_BYTES // TURN_BYTES_FIRST
    stuck, other = ("s", Priority.DECODE, 1, turns + 1), ("o", Priority.BULK, 1, 1)
    assert await order_of(stuck, other, is_read=False) == "s" * turns + "o"
