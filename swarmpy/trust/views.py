"""What membership shows to people and programs: plain values, JSON-able by msgspec."""

from __future__ import annotations

import msgspec

from swarmpy.identity import PeerId
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


class InviteCreated(msgspec.Struct, frozen=True, kw_only=True):
    """A new invite. The code is a secret: anyone who holds it can join."""

    code: str
    id: str
    words: tuple[str, ...]
    network_id: NetworkId
    network_name: str
    expires_wall_s: float
    uses: int
    can_invite: bool
    addresses: tuple[str, ...]


class InviteView(msgspec.Struct, frozen=True, kw_only=True):
    """An open invite, without its code."""

    id: str
    network_id: NetworkId
    network_name: str
    can_invite: bool
    uses: int
    uses_left: int
    expires_wall_s: float


class InviteShown(msgspec.Struct, frozen=True, kw_only=True):
    """What a joiner sees before it says yes."""

    network_id: NetworkId
    network_name: str
    issuer: PeerId
    issuer_name: str
    words: tuple[str, ...]
    """The same four words stand on the issuer's screen."""
    scope: tuple[str, ...]
    """Sentences: what this node will do for the members, and what it may ask of them."""
    expires_wall_s: float
    can_invite: bool
    is_member: bool
    """Whether this node is in the network already."""


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """The network a node has joined."""

    network_id: NetworkId
    network_name: str
    issuer: PeerId
    issuer_name: str
    was_member: bool
