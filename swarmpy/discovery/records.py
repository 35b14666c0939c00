"""The table of announcements: the newest of each member and network, none older than an hour.

Pure bookkeeping: no stream, clock or store. Spec: protocols/announce.md, section 4.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass

from swarmpy.abc import NowSeconds
from swarmpy.config import RECORDS_MAX
from swarmpy.identity import PeerId
from swarmpy.proto.announce import ANNOUNCEMENT_TTL_S, Announcement, SignedAnnouncement
from swarmpy.proto.membership import NetworkId

Key = tuple[PeerId, NetworkId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A stored announcement."""

    signed: SignedAnnouncement
    digest: bytes
    expires_s: float

    @property
    def key(self) -> Key:
        return (self.signed.peer, self.signed.membership.network_id)

    @property
    def seq(self) -> int:
        return self.signed.announcement.seq


class RecordTable:
    """Announcements by member and network, at most `RECORDS_MAX`."""

    def __init__(self) -> None:
        self._records: dict[PeerId, dict[NetworkId, Record]] = {}
        self._digests: set[bytes] = set()
        self._next_expiry_s = math.inf

    def __len__(self) -> int:
        return len(self._digests)

    def holds(self, envelope: bytes) -> bool:
        """Whether exactly these bytes are stored: gossip brings each announcement many times."""
        return digest_of(envelope) in self._digests

    def add(self, signed: SignedAnnouncement, *, age_s: float, now_s: NowSeconds) -> bool:
        """Store a verified announcement; False where it is no newer than what is stored.

        A full table takes no new members: strangers to it cannot push out those that are there.
        """
        self.expire(now_s=now_s)
        network_id = signed.membership.network_id
        of_peer = self._records.get(signed.peer, {})
        stored = of_peer.get(network_id)
        if stored is not None and signed.announcement.seq <= stored.seq:
            return False
        if stored is None and len(self) >= RECORDS_MAX:
            return False
        if stored is not None:
            self._digests.discard(stored.digest)
        record = Record(
            signed=signed,
            digest=digest_of(signed.envelope),
            expires_s=now_s + ANNOUNCEMENT_TTL_S - max(0.0, age_s),
        )
        self._records.setdefault(signed.peer, {})[network_id] = record
        self._digests.add(record.digest)
        self._next_expiry_s = min(self._next_expiry_s, record.expires_s)
        return True

    def expire(self, *, now_s: NowSeconds) -> None:
        """Forget what is over."""
        if now_s < self._next_expiry_s:
            return
        kept = [record for record in self._all() if record.expires_s > now_s]
        self._records = {}
        for record in kept:
            peer, network_id = record.key
            self._records.setdefault(peer, {})[network_id] = record
        self._digests = {record.digest for record in kept}
        self._next_expiry_s = min((record.expires_s for record in kept), default=math.inf)

    def of_networks(self, networks: Collection[NetworkId]) -> list[Record]:
        """Return the announcements for some networks, in PeerId order."""
        found = [record for record in self._all() if record.key[1] in networks]
        return sorted(found, key=lambda record: record.key)

    def newest(self, peer: PeerId) -> Announcement | None:
        """Return a member's newest announcement, whichever network it was for."""
        found = self._records.get(peer)
        if not found:
            return None
        return max(found.values(), key=lambda record: record.seq).signed.announcement

    def peers(self) -> list[PeerId]:
        """Return everybody an announcement is stored of, in PeerId order."""
        return sorted(self._records)

    def _all(self) -> list[Record]:
        return [record for of_peer in self._records.values() for record in of_peer.values()]


def digest_of(envelope: bytes) -> bytes:
    """Return what an announcement's exact bytes are recognised by."""
    return hashlib.sha256(envelope).digest()
