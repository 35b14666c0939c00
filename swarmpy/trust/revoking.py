"""Revoking a member: by the network's key where it is here, else by standing above it in its chain.

Spec: protocols/membership.md, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from swarmpy.environment import Environment
from swarmpy.errors import NotAMember
from swarmpy.identity import Identity, PeerId
from swarmpy.proto.membership import Membership, NetworkId, Proof, open_membership
from swarmpy.proto.revocation import SignedRevocation, open_revocation, seal_revocation
from swarmpy.trust.networks import NetworkBook


class RevocationDesk:
    """Signs the revocations of one node."""

    def __init__(
        self,
        networks: NetworkBook,
        *,
        identity: Identity,
        environment: Environment,
        given: Callable[[PeerId], Iterable[Proof]],
    ) -> None:
        """Args: given: The proofs that a peer got for invites of this node."""
        self._networks = networks
        self._identity = identity
        self._environment = environment
        self._given = given

    def revoke(self, peer: PeerId, shown: Iterable[Membership]) -> list[SignedRevocation]:
        """Sign a revocation for each network where this node may; see `Membership.revoke`.

        Args:
            shown: The peer's memberships, as it showed or announced them.
        """
        known = {item.network_id: item for item in map(open_membership, self._given(peer))}
        known |= {item.network_id: item for item in shown}
        made = [
            revocation
            for network_id in self._networks.memberships
            if (revocation := self._sign(peer, known.get(network_id), network_id)) is not None
        ]
        if not made:
            raise NotAMember(
                f"{peer} is no member that this node let in, or whose network's key is here",
                fix="Ask the network's founder, or whoever invited it.",
            )
        return made

    def _sign(
        self, peer: PeerId, membership: Membership | None, network_id: NetworkId
    ) -> SignedRevocation | None:
        if membership is None or peer == self._identity.peer_id:
            return None
        key = self._networks.key(network_id)
        if key is None and self._identity.peer_id not in membership.members[:-1]:
            return None
        wall_s = self._environment.wall_time()
        sealed = seal_revocation(
            key or self._identity,
            network_id=network_id,
            member=peer,
            chain=() if key else membership.proof,
            wall_s=wall_s,
        )
        return open_revocation(sealed, wall_s=wall_s)
