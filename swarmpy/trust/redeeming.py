"""Redeeming a code at its issuer: dial, show, verify the answer; nothing is stored here.

Asking again is harmless (the issuer answers the same peer with the same bytes), so a connection
that breaks in between costs another try and never the code.
Spec: protocols/invite.md, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import assert_never, cast

from swarmpy.abc import Address, Host, ProtocolId, WallSeconds
from swarmpy.errors import (
    BadMessage,
    ConnectionLost,
    InviteExpired,
    InviteForeign,
    InviteMalformed,
    InviteUsed,
    MembershipError,
    MembershipRevoked,
    StreamReset,
)
from swarmpy.identity import PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto import invite as proto
from swarmpy.proto.invite import Accepted, Redeem, Refused, SignedInvite
from swarmpy.proto.membership import Membership, verify_membership
from swarmpy.trust.exchange import CONVERSATION_TIMEOUT_S, within

PROTOCOL = ProtocolId(proto.PROTOCOL)

ATTEMPTS_MAX = 3
"""The issuer may close this very connection as one of two made at once; then another is there."""


async def redeem_at(
    host: Host,
    signed: SignedInvite,
    *,
    member: PeerId,
    wall_time: Callable[[], WallSeconds],
) -> Membership:
    """Redeem an invite for `member` and return the verified membership.

    Raises:
        DialFailed, HandshakeFailed: The issuer cannot be reached at the invite's addresses.
        InviteExpired, InviteUsed, InviteForeign, InviteMalformed: The issuer refused the code.
        MembershipRevoked: This node was a member once, and was revoked.
        MembershipError: The issuer cannot admit anybody now.
        RemoteProtocolError: Its answer does not verify.
    """
    for attempt in range(ATTEMPTS_MAX):
        await host.dial(signed.issuer, addresses_of(signed))
        try:
            answer = await _ask(host, signed)
            break
        except (ConnectionLost, StreamReset):
            if attempt == ATTEMPTS_MAX - 1:
                raise
    if isinstance(answer, Refused):
        raise _refusal(answer, signed, wall_time())
    membership = verify_membership(answer.proof, wall_s=wall_time(), expected_member=member)
    if membership.network_id != signed.network_id:
        raise BadMessage(
            f"the issuer answered with a membership of {membership.network_id},"
            f" expected {signed.network_id}",
            peer=signed.issuer,
        )
    return membership


def addresses_of(signed: SignedInvite) -> list[Address]:
    """Return where an invite says its issuer listens."""
    return [Address(address) for address in signed.addresses]


async def _ask(host: Host, signed: SignedInvite) -> Accepted | Refused:
    with within(CONVERSATION_TIMEOUT_S, "redeeming the invite"):
        stream = await host.open_stream(signed.issuer, [PROTOCOL])
        try:
            messages = MessageStream(stream)
            await messages.send(Redeem(invite=signed.envelope))
            kinds = cast("type[Accepted | Refused]", Accepted | Refused)
            answer = await messages.receive(kinds)
            await messages.close_write()
        except BaseException:
            stream.reset()
            raise
    return answer


def _refusal(refused: Refused, signed: SignedInvite, wall_s: WallSeconds) -> MembershipError:
    issuer = signed.invite.issuer_name or signed.issuer
    match refused.reason:
        case "expired":
            return InviteExpired(
                f"the invite ended at {utc(signed.invite.expires_wall_s)}; it is"
                f" {utc(refused.wall_s)} at {issuer} and {utc(wall_s)} here"
            )
        case "used":
            return InviteUsed(f"{issuer} says that the invite was used by others, or revoked")
        case "foreign":
            return InviteForeign(f"{issuer} has no record of having issued this invite")
        case "malformed":
            return InviteMalformed(f"{issuer} could not read the invite")
        case "busy":
            return MembershipError(
                f"{issuer} was shown too many wrong codes from this address",
                fix="Wait a minute and try again.",
            )
        case "unable":
            return MembershipError(
                f"{issuer} may not let anybody into the network now: its own membership has ended"
                " or does not allow it",
                fix="Ask another member for an invite.",
            )
        case "revoked":
            return MembershipRevoked(
                f"{issuer} says that this node's membership of"
                f" {signed.invite.network_name!r} was revoked: its codes let this node in no more"
            )
        case _:
            assert_never(refused.reason)


def utc(wall_s: float) -> str:
    """Return Unix seconds as people read them."""
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
