"""The gate: a stranger may identify itself, ping, and prove or ask for membership; nothing else."""

from __future__ import annotations

from collections.abc import Callable

from swarmpy.abc import Gate, ProtocolId
from swarmpy.identity import PeerId
from swarmpy.proto import invite, membership

OPEN_PROTOCOLS = frozenset(
    {
        "/ipfs/id/1.0.0",
        "/ipfs/id/push/1.0.0",
        "/ipfs/ping/1.0.0",
        membership.PROTOCOL,
        invite.PROTOCOL,
    }
)
"""What is served to everybody: enough to become a member, too little to be of use."""


class MembershipGate(Gate):
    """Lets strangers open only `OPEN_PROTOCOLS`, members everything."""

    def __init__(self, is_admitted: Callable[[PeerId], bool]) -> None:
        self._is_admitted = is_admitted

    def allow_stream(self, peer: PeerId, protocol: ProtocolId) -> bool:
        return protocol in OPEN_PROTOCOLS or self._is_admitted(peer)

    def may_drop(self, peer: PeerId) -> bool:
        return not self._is_admitted(peer)
