"""How a host comes from several connections to one peer back to the best one, and to a fresh one.

A connection that a better path outranks drains: its streams may finish, for a while. One that is
only superseded on the same path is closed once nothing is on it. One of great age is replaced.
Spec: protocols/multistream.md, section 4.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from swarmpy import config
from swarmpy.abc import Address
from swarmpy.errors import NetworkError, ProtocolError
from swarmpy.identity import PeerId
from swarmpy.net.connection import NativeConnection
from swarmpy.net.table import DIRECT, ConnectionTable, rank_of

logger = logging.getLogger(__name__)

RETIRE_PAUSE_S = 1.0
"""A superseded connection is looked at this often, and lives this long: its other end may just have
opened a stream on it."""

DRAIN_S = 30.0
"""What streams get to finish on a path that a better one outranks; sessions resume on the new."""

AGE_LOOK_S = 60.0
"""Pause between two looks for connections of great age, and between two tries to replace one."""

Redial = Callable[[PeerId, Address], Awaitable[None]]


class Paths:
    """What happens to connections that are not, or should no longer be, the ones to use."""

    def __init__(self, table: ConnectionTable) -> None:
        self._table = table
        self._watched: set[PeerId] = set()

    async def retire(self, peer: PeerId) -> None:
        """Close a peer's connections that have a better one; return when there is none for us."""
        if peer in self._watched:
            return
        self._watched.add(peer)
        draining_since_s: dict[NativeConnection, float] = {}
        try:
            while superseded := [
                item for item in self._table.of(peer) if self._table.is_superseded(item)
            ]:
                now_s = trio.current_time()
                draining_since_s = {
                    item: draining_since_s.get(item, now_s)
                    for item in superseded
                    if self._table.is_outranked(item)
                }
                await trio.sleep(RETIRE_PAUSE_S)
                for connection in superseded:
                    self._close_if_done(connection, draining_since_s.get(connection))
        finally:
            self._watched.discard(peer)

    def _close_if_done(self, connection: NativeConnection, since_s: float | None) -> None:
        """Close a connection that is idle, or has drained since then for long enough."""
        if not self._table.is_superseded(connection):
            return
        is_over = since_s is not None and trio.current_time() - since_s >= DRAIN_S
        if is_over or not connection.stream_count:
            connection.close()

    async def renew_forever(self, redial: Redial) -> None:
        """Replace what has become old, once it is idle: its dialler dials again.

        Noise has no rekey here; the new connection supersedes the old one, which then retires.
        """
        while True:
            await trio.sleep(AGE_LOOK_S)
            for connection in self._table.all():
                if not self._is_due(connection):
                    continue
                try:
                    await redial(connection.peer, connection.remote_address)
                except (NetworkError, ProtocolError) as error:
                    fields = {"peer": connection.peer, "error": str(error)}
                    logger.debug("renewal.failed", extra=fields)

    def _is_due(self, connection: NativeConnection) -> bool:
        return (
            connection.is_alive
            and connection.direction == "outbound"
            and rank_of(connection) == DIRECT
            and self._table.best(connection.peer, allow_limited=False) is connection
            and self._table.age_s(connection) >= config.CONNECTION_AGE_S_MAX
            and not connection.stream_count
        )
