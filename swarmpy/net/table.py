"""The open connections of a host, and which of several to one peer is the one to use.

After a simultaneous dial both ends keep the connection whose initiator has the smaller PeerId; each
decides alone and both decide alike. Spec: protocols/multistream.md, section 4.
"""

from __future__ import annotations

from swarmpy.identity import PeerId
from swarmpy.net.connection import NativeConnection


class ConnectionTable:
    """Open connections by peer."""

    def __init__(self, local: PeerId) -> None:
        self._local = local
        self._by_peer: dict[PeerId, list[NativeConnection]] = {}

    def __len__(self) -> int:
        return sum(len(items) for items in self._by_peer.values())

    def all(self) -> list[NativeConnection]:
        """Return the connections in PeerId order."""
        return [item for peer in sorted(self._by_peer) for item in self._by_peer[peer]]

    def oldest_first(self) -> list[NativeConnection]:
        """Return the connections, those of the peers that came first in front."""
        return [item for items in self._by_peer.values() for item in items]

    def count(self, peer: PeerId) -> int:
        """Return how many connections a peer has."""
        return len(self._by_peer.get(peer, ()))

    def add(self, connection: NativeConnection) -> None:
        """Add a connection."""
        self._by_peer.setdefault(connection.peer, []).append(connection)

    def remove(self, connection: NativeConnection) -> None:
        """Remove a connection."""
        items = self._by_peer[connection.peer]
        items.remove(connection)
        if not items:
            del self._by_peer[connection.peer]

    def best(self, peer: PeerId) -> NativeConnection | None:
        """Return the connection to use: the smaller initiator's; of one initiator's the newest."""
        items = [item for item in self._by_peer.get(peer, ()) if item.is_open]
        return min(reversed(items), key=self._initiator, default=None)

    def is_superseded(self, connection: NativeConnection) -> bool:
        """Whether this end may close a connection that is idle, because there is a better one.

        Of several that one peer initiated only that peer closes the older ones: the other end may
        have seen them come in another order.
        """
        best = self.best(connection.peer)
        if best is None or best is connection:
            return False
        ours = connection.is_initiator
        return ours or self._initiator(best) != self._initiator(connection)

    def _initiator(self, connection: NativeConnection) -> PeerId:
        return self._local if connection.is_initiator else connection.peer
