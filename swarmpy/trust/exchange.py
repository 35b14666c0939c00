"""The membership conversation: each side learns whether the other is in a network of its own.

Straight-line, four messages: hello, proofs, proofs, done. Whoever's proofs were verified is
admitted before the next message goes out, so that no stream opened on its strength is refused.
Spec: protocols/membership.md, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from swarmpy.abc import Stream, WallSeconds
from swarmpy.errors import BadMessage, HandshakeFailed, MembershipRevoked, NotAMember, PeerTimeout
from swarmpy.net.messages import MessageStream
from swarmpy.proto.membership import (
    Done,
    Hello,
    Membership,
    NetworkId,
    Proof,
    Proofs,
    matching_networks,
    network_tag,
    verify_membership,
)
from swarmpy.proto.revocation import SignedRevocation
from swarmpy.proto.wire import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

CONVERSATION_TIMEOUT_S = 10.0
"""For a whole conversation; four messages and a few signatures on a slow mobile link take 3 s."""

Shared = Mapping[NetworkId, Membership]
"""The remote peer's verified memberships of this node's networks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What both roles of the conversation need from the node.

    `admit` is called with what was verified of the peer, before the peer can know; `voiding`
    returns the revocation that makes a sound membership void, if one does; `told_revoked` takes the
    one by which this node's own is.
    """

    own: Mapping[NetworkId, Membership]
    wall_s: WallSeconds
    voiding: Callable[[Membership], SignedRevocation | None]
    told_revoked: Callable[[bytes], None]
    admit: Callable[[Shared], None]

    async def initiate(self, messages: MessageStream) -> Shared:
        """Start the conversation; on return both sides serve each other in the networks returned.

        Raises:
            NotAMember: The peer refused this node's proofs, or its own have ended.
            MembershipRevoked: It refused them, and showed by what they are void.
            RemoteProtocolError: The peer showed what does not verify.
        """
        binding = channel_binding(messages.stream)
        tags = tuple(
            network_tag(network_id, channel_binding=binding, role="initiator")
            for network_id in self.own
        )
        await messages.send(Hello(tags=tags))
        proofs = await messages.receive(Proofs)
        shared = self._verify(proofs.proofs, messages).counting()
        if not shared:
            return {}
        self.admit(shared)
        await messages.send(Proofs(proofs=self._own_proofs(shared)))
        done = await messages.receive(Done)
        if done.revocation:
            self.told_revoked(done.revocation)
        if done.refusal:
            reason = printable(done.refusal)
            kind = MembershipRevoked if done.revocation else NotAMember
            raise kind(f"{messages.peer} refused this node's membership: {reason}")
        return shared

    async def respond(self, hello: Hello, messages: MessageStream) -> Shared:
        """Answer a hello; as for `initiate`."""
        binding = channel_binding(messages.stream)
        matching = matching_networks(hello.tags, self.own, channel_binding=binding)
        await messages.send(Proofs(proofs=self._own_proofs(matching)))
        if not matching:
            return {}
        proofs = await messages.receive(Proofs)
        shown = self._verify(proofs.proofs, messages)
        revocation = b"" if shown.revocation is None else shown.revocation.envelope
        try:
            shared = shown.counting()
        except NotAMember as error:
            # An ended record is a clock or a long absence, not an attack: its owner is told.
            await messages.send(Done(refusal=str(error)[:200], revocation=revocation))
            return {}
        if shared:
            self.admit(shared)
        refusal = "" if shared else "no membership was shown"
        await messages.send(Done(refusal=refusal, revocation=revocation))
        return shared

    def _own_proofs(self, networks: Sequence[NetworkId] | Shared) -> tuple[Proof, ...]:
        return tuple(self.own[network_id].proof for network_id in networks)

    def _verify(self, proofs: Sequence[Proof], messages: MessageStream) -> _Shown:
        """Look at each proof by itself: who is out of one network may share another.

        Raises:
            RemoteProtocolError: One is malformed, another peer's, or of a network not named.
        """
        shown = _Shown()
        for proof in proofs:
            try:
                membership = verify_membership(
                    proof, wall_s=self.wall_s, expected_member=messages.peer
                )
            except NotAMember as error:
                shown.refused = shown.refused or error
                continue
            if membership.network_id not in self.own:
                raise BadMessage("a membership of a network that was not named", peer=messages.peer)
            if (revocation := self.voiding(membership)) is None:
                shown.shared[membership.network_id] = membership
                continue
            shown.revocation = shown.revocation or revocation
            shown.refused = shown.refused or MembershipRevoked(
                f"revoked: {messages.peer}, or who signed it in, is no member of"
                f" {membership.network_name!r} any more"
            )
        return shown


@dataclass(slots=True)
class _Shown:
    """What a peer's proofs come to."""

    shared: dict[NetworkId, Membership] = field(default_factory=dict)
    refused: NotAMember | None = None
    """Why the first of the others does not count."""
    revocation: SignedRevocation | None = None
    """What makes the first void that is."""

    def counting(self) -> Shared:
        """Return the memberships that count.

        Raises:
            NotAMember: Some were shown, and none does.
        """
        if self.refused is not None and not self.shared:
            raise self.refused
        return self.shared


def channel_binding(stream: Stream) -> bytes:
    """Return what is equal at both ends of the stream's connection alone.

    Raises:
        HandshakeFailed: The connection has none; membership cannot be shown on it.
    """
    binding = stream.connection.channel_binding
    if binding is None:
        raise HandshakeFailed("the connection has no channel binding", peer=stream.peer)
    return binding


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Bound a block's duration.

    Raises:
        PeerTimeout: It took longer.
    """
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        raise PeerTimeout(f"{what} took longer than {seconds:.0f} s") from error
