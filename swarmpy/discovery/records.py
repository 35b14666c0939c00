"""The table of records: of each member and network the newest word, and what the whole amounts to.

A word is an announcement, the statement that it was the last, or a revocation; each has a version,
and the higher one stands. The announcements and revocations are in their network's summary, which
neighbours compare; that somebody is gone matters only to who has the announcement still.
Pure bookkeeping: no stream, clock or store. Spec: protocols/announce.md, Records and States.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from swarmpy.config import RECORDS_MAX
from swarmpy.identity import PeerId
from swarmpy.proto.announce import Announcement, SignedAnnouncement
from swarmpy.proto.membership import NETWORKS_MAX, NetworkId
from swarmpy.proto.revocation import SignedRevocation
from swarmpy.proto.summary import Entry, Summary, first_bytes, record_key
from swarmpy.proto.swim import SignedStatement

Record = SignedAnnouncement | SignedStatement | SignedRevocation

TOMBSTONES_MAX = 2 * RECORDS_MAX
"""Statements beside the announcements: an hour in which every member left twice."""

REVOKED_MAX = 1000
"""Revocations of each network beside both, which nobody's statements may keep out: as many as
membership keeps."""

SWEEP_INTERVAL_S = 60.0
"""Records are dropped up to so much after their end: a sweep looks at all of them."""


class RecordTable:
    """Records by key; each kind has room of its own, and each network a share of the announcements.

    While a node is in n networks each takes `RECORDS_MAX` / n members. What came before there were
    so many stays until it ends, so that there are at most twice `RECORDS_MAX` with four networks.
    """

    def __init__(self, own: PeerId | None = None) -> None:
        """Args: own: The peer whose announcements always fit."""
        self._own = own
        self._records: dict[bytes, Record] = {}
        self._summaries: dict[NetworkId, Summary] = {}
        self._buckets: dict[NetworkId, dict[int, dict[bytes, int]]] = {}
        """Versions by key, by the first byte of the key: a comparison lists a few of them."""
        self._announcement_count = 0
        self._counts: Counter[tuple[NetworkId, type[Record]]] = Counter()
        self._next_sweep_wall_s = math.inf
        self._swept_s = -math.inf

    def __len__(self) -> int:
        return len(self._records)

    @property
    def announcement_count(self) -> int:
        """How many members are in view, this node included where it announced itself."""
        return self._announcement_count

    def __iter__(self) -> Iterator[Record]:
        """Iterate over all records, in no particular but a reproducible order."""
        return iter(self._records.values())

    def get(self, key: bytes) -> Record | None:
        """Return the record of a key."""
        return self._records.get(key)

    def version(self, key: bytes) -> int:
        """Return the version that is stored of a key, -1 without any."""
        record = self._records.get(key)
        return -1 if record is None else record.version

    def add(self, record: Record) -> bool:
        """Store a verified record; False where it is no newer than what is stored.

        A full table takes no new members: strangers to it cannot push out those that are there.
        """
        key, version, network_id = record.key, record.version, record.network_id
        kind = type(record)
        stored = self._records.get(key)
        if stored is not None and version <= stored.version:
            return False
        if (stored is None or type(stored) is not kind) and not self._has_room(record):
            return False
        if stored is not None:
            self._drop(stored)
        self._records[key] = record
        self._announcement_count += kind is SignedAnnouncement
        self._counts[network_id, kind] += 1
        if kind is not SignedStatement:
            self.summary(network_id).add(key, version)
        buckets = self._buckets.get(network_id)
        if buckets is None:
            buckets = self._buckets[network_id] = {}
        bucket = buckets.get(key[0])
        if bucket is None:
            bucket = buckets[key[0]] = {}
        bucket[key] = version
        if record.expires_wall_s < self._next_sweep_wall_s:
            self._next_sweep_wall_s = record.expires_wall_s
        return True

    def remove(self, record: Record) -> None:
        """Forget a record that is stored."""
        self._drop(record)
        del self._records[record.key]

    def sweep(self, *, wall_s: float, now_s: float) -> list[Record]:
        """Forget what is over; return it. Cheap where nothing is.

        Args:
            now_s: By a clock that nobody sets; a wall clock that was ahead must not stop sweeps.
        """
        if wall_s < self._next_sweep_wall_s or now_s < self._swept_s + SWEEP_INTERVAL_S:
            return []
        over = [record for record in self._records.values() if record.expires_wall_s <= wall_s]
        for record in over:
            self.remove(record)
        self._swept_s = now_s
        self._next_sweep_wall_s = min(
            (record.expires_wall_s for record in self._records.values()), default=math.inf
        )
        return over

    def newest(
        self, peer: PeerId, networks: Iterable[NetworkId], *, wall_s: float
    ) -> Announcement | None:
        """Return a member's newest announcement, whichever of the networks it was for."""
        newest: Announcement | None = None
        for network_id in networks:
            record = self._records.get(record_key(network_id, peer))
            if isinstance(record, SignedAnnouncement) and record.expires_wall_s > wall_s:
                announcement = record.announcement
                if newest is None or announcement.seq > newest.seq:
                    newest = announcement
        return newest

    def announced(self) -> Iterator[SignedAnnouncement]:
        """Iterate over the announcements, in no particular but a reproducible order."""
        for record in self._records.values():
            if isinstance(record, SignedAnnouncement):
                yield record

    def gone(self) -> Iterator[SignedStatement]:
        """Iterate over the members that left or were found dead within the last hour."""
        for record in self._records.values():
            if isinstance(record, SignedStatement):
                yield record

    def summary(self, network_id: NetworkId) -> Summary:
        """Return the summary of one network's announcements and revocations."""
        summary = self._summaries.get(network_id)
        if summary is None:
            summary = self._summaries[network_id] = Summary()
        return summary

    def entries(self, network_id: NetworkId, prefixes: Collection[str]) -> dict[str, list[Entry]]:
        """Return the entries of a network under each of some prefixes, in order."""
        buckets = self._buckets.get(network_id, {})
        found: dict[str, list[Entry]] = {}
        for prefix in sorted(prefixes):
            entries = found[prefix] = []
            for first in first_bytes(prefix):
                if (bucket := buckets.get(first)) is not None:
                    entries += bucket.items()
            entries.sort()
        return found

    def drop_networks(self, kept: Collection[NetworkId]) -> None:
        """Forget everything of networks that this node is not in any more."""
        for record in [item for item in self._records.values() if item.network_id not in kept]:
            self.remove(record)

    def _has_room(self, record: Record) -> bool:
        """Whether a network may have one more record of a kind."""
        if isinstance(record, SignedRevocation):
            return self._counts[record.network_id, SignedRevocation] < REVOKED_MAX
        if record.peer == self._own:
            return True
        # Of every network that this node is in it has its own announcement here.
        room = RECORDS_MAX if isinstance(record, SignedAnnouncement) else TOMBSTONES_MAX
        count = self._counts[record.network_id, type(record)]
        if count < room // NETWORKS_MAX:
            return True
        networks = {network_id for network_id, _ in self._counts} | {record.network_id}
        return count < room // len(networks)

    def _drop(self, record: Record) -> None:
        self._announcement_count -= isinstance(record, SignedAnnouncement)
        place = record.network_id, type(record)
        self._counts[place] -= 1
        if not self._counts[place]:
            del self._counts[place]
        if not isinstance(record, SignedStatement):
            self._summaries[record.network_id].remove(record.key, record.version)
        del self._buckets[record.network_id][record.key[0]][record.key]
