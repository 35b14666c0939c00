"""The invite desk: issues codes, shows them, and redeems them for whoever brings one.

Only the issuer redeems. What it decides is on disk before it is said (`invites.py`).
Spec: protocols/invite.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from swarmpy.abc import Address, NowSeconds
from swarmpy.config import INVITE_TTL_S
from swarmpy.environment import Environment
from swarmpy.errors import (
    BadMessage,
    InviteExpired,
    InviteForeign,
    InviteUsed,
    MembershipError,
    MembershipRevoked,
    NotAMember,
    RemoteProtocolError,
)
from swarmpy.identity import Identity, PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto.endpoint import advertised, ip_endpoint
from swarmpy.proto.invite import (
    INVITE_ADDRESSES_MAX,
    INVITE_USES_MAX,
    TOKEN_BYTES,
    Accepted,
    Redeem,
    RefusalReason,
    Refused,
    SignedInvite,
    decode_invite,
    encode_invite,
    open_invite,
    words_of,
)
from swarmpy.proto.membership import CLOCK_SKEW_S, NAME_MAX, NetworkId, Proof
from swarmpy.proto.wire import decode, encode
from swarmpy.status import InviteCreated, InviteShown
from swarmpy.trust.attempts import Attempts
from swarmpy.trust.invites import InviteBook, Redemption
from swarmpy.trust.networks import NetworkBook
from swarmpy.trust.redeeming import utc
from swarmpy.trust.views import InviteView

INVITE_TTL_S_MIN = 1.0

_SERVES = (
    "It will run layers of models for the network's members with the memory you allow.",
    "It may ask members to do the same; a member that computes on a prompt can read most of it.",
    "Members see its name, addresses and which models it has.",
)
_INVITES = "It may invite others into the network and renew their membership."
_INVITES_NOT = "It may not invite others."


class InviteDesk:
    """Issues and redeems the invites of one node."""

    def __init__(
        self,
        book: InviteBook,
        networks: NetworkBook,
        *,
        identity: Identity,
        name: str,
        environment: Environment,
    ) -> None:
        self._book = book
        self._networks = networks
        self._identity = identity
        self._name = name[:NAME_MAX]
        self._environment = environment
        self._attempts = Attempts()

    # Issuing ---------------------------------------------------------------------

    def create(
        self,
        addresses: Sequence[Address],
        *,
        ttl_s: float,
        uses: int,
        can_invite: bool,
        network_id: NetworkId | None,
    ) -> InviteCreated:
        """Issue an invite that names `addresses`; see `Membership.create_invite`."""
        if not INVITE_TTL_S_MIN <= ttl_s <= INVITE_TTL_S:
            raise MembershipError(
                f"an invite lives {INVITE_TTL_S_MIN:.0f} to {INVITE_TTL_S:.0f} s, not {ttl_s:g} s",
                fix="Choose a life of at most 24 hours.",
            )
        if not 1 <= uses <= INVITE_USES_MAX:
            raise MembershipError(
                f"an invite admits 1 to {INVITE_USES_MAX} machines, not {uses}",
                fix="Issue several codes.",
            )
        told = tuple(advertised(addresses, count_max=INVITE_ADDRESSES_MAX))
        if not told:
            raise MembershipError(
                "this node listens at no address that an invite could name",
                fix="Set network.listen to an address such as /ip4/0.0.0.0/tcp/0.",
            )
        membership = self._networks.inviting(network_id)
        wall_s = self._environment.wall_time()
        token = self._environment.random.randbytes(TOKEN_BYTES)
        expires_wall_s = int(wall_s + ttl_s)
        invite_id = self._book.add(
            token,
            network_id=membership.network_id,
            can_invite=can_invite,
            uses=uses,
            expires_wall_s=expires_wall_s,
            wall_s=wall_s,
        )
        code = encode_invite(
            self._identity,
            network_id=membership.network_id,
            network_name=membership.network_name,
            issuer_name=self._name,
            addresses=told,
            token=token,
            expires_wall_s=expires_wall_s,
            can_invite=can_invite,
            uses=uses,
        )
        return InviteCreated(
            code=code,
            id=invite_id,
            words=" ".join(words_of(membership.network_id)),
            network=membership.network_name,
            expires_wall_s=float(expires_wall_s),
            uses=uses,
        )

    def open_invites(self) -> list[InviteView]:
        """Return the open invites, the next to end first."""
        names = {key: value.network_name for key, value in self._networks.memberships.items()}
        return [
            InviteView(
                id=invite.id,
                network_id=invite.network_id,
                network_name=names.get(invite.network_id, ""),
                can_invite=invite.can_invite,
                uses=invite.uses,
                uses_left=invite.uses_left,
                expires_wall_s=float(invite.expires_wall_s),
            )
            for invite in self._book.open(wall_s=self._environment.wall_time())
        ]

    def revoke(self, invite_id: str) -> bool:
        """End an invite; see `InviteBook.revoke`."""
        return self._book.revoke(invite_id)

    def proofs_given(self, peer: PeerId) -> list[Proof]:
        """Return the proofs that a peer got for invites of this node."""
        return [decode(answer, Accepted).proof for answer in self._book.answers(peer)]

    # Reading codes -----------------------------------------------------------------

    def open_code(self, code: str) -> SignedInvite:
        """Verify a code as far as this machine can.

        Raises:
            InviteMalformed: The code is incomplete or was changed.
            InviteExpired: It is over by this machine's clock.
        """
        signed = decode_invite(code)
        wall_s = self._environment.wall_time()
        if wall_s > signed.invite.expires_wall_s + CLOCK_SKEW_S:
            # Within the skew its issuer decides, by the clock that set the time.
            raise InviteExpired(
                f"the invite ended at {utc(signed.invite.expires_wall_s)}, and it is {utc(wall_s)}"
                " by this machine's clock"
            )
        return signed

    def show(self, code: str) -> InviteShown:
        """Read a code for a person; see `Membership.inspect_invite`."""
        signed = self.open_code(code)
        invite = signed.invite
        return InviteShown(
            network=invite.network_name,
            network_id=signed.network_id,
            issuer=invite.issuer_name,
            issuer_peer=signed.issuer,
            words=" ".join(words_of(signed.network_id)),
            scope="; ".join((*_SERVES, _INVITES if invite.can_invite else _INVITES_NOT)),
            expires_wall_s=float(invite.expires_wall_s),
        )

    # Redeeming -----------------------------------------------------------------------

    async def serve(self, messages: MessageStream) -> None:
        """Answer one joiner."""
        asked = await messages.receive(Redeem)
        await messages.send(self._answer(asked, messages))
        await messages.close_write()

    def _answer(self, asked: Redeem, messages: MessageStream) -> Accepted | Refused:
        """Decide, without an await between the decision and the disk."""
        now_s = NowSeconds(trio.current_time())
        sources = [messages.peer, _ip_of(messages.stream.connection.remote_address)]
        if any(self._attempts.is_blocked(source, now_s=now_s) for source in sources):
            return self._refused("busy")
        try:
            return self._redeem(asked, messages.peer)
        except InviteExpired:
            return self._refused("expired")
        except InviteUsed:
            return self._refused("used")
        except MembershipRevoked:
            return self._refused("revoked")
        except NotAMember:
            return self._refused("unable")
        except (InviteForeign, RemoteProtocolError) as error:
            # Only these can be guesses; the others held a code that this node signed.
            for source in sources:
                self._attempts.add(source, now_s=now_s)
            return self._refused("foreign" if isinstance(error, InviteForeign) else "malformed")

    def _redeem(self, asked: Redeem, peer: PeerId) -> Accepted:
        signed = open_invite(asked.invite)
        if signed.issuer != self._identity.peer_id:
            raise InviteForeign(f"the invite was issued by {signed.issuer}")

        def answer(redemption: Redemption) -> bytes:
            proof = self._networks.issue(
                redemption.network_id, peer, can_invite=redemption.can_invite
            )
            return encode(Accepted(proof=proof))

        stored = self._book.redeem(
            signed.invite.token, peer, wall_s=self._environment.wall_time(), answer=answer
        )
        accepted = decode(stored, Accepted)
        # What was answered before a revocation admits nobody after it.
        self._networks.check_not_void(accepted.proof)
        return accepted

    def _refused(self, reason: RefusalReason) -> Refused:
        return Refused(reason=reason, wall_s=int(self._environment.wall_time()))


def _ip_of(address: Address) -> str:
    try:
        return str(ip_endpoint(address)[0])
    except BadMessage:
        return address
