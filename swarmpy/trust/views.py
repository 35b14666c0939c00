"""What membership shows to people and programs: plain values, JSON-able by msgspec."""

from __future__ import annotations

import msgspec

from swarmpy.proto.membership import NetworkId


class NetworkView(msgspec.Struct, frozen=True, kw_only=True):
    """A network this node is in."""

    id: NetworkId
    name: str
    is_founder: bool
    """Whether the network's key is here: back it up, memberships outlive it by 30 days at most."""
    can_invite: bool
    member_since_wall_s: float
    not_after_wall_s: float


class InviteView(msgspec.Struct, frozen=True, kw_only=True):
    """An open invite, without its code."""

    id: str
    network_id: NetworkId
    network_name: str
    can_invite: bool
    uses: int
    uses_left: int
    expires_wall_s: float
