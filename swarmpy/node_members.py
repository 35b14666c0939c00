"""How a node's membership and discovery know each other, and how it revokes a member."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmpy.discovery.service import Discovery, PeerView
from swarmpy.discovery.trust import Trust
from swarmpy.errors import MembershipError, NotAMember
from swarmpy.status import Revoked
from swarmpy.trust.membership import Membership

if TYPE_CHECKING:
    from swarmpy.node import Node

SUFFIX_CHARACTERS_MIN = 6
"""Fewest characters of the end of a PeerId that name a peer; `swarmpy peers` shows eight."""


def trust_of(membership: Membership) -> Trust:
    """Return what discovery needs to know of membership."""
    return Trust(
        is_member=membership.is_member,
        confirm=membership.confirm,
        shared_networks=membership.shared_networks,
        own_memberships=membership.own_memberships,
        is_void=membership.is_void,
        revocations=membership.revocations,
        take_revocation=membership.take_revocation,
    )


def introduce(membership: Membership, discovery: Discovery) -> None:
    """Tell discovery what happens to membership, from now on."""
    membership.on_member(discovery.member_joined)
    membership.on_lost(discovery.member_lost)
    membership.on_network(discovery.networks_changed)
    membership.on_revoked(discovery.member_revoked)


def revoke(node: Node, text: str) -> Revoked:
    """End a member's membership wherever this node may; see `Node.revoke`."""
    view = find_peer(node, text)
    announced = node.discovery.memberships(view.peer)
    names = {network.id: network.name for network in node.membership.networks()}
    networks = node.membership.revoke(view.peer, announced=announced)
    return Revoked(
        peer=view.peer,
        name=view.name,
        networks=tuple(names[network_id] for network_id in networks),
    )


def find_peer(node: Node, text: str) -> PeerView:
    """Return the peer that a person means: by PeerId, the end of one, or a name.

    Raises:
        NotAMember: No peer known here is called so.
        MembershipError: Several are.
    """
    ending = text.removeprefix("…")
    views = node.discovery.peers()
    exact = [view for view in views if view.peer == text]
    found = exact or [
        view
        for view in views
        if view.name == text
        or (len(ending) >= SUFFIX_CHARACTERS_MIN and view.peer.endswith(ending))
    ]
    if not found:
        raise NotAMember(
            f"no peer called {text!r} is known here",
            fix="`swarmpy peers` lists them; name it by its PeerId, the end of it, or its name.",
        )
    if len(found) > 1:
        raise MembershipError(
            f"{len(found)} peers are called {text!r}: {', '.join(view.peer for view in found)}",
            fix="Name the one you mean by its PeerId.",
        )
    return found[0]
