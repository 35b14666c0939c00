"""Paths between simulated machines: links, what stops them, and how what is sent arrives.

A path is one direction between two machines; a lane is one direction of one connection on it. TCP
loses nothing: a lost segment is late by its retransmissions, and what is sent into a partition
arrives after it, unless somebody has given up by then.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from swarmpy.testing.calendar import Calendar, Call

RTO_S = 0.2
"""First retransmission timeout, as Linux has it at least; doubles with each further loss."""

UNSENT_BYTES_MAX = 64 * 1024
"""Bytes that may wait for a slow link, as the TCP host sets it at first."""

_NEVER = -1
"""Life of a lane that began while one of its machines was down."""

RETRANSMISSIONS_MAX = 6
"""Losses of one segment in a row: 12.6 s late; beyond that the connection would be given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction between two machines."""

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    jitter_s: float = 0.0
    """Each segment is late by up to so much, drawn evenly; none overtakes another of its stream."""
    loss: float = 0.0
    """Probability, below 1, that a segment is lost and comes `RTO_S` later, doubling each time."""
    torn: float = 0.0
    """Probability that a byte stream's segment is cut in two at any byte."""


class End(Protocol):
    """One end of a connection: it hears over the path that comes in."""

    def path_changed(self) -> None:
        """The path begins or ceases to carry, or its link is another."""

    def was_reset(self) -> None:
        """The connection is gone, at this end too."""


class Machine:
    """What the world knows of one machine."""

    def __init__(self, ip: str) -> None:
        self.ip = ip
        self.is_up = True
        self.is_frozen = False
        self.has_nat = False
        self.crashes = 0
        self.paths: list[Path] = []
        """From and to this machine, in the order in which they were first used."""


class Path:
    """One direction between two machines."""

    __slots__ = (
        "bytes_sent",
        "ends",
        "holding",
        "is_blocked",
        "is_lossy",
        "life",
        "link",
        "messages_sent",
        "pings_sent",
        "sent_s",
        "source",
        "target",
    )

    def __init__(self, source: Machine, target: Machine, link: Link) -> None:
        self.source = source
        self.target = target
        self.link = link
        self.is_blocked = False  # nothing comes through for now: partition, hold, freeze
        self.is_lossy = False  # what is blocked must be sent again: a partition
        self.life = 0  # counts the crashes of either machine
        self.sent_s = -math.inf  # when the link has sent all it was given
        self.messages_sent = 0
        self.pings_sent = 0  # of simulated hosts: they were not sent, but would have been
        self.bytes_sent = 0
        self.holding: dict[Lane, None] = {}
        self.ends: dict[End, None] = {}

    @property
    def carries(self) -> bool:
        """Whether what is sent now arrives without anything being repaired first."""
        return not self.is_blocked and self.is_up

    @property
    def is_up(self) -> bool:
        """Whether both machines run."""
        return self.source.is_up and self.target.is_up

    def tell(self) -> None:
        """Tell the ends that hear over this path of a change."""
        for end in list(self.ends):
            end.path_changed()

    def arrival_s(self, now_s: float, size: int, source: random.Random) -> float:
        """Return when `size` bytes sent now arrive, and take their time on the link."""
        link = self.link
        if link.bytes_per_s is math.inf:
            sent_s = now_s
        else:
            sent_s = self.sent_s = max(now_s, self.sent_s) + size / link.bytes_per_s
        at_s = sent_s + link.latency_s
        if link.jitter_s:
            at_s += source.random() * link.jitter_s
        if link.loss:
            at_s += _retransmission_s(link.loss, source)
        return at_s

    def room_at_s(self, unsent_bytes_max: int = UNSENT_BYTES_MAX) -> float:
        """Return when the link has so few bytes left to send that a sender may give it more."""
        return self.sent_s - unsent_bytes_max / self.link.bytes_per_s


class Lane:
    """One direction of one connection: what is posted arrives in order, or never."""

    __slots__ = (
        "_calendar",
        "_held",
        "_last_s",
        "_life",
        "_pending",
        "_random",
        "on_refused",
        "path",
    )

    def __init__(
        self,
        path: Path,
        calendar: Calendar,
        source: random.Random,
        on_refused: Callable[[], None] | None = None,
    ) -> None:
        """Make a lane that ends with the next crash at either end.

        Args:
            on_refused: Called when the far machine, restarted since, answers with a reset.
        """
        self.path = path
        self._calendar = calendar
        self._random = source
        self.on_refused = on_refused
        self._life = path.life if path.is_up else _NEVER
        self._last_s = -math.inf
        self._pending = 0
        self._held: deque[Call] = deque()

    @property
    def is_dead(self) -> bool:
        """Whether one of its machines has crashed since: nothing arrives any more."""
        return self._life != self.path.life

    def post(self, size: int, call: Callable[..., object], *args: object) -> None:
        """Send `size` bytes; `call` is what happens when they arrive. At once on a perfect link."""
        path = self.path
        if self._life != path.life:
            self._refuse()
            return
        path.messages_sent += 1
        path.bytes_sent += size
        if (path.is_blocked or self._held) and not self._pending:
            self._hold((call, args))
            return
        now_s = trio.current_time()
        at_s = self._last_s = max(self._last_s, path.arrival_s(now_s, size, self._random))
        if at_s > now_s or self._pending:
            self._pending += 1
            self._calendar.post(at_s, self._arrive, call, args)
        else:
            call(*args)

    def _arrive(self, call: Callable[..., object], args: tuple[object, ...]) -> None:
        self._pending -= 1
        if self._life != self.path.life:
            return
        if self.path.is_blocked or self._held:
            self._hold((call, args))
        else:
            call(*args)

    def _hold(self, call: Call) -> None:
        self._held.append(call)
        self.path.holding[self] = None

    def flush(self) -> None:
        """Let what was held arrive, unless the path is blocked again."""
        while self._held and not self.path.is_blocked:
            call, args = self._held.popleft()
            if self._life == self.path.life:
                call(*args)
        if not self._held:
            self.path.holding.pop(self, None)

    def _refuse(self) -> None:
        path = self.path
        if self.on_refused is not None and path.carries and path.source.is_up:
            round_trip_s = 2 * path.link.latency_s
            self._calendar.post(trio.current_time() + round_trip_s, self.on_refused)


def _retransmission_s(loss: float, source: random.Random) -> float:
    """Draw by how much a segment is late because it was lost, maybe more than once."""
    late_s, timeout_s = 0.0, RTO_S
    for _ in range(RETRANSMISSIONS_MAX):
        if source.random() >= loss:
            break
        late_s += timeout_s
        timeout_s *= 2
    return late_s
