"""Yamux: two sessions against each other, in any order of steps."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from yamux_frames import (
    MIB,
    RTT_S,
    session,
    take,
)

from swarmpy.proto.receive_budget import ReceiveBudget
from swarmpy.proto.yamux import (
    FRAME_DATA_BYTES_MAX,
    INITIAL_WINDOW_BYTES,
    WINDOW_BYTES_MAX,
    WINDOW_IDLE_S,
    DataReceived,
    StreamEnded,
    StreamWasReset,
)


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
