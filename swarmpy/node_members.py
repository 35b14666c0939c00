"""How membership and discovery know each other, whom a node waits for, how it revokes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from swarmpy.discovery.neighbourhood import NEIGHBOURS_MIN
from swarmpy.discovery.service import Discovery
from swarmpy.discovery.trust import Trust
from swarmpy.errors import MembershipError, NotAMember, RemoteProtocolError
from swarmpy.identity import PeerId, parse_peer_id
from swarmpy.proto.membership import NetworkId
from swarmpy.proto.revocation import SignedRevocation, voids
from swarmpy.status import Revoked
from swarmpy.trust.membership import Membership

if TYPE_CHECKING:
    from swarmpy.node import Node

ANNOUNCED_S = 2.0
"""What a member that has just connected gets to announce itself, before a plan without it."""

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


def revoke(node: Node, text: str, *, network: str, is_rehearsal: bool) -> Revoked:
    """End a member's membership wherever this node may; see `Node.revoke`."""
    peer, name = find_peer(node, text)
    announced = node.discovery.memberships(peer)
    network_id = _find_network(node, network) if network else None
    names = {item.id: item.name for item in node.membership.networks()}
    signed = node.membership.sign_revocations(peer, announced=announced, network_id=network_id)
    falling = _falling(node, signed)
    if not is_rehearsal:
        node.membership.revoke(peer, announced=announced, network_id=network_id)
    networks = {item.network_id for item in signed}
    told = [item for item in node.membership.members() if item != peer]
    return Revoked(
        peer=peer,
        name=name,
        networks=tuple(names[item.network_id] for item in signed),
        falling=falling,
        neighbours_told=sum(bool(networks & node.membership.shared_networks(it)) for it in told),
    )


def _falling(node: Node, signed: Sequence[SignedRevocation]) -> tuple[str, ...]:
    """Return who is in view and rests on whom these revocations are of."""
    revoked = {item.peer for item in signed}
    return tuple(
        announcement.name or announcement.peer
        for announcement in node.discovery.announcements()
        if announcement.peer not in revoked
        and any(
            voids(item, membership)
            for membership in node.discovery.memberships(PeerId(announcement.peer))
            for item in signed
        )
    )


def _find_network(node: Node, text: str) -> NetworkId:
    found = [item.id for item in node.membership.networks() if text in (item.id, item.name)]
    if len(found) != 1:
        raise NotAMember(
            f"this node is in {len(found) or 'no'} networks called {text!r}, expected one",
            fix="`swarmpy status --json` lists them; name it by its id.",
        )
    return found[0]


def find_peer(node: Node, text: str) -> tuple[PeerId, str]:
    """Return the PeerId and name of whom a person means: by PeerId, the end of one, or a name.

    A name is what a peer says of itself; it counts among members only, and only if one has it. A
    whole PeerId need not be known here: its owner may have been away for long.

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
        if (view.name == text and view.state != "visible")
        or (len(ending) >= SUFFIX_CHARACTERS_MIN and view.peer.endswith(ending))
    ]
    if not found and (absent := _peer_id(text)) is not None:
        return absent, ""
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
    return found[0].peer, found[0].name


def _peer_id(text: str) -> PeerId | None:
    try:
        return parse_peer_id(text)
    except RemoteProtocolError:
        return None


async def wait_members(node: Node, count: int) -> None:
    """Wait until `count` members are known, and connected as far as neighbours are."""
    while True:
        reachable = node.discovery.reachable()
        connected = sum(node.membership.is_member(PeerId(item.peer)) for item in reachable)
        if len(reachable) >= count and connected >= min(count, NEIGHBOURS_MIN):
            return
        await node.wait_members_changed()


async def wait_announced(node: Node) -> bool:
    """Give members that connected just now a moment; return whether one said what it offers."""

    def silent() -> int:
        found = map(node.discovery.announcement, node.membership.members())
        return sum(announcement is None for announcement in found)

    before = silent()
    with trio.move_on_after(ANNOUNCED_S if before else 0):
        while silent():
            await node.wait_members_changed()
    return silent() < before
