"""The peer cache: members met before, on disk, dialled at once after a restart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from swarmpy.abc import Address, DiscoverySource, Sighting, WallSeconds
from swarmpy.config import PEER_CACHE_MAX
from swarmpy.identity import PeerId
from swarmpy.store import open_database, transaction

SCHEMA = """
CREATE TABLE IF NOT EXISTS peers (
    peer TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    proven TEXT NOT NULL,
    claimed TEXT NOT NULL,
    seen_wall_s REAL NOT NULL
);
"""


class CachedPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A member met before."""

    peer: PeerId
    name: str
    proven: tuple[Address, ...]
    """Addresses at which it was reached."""
    claimed: tuple[Address, ...]
    """Addresses it announced and nobody here tried."""
    seen_wall_s: float


class PeerCache(DiscoverySource):
    """At most `PEER_CACHE_MAX` members; the ones not seen for longest make room."""

    name = "cache"

    def __init__(self, path: Path) -> None:
        self._database = open_database(path, SCHEMA)
        self._peers = {item.peer: item for item in self._load()}

    async def run(self, see: Callable[[Sighting], None]) -> None:
        """Report everybody in the cache once, the last seen first."""
        for cached in self.peers():
            addresses = (*cached.proven, *cached.claimed)
            see(Sighting(peer=cached.peer, addresses=addresses, source=self.name))

    def peers(self) -> list[CachedPeer]:
        """Return the cached members, the last seen first."""
        return sorted(self._peers.values(), key=lambda item: (-item.seen_wall_s, item.peer))

    def get(self, peer: PeerId) -> CachedPeer | None:
        """Return a cached member."""
        return self._peers.get(peer)

    def put(
        self,
        peer: PeerId,
        *,
        name: str,
        proven: Sequence[Address],
        claimed: Sequence[Address],
        wall_s: WallSeconds,
    ) -> None:
        """Remember a member that was met just now."""
        entry = CachedPeer(
            peer=peer,
            name=name,
            proven=tuple(proven),
            claimed=tuple(claimed),
            seen_wall_s=wall_s,
        )
        self._peers[peer] = entry
        with transaction(self._database) as database:
            database.execute(
                "INSERT OR REPLACE INTO peers (peer, name, proven, claimed, seen_wall_s)"
                " VALUES (?, ?, ?, ?, ?)",
                (peer, name, _text(entry.proven), _text(entry.claimed), wall_s),
            )
            for old in self.peers()[PEER_CACHE_MAX:]:
                del self._peers[old.peer]
                database.execute("DELETE FROM peers WHERE peer = ?", (old.peer,))

    def forget(self, peer: PeerId) -> None:
        """Remove a peer that is no member any more."""
        if self._peers.pop(peer, None) is not None:
            with transaction(self._database) as database:
                database.execute("DELETE FROM peers WHERE peer = ?", (peer,))

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _load(self) -> list[CachedPeer]:
        rows = self._database.execute(
            "SELECT peer, name, proven, claimed, seen_wall_s FROM peers"
            " ORDER BY seen_wall_s DESC LIMIT ?",
            (PEER_CACHE_MAX,),
        ).fetchall()
        return [
            CachedPeer(
                peer=PeerId(peer),
                name=name,
                proven=tuple(Address(item) for item in proven.split()),
                claimed=tuple(Address(item) for item in claimed.split()),
                seen_wall_s=seen_wall_s,
            )
            for peer, name, proven, claimed, seen_wall_s in rows
        ]


def _text(addresses: Sequence[Address]) -> str:
    return " ".join(addresses)
