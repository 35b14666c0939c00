"""Renewal: a member whose record ends soon asks another for a new one.

Spec: protocols/membership.md, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

from swarmpy.abc import Host, ProtocolId, WallSeconds
from swarmpy.errors import NotAMember
from swarmpy.identity import PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto.membership import (
    PROTOCOL,
    RENEW_BELOW_S,
    Membership,
    NotRenewed,
    Renew,
    Renewed,
    verify_membership,
)
from swarmpy.trust.exchange import CONVERSATION_TIMEOUT_S, within
from swarmpy.trust.networks import NetworkBook

RENEWED_MIN_S = 24 * 3600.0
"""A renewed record must gain a day, or two members could renew each other for ever to no end."""


def renewers(own: Membership, others: Iterable[Membership]) -> list[PeerId]:
    """Return which members may be asked to renew a membership, in order.

    First come those on whom it rests already: each other that renews it stands above its member
    from then on, and may revoke it.
    """
    added = {
        theirs.member: len(set(theirs.line) - set(own.line))
        for theirs in others
        if theirs.can_invite and own.member not in theirs.members
    }
    return sorted(added, key=lambda peer: (added[peer], peer))


async def ask_renewal(
    host: Host, peer: PeerId, own: Membership, *, wall_time: Callable[[], WallSeconds]
) -> Membership | None:
    """Ask a member for a new record; None where it has none that is worth having.

    Raises:
        NetworkError, ProtocolError, NotAMember: It did not answer, or with what does not verify.
    """
    with within(CONVERSATION_TIMEOUT_S, "the renewal"):
        stream = await host.open_stream(peer, [ProtocolId(PROTOCOL)])
        try:
            messages = MessageStream(stream)
            await messages.send(Renew(proof=own.proof))
            kinds = cast("type[Renewed | NotRenewed]", Renewed | NotRenewed)
            answer = await messages.receive(kinds)
            await stream.close_write()
        except BaseException:
            stream.reset()
            raise
    if isinstance(answer, NotRenewed):
        return None
    renewed = verify_membership(answer.proof, wall_s=wall_time(), expected_member=own.member)
    gained_s = renewed.not_after_wall_s - own.not_after_wall_s
    is_same = renewed.network_id == own.network_id
    return renewed if is_same and gained_s >= RENEWED_MIN_S else None


def renewal_for(
    peer: PeerId,
    asked: Renew,
    *,
    book: NetworkBook,
    is_void: Callable[[Membership], bool],
    wall_s: WallSeconds,
) -> Renewed | NotRenewed:
    """Answer a member whose record ends soon; its scope stays what it was, and on whom it rests.

    Raises:
        RemoteProtocolError: The proof is malformed, or another peer's.
    """
    try:
        theirs = verify_membership(asked.proof, wall_s=wall_s, expected_member=peer)
        if theirs.not_after_wall_s - wall_s >= RENEW_BELOW_S or is_void(theirs):
            return NotRenewed()
        proof = book.issue(theirs.network_id, peer, can_invite=theirs.can_invite, replaced=theirs)
    except NotAMember:
        return NotRenewed()
    return Renewed(proof=proof)
