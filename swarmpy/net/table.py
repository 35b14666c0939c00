"""The open connections of a host, and which of several to one peer is the one to use.

The better path wins. Of one path both ends keep, after a simultaneous dial, the connection whose
initiator has the smaller PeerId; each decides alone and both decide alike.
Spec: protocols/multistream.md, section 4.
"""

from __future__ import annotations

import trio

from swarmpy.abc import Connection
from swarmpy.identity import PeerId
from swarmpy.net.connection import NativeConnection

DIRECT, RELAYED, LIMITED = range(3)


def rank_of(connection: Connection) -> int:
    """Return how good a connection's path is, the best first."""
    if connection.limit is not None:
        return LIMITED
    return DIRECT if connection.path == "direct" else RELAYED


class ConnectionTable:
    """Open connections by peer."""

    def __init__(self, local: PeerId) -> None:
        self._local = local
        self._by_peer: dict[PeerId, list[NativeConnection]] = {}
        self._opened_s: dict[NativeConnection, float] = {}

    def __len__(self) -> int:
        return len(self._opened_s)

    def all(self) -> list[NativeConnection]:
        """Return the connections in PeerId order."""
        return [item for peer in sorted(self._by_peer) for item in self._by_peer[peer]]

    def oldest_first(self) -> list[NativeConnection]:
        """Return the connections, those that came first in front."""
        return list(self._opened_s)

    def of(self, peer: PeerId) -> list[NativeConnection]:
        """Return a peer's connections, those that came first in front."""
        return list(self._by_peer.get(peer, ()))

    def age_s(self, connection: NativeConnection) -> float:
        """Return for how long a connection has been in the table, in seconds."""
        return trio.current_time() - self._opened_s[connection]

    def add(self, connection: NativeConnection) -> None:
        """Add a connection."""
        self._by_peer.setdefault(connection.peer, []).append(connection)
        self._opened_s[connection] = trio.current_time()

    def remove(self, connection: NativeConnection) -> None:
        """Remove a connection."""
        del self._opened_s[connection]
        items = self._by_peer[connection.peer]
        items.remove(connection)
        if not items:
            del self._by_peer[connection.peer]

    def best(self, peer: PeerId, *, allow_limited: bool = True) -> NativeConnection | None:
        """Return the connection for new streams, None if there is none, or only limited ones.

        That is the best path's; of one path the smaller initiator's; of that the newest.
        """
        items = [
            item
            for item in self._by_peer.get(peer, ())
            if item.is_open and (allow_limited or item.limit is None)
        ]
        return min(
            reversed(items), key=lambda item: (rank_of(item), self._initiator(item)), default=None
        )

    def worst(self, peer: PeerId) -> NativeConnection | None:
        """Return a peer's connection with the worst path, of those the oldest."""
        return max(self._by_peer.get(peer, ()), key=rank_of, default=None)

    def is_outranked(self, connection: NativeConnection) -> bool:
        """Whether a better path to the peer is open: this one then only finishes its streams."""
        best = self.best(connection.peer)
        return best is not None and rank_of(best) < rank_of(connection)

    def is_superseded(self, connection: NativeConnection) -> bool:
        """Whether this end may close a connection that is idle, because there is a better one.

        Of several that one peer initiated on one path only that peer closes the older ones: the
        other end may have seen them come in another order.
        """
        best = self.best(connection.peer)
        if best is None or best is connection:
            return False
        if connection.is_initiator or rank_of(best) < rank_of(connection):
            return True
        return self._initiator(best) != self._initiator(connection)

    def _initiator(self, connection: NativeConnection) -> PeerId:
        return self._local if connection.is_initiator else connection.peer
