"""Members: what each connected peer has proven of its membership, and who waits to hear of it.

A peer is admitted when its proofs are verified, so that nothing it sends on their strength is
refused; it is a member when the conversation has ended well and both sides know.
Spec: protocols/membership.md, section 3 and States.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from swarmpy.abc import Connection
from swarmpy.identity import PeerId
from swarmpy.proto.membership import Membership, NetworkId
from swarmpy.trust.exchange import Shared

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True)
class _Member:
    """What is known of a connected peer's membership."""

    shared: dict[NetworkId, Membership] = field(default_factory=dict)
    connection: Connection | None = None
    """Where both sides confirmed; None before."""


class Members:
    """The connected peers that have shown a membership. As many as there are connections."""

    def __init__(self, is_valid: Callable[[Membership], bool]) -> None:
        """Args: is_valid: Whether a verified membership counts for anything here and now."""
        self._is_valid = is_valid
        self._peers: dict[PeerId, _Member] = {}
        self._joining: dict[PeerId, int] = {}
        self._changed = trio.Event()
        self._on_member: list[Callable[[PeerId], None]] = []
        self._on_lost: list[Callable[[PeerId], None]] = []

    # Who is one ----------------------------------------------------------------------

    def is_admitted(self, peer: PeerId) -> bool:
        """Whether a peer has shown a membership that is valid now; the gate asks this."""
        known = self._peers.get(peer)
        return known is not None and any(map(self._is_valid, known.shared.values()))

    def is_member(self, peer: PeerId) -> bool:
        """Whether a peer is admitted and knows that this node is a member too."""
        known = self._peers.get(peer)
        return known is not None and known.connection is not None and self.is_admitted(peer)

    def members(self) -> list[PeerId]:
        """Return the members in PeerId order."""
        return [peer for peer in sorted(self._peers) if self.is_member(peer)]

    def lapsed(self) -> list[PeerId]:
        """Return in PeerId order who showed memberships of which none is valid any more."""
        return [peer for peer in sorted(self._peers) if not self.is_admitted(peer)]

    def memberships(self, peer: PeerId) -> dict[NetworkId, Membership]:
        """Return what a peer has shown, whether or not it is valid still."""
        known = self._peers.get(peer)
        return {} if known is None else dict(known.shared)

    def shared_networks(self, peer: PeerId) -> frozenset[NetworkId]:
        """Return the networks of which a peer has shown a membership that is valid now."""
        shown = self.memberships(peer)
        return frozenset(network for network, item in shown.items() if self._is_valid(item))

    def connection(self, peer: PeerId) -> Connection | None:
        """Return the connection on which both sides confirmed; None before."""
        known = self._peers.get(peer)
        return None if known is None else known.connection

    # Coming and going ----------------------------------------------------------------

    def admit(self, peer: PeerId, shared: Shared) -> None:
        """Count what a peer has shown; of one network the membership that lasts longest."""
        known = self._peers.setdefault(peer, _Member()).shared
        for network_id, membership in shared.items():
            # Of two conversations at once the one that ends last may have begun before a renewal.
            before = known.get(network_id)
            if before is None or before.not_after_wall_s < membership.not_after_wall_s:
                known[network_id] = membership

    def confirm(self, connection: Connection, shared: Shared) -> None:
        """A conversation has ended well: both sides serve each other from here on."""
        known = self._peers.setdefault(connection.peer, _Member(shared=dict(shared)))
        if known.connection is not connection:
            known.connection = connection
            for callback in self._on_member:
                callback(connection.peer)
        self._wake()

    def forget(self, peer: PeerId) -> None:
        """A peer is a stranger again."""
        known = self._peers.pop(peer, None)
        if known is not None and known.connection is not None:
            for callback in self._on_lost:
                callback(peer)
        self._wake()

    def retain(self, connected: Container[PeerId]) -> None:
        """Forget whoever is not connected, or showed no membership that is valid still."""
        kept = {peer for peer in self._peers if peer in connected and self.is_admitted(peer)}
        if len(kept) < len(self._peers):
            for peer in sorted(self._peers.keys() - kept):
                self.forget(peer)

    @contextmanager
    def joining(self, peer: PeerId) -> Iterator[None]:
        """Keep `wait_joined` from calling a peer a stranger while it joins, or lets us join."""
        self._joining[peer] = self._joining.get(peer, 0) + 1
        try:
            yield
        finally:
            self._joining[peer] -= 1
            if not self._joining[peer]:
                del self._joining[peer]
            self._wake()

    # Waiting -------------------------------------------------------------------------

    async def wait_member(self, peer: PeerId) -> None:
        """Wait until a peer is a member."""
        while not self.is_member(peer):
            await self._changed.wait()

    async def wait_joined(self, peer: PeerId) -> bool:
        """Wait while a peer is `joining` and no member yet; return whether it is one."""
        while not self.is_member(peer) and self._joining.get(peer):
            await self._changed.wait()
        return self.is_member(peer)

    def on_member(self, callback: Callable[[PeerId], None]) -> None:
        """Call back when a peer has become a member, and again after each reconnection."""
        self._on_member.append(callback)

    def on_lost(self, callback: Callable[[PeerId], None]) -> None:
        """Call back when a member was forgotten."""
        self._on_lost.append(callback)

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()
