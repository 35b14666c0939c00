"""Links of a ring: control channels (local or over a stream) and outgoing edges.

A coordinator speaks to a stage through a `Control`, whether the stage is in this node or far away;
steps and tokens leave a node through an `OutEdge`. Spec: protocols/pipeline.md, section "Streams".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar, get_args

import msgspec
import trio

from swarmpy import errors
from swarmpy.abc import Host, Priority, ProtocolId
from swarmpy.errors import NetworkError, ProtocolError, SwarmError
from swarmpy.identity import PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.pipeline.audience import Audience, send_private
from swarmpy.proto import pipeline as messages

PROTOCOL = ProtocolId(messages.PROTOCOL)

CONTROL_MESSAGES_MAX = 2 * messages.SESSIONS_MAX
"""Control messages that may wait: a failure and a close of every session."""

Spawn = Callable[[Callable[[], Awaitable[None]]], None]
"""Runs a task until it ends or its service is closed."""

S = TypeVar("S", bound=msgspec.Struct)
R = TypeVar("R")


def error_name(error: SwarmError) -> messages.ErrorName:
    """The class of an error as one peer names it to another."""
    for kind in type(error).__mro__:
        for name in get_args(messages.ErrorName):
            if name == kind.__name__:
                return name  # type: ignore[no-any-return]
    return "PipelineError"


def error_of(name: messages.ErrorName, message: str) -> SwarmError:
    """The error a peer named."""
    kind: type[SwarmError] = getattr(errors, name)
    return kind(message)


class Control(Generic[S, R]):
    """One end of a control channel: sends S, receives R.

    Sending never waits, so that a cancelled request can still say goodbye.
    """

    def __init__(
        self,
        peer: PeerId,
        outbox: trio.MemorySendChannel[S],
        inbox: trio.MemoryReceiveChannel[R],
    ) -> None:
        self.peer = peer
        """Who is at the other end."""
        self._outbox = outbox
        self._inbox = inbox

    def send_nowait(self, message: S) -> None:
        """Queue a message; nobody is told if the other end is gone.

        A full queue closes the channel: whoever reads that slowly is not there.
        """
        try:
            self._outbox.send_nowait(message)
        except trio.WouldBlock:
            self.close()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def receive(self) -> R | None:
        """Wait for the next message; None once either end has closed."""
        try:
            return await self._inbox.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            return None

    def close(self) -> None:
        """Close this end; what was sent can still be received."""
        self._outbox.close()
        self._inbox.close()

    async def deliver(self, message: S) -> bool:
        """Send and wait for room; False if the other end is gone."""
        try:
            await self._outbox.send(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True


StageControl = Control[messages.Report, messages.Command]
"""A stage's end."""

CoordinatorControl = Control[messages.Command, messages.Report]
"""A coordinator's end."""


def control_pair(*, coordinator: PeerId, stage: PeerId) -> tuple[CoordinatorControl, StageControl]:
    """Return the two ends of a channel inside this node."""
    commands = trio.open_memory_channel[messages.Command](CONTROL_MESSAGES_MAX)
    reports = trio.open_memory_channel[messages.Report](CONTROL_MESSAGES_MAX)
    return (
        Control(stage, commands[0], reports[1]),
        Control(coordinator, reports[0], commands[1]),
    )


async def carry(stream: MessageStream, control: Control[Any, Any], kind: Any) -> SwarmError | None:
    """Carry a channel over a stream: what the stream brings into `control`, and what that receives.

    Returns once either side has ended; the channel is closed then.

    Returns:
        What broke the stream (a `ProtocolError` where it brought something else than `kind`), None
        after a clean end.
    """
    broken: SwarmError | None = None
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            nonlocal broken
            try:
                while (message := await stream.receive_or_end(kind)) is not None:
                    if not await control.deliver(message):
                        break
            except (NetworkError, ProtocolError) as error:
                broken = error
            control.close()

        nursery.start_soon(receive)
        try:
            while (command := await control.receive()) is not None:
                await stream.send(command)
            await stream.close_write()
        except NetworkError as error:
            broken = broken or error
        control.close()
        nursery.cancel_scope.cancel()
    if broken is not None:
        stream.reset()
    return broken


class OutEdge:
    """A stream of steps or tokens to one peer, opened at its first frame."""

    def __init__(
        self,
        host: Host,
        peer: PeerId,
        first: messages.Edge,
        *,
        spawn: Spawn | None = None,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        """Args:
        spawn, on_lost: Where both are given, the edge is watched and its loss told at once.
        """
        self.peer = peer
        self._host = host
        self._first = first
        self._spawn = spawn
        self._on_lost = on_lost
        self._lock = trio.Lock()
        self._messages: MessageStream | None = None
        self._is_closed = False

    async def send(self, audience: Audience, frame: bytes) -> None:
        """Send one frame, in the order of calls.

        Raises:
            LocalProtocolError: The peer is not in the audience.
            StreamReset, ConnectionLost: The edge broke; the next call opens it anew.
        """
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()
        try:
            stream = self._messages
            if stream is None:
                audience.require(self.peer)
                stream = await self._open()
            await send_private(stream, audience, frame)
        except (NetworkError, ProtocolError):
            self._messages = None
            raise
        finally:
            self._lock.release()

    async def finish(self) -> None:
        """Say that no more frames follow."""
        stream, self._messages = self._messages, None
        if stream is not None:
            await stream.close_write()

    def close(self) -> None:
        """Give the edge up; its loss is no longer told."""
        self._is_closed = True
        stream, self._messages = self._messages, None
        if stream is not None:
            stream.reset()

    async def _open(self) -> MessageStream:
        priority = Priority.PREFILL if self._first.kind == "bulk" else Priority.DECODE
        stream = MessageStream(
            await self._host.open_stream(self.peer, [PROTOCOL], priority=priority)
        )
        await stream.send(self._first)
        self._messages = stream
        if self._spawn is not None:
            self._spawn(lambda: self._watch(stream))
        return stream

    async def _watch(self, stream: MessageStream) -> None:
        """Wait for the stream's end: nothing is ever received here."""
        reason = "it ended the stream"
        try:
            if await stream.receive_frame(0) is not None:
                reason = "it answered on a one-way stream"
        except (NetworkError, ProtocolError) as error:
            reason = str(error)
        if self._messages is stream:
            self._messages = None
        stream.reset()
        if not self._is_closed and self._on_lost is not None:
            self._on_lost(f"the link to {self.peer} broke: {reason}")
