"""The peer cache on disk."""

from __future__ import annotations

from pathlib import Path

from swarmpy.abc import Address, Sighting, WallSeconds
from swarmpy.config import PEER_CACHE_MAX
from swarmpy.discovery.cache import PeerCache
from swarmpy.identity import Identity, PeerId

ADDRESS = Address("/ip4/192.0.2.1/tcp/4001")
OTHER = Address("/ip4/192.0.2.2/tcp/4001")


def peer(number: int) -> PeerId:
    return Identity(number.to_bytes(32, "big")).peer_id


def put(cache: PeerCache, number: int, *, name: str = "bob") -> None:
    cache.put(
        peer(number), name=name, proven=[ADDRESS], claimed=[OTHER], wall_s=WallSeconds(number)
    )


async def test_what_is_put_is_sighted_after_a_restart_the_last_seen_first(tmp_path: Path) -> None:
    cache = PeerCache(tmp_path / "peers.db")
    put(cache, 1)
    put(cache, 2)
    cache.close()
    seen: list[Sighting] = []

    cache = PeerCache(tmp_path / "peers.db")
    await cache.run(seen.append)
    cache.close()

    assert [sighting.peer for sighting in seen] == [peer(2), peer(1)]
    assert seen[0].addresses == (ADDRESS, OTHER)


def test_a_peer_put_again_replaces_itself(tmp_path: Path) -> None:
    cache = PeerCache(tmp_path / "peers.db")
    put(cache, 1, name="bob")
    put(cache, 1, name="robert")

    assert [item.name for item in cache.peers()] == ["robert"]
    cache.close()


def test_a_full_cache_forgets_whoever_was_not_seen_for_longest(tmp_path: Path) -> None:
    cache = PeerCache(tmp_path / "peers.db")
    for number in range(PEER_CACHE_MAX + 1):
        put(cache, number)
    cache.close()

    cache = PeerCache(tmp_path / "peers.db")
    assert len(cache.peers()) == PEER_CACHE_MAX
    assert cache.get(peer(0)) is None
    cache.close()


def test_a_forgotten_peer_stays_forgotten(tmp_path: Path) -> None:
    cache = PeerCache(tmp_path / "peers.db")
    put(cache, 1)
    cache.forget(peer(1))
    cache.close()

    cache = PeerCache(tmp_path / "peers.db")
    assert cache.peers() == []
    cache.close()


def test_a_disk_that_takes_no_more_costs_no_error(tmp_path: Path) -> None:
    cache = PeerCache(tmp_path / "peers.db")
    put(cache, 1)
    cache._database.execute("PRAGMA query_only = ON")

    put(cache, 2)
    cache.forget(peer(1))

    assert [item.peer for item in cache.peers()] == [peer(2)]
    cache.close()
