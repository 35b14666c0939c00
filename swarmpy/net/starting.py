"""Starting the handlers of a connection's inbound streams, a few at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from swarmpy.net.stream import NativeStream

STARTS_AT_ONCE = 4
"""Handlers started for one connection before others have their turn: a peer that opens 64 streams
in one go, again and again, would make everybody else wait for 64 handlers each time."""


class Starts:
    """Of many streams that come at once the later ones wait their turn."""

    def __init__(
        self, nursery: trio.Nursery, serve: Callable[[NativeStream], Awaitable[None]]
    ) -> None:
        """Start handlers in `nursery`: `serve` is run for each stream."""
        self._nursery = nursery
        self._serve = serve
        self._started = 0  # for the streams that the last read opened
        self._waiting: deque[NativeStream] = deque()

    def next_read(self) -> None:
        """Bytes were read anew: others had their turn in between."""
        self._started = 0

    def start(self, stream: NativeStream) -> None:
        """Serve a stream now, or once those before it were started."""
        if not self._waiting and self._started < STARTS_AT_ONCE:
            self._started += 1
            self._nursery.start_soon(self._serve, stream)
            return
        self._waiting.append(stream)
        if len(self._waiting) == 1:
            self._nursery.start_soon(self._start_others)

    async def _start_others(self) -> None:
        while self._waiting:
            await trio.lowlevel.checkpoint()
            for _ in range(min(STARTS_AT_ONCE, len(self._waiting))):
                self._nursery.start_soon(self._serve, self._waiting.popleft())
