"""Keepalive: pings that measure a connection's round trip, and the verdict on a silent peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from swarmpy import config
from swarmpy.errors import PeerTimeout

if TYPE_CHECKING:
    from swarmpy.net.connection import NativeConnection
    from swarmpy.proto.yamux import Yamux

STALL_S = 1.0
"""A timer that is this late tells of a stall of our own: whoever was silent meanwhile may have been
heard all along, and gets the time back."""

_PING_VALUES = 1 << 32


class Keepalive:
    """Asks a peer for signs of life; any byte of it is one."""

    def __init__(self, connection: NativeConnection, yamux: Yamux) -> None:
        self._connection = connection
        self._yamux = yamux
        self._value = 0
        self._sent_s = 0.0  # 0.0: nothing is asked

    async def run(self) -> None:
        """Ping now and then, and give up on a peer that has been silent too long.

        While this process stalls nobody is heard; what came meanwhile is read before any verdict.
        """
        connection = self._connection
        silent_since_s = wake_s = trio.current_time()
        while True:
            now_s = trio.current_time()
            if now_s - wake_s > STALL_S:
                silent_since_s = now_s
            deadline_s = max(connection.heard_s, silent_since_s) + config.KEEPALIVE_TIMEOUT_S
            if now_s >= deadline_s:
                timeout_s = config.KEEPALIVE_TIMEOUT_S
                connection.close_for(PeerTimeout(f"nothing was heard for {timeout_s:.0f} s"))
                return
            self._value = (self._value + 1) % _PING_VALUES
            self._sent_s = now_s
            self._yamux.shrink_idle(now_s)
            self.ping()
            wake_s = min(now_s + config.KEEPALIVE_INTERVAL_S, deadline_s)
            await trio.sleep_until(wake_s)

    def ping(self) -> None:
        """Ask for a sign of life now."""
        self._yamux.ping(self._value)
        self._connection.flush()

    def take_pong(self, value: int) -> None:
        """Take an answer: the first to the last question tells the round trip."""
        if value == self._value and self._sent_s:
            sent_s, self._sent_s = self._sent_s, 0.0
            self._connection.measured(self._connection.heard_s - sent_s)
