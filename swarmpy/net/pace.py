"""Pace: how much one stream may send in a turn, by how fast the kernel's buffer is seen to drain.

What was handed to the kernel can no longer be overtaken, so on a slow link little is handed over at
a time. Touches no clock and no socket: the connection tells what it sees.
Spec: protocols/yamux.md, sending.
"""

from __future__ import annotations

from collections import deque

from swarmpy.proto.yamux import FRAME_DATA_BYTES_MAX, NEAR_RTT_S

TURN_S = 0.001
"""A turn is what drains in this time. Shorter ones would cost more wake-ups than they are worth, at
about 40 us each."""

UNSENT_S = 0.002
"""What the kernel may hold unsent drains in this time. An urgent frame waits for that, the turn the
kernel took last and the one already encrypted: together 4 ms, and the 2 ms of packets that Linux
keeps at the interface; less than a frame of 16 KiB takes on 20 Mbit/s."""

TURN_BYTES_MIN = 2 * 1024
"""On the slowest links: 16 ms of 1 Mbit/s, and headers are less than 2 % of it."""

UNSENT_BYTES_MIN = 4 * 1024
"""The same; the kernel asks for more at half of it, a packet's worth before it has nothing left."""

TURN_BYTES_FIRST = 16 * 1024
"""Before the link was measured, unless the round trip says that it is near."""

TURN_BYTES_MAX = FRAME_DATA_BYTES_MAX
"""On a fast link: one frame of the largest size."""

UNSENT_BYTES_NEAR = 64 * 1024
"""What the kernel may hold unsent of a near peer that was not measured yet."""

UNSENT_BYTES_MAX = 512 * 1024
"""The same on the fastest links, `UNSENT_S` of 2 Gbit/s. With 64 KiB the sender was woken ten times
as often on loopback, and bulk cost 9 % more CPU."""

MEASURE_S = 0.01
"""Shortest time a drain rate is measured over: some turns, whatever the kernel's grain."""

_GAIN = 0.5
"""Weight of a new measurement."""

ROUND_TRIPS_KEPT = 8
"""Round trips of which the shortest counts for the windows: of about the last forty seconds."""

_RTT_GAIN = 0.125
"""Weight of a new round trip in the smoothed one (as in RFC 6298)."""


class RoundTrips:
    """The round trips of one connection, as its pings measure them.

    Attributes:
        smoothed_s: What users are told.
        shortest_s: The path itself, without what stood in the way of a ping.
    """

    __slots__ = ("_last", "shortest_s", "smoothed_s")

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=ROUND_TRIPS_KEPT)
        self.smoothed_s = self.shortest_s = 0.0

    def take(self, rtt_s: float) -> None:
        """Take a measured one; before the first nothing is known."""
        before_s = self.smoothed_s if self._last else rtt_s
        self.smoothed_s = before_s + _RTT_GAIN * (rtt_s - before_s)
        self._last.append(rtt_s)
        self.shortest_s = min(self._last)


class Pace:
    """The pace of one connection's sending.

    Attributes:
        turn_bytes: What a stream may send in one turn.
        unsent_bytes: What the kernel may hold that it could not send yet.
        bytes_per_s: The measured drain rate, None before the first measurement.
    """

    __slots__ = ("_full_s", "_taken", "bytes_per_s", "turn_bytes", "unsent_bytes")

    def __init__(self) -> None:
        self.turn_bytes = TURN_BYTES_FIRST
        self.unsent_bytes = TURN_BYTES_FIRST
        self.bytes_per_s: float | None = None
        self._full_s: float | None = None  # when the kernel was last seen full
        self._taken = 0  # bytes it took since then

    def took(self, size: int) -> None:
        """Say that the kernel took bytes while others wait."""
        self._taken += size

    def was_full(self, now_s: float) -> bool:
        """Say that the kernel took no more; return whether the pace changed.

        What it took since it was last full is what drained in between.
        """
        if self._full_s is None:
            self._full_s, self._taken = now_s, 0
            return False
        elapsed_s = now_s - self._full_s
        if elapsed_s < MEASURE_S:
            return False
        sample = self._taken / elapsed_s
        before = sample if self.bytes_per_s is None else self.bytes_per_s
        self.bytes_per_s = before + _GAIN * (sample - before)
        self._full_s, self._taken = now_s, 0
        return self._set(
            min(max(int(self.bytes_per_s * TURN_S), TURN_BYTES_MIN), TURN_BYTES_MAX),
            min(max(int(self.bytes_per_s * UNSENT_S), UNSENT_BYTES_MIN), UNSENT_BYTES_MAX),
        )

    def was_idle(self) -> None:
        """Say that nothing waits to be sent: what drains from now on tells nothing."""
        self._full_s = None

    def is_near(self, rtt_s: float) -> bool:
        """Take the first round trip as a hint; return whether the pace changed."""
        # On the same machine or wire: taken for fast until measured.
        if self.bytes_per_s is not None or rtt_s > NEAR_RTT_S:
            return False
        return self._set(TURN_BYTES_MAX, UNSENT_BYTES_NEAR)

    def _set(self, turn_bytes: int, unsent_bytes: int) -> bool:
        """Set the pace; small changes are not worth a system call."""
        is_small = abs(unsent_bytes - self.unsent_bytes) * 8 <= self.unsent_bytes
        if is_small and abs(turn_bytes - self.turn_bytes) * 8 <= self.turn_bytes:
            return False
        self.turn_bytes, self.unsent_bytes = turn_bytes, unsent_bytes
        self._full_s = None  # full is something else now
        return True
