"""The networks this node belongs to: their keys where it founded them, its own records, on disk.

Spec: protocols/membership.md, sections 1 and 2.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from swarmpy.environment import Environment
from swarmpy.errors import MembershipError, MembershipRevoked, NotAMember, ProtocolError
from swarmpy.identity import Identity, PeerId
from swarmpy.proto.membership import (
    NETWORKS_MAX,
    RENEW_BELOW_S,
    Membership,
    NetworkId,
    Proof,
    Proofs,
    issue,
    network_name_of,
    open_membership,
    own_network_id,
    verify_membership,
)
from swarmpy.proto.wire import decode, encode
from swarmpy.store import transaction
from swarmpy.trust.revocations import RevocationBook
from swarmpy.trust.views import NetworkView

logger = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS networks (
    network_id TEXT PRIMARY KEY,
    joined_wall_s REAL NOT NULL,
    proof BLOB NOT NULL
);
"""

KEY_SUFFIX = ".key"


class NetworkBook:
    """The memberships of one node, those that are valid now; what has ended stays on disk only."""

    def __init__(
        self,
        database: sqlite3.Connection,
        *,
        identity: Identity,
        folder: Path,
        environment: Environment,
        revocations: RevocationBook,
    ) -> None:
        """Args: database: Opened with `SCHEMA` applied. folder: Where network keys are kept."""
        self._database = database
        self._revocations = revocations
        self._identity = identity
        self._folder = folder
        self._environment = environment
        self._keys = self._load_keys()
        self._joined: dict[NetworkId, float] = {}
        self._memberships: dict[NetworkId, Membership] = {}
        self._void: dict[NetworkId, Membership] = {}
        self._load()
        self.renew_founded()

    @property
    def memberships(self) -> Mapping[NetworkId, Membership]:
        """This node's own memberships, the oldest first."""
        return self._memberships

    def revoked_names(self) -> list[str]:
        """Return the names of the networks that this node was revoked in, for as long as it is."""
        found = (item for item in self._void.values() if self._revocations.is_void(item))
        return [item.network_name for item in found if item.network_id not in self._memberships]

    def joined_wall_s(self, network_id: NetworkId) -> float:
        """When this node made or joined the network."""
        return self._joined[network_id]

    def views(self) -> list[NetworkView]:
        """Return what there is to show of the networks, the oldest first."""
        return [self.view(membership) for membership in self._memberships.values()]

    def view(self, membership: Membership) -> NetworkView:
        """Return what there is to show of one network."""
        return NetworkView(
            id=membership.network_id,
            name=membership.network_name,
            is_founder=self.is_founder(membership.network_id),
            can_invite=membership.can_invite,
            member_since_wall_s=self.joined_wall_s(membership.network_id),
            not_after_wall_s=membership.not_after_wall_s,
        )

    def is_founder(self, network_id: NetworkId) -> bool:
        """Whether this node holds the network's key."""
        return network_id in self._keys

    def key(self, network_id: NetworkId) -> Identity | None:
        """Return the network's key where this node holds it."""
        return self._keys.get(network_id)

    def create(self, name: str) -> Membership:
        """Make a new network and this node its first member."""
        self.check_room()
        key = Identity.generate(self._environment.random)
        network_id = own_network_id(key)
        key.save(self._folder / f"{network_id}{KEY_SUFFIX}")
        self._keys[network_id] = key
        membership = self._found(network_id, name)
        self.store(membership)
        return membership

    def store(self, membership: Membership) -> None:
        """Keep an own membership, in place of an older one of the same network.

        Raises:
            MembershipError: The node is in `NETWORKS_MAX` networks already.
        """
        network_id = membership.network_id
        if network_id not in self._memberships:
            self.check_room()
        joined = self._joined.get(network_id, self._environment.wall_time())
        with transaction(self._database) as database:
            database.execute(
                "INSERT INTO networks (network_id, joined_wall_s, proof) VALUES (?, ?, ?)"
                " ON CONFLICT (network_id) DO UPDATE SET proof = excluded.proof",
                (network_id, joined, encode(Proofs(proofs=(membership.proof,)))),
            )
        self._joined[network_id] = joined
        self._memberships[network_id] = membership

    def inviting(self, network_id: NetworkId | None) -> Membership:
        """Return the membership by which this node invites: of a network, or the last joined.

        Raises:
            NotAMember: The node is not in it, or may not invite.
        """
        if network_id is None:
            found = [item for item in self._memberships.values() if item.can_invite][-1:]
        else:
            found = [self._memberships[network_id]] if network_id in self._memberships else []
        if not found:
            raise NotAMember(
                f"this node may not invite into {network_id or 'any network'}: it is no member",
                fix="Start a network with `swarmpy run`, or join one.",
            )
        if not found[0].can_invite:
            raise NotAMember(
                f"this node's membership of {found[0].network_name!r} does not allow it to invite",
                fix="Ask the member that invited this node.",
            )
        return found[0]

    def issue(
        self,
        network_id: NetworkId,
        member: PeerId,
        *,
        can_invite: bool,
        replaced: Membership | None = None,
    ) -> tuple[bytes, ...]:
        """Sign a membership of one of this node's networks, by the network's key where it is here.

        Args:
            replaced: The member's own, where it is to be renewed.

        Raises:
            NotAMember: This node may not, or no longer.
            MembershipRevoked: The member is revoked, by whoever it would rest on.
        """
        membership = self._memberships.get(network_id)
        if membership is None:
            raise NotAMember("this node's own membership of the network has ended")
        key = self._keys.get(network_id)
        proof = issue(
            key or self._identity,
            authority=None if key else membership,
            network_id=network_id,
            network_name=membership.network_name,
            member=member,
            can_invite=can_invite,
            serial=self._environment.random.getrandbits(62),
            wall_s=self._environment.wall_time(),
            replaced=replaced,
        )
        self.check_not_void(proof)
        return proof

    def check_not_void(self, proof: Proof) -> None:
        """Raises: MembershipRevoked: A proof that was signed here rests on a revoked member."""
        membership = open_membership(proof)
        if self._revocations.is_void(membership):
            raise MembershipRevoked(f"{membership.member} is revoked in this network")

    def renew_founded(self) -> list[NetworkId]:
        """Sign own records anew where they end soon and the key is here; return which."""
        wall_s = self._environment.wall_time()
        renewed = []
        for network_id in sorted(self._keys):
            membership = self._memberships.get(network_id)
            if membership and membership.not_after_wall_s - wall_s < RENEW_BELOW_S:
                self.store(self._found(network_id, membership.network_name))
                renewed.append(network_id)
        return renewed

    def drop_ended(self) -> list[NetworkId]:
        """Leave the networks whose membership has ended or is revoked, in memory only.

        Returns:
            Which they are.
        """
        wall_s = self._environment.wall_time()
        ended = [
            network_id
            for network_id, membership in self._memberships.items()
            if membership.not_after_wall_s < wall_s or self._revocations.is_void(membership)
        ]
        for network_id in ended:
            self._void[network_id] = self._memberships.pop(network_id)
            logger.warning("membership.ended", extra={"network_id": network_id})
        return ended

    def _found(self, network_id: NetworkId, name: str) -> Membership:
        wall_s = self._environment.wall_time()
        proof = issue(
            self._keys[network_id],
            authority=None,
            network_id=network_id,
            network_name=name,
            member=self._identity.peer_id,
            can_invite=True,
            serial=self._environment.random.getrandbits(62),
            wall_s=wall_s,
        )
        return verify_membership(proof, wall_s=wall_s)

    def check_room(self) -> None:
        """Raises: MembershipError: The node is in `NETWORKS_MAX` networks already."""
        if len(self._memberships) >= NETWORKS_MAX:
            raise MembershipError(f"this node is in {NETWORKS_MAX} networks, the most there may be")

    def _load_keys(self) -> dict[NetworkId, Identity]:
        keys = {}
        for path in sorted(self._folder.glob(f"*{KEY_SUFFIX}")):
            key = Identity.load_or_create(path, self._environment.random)
            keys[own_network_id(key)] = key
        return keys

    def _load(self) -> None:
        wall_s = self._environment.wall_time()
        rows = self._database.execute(
            "SELECT network_id, joined_wall_s, proof FROM networks"
            " ORDER BY joined_wall_s, network_id"
        ).fetchall()
        for network_id, joined, stored in rows:
            membership: Membership | None
            try:
                (proof,) = decode(stored, Proofs).proofs
                membership = verify_membership(
                    proof, wall_s=wall_s, expected_member=self._identity.peer_id
                )
            except NotAMember:
                membership = self._revive(NetworkId(network_id), proof)
            except (ProtocolError, ValueError):
                # Another identity's record, or a damaged one: worth nothing here, and no reason
                # for the node not to start.
                logger.warning("membership.unusable", extra={"network_id": network_id})
                continue
            if membership is None:
                continue
            if self._revocations.is_void(membership):
                self._void[membership.network_id] = membership
            else:
                self._joined[membership.network_id] = joined
                self._memberships[membership.network_id] = membership

    def _revive(self, network_id: NetworkId, proof: tuple[bytes, ...]) -> Membership | None:
        """Return a founder's own ended membership signed anew, None where the key is not here."""
        if network_id not in self._keys:
            logger.warning("membership.ended", extra={"network_id": network_id})
            return None
        membership = self._found(network_id, network_name_of(proof))
        self.store(membership)
        return membership
