"""The table of announcements: the newest of each member and network, none older than an hour.

Pure bookkeeping: no stream, clock or store. Spec: protocols/announce.md, section 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

from swarmpy.abc import NowSeconds
from swarmpy.config import RECORDS_MAX
from swarmpy.identity import PeerId
from swarmpy.proto.announce import ANNOUNCEMENT_TTL_S, Announcement, SignedAnnouncement
from swarmpy.proto.membership import NetworkId

Key = tuple[NetworkId, PeerId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A stored announcement."""

    signed: SignedAnnouncement
    digest: bytes
    expires_s: NowSeconds

    @property
    def seq(self) -> int:
        return self.signed.announcement.seq


class RecordTable:
    """Announcements by network and member, at most `RECORDS_MAX`."""

    def __init__(self) -> None:
        self._records: dict[Key, Record] = {}
        self._digests: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._records)

    def holds(self, envelope: bytes) -> bool:
        """Whether exactly these bytes are stored: gossip brings each announcement many times."""
        return digest_of(envelope) in self._digests

    def add(self, signed: SignedAnnouncement, *, age_s: float, now_s: NowSeconds) -> bool:
        """Store a verified announcement; False where it is no newer than what is stored.

        A full table takes no new members: strangers to it cannot push out those that are there.
        """
        key = (signed.membership.network_id, signed.peer)
        stored = self._records.get(key)
        if stored is not None and signed.announcement.seq <= stored.seq:
            return False
        self.expire(now_s=now_s)
        if stored is None and len(self._records) >= RECORDS_MAX:
            return False
        self._remove(key)
        digest = digest_of(signed.envelope)
        left_s = ANNOUNCEMENT_TTL_S - max(0.0, age_s)
        self._records[key] = Record(
            signed=signed, digest=digest, expires_s=NowSeconds(now_s + left_s)
        )
        self._digests.add(digest)
        return True

    def expire(self, *, now_s: NowSeconds) -> None:
        """Forget what is over."""
        for key in [key for key, record in self._records.items() if record.expires_s <= now_s]:
            self._remove(key)

    def of_networks(self, networks: Collection[NetworkId]) -> dict[Key, Record]:
        """Return the announcements for some networks, in PeerId order."""
        found = [item for item in self._records.items() if item[0][0] in networks]
        return dict(sorted(found, key=lambda item: (item[0][1], item[0][0])))

    def newest(self, peer: PeerId) -> Announcement | None:
        """Return a member's newest announcement, whichever network it was for."""
        found = [record for (_, member), record in self._records.items() if member == peer]
        return max(found, key=lambda record: record.seq).signed.announcement if found else None

    def peers(self) -> list[PeerId]:
        """Return everybody an announcement is stored of, in PeerId order."""
        return sorted({peer for _, peer in self._records})

    def _remove(self, key: Key) -> None:
        record = self._records.pop(key, None)
        if record is not None:
            self._digests.discard(record.digest)


def digest_of(envelope: bytes) -> bytes:
    """Return what an announcement's exact bytes are recognised by."""
    return hashlib.sha256(envelope).digest()
