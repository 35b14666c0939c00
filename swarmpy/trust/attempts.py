"""How often somebody may try, or ask: a window of one minute, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict

from swarmpy.abc import NowSeconds

WRONG_ATTEMPTS_MAX = 3
"""Wrong invites in a minute from one peer or one IP; a person mistypes no faster."""

CONVERSATIONS_MAX = 120
"""Conversations one peer may begin in a minute: each can cost a dozen signatures to verify, and who
reconnects twice a second needs no more."""

WINDOW_S = 60.0

SOURCES_MAX = 1024
"""Peers and IPs remembered; the ones longest without an attempt are forgotten first."""


class Attempts:
    """Counts attempts by source, a PeerId or an IP."""

    def __init__(self, count_max: int = WRONG_ATTEMPTS_MAX) -> None:
        self._count_max = count_max
        self._times: OrderedDict[str, list[NowSeconds]] = OrderedDict()

    def is_blocked(self, source: str, *, now_s: NowSeconds) -> bool:
        """Whether the source made its attempts of this minute already."""
        return len(self._recent(source, now_s)) >= self._count_max

    def add(self, source: str, *, now_s: NowSeconds) -> None:
        """Count an attempt."""
        times = [*self._recent(source, now_s), now_s]
        self._times[source] = times[-self._count_max :]
        self._times.move_to_end(source)
        while len(self._times) > SOURCES_MAX:
            self._times.popitem(last=False)

    def _recent(self, source: str, now_s: NowSeconds) -> list[NowSeconds]:
        return [time for time in self._times.get(source, ()) if now_s - time < WINDOW_S]
