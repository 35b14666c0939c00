"""A connection between two simulated hosts: two ends, a lane each way, and no task.

Keepalives are not sent: that the other side has fallen silent is known when a fault makes it so,
and the connection ends when a native host's would, `KEEPALIVE_TIMEOUT_S` after the last ping heard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import trio

from swarmpy import config
from swarmpy.abc import Address, Connection, Priority, ProtocolId
from swarmpy.errors import ConnectionLost, PeerTimeout, RemoteProtocolError
from swarmpy.identity import PeerId
from swarmpy.testing.host_stream import HostStream

if TYPE_CHECKING:
    from swarmpy.testing.host import SimHost
    from swarmpy.testing.paths import Path

HANDLER_GRACE_S = 5.0
"""Handlers may tidy up this long after their connection is gone; then they are cancelled."""

_park = trio.lowlevel.wait_task_rescheduled


class HostConnection(Connection):
    """One end of a connection between two simulated hosts."""

    def __init__(
        self,
        host: SimHost,
        peer: PeerId,
        *,
        direction: Literal["inbound", "outbound"],
        local_address: Address,
        remote_address: Address,
        remote_machine: str,
        channel_binding: bytes,
    ) -> None:
        self.peer = peer
        self.direction = direction
        self.path = "direct"
        self.limit = None
        self.local_address = local_address
        self.remote_address = remote_address
        self.channel_binding = channel_binding
        self.is_initiator = direction == "outbound"
        self.far: HostConnection
        """The other end; only deliveries touch it."""
        self.error: Exception | None = None
        """Why the connection ended, None while it lives."""
        self.unyielded = 0
        """Bytes sent since a sending task last let others run."""
        self._host = host
        world = self._world = host.machine.world
        self._way_out: Path = world.path(host.machine.ip, remote_machine)
        self._way_in: Path = world.path(remote_machine, host.machine.ip)
        self._lane = world.lane(self._way_out, on_refused=self.was_reset)
        self._life = self._way_in.life
        self._streams: dict[HostStream, None] = {}
        self._inbound_count = 0
        self._refusals: deque[float] = deque()
        self._senders: tuple[deque[trio.lowlevel.Task], ...] = tuple(deque() for _ in Priority)
        self._is_turn_posted = False
        self._opened_s = self.received_s = trio.current_time()
        self._silent_since_s: float | None = None
        self.rtt_s = self._measured_rtt_s()
        self._way_in.ends[self] = None
        self.path_changed()

    def __repr__(self) -> str:
        state = "open" if self.error is None else "closed"
        return f"<simulated {self.direction} connection to {self.peer}, {state}>"

    # For users -----------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self.error is None

    @property
    def heard_s(self) -> float:
        if self._silent_since_s is not None:
            return self._silent_since_s
        return trio.current_time()  # Whoever is not silent would answer if it were asked.

    @property
    def streams(self) -> list[HostStream]:
        """Streams open now, the oldest first."""
        return list(self._streams)

    @property
    def stream_count(self) -> int:
        """Streams open now, in either direction."""
        return len(self._streams)

    def close(self) -> None:
        self.post("close", self.far.was_closed, "the peer closed it")
        self.fail(ConnectionLost("it was closed here"))

    def close_for(self, error: Exception) -> None:
        """Close because of an error of the peer's; streams and `error` will name it."""
        self.post("close", self.far.was_closed, "it ended without a goodbye")
        self.fail(error)

    # Streams -------------------------------------------------------------------

    def open_stream(self, protocols: tuple[ProtocolId, ...], priority: Priority) -> HostStream:
        """Open a stream; the peer hears of it with its first bytes.

        Raises:
            ConnectionLost: The connection has ended.
        """
        self.raise_if_lost()
        near = HostStream(self, protocols, priority=priority)
        far = HostStream(self.far, protocols[:1], priority=priority, is_inbound=True)
        near.far, far.far = far, near
        self._streams[near] = None
        return near

    def announce(self, stream: HostStream, protocols: tuple[ProtocolId, ...]) -> None:
        """Tell the peer of a stream."""
        self.post("open", self.far.take_stream, stream.far, protocols)

    def take_stream(self, stream: HostStream, protocols: tuple[ProtocolId, ...]) -> None:
        """Serve an inbound stream, or refuse it."""
        if self.error is not None:
            return
        if self._inbound_count >= config.INBOUND_STREAMS_MAX:
            stream.reset()
            self._count_refusal()
            return
        protocol = self._host.choose(self.peer, protocols)
        if protocol is None:
            self.post("refuse", stream.far.refuse)
            return
        stream.protocol = protocol
        if len(protocols) > 1:
            self.post("agree", stream.far.agree, protocol)
        self._streams[stream] = None
        self._inbound_count += 1
        self._host.serve(stream)

    def release(self, stream: HostStream) -> None:
        """An inbound stream's handler is through: its place is free."""
        self._inbound_count -= 1
        self._streams.pop(stream, None)

    def forget(self, stream: HostStream) -> None:
        """A stream is over."""
        if stream.scope is None:
            self._streams.pop(stream, None)

    # Sending -------------------------------------------------------------------

    def post(self, kind: str, call: Callable[..., object], *args: object) -> None:
        """Send word of something that carries no payload, unless the connection has ended."""
        if self.error is None:
            if kind:
                self._world.observe(kind, self.local_address, self.remote_address, b"")
            self._lane.post(0, call, *args)

    def post_data(self, data: bytes, call: Callable[[bytes], None]) -> None:
        """Send payload."""
        self._world.observe("data", self.local_address, self.remote_address, data)
        self._lane.post(len(data), call, data)

    @property
    def is_slow(self) -> bool:
        """Whether the link has a bandwidth."""
        return self._way_out.link.bytes_per_s != float("inf")

    @property
    def is_congested(self) -> bool:
        """Whether the link still has as much to send as may wait for it."""
        return self.is_slow and self._way_out.room_at_s() > trio.current_time()

    async def wait_turn(self, priority: Priority) -> None:
        """Wait until the link has room and no more urgent sender waits."""
        waiting = self._senders[priority]
        task = trio.lowlevel.current_task()
        waiting.append(task)
        self.pass_turn()

        def abort(_: object) -> trio.lowlevel.Abort:
            waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await _park(abort)

    def pass_turn(self) -> None:
        """Let the next sender go once the link has room."""
        if not self._is_turn_posted and any(self._senders):
            self._is_turn_posted = True
            self._world.calendar.post(self._way_out.room_at_s(), self._give_turn)

    def _give_turn(self) -> None:
        self._is_turn_posted = False
        for waiting in self._senders:
            if waiting:
                trio.lowlevel.reschedule(waiting.popleft())
                return

    # Life and death ------------------------------------------------------------

    def raise_if_lost(self) -> None:
        """Raise `ConnectionLost`, naming what ended the connection, if it has ended."""
        if self.error is not None:
            raise ConnectionLost(f"connection to {self.peer}: {self.error}") from self.error

    def path_changed(self) -> None:
        """A fault began or ended: the peer is heard, or it is not."""
        way = self._way_in
        self.rtt_s = self._measured_rtt_s()
        hears = way.carries and way.life == self._life
        if hears and self._silent_since_s is not None:
            self._silent_since_s = None
            self.received_s = trio.current_time()
        elif not hears and self._silent_since_s is None:
            last_ping_s = self._next_ping_s() - config.KEEPALIVE_INTERVAL_S
            heard_s = self._silent_since_s = max(self.received_s, last_ping_s)
            deadline_s = heard_s + config.KEEPALIVE_TIMEOUT_S
            self._world.calendar.post(deadline_s, self._silence_over, heard_s)
        if way.life != self._life and way.is_up:
            # The peer's machine runs again and knows nothing of this: its answer to the next ping.
            self._world.calendar.post(self._next_ping_s(), self.was_reset)

    def _silence_over(self, since_s: float) -> None:
        if self.error is None and self._silent_since_s == since_s:
            timeout_s = config.KEEPALIVE_TIMEOUT_S
            self.close_for(PeerTimeout(f"nothing was heard for {timeout_s:.0f} s"))

    def _next_ping_s(self) -> float:
        interval_s = config.KEEPALIVE_INTERVAL_S
        since_s = trio.current_time() - self._opened_s
        return self._opened_s + (since_s // interval_s + 1) * interval_s

    def _measured_rtt_s(self) -> float:
        return self._way_out.link.latency_s + self._way_in.link.latency_s

    def was_reset(self) -> None:
        """The connection was broken on its way."""
        self.fail(ConnectionLost("the simulated connection was reset"))

    def was_closed(self, how: str) -> None:
        """The peer closed the connection."""
        self.fail(ConnectionLost(how))

    def fail(self, error: Exception) -> None:
        """End this end: everybody who waits on it wakes and finds it ended."""
        if self.error is not None:
            return
        self.error = error
        self._way_in.ends.pop(self, None)
        self._count_pings()
        for waiting in self._senders:
            while waiting:
                trio.lowlevel.reschedule(waiting.popleft())
        for stream in list(self._streams):
            stream.connection_closed()
            if stream.scope is not None:
                stream.scope.deadline = trio.current_time() + HANDLER_GRACE_S
        self._host.removed(self)

    def _count_refusal(self) -> None:
        """A flood of streams beyond the bound costs the connection."""
        now_s = trio.current_time()
        self._refusals.append(now_s)
        while self._refusals[0] <= now_s - 1.0:
            self._refusals.popleft()
        if len(self._refusals) > config.RESETS_PER_SECOND_MAX:
            error = RemoteProtocolError("too many streams were refused", peer=self.peer)
            self.close_for(error)

    def _count_pings(self) -> None:
        """Count what keepalives would have sent from this end: a ping and an answer at a time."""
        pings = int((trio.current_time() - self._opened_s) // config.KEEPALIVE_INTERVAL_S)
        self._way_out.pings_sent += 2 * pings
