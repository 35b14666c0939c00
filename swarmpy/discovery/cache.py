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

    Changes are written together by `flush`: a commit waits for the disk, and a crash that loses the
    last seconds costs a slower restart. So does a disk that takes no more; never the node.
    """

    name = "cache"

    def __init__(self, path: Path) -> None:
        self._database = open_database(path, SCHEMA)
        self._peers = {item.peer: item for item in self._load()}
        self._unwritten: dict[PeerId, None] = {}

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
        self._peers[peer] = CachedPeer(
            peer=peer,
            name=name,
            proven=tuple(proven),
            claimed=tuple(claimed),
            seen_wall_s=wall_s,
        )
        self._unwritten[peer] = None
        if len(self._peers) > PEER_CACHE_MAX:
            self.forget(self.peers()[-1].peer)

    def forget(self, peer: PeerId) -> None:
        """Remove a peer that is no member any more."""
        if self._peers.pop(peer, None) is not None:
            self._unwritten[peer] = None

    def flush(self) -> None:
        """Write what changed, in one commit."""
        if not self._unwritten:
            return
        changed, self._unwritten = self._unwritten, {}
        try:
            with transaction(self._database) as database:
                for peer in changed:
                    entry = self._peers.get(peer)
                    if entry is None:
                        database.execute(_FORGET, (peer,))
                    else:
                        database.execute(_PUT, _row(entry))
        except ConfigError as error:
            logger.warning("cache.unwritable", extra={"error": str(error)})

    def close(self) -> None:
        """Write what changed and close the database."""
        self.flush()
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


def _row(entry: CachedPeer) -> tuple[object, ...]:
    proven, claimed = _text(entry.proven), _text(entry.claimed)
    return (entry.peer, entry.name, proven, claimed, entry.seen_wall_s)


def _text(addresses: Sequence[Address]) -> str:
    return " ".join(addresses)
