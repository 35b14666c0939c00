"""The table of records: of each member and network the newest word, and what the whole amounts to.

A word is an announcement, the statement that it was the last, or a revocation; each has a version,
and the higher one stands. Every entry is in its network's summary, which neighbours compare.
Pure bookkeeping: no stream, clock or store. Spec: protocols/announce.md, sections 4 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator

from swarmpy.config import RECORDS_MAX
from swarmpy.identity import PeerId
from swarmpy.proto.announce import Announcement, SignedAnnouncement
from swarmpy.proto.membership import NetworkId
from swarmpy.proto.revocation import SignedRevocation
from swarmpy.proto.summary import Entry, Summary, record_key
from swarmpy.proto.swim import SignedStatement

Record = SignedAnnouncement | SignedStatement | SignedRevocation

TOMBSTONES_MAX = 2 * RECORDS_MAX
"""Statements and revocations beside the announcements: an hour in which every member left twice."""

SWEEP_INTERVAL_S = 60.0
"""Records are dropped up to so much after their end: a sweep looks at all of them."""


class RecordTable:
    """Records by key; at most `RECORDS_MAX` announcements and `TOMBSTONES_MAX` others."""

    def __init__(self) -> None:
        self._records: dict[bytes, Record] = {}
        self._summaries: dict[NetworkId, Summary] = {}
        self._announcement_count = 0
        self._next_sweep_wall_s = math.inf
        self._swept_wall_s = -math.inf

    def __len__(self) -> int:
        return len(self._records)

    @property
    def announcement_count(self) -> int:
        """How many members are in view, this node included where it announced itself."""
        return self._announcement_count

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
        stored = self._records.get(record.key)
        if stored is not None and record.version <= stored.version:
            return False
        is_announcement = isinstance(record, SignedAnnouncement)
        if not isinstance(stored, type(record)) and not self._has_room(is_announcement):
            return False
        if stored is not None:
            self._drop(stored)
        self._records[record.key] = record
        self._announcement_count += is_announcement
        summary = self._summaries.get(record.network_id)
        if summary is None:
            summary = self._summaries[record.network_id] = Summary()
        summary.add(record.key, record.version)
        if record.expires_wall_s < self._next_sweep_wall_s:
            self._next_sweep_wall_s = record.expires_wall_s
        return True

    def remove(self, record: Record) -> None:
        """Forget a record that is stored."""
        self._drop(record)
        del self._records[record.key]

    def sweep(self, *, wall_s: float) -> list[Record]:
        """Forget what is over; return it. Cheap where nothing is."""
        if wall_s < self._next_sweep_wall_s or wall_s < self._swept_wall_s + SWEEP_INTERVAL_S:
            return []
        over = [record for record in self._records.values() if record.expires_wall_s <= wall_s]
        for record in over:
            self.remove(record)
        self._swept_wall_s = wall_s
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
        """Return the summary of one network's records."""
        return self._summaries.setdefault(network_id, Summary())

    def entries(self, network_id: NetworkId, prefixes: Collection[str]) -> dict[str, list[Entry]]:
        """Return the entries of a network under each of some prefixes of one length, in order."""
        found: dict[str, list[Entry]] = {prefix: [] for prefix in sorted(prefixes)}
        length = len(next(iter(found), ""))
        for key, record in self._records.items():
            under = found.get(key[:1].hex()[:length])
            if under is not None and record.network_id == network_id:
                under.append((key, record.version))
        for under in found.values():
            under.sort()
        return found

    def drop_networks(self, kept: Collection[NetworkId]) -> None:
        """Forget everything of networks that this node is not in any more."""
        for record in [item for item in self._records.values() if item.network_id not in kept]:
            self.remove(record)

    def _has_room(self, is_announcement: bool) -> bool:
        if is_announcement:
            return self._announcement_count < RECORDS_MAX
        return len(self._records) - self._announcement_count < TOMBSTONES_MAX

    def _drop(self, record: Record) -> None:
        self._announcement_count -= isinstance(record, SignedAnnouncement)
        self._summaries[record.network_id].remove(record.key, record.version)
