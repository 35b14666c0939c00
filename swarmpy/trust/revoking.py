"""Revoking a member: by the network's key where it is here, else by having vouched for it.

Spec: protocols/membership.md, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from swarmpy.environment import Environment
from swarmpy.errors import NotAMember
from swarmpy.identity import Identity, PeerId
from swarmpy.proto.membership import (
    Membership,
    NetworkId,
    Proof,
    open_membership,
    voucher_of,
)
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

    def sign(
        self, peer: PeerId, shown: Iterable[Membership], *, network_id: NetworkId | None
    ) -> list[SignedRevocation]:
        """Sign a revocation for each network where this node may; see `Membership.revoke`.

        Args:
            shown: The peer's memberships, as it showed or announced them.
            network_id: Of this network only; None: of all.
        """
        known = [*shown, *map(open_membership, self._given(peer))]
        asked = [network_id] if network_id is not None else self._asked(known)
        made = [
            revocation
            for item in asked
            if (revocation := self._sign(peer, known, item)) is not None
        ]
        if not made:
            raise NotAMember(
                f"{peer} is no member that this node let in, or whose network's key is here",
                fix="Ask the network's founder, or whoever invited it.",
            )
        return made

    def _asked(self, known: Iterable[Membership]) -> list[NetworkId]:
        """Return the networks that are meant: those the peer is known in, else all of them."""
        shared = {item.network_id for item in known}
        return [item for item in self._networks.memberships if not shared or item in shared]

    def _sign(
        self, peer: PeerId, known: Iterable[Membership], network_id: NetworkId
    ) -> SignedRevocation | None:
        """Sign one revocation; None where this node may not.

        With the network's key it may always: the member may be away, and was never met here.
        """
        key = self._networks.key(network_id)
        wall_s = self._environment.wall_time()
        chain: Proof | tuple[()] = ()
        if peer == self._identity.peer_id:
            return None
        if key is None:
            below = [item for item in known if self._may_end(item, peer, network_id)]
            if not below:
                return None
            chain = max(below, key=lambda item: item.not_after_wall_s).proof
        sealed = seal_revocation(
            key or self._identity, network_id=network_id, member=peer, chain=chain, wall_s=wall_s
        )
        return open_revocation(sealed, wall_s=wall_s)

    def _may_end(self, membership: Membership, peer: PeerId, network_id: NetworkId) -> bool:
        return (
            membership.network_id == network_id
            and membership.member == peer
            and membership.not_after_wall_s >= self._environment.wall_time()
            and voucher_of(self._identity.peer_id) in membership.line[:-1]
        )
