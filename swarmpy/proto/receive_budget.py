"""The budget of a node for what its peers make it hold, over all its Yamux sessions.

Sans-IO, like the sessions that share it. Spec: protocols/yamux.md, limits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarmpy.proto.yamux import Yamux

RECEIVE_BUDGET_BYTES = 256 * 1024 * 1024
"""Unread bytes and grown windows of a node, over all its connections."""


class ReceiveBudget:
    """What the peers of a node may make it hold: unread bytes and grown windows of all sessions.

    Past it the streams whose unread bytes are the oldest are reset, whosever they are; the sockets
    are read on.

    Attributes:
        unread_bytes: Received and not yet read, over all sessions.
        grown_bytes: Window granted beyond the initial one, over all streams.
    """

    def __init__(self, bytes_max: int = RECEIVE_BUDGET_BYTES) -> None:
        self.bytes_max = bytes_max
        self.unread_bytes = 0
        self.grown_bytes = 0
        self.serial = 0
        """Counts the moments at which a stream began to hold unread bytes."""
        self._sessions: dict[Yamux, Callable[[int], None]] = {}

    def join(self, session: Yamux, on_reset: Callable[[int], None]) -> None:
        """Let `session` be shed: `on_reset` is told each stream that was reset for the budget."""
        self._sessions[session] = on_reset

    def leave(self, session: Yamux) -> None:
        """Forget a session that is over, and what it held."""
        self._sessions.pop(session, None)
        session.forget_all()

    def take_growth(self, size: int) -> bool:
        """Take `size` bytes for a window that grows; False if they would pass the budget."""
        if self.unread_bytes + self.grown_bytes + size > self.bytes_max:
            return False
        self.grown_bytes += size
        return True

    def shed(self) -> None:
        """Reset the streams with the oldest unread bytes until a sixteenth of the budget is free.

        Not just until it is kept: a flood would have all streams looked through for every frame.
        """
        target = self.bytes_max - self.bytes_max // 16
        waiting = [
            (since, stream_id, session)
            for session in self._sessions
            for since, stream_id in session.unread_streams()
        ]
        waiting.sort(key=lambda item: item[0])
        for _, stream_id, session in waiting:
            if self.unread_bytes <= target:
                return
            session.reset(stream_id)
            self._sessions[session](stream_id)
