"""What discovery needs to know of membership, as plain callables that the node hands over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from swarmpy.identity import PeerId
from swarmpy.proto.membership import Membership, NetworkId
from swarmpy.proto.revocation import SignedRevocation


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Who is a member. Each is the method of the same name of `swarmpy.trust.membership`."""

    is_member: Callable[[PeerId], bool]
    confirm: Callable[[PeerId], Awaitable[bool]]
    shared_networks: Callable[[PeerId], frozenset[NetworkId]]
    own_memberships: Callable[[], Mapping[NetworkId, Membership]]
    is_void: Callable[[Membership], bool]
    """Whether a membership rests on a revoked one."""
    revocations: Callable[[], Sequence[SignedRevocation]]
    take_revocation: Callable[[SignedRevocation], bool]
    """Keep a verified revocation of one of this node's networks, and act on it; False where there
    is no room."""
