"""Who gets a connection: the gate's word, the bounds of the host, and who makes room for whom.

A stranger is asked about when it comes, at the lowest price; a peer once more when it is proven.
Spec: protocols/noise.md, limits.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from swarmpy import config
from swarmpy.abc import Address, Gate
from swarmpy.errors import DialFailed
from swarmpy.identity import PeerId
from swarmpy.net.connection import NativeConnection
from swarmpy.net.handshakes import Arrivals, Handshakes
from swarmpy.net.table import ConnectionTable, rank_of


class Admission:
    """Decides about strangers at the door, and about peers that are proven."""

    def __init__(self, table: ConnectionTable, *, local: PeerId, gate: Callable[[], Gate]) -> None:
        self._table = table
        self._local = local
        self._gate = gate
        self._arrivals = Arrivals()
        self.handshakes = Handshakes()

    def admits(self, remote: Address) -> bool:
        """Whether a stranger at this address may begin a handshake, the cheapest refusal first."""
        if not self._arrivals.take(remote, now_s=trio.current_time()):
            return False
        has_room = len(self._table) < config.CONNECTIONS_MAX or self._droppable() is not None
        return has_room and self._gate().allow_address(remote)

    def check(self, connection: NativeConnection) -> None:
        """Decide about a connection whose peer is proven; a refused one is closed.

        That peer is this node itself where somebody carries its own handshake back to it.

        Raises:
            DialFailed: The gate or a bound forbids it.
        """
        peer = connection.peer
        is_allowed = peer != self._local and self._gate().allow_peer(peer, connection.direction)
        if is_allowed and self._has_place(connection) and self._has_room(connection):
            return
        connection.close()
        raise DialFailed(f"a connection to {peer} is not allowed, or one too many")

    def _has_place(self, connection: NativeConnection) -> bool:
        """Whether the peer has a place left; a better path takes the place of a worse one."""
        if len(self._table.of(connection.peer)) < config.CONNECTIONS_PER_PEER_MAX:
            return True
        worst = self._table.worst(connection.peer)
        if worst is None or rank_of(worst) <= rank_of(connection):
            return False
        worst.close()
        return True

    def _has_room(self, connection: NativeConnection) -> bool:
        """Whether the host has room; for an inbound connection one that may be dropped makes it.

        What this node dials it has reasons for, and bounds elsewhere.
        """
        if connection.direction == "outbound" or len(self._table) < config.CONNECTIONS_MAX:
            return True
        dropped = self._droppable()
        if dropped is not None:
            dropped.close()
        return dropped is not None

    def _droppable(self) -> NativeConnection | None:
        """Return the oldest connection that the gate does not mind losing.

        Strangers prove themselves quickly or not at all; they must not shut the members out.
        """
        for connection in self._table.oldest_first():
            if connection.is_alive and self._gate().may_drop(connection.peer):
                return connection
        return None
