"""The revocations a node knows, on disk until what they revoke would have ended.

Spec: protocols/membership.md, section 5.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter

from swarmpy.environment import Environment
from swarmpy.errors import ConfigError, MembershipError, ProtocolError
from swarmpy.identity import PeerId
from swarmpy.proto.membership import Membership, NetworkId
from swarmpy.proto.revocation import SignedRevocation, open_revocation
from swarmpy.store import transaction

logger = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS revocations (
    network_id TEXT NOT NULL,
    peer TEXT NOT NULL,
    sealed BLOB NOT NULL,
    PRIMARY KEY (network_id, peer)
);
"""

REVOCATIONS_MAX = 1000
"""Revocations kept, 6 KiB each at the most; after more in a month a new network is better."""

PER_SIGNER_MAX = 100
"""Of these by one member: one that signs strangers in and revokes them fills no table."""


class RevocationBook:
    """Who is revoked in which network."""

    def __init__(self, database: sqlite3.Connection, environment: Environment) -> None:
        """Args: database: Opened with `SCHEMA` applied."""
        self._database = database
        self._environment = environment
        self._revocations: dict[tuple[NetworkId, PeerId], SignedRevocation] = {}
        self._counts: Counter[PeerId] = Counter()
        self._load()

    def all(self) -> list[SignedRevocation]:
        """Return what is known, in no particular but a reproducible order."""
        return list(self._revocations.values())

    def is_revoked(self, network_id: NetworkId, peer: PeerId) -> bool:
        """Whether a peer is revoked in a network."""
        return (network_id, peer) in self._revocations

    def is_void(self, membership: Membership) -> bool:
        """Whether a membership rests on a revoked one: authority ends with its source."""
        if not self._revocations:
            return False
        return any(
            (membership.network_id, member) in self._revocations for member in membership.members
        )

    def add(self, revocation: SignedRevocation) -> bool:
        """Keep a verified revocation; False where it is known, or there are too many.

        A disk that takes no more costs its memory after a restart; the neighbours remind this node.
        """
        self.drop_over()
        place = (revocation.network_id, revocation.peer)
        is_full = len(self._revocations) >= REVOCATIONS_MAX
        if place in self._revocations or is_full:
            return False
        if not revocation.is_by_key and self._counts[revocation.signer] >= PER_SIGNER_MAX:
            return False
        self._keep(revocation)
        try:
            with transaction(self._database) as database:
                database.execute(
                    "INSERT OR REPLACE INTO revocations (network_id, peer, sealed)"
                    " VALUES (?, ?, ?)",
                    (*place, revocation.envelope),
                )
        except ConfigError as error:
            logger.warning("revocation.unwritable", extra={"error": str(error)})
        return True

    def _keep(self, revocation: SignedRevocation) -> None:
        self._revocations[revocation.network_id, revocation.peer] = revocation
        self._counts[revocation.signer] += 1

    def drop_over(self) -> None:
        """Forget what is over."""
        wall_s = self._environment.wall_time()
        over = [item for item in self._revocations.values() if item.expires_wall_s < wall_s]
        for revocation in over:
            del self._revocations[revocation.network_id, revocation.peer]
            self._counts[revocation.signer] -= 1
            self._forget(revocation.network_id, revocation.peer)

    def _forget(self, network_id: str, peer: str) -> None:
        try:
            with transaction(self._database) as database:
                database.execute(
                    "DELETE FROM revocations WHERE network_id = ? AND peer = ?", (network_id, peer)
                )
        except ConfigError as error:
            logger.warning("revocation.unwritable", extra={"error": str(error)})

    def _load(self) -> None:
        wall_s = self._environment.wall_time()
        rows = self._database.execute(
            "SELECT network_id, peer, sealed FROM revocations ORDER BY network_id, peer LIMIT ?",
            (REVOCATIONS_MAX,),
        ).fetchall()
        for network_id, peer, sealed in rows:
            try:
                self._keep(open_revocation(bytes(sealed), wall_s=wall_s))
            except (MembershipError, ProtocolError):
                self._forget(network_id, peer)  # over, or damaged
