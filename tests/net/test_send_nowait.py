"""What a native stream takes without waiting, and what it does not."""

from __future__ import annotations

from net_hosts import ECHO, World, connect, echo, exchange, receive_exactly

from swarmpy.abc import Stream

MESSAGE = b"x" * 100


async def agreed_stream(world: World) -> Stream:
    """Return a stream to an echo, on which both sides have said something."""
    alice, bob = await world.host("alice"), await world.host("bob")
    bob.set_handler(ECHO, echo)
    stream = await alice.open_stream(await connect(alice, bob), [ECHO])
    await exchange(stream, b"hello")
    return stream


async def test_an_agreed_stream_with_room_takes_a_message_without_waiting(world: World) -> None:
    """Of a host it may be that it takes none; the native one takes what can go at once."""
    stream = await agreed_stream(world)

    assert stream.send_nowait(MESSAGE)

    assert await receive_exactly(stream, len(MESSAGE)) == MESSAGE


async def test_a_stream_that_is_not_agreed_on_takes_nothing(world: World) -> None:
    """Its proposal goes out with the first bytes, by a task that may wait."""
    alice, bob = await world.host("alice"), await world.host("bob")
    bob.set_handler(ECHO, echo)
    stream = await alice.open_stream(await connect(alice, bob), [ECHO])

    assert not stream.send_nowait(MESSAGE)

    assert await exchange(stream, MESSAGE) == MESSAGE


async def test_a_stream_whose_end_was_sent_takes_nothing(world: World) -> None:
    stream = await agreed_stream(world)
    await stream.close_write()

    assert not stream.send_nowait(MESSAGE)
