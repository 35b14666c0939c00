"""Invites this node issued, on disk: which are open, who redeemed them, what they were answered.

A redemption and its answer are one transaction, on disk before the answer is sent: the same peer
asking again gets the same bytes, also after a crash, and of two peers racing exactly one wins.
Spec: protocols/invite.md, section 4.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from swarmpy.abc import WallSeconds
from swarmpy.errors import InviteExpired, InviteForeign, InviteUsed, MembershipError
from swarmpy.identity import PeerId
from swarmpy.proto.membership import NetworkId
from swarmpy.store import transaction

SCHEMA = """
CREATE TABLE IF NOT EXISTS invites (
    id TEXT PRIMARY KEY,
    token_hash BLOB NOT NULL,
    network_id TEXT NOT NULL,
    can_invite INTEGER NOT NULL,
    uses INTEGER NOT NULL,
    expires_wall_s INTEGER NOT NULL,
    is_revoked INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS redemptions (
    invite_id TEXT NOT NULL REFERENCES invites (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    peer TEXT NOT NULL,
    answer BLOB NOT NULL,
    PRIMARY KEY (invite_id, position),
    UNIQUE (invite_id, peer)
);
"""

OPEN_INVITES_MAX = 1000
"""Open invites of one node; a script that makes more has lost count of who it lets in."""

KEEP_S = 7 * 24 * 3600.0
"""An invite is remembered this long after its end, for joiners whose reply was lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenInvite:
    """An invite that can still be redeemed."""

    id: str
    network_id: NetworkId
    can_invite: bool
    uses: int
    uses_left: int
    expires_wall_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Redemption:
    """What a redeemed invite entitles to."""

    network_id: NetworkId
    can_invite: bool


class InviteBook:
    """The invites of one node. Tokens are kept as hashes: a stolen database admits nobody."""

    def __init__(self, database: sqlite3.Connection) -> None:
        """Args: database: Opened with `SCHEMA` applied."""
        self._database = database

    def add(
        self,
        token: bytes,
        *,
        network_id: NetworkId,
        can_invite: bool,
        uses: int,
        expires_wall_s: int,
        wall_s: WallSeconds,
    ) -> str:
        """Remember a new invite and return its id.

        Raises:
            MembershipError: `OPEN_INVITES_MAX` are open already.
        """
        invite_id = invite_id_of(token)
        with transaction(self._database) as database:
            database.execute(
                "DELETE FROM redemptions WHERE invite_id IN"
                " (SELECT id FROM invites WHERE expires_wall_s < ?)",
                (wall_s - KEEP_S,),
            )
            database.execute("DELETE FROM invites WHERE expires_wall_s < ?", (wall_s - KEEP_S,))
            if len(self.open(wall_s=wall_s)) >= OPEN_INVITES_MAX:
                raise MembershipError(
                    f"{OPEN_INVITES_MAX} invites are open, the most there may be",
                    fix="Revoke some, or let one code admit several machines.",
                )
            database.execute(
                "INSERT INTO invites (id, token_hash, network_id, can_invite, uses, expires_wall_s)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (invite_id, _hash(token), network_id, can_invite, uses, expires_wall_s),
            )
        return invite_id

    def redeem(
        self,
        token: bytes,
        peer: PeerId,
        *,
        wall_s: WallSeconds,
        answer: Callable[[Redemption], bytes],
    ) -> bytes:
        """Redeem an invite for a peer and return the answer, which is on disk by then.

        Args:
            answer: Makes the answer of a first redemption; a later one gets the stored bytes.

        Raises:
            InviteForeign: This node knows no such invite.
            InviteExpired, InviteUsed: It is over, used up by others, or revoked.
        """
        invite_id = invite_id_of(token)
        with transaction(self._database) as database:
            row = database.execute(
                "SELECT network_id, can_invite, uses, expires_wall_s, is_revoked FROM invites"
                " WHERE id = ? AND token_hash = ?",
                (invite_id, _hash(token)),
            ).fetchone()
            if row is None:
                raise InviteForeign("this node has no record of having issued the invite")
            network_id, can_invite, uses, expires_wall_s, is_revoked = row
            stored = database.execute(
                "SELECT answer FROM redemptions WHERE invite_id = ? AND peer = ?",
                (invite_id, peer),
            ).fetchone()
            if stored is not None:
                return bytes(stored[0])
            (used,) = database.execute(
                "SELECT COUNT(*) FROM redemptions WHERE invite_id = ?", (invite_id,)
            ).fetchone()
            if is_revoked:
                raise InviteUsed("the invite was revoked by its issuer")
            if used >= uses:
                raise InviteUsed(f"the invite admits {uses} and was used {used} times")
            if wall_s > expires_wall_s:
                raise InviteExpired(f"the invite ended {wall_s - expires_wall_s:.0f} s ago")
            made = answer(Redemption(network_id=network_id, can_invite=bool(can_invite)))
            # The primary key (invite, position) is what makes a second winner impossible.
            database.execute(
                "INSERT INTO redemptions (invite_id, position, peer, answer) VALUES (?, ?, ?, ?)",
                (invite_id, used, peer, made),
            )
        return made

    def open(self, *, wall_s: WallSeconds) -> list[OpenInvite]:
        """Return the invites that can still be redeemed, the next to end first."""
        rows = self._database.execute(
            "SELECT id, network_id, can_invite, uses, expires_wall_s,"
            " (SELECT COUNT(*) FROM redemptions WHERE invite_id = id) AS used FROM invites"
            " WHERE NOT is_revoked AND expires_wall_s >= ? AND used < uses"
            " ORDER BY expires_wall_s, id",
            (wall_s,),
        ).fetchall()
        return [
            OpenInvite(
                id=row[0],
                network_id=NetworkId(row[1]),
                can_invite=bool(row[2]),
                uses=row[3],
                uses_left=row[3] - row[5],
                expires_wall_s=row[4],
            )
            for row in rows
        ]

    def answers(self, peer: PeerId) -> list[bytes]:
        """Return what a peer was answered when it redeemed invites of this node."""
        rows = self._database.execute(
            "SELECT answer FROM redemptions WHERE peer = ? ORDER BY invite_id", (peer,)
        ).fetchall()
        return [bytes(answer) for (answer,) in rows]

    def revoke(self, invite_id: str) -> bool:
        """End an invite; whoever redeemed it stays a member. False where there is none."""
        with transaction(self._database) as database:
            cursor = database.execute(
                "UPDATE invites SET is_revoked = 1 WHERE id = ? AND NOT is_revoked", (invite_id,)
            )
        return cursor.rowcount == 1


def invite_id_of(token: bytes) -> str:
    """Return the id under which an invite is listed and revoked; it says nothing of the token."""
    return _hash(token)[:6].hex()


def _hash(token: bytes) -> bytes:
    return hashlib.sha256(b"swarmpy-invite-token\0" + token).digest()
