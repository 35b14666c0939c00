"""How often somebody may show a wrong invite: a window of one minute, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict

from swarmpy.abc import NowSeconds

WRONG_ATTEMPTS_MAX = 3
"""Wrong invites in a minute from one peer or one IP; a person mistypes no faster."""

WINDOW_S = 60.0

SOURCES_MAX = 1024
"""Peers and IPs remembered; the ones longest without a mistake are forgotten first."""


class Attempts:
    """Counts wrong attempts by source, a PeerId or an IP."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, list[NowSeconds]] = OrderedDict()

    def is_blocked(self, source: str, *, now_s: NowSeconds) -> bool:
        """Whether the source made its mistakes of this minute already."""
        return len(self._recent(source, now_s)) >= WRONG_ATTEMPTS_MAX

    def add(self, source: str, *, now_s: NowSeconds) -> None:
        """Count a mistake."""
        times = [*self._recent(source, now_s), now_s]
        self._times[source] = times[-WRONG_ATTEMPTS_MAX:]
        self._times.move_to_end(source)
        while len(self._times) > SOURCES_MAX:
            self._times.popitem(last=False)

    def _recent(self, source: str, now_s: NowSeconds) -> list[NowSeconds]:
        return [time for time in self._times.get(source, ()) if now_s - time < WINDOW_S]
