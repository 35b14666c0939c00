"""The revocations a node knows, on disk until what they revoke would have ended.

Nothing is forgotten by the word of one clock: what is over by it is of no effect here, and stays on
disk for as long again, since a machine may start with a clock that is wrong by weeks.
Spec: protocols/membership.md, section 5.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator

from swarmpy.environment import Environment
from swarmpy.errors import ConfigError, MembershipError, ProtocolError
from swarmpy.identity import PeerId
from swarmpy.proto.membership import Membership, NetworkId, voucher_of
from swarmpy.proto.revocation import REVOCATION_TTL_S, SignedRevocation, opened_again, voids
from swarmpy.store import transaction

logger = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS revocations_kept (
    network_id TEXT NOT NULL,
    peer TEXT NOT NULL,
    signer TEXT NOT NULL,
    sealed BLOB NOT NULL,
    PRIMARY KEY (network_id, peer, signer)
);
"""

BY_KEY_MAX = 600
"""Revocations kept that a network's key signed; after more in a month a new network is better."""

BY_MEMBERS_MAX = 400
"""Of one network by its members, up to 6 KiB each: none of them takes the key's places."""

PER_SIGNER_MAX = 50
"""Of these by one member: one that signs strangers in and revokes them leaves room for others."""

Place = tuple[NetworkId, PeerId, PeerId]
"""Network, who is revoked, by whom."""


class RevocationBook:
    """Who is revoked in which network, and by whom."""

    def __init__(self, database: sqlite3.Connection, environment: Environment) -> None:
        """Args: database: Opened with `SCHEMA` applied."""
        self._database = database
        self._environment = environment
        self._kept: dict[Place, SignedRevocation] = {}
        self._about: dict[tuple[NetworkId, bytes], dict[Place, SignedRevocation]] = {}
        """By network and `voucher_of` who is revoked."""
        self._load()

    def all(self) -> list[SignedRevocation]:
        """Return what is in force, in no particular but a reproducible order."""
        wall_s = self._environment.wall_time()
        return [item for item in self._kept.values() if item.expires_wall_s >= wall_s]

    def holds(self, revocation: SignedRevocation) -> bool:
        """Whether a revocation, or an equal one of the same signer, is kept here."""
        return _place(revocation) in self._kept

    def is_void(self, membership: Membership) -> bool:
        """Whether a membership rests on a revoked one: authority ends with its source."""
        return self.voiding(membership) is not None

    def voiding(self, membership: Membership) -> SignedRevocation | None:
        """Return what makes a membership void, None where nothing does."""
        if not self._kept:
            return None
        wall_s = self._environment.wall_time()
        for member in membership.line:
            for revocation in self._about.get((membership.network_id, member), {}).values():
                if revocation.expires_wall_s >= wall_s and voids(revocation, membership):
                    return revocation
        return None

    def add(self, revocation: SignedRevocation, *, is_own: bool = False) -> bool:
        """Keep a verified revocation; False where it is known, or there are too many.

        One that was heard stands until a restart where the disk takes no more: the neighbours
        remind this node. One's own has to be on disk first.

        Raises:
            ConfigError: The disk takes no more, and it is this node's own. Nothing was changed.
        """
        self.drop_over()
        if self.holds(revocation) or not self._has_room(revocation):
            return False
        try:
            self._write(revocation)
        except ConfigError as error:
            if is_own:
                raise
            logger.warning("revocation.unwritable", extra={"error": str(error)})
        self._keep(revocation)
        return True

    def drop_over(self) -> None:
        """Forget what has been over for long."""
        oldest_s = self._environment.wall_time() - REVOCATION_TTL_S
        self._forget([item for item in self._kept.values() if item.expires_wall_s < oldest_s])

    def _has_room(self, revocation: SignedRevocation) -> bool:
        """Whether there is room for one more, if need be in place of what is over."""
        if self._is_full(revocation):
            wall_s = self._environment.wall_time()
            self._forget([item for item in self._kept.values() if item.expires_wall_s < wall_s])
        return not self._is_full(revocation)

    def _is_full(self, revocation: SignedRevocation) -> bool:
        beside = [
            item
            for item in self._kept.values()
            if item.network_id == revocation.network_id and item.is_by_key == revocation.is_by_key
        ]
        if revocation.is_by_key:
            return len(beside) >= BY_KEY_MAX
        by_signer = sum(item.signer == revocation.signer for item in beside)
        return len(beside) >= BY_MEMBERS_MAX or by_signer >= PER_SIGNER_MAX

    def _keep(self, revocation: SignedRevocation) -> None:
        place = _place(revocation)
        self._kept[place] = revocation
        self._about.setdefault(_whom(revocation), {})[place] = revocation

    def _write(self, revocation: SignedRevocation) -> None:
        with transaction(self._database) as database:
            database.execute(
                "INSERT OR REPLACE INTO revocations_kept (network_id, peer, signer, sealed)"
                " VALUES (?, ?, ?, ?)",
                (*_place(revocation), revocation.envelope),
            )

    def _forget(self, revocations: list[SignedRevocation]) -> None:
        for revocation in revocations:
            place = _place(revocation)
            del self._kept[place]
            del self._about[_whom(revocation)][place]
            self._erase(place)

    def _erase(self, place: tuple[str, str, str]) -> None:
        try:
            with transaction(self._database) as database:
                database.execute(
                    "DELETE FROM revocations_kept WHERE network_id = ? AND peer = ? AND signer = ?",
                    place,
                )
        except ConfigError as error:
            logger.warning("revocation.unwritable", extra={"error": str(error)})

    def _load(self) -> None:
        for *place, sealed in self._rows():
            try:
                self._keep(opened_again(bytes(sealed)))
            except (MembershipError, ProtocolError):
                self._erase((place[0], place[1], place[2]))  # damaged

    def _rows(self) -> Iterator[tuple[str, str, str, bytes]]:
        yield from self._database.execute(
            "SELECT network_id, peer, signer, sealed FROM revocations_kept"
            " ORDER BY network_id, peer, signer"
        ).fetchall()


def _place(revocation: SignedRevocation) -> Place:
    return revocation.network_id, revocation.peer, revocation.signer


def _whom(revocation: SignedRevocation) -> tuple[NetworkId, bytes]:
    return revocation.network_id, voucher_of(revocation.peer)
