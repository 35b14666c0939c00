"""The peer cache: members met before, on disk, dialled at once after a restart."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from swarmpy.abc import Address, DiscoverySource, Sighting, WallSeconds
from swarmpy.config import PEER_CACHE_MAX
from swarmpy.errors import ConfigError
from swarmpy.identity import PeerId
from swarmpy.store import open_database, transaction

logger = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS peers (
    peer TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    proven TEXT NOT NULL,
    claimed TEXT NOT NULL,
    seen_wall_s REAL NOT NULL
);
"""

_PUT = (
    "INSERT OR REPLACE INTO peers (peer, name, proven, claimed, seen_wall_s) VALUES (?, ?, ?, ?, ?)"
)
_FORGET = "DELETE FROM peers WHERE peer = ?"


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
    """At most `PEER_CACHE_MAX` members; the ones not seen for longest make room.

    A disk that takes no more costs a slower restart, never the node.
    """

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
        surplus = [old.peer for old in self.peers()[PEER_CACHE_MAX:]]
        for old in surplus:
            del self._peers[old]
        self._write(
            (_PUT, (peer, name, _text(entry.proven), _text(entry.claimed), wall_s)),
            *((_FORGET, (old,)) for old in surplus),
        )

    def forget(self, peer: PeerId) -> None:
        """Remove a peer that is no member any more."""
        if self._peers.pop(peer, None) is not None:
            self._write((_FORGET, (peer,)))

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _write(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        try:
            with transaction(self._database) as database:
                for statement, values in statements:
                    database.execute(statement, values)
        except ConfigError as error:
            logger.warning("cache.unwritable", extra={"error": str(error)})

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
