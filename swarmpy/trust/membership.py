"""Membership: which networks this node is in, which peers share one, and how either changes.

After each handshake the connection's initiator starts the membership conversation; until it has
ended well the gate serves the peer nothing but what a stranger may ask.
Spec: protocols/membership.md, protocols/invite.md; design: docs/architecture.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import trio

from swarmpy.abc import Connection, Host, NowSeconds, ProtocolId, Stream
from swarmpy.agenda import Agenda
from swarmpy.config import INVITE_TTL_S
from swarmpy.environment import Environment
from swarmpy.errors import (
    ConfigError,
    MembershipError,
    NetworkError,
    NotAMember,
    ProtocolError,
    RemoteProtocolError,
    StaleRecord,
)
from swarmpy.identity import Identity, PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto import invite
from swarmpy.proto import membership as proto
from swarmpy.proto.membership import Hello, NetworkId, Renew
from swarmpy.proto.revocation import SignedRevocation, open_revocation
from swarmpy.status import InviteCreated, InviteShown, Joined
from swarmpy.store import open_database
from swarmpy.trust import invites, networks, revocations
from swarmpy.trust.attempts import CONVERSATIONS_MAX, Attempts
from swarmpy.trust.conversations import PROTOCOL, Conversations
from swarmpy.trust.exchange import CONVERSATION_TIMEOUT_S, Exchange, within
from swarmpy.trust.gate import MembershipGate
from swarmpy.trust.issuing import InviteDesk
from swarmpy.trust.members import Members
from swarmpy.trust.networks import NetworkBook
from swarmpy.trust.redeeming import redeem_at
from swarmpy.trust.renewing import ask_renewal, renewal_for, renewers
from swarmpy.trust.revocations import RevocationBook
from swarmpy.trust.revoking import RevocationDesk
from swarmpy.trust.views import InviteView, NetworkView

logger = logging.getLogger(__name__)

Subject = TypeVar("Subject")

INVITE_PROTOCOL = ProtocolId(invite.PROTOCOL)

STRANGER_TIMEOUT_S = 30.0
"""A connected stranger has this long to become a member; a person confirming a join is quicker,
and redials where not."""

SWEEP_INTERVAL_S = 5.0
RENEW_INTERVAL_S = 600.0


class Membership:
    """A node's memberships and its peers'. `run` must run for peers to become members."""

    def __init__(
        self,
        *,
        identity: Identity,
        name: str,
        folder: Path,
        environment: Environment,
        host: Host,
    ) -> None:
        """Take over the host's gate and serve the membership and invite protocols.

        Args:
            name: This node's name, shown in invites.
            folder: The node's data folder; `membership.db` and `networks/` are kept in it.
        """
        self._identity = identity
        self._name = name
        self._environment = environment
        self._host = host
        self._agenda = Agenda(environment.call_at)
        self._strangers_since: dict[Connection, float] = {}
        self._database = open_database(
            folder / "membership.db", networks.SCHEMA + invites.SCHEMA + revocations.SCHEMA
        )
        self._revocations = RevocationBook(self._database, environment)
        self._book = NetworkBook(
            self._database,
            identity=identity,
            folder=folder / "networks",
            environment=environment,
            revocations=self._revocations,
        )
        self._desk = InviteDesk(
            invites.InviteBook(self._database),
            self._book,
            identity=identity,
            name=name,
            environment=environment,
        )
        self._revoking = RevocationDesk(
            self._book, identity=identity, environment=environment, given=self._desk.proofs_given
        )
        self._members = Members(self._is_valid)
        self._conversations = Conversations(host, self._members, self._conversation)
        self._begun = Attempts(CONVERSATIONS_MAX)
        self._on_network: list[Callable[[NetworkId], None]] = []
        self._on_revoked: list[Callable[[SignedRevocation], None]] = []
        self.gate = MembershipGate(self._members.is_admitted)
        host.gate = self.gate
        host.set_handler(PROTOCOL, self._serve_membership, allow_limited=True)
        host.set_handler(INVITE_PROTOCOL, self._serve_invite)

    # Own networks ----------------------------------------------------------------

    def own_memberships(self) -> Mapping[NetworkId, proto.Membership]:
        """Return this node's own valid memberships, the oldest first."""
        return self._book.memberships

    def networks(self) -> list[NetworkView]:
        """Return the networks this node is in, the oldest first."""
        return self._book.views()

    def revoked_names(self) -> list[str]:
        """Return the names of the networks that this node was revoked in."""
        return self._book.revoked_names()

    def create_network(self, name: str = "") -> NetworkView:
        """Make a network with this node as its founder and first member.

        Args:
            name: What people call it; empty: "<node name>'s network".
        """
        membership = self._book.create((name or f"{self._name}'s network")[: proto.NAME_MAX])
        _tell(self._on_network, membership.network_id)
        return self._book.view(membership)

    # Invites -----------------------------------------------------------------------

    async def create_invite(
        self,
        *,
        ttl_s: float = INVITE_TTL_S,
        uses: int = 1,
        can_invite: bool = True,
        network_id: NetworkId | None = None,
    ) -> InviteCreated:
        """Issue an invite with this host's present addresses. Whoever holds the code can join.

        Args:
            ttl_s: Life in seconds, at most 24 hours.
            uses: How many machines it admits.
            can_invite: Whether those may invite and renew others.
            network_id: Into which network; None: the one made or joined last.

        Raises:
            NotAMember: The node is in no such network, or may not invite into it.
            MembershipError: A value is out of range, or the node listens nowhere.
        """
        await trio.lowlevel.checkpoint()
        return self._desk.create(
            self._host.addresses,
            ttl_s=ttl_s,
            uses=uses,
            can_invite=can_invite,
            network_id=network_id,
        )

    def invites(self) -> list[InviteView]:
        """Return this node's open invites, the next to end first."""
        return self._desk.open_invites()

    def revoke_invite(self, invite_id: str) -> bool:
        """End an open invite; False where there is none of this id."""
        return self._desk.revoke(invite_id)

    async def inspect_invite(self, code: str) -> InviteShown:
        """Read a code without using it: what a person should see before saying yes.

        Raises:
            InviteMalformed: The code is incomplete or was changed.
            InviteExpired: It is over.
        """
        await trio.lowlevel.checkpoint()
        return self._desk.show(code)

    async def redeem(self, code: str) -> Joined:
        """Join the network of a code; on return its issuer and this node are members to each other.

        Nothing is stored unless the issuer's answer verifies. A code of a network this node is in
        already is not used up.

        Raises:
            InviteMalformed, InviteExpired, InviteUsed, InviteForeign: The code admits nobody.
            DialFailed: The issuer cannot be reached.
            MembershipRevoked: This node was revoked in the network.
            MembershipError: The issuer cannot admit anybody now.
        """
        started_s = trio.current_time()
        signed = self._desk.open_code(code)
        was_member = signed.network_id in self._book.memberships
        with self._members.joining(signed.issuer):
            if not was_member:
                self._book.check_room()  # before the code is used up
                membership = await redeem_at(
                    self._host,
                    signed,
                    member=self._identity.peer_id,
                    wall_time=self._environment.wall_time,
                )
                self._book.store(membership)
                _tell(self._on_network, membership.network_id)
            if signed.issuer != self._identity.peer_id:
                await self._conversations.meet(signed)
        return Joined(
            network=signed.invite.network_name,
            network_id=signed.network_id,
            issuer=signed.invite.issuer_name,
            words=" ".join(invite.words_of(signed.network_id)),
            was_member=was_member,
            seconds=trio.current_time() - started_s,
        )

    # Peers -------------------------------------------------------------------------

    def is_member(self, peer: PeerId) -> bool:
        """Whether the peer is connected, proven, and knows that this node is a member too."""
        return self._members.is_member(peer)

    def members(self) -> list[PeerId]:
        """Return the connected members in PeerId order."""
        return self._members.members()

    def shared_networks(self, peer: PeerId) -> frozenset[NetworkId]:
        """Return the networks of this node that a connected peer has proven to be in.

        Already true of a peer that the gate admits and whose conversation has not ended yet: what
        it sends on the strength of that must not be taken for a stranger's.
        """
        return self._members.shared_networks(peer)

    async def confirm(self, peer: PeerId) -> bool:
        """Have the membership conversation with a connected peer, or wait for the one under way.

        Returns:
            Whether the peer is a member now. Where somebody joins through it just now, that is
            awaited first.

        Raises:
            NetworkError: The connection broke meanwhile.
        """
        await self._conversations.wait(peer)
        if not self.is_member(peer):
            await self._conversations.have(peer)
        return await self._members.wait_joined(peer)

    async def wait_member(self, peer: PeerId) -> None:
        """Wait until a peer is a member."""
        await self._members.wait_member(peer)

    def on_member(self, callback: Callable[[PeerId], None]) -> None:
        """Call back when a peer and this node serve each other; again after each reconnection."""
        self._members.on_member(callback)

    def on_lost(self, callback: Callable[[PeerId], None]) -> None:
        """Call back when a member's last connection closed, or its membership ended."""
        self._members.on_lost(callback)

    def on_network(self, callback: Callable[[NetworkId], None]) -> None:
        """Call back when this node made or joined a network, or has a new record of one."""
        self._on_network.append(callback)

    # Revocation --------------------------------------------------------------------

    def revoke(
        self,
        peer: PeerId,
        *,
        announced: Sequence[proto.Membership] = (),
        network_id: NetworkId | None = None,
    ) -> list[NetworkId]:
        """End a member's membership of each network where this node has the authority to.

        That is where this node holds the network's key, or has vouched for the member: stands above
        it in its line. What rests on the member is void with it.

        Args:
            announced: The member's memberships as far as its announcements show them.
            network_id: Of this network only; None: of all.

        Returns:
            The networks, at least one.

        Raises:
            NotAMember: It is no member that this node could revoke.
            MembershipError: There is no room for another revocation.
            ConfigError: The disk takes none; of the networks before it is revoked.
        """
        made = self.sign_revocations(peer, announced=announced, network_id=network_id)
        for revocation in made:
            if not self._take_revocation(revocation, is_own=True):
                raise MembershipError("this node keeps as many revocations as there may be")
            _tell(self._on_revoked, revocation)
        return [revocation.network_id for revocation in made]

    def sign_revocations(
        self,
        peer: PeerId,
        *,
        announced: Sequence[proto.Membership] = (),
        network_id: NetworkId | None = None,
    ) -> list[SignedRevocation]:
        """Return what `revoke` would put into force, without doing so. Raises: NotAMember."""
        shown = self._members.memberships(peer).values()
        return self._revoking.sign(peer, [*announced, *shown], network_id=network_id)

    def revocations(self) -> list[SignedRevocation]:
        """Return the revocations that hold, of this node's networks and of former ones."""
        return self._revocations.all()

    def is_void(self, membership: proto.Membership) -> bool:
        """Whether a membership rests on a revoked one."""
        return self._revocations.is_void(membership)

    def take_revocation(self, revocation: SignedRevocation) -> bool:
        """Keep a verified revocation, and serve nobody any more whose membership it voids.

        Returns:
            Whether it is kept here: not where there is no room for it.
        """
        return self._take_revocation(revocation, is_own=False)

    def _take_revocation(self, revocation: SignedRevocation, *, is_own: bool) -> bool:
        if not self._revocations.add(revocation, is_own=is_own):
            return self._revocations.holds(revocation)
        logger.warning(
            "membership.revoked",
            extra={"peer": revocation.peer, "network_id": revocation.network_id},
        )
        self._drop_ended()
        for peer in self._members.lapsed():
            for connection in self._host.connections:
                if connection.peer == peer:
                    connection.close()
            self._members.forget(peer)
        return True

    def _drop_ended(self) -> None:
        for network_id in self._book.drop_ended():
            _tell(self._on_network, network_id)

    def on_revoked(self, callback: Callable[[SignedRevocation], None]) -> None:
        """Call back when this node revoked a member, or was told that it is revoked itself."""
        self._on_revoked.append(callback)

    # Running -----------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Show memberships on new connections, renew, and send strangers away, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_connections, nursery)
            self._agenda.after(SWEEP_INTERVAL_S, self._sweep)
            nursery.start_soon(self._agenda.run)
            nursery.start_soon(self._renew_forever)
            task_status.started()

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    async def _watch_connections(
        self,
        nursery: trio.Nursery,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        events = self._host.connection_events()
        for connection in self._host.connections:
            nursery.start_soon(self._conversations.attempt, connection.peer)
        task_status.started()
        async for event in events:
            peer = event.connection.peer
            if event.kind == "closed":
                self._connection_closed(event.connection, nursery)
            elif event.connection.direction == "outbound":
                nursery.start_soon(self._conversations.attempt, peer)

    def _connection_closed(self, connection: Connection, nursery: trio.Nursery) -> None:
        peer = connection.peer
        if self._host.connection_to(peer) is None:
            self._members.forget(peer)
        elif self._members.connection(peer) is connection:
            # The other end may have restarted on the connection that is left: show it again.
            nursery.start_soon(self._conversations.attempt, peer)

    def _sweep(self) -> None:
        """Forget who is gone, and send away who stayed a stranger; now and from then on."""
        self._agenda.after(SWEEP_INTERVAL_S, self._sweep)
        connections = self._host.connections
        # One that is going away serves nobody, however long its peer keeps it.
        self._members.retain({item.peer for item in connections if item.is_open})
        confirmed = self._members.connection
        strangers = [item for item in connections if confirmed(item.peer) is None]
        now = trio.current_time()
        before = self._strangers_since
        self._strangers_since = {item: before.get(item, now) for item in strangers}
        for connection, since in self._strangers_since.items():
            if now - since >= STRANGER_TIMEOUT_S:
                connection.close()

    async def _renew_forever(self) -> None:
        while True:
            renewed: list[NetworkId] = []
            try:
                renewed += self._book.renew_founded()
                for network_id in list(self._book.memberships):
                    if await self._renew(network_id):
                        renewed.append(network_id)
            except ConfigError as error:
                # The disk takes no more; the old records last for days, and it is tried again.
                logger.warning("membership.unwritable", extra={"error": str(error)})
            self._drop_ended()
            self._revocations.drop_over()
            for network_id in renewed:
                _tell(self._on_network, network_id)
            if renewed:
                for peer in self.members():
                    await self._conversations.attempt(peer)
            await trio.sleep(RENEW_INTERVAL_S)

    # The conversation ----------------------------------------------------------------

    async def _serve_membership(self, stream: Stream) -> None:
        self._count_conversation(stream.peer)
        messages = MessageStream(stream)
        with within(CONVERSATION_TIMEOUT_S, "the membership conversation"):
            match await messages.receive(cast("type[Hello | Renew]", Hello | Renew)):
                case Hello() as hello:
                    shared = await self._conversation(stream.peer).respond(hello, messages)
                    self._conversations.ended(stream, shared)
                case Renew() as asked:
                    wall_s = self._environment.wall_time()
                    answer = renewal_for(
                        stream.peer, asked, book=self._book, is_void=self.is_void, wall_s=wall_s
                    )
                    await messages.send(answer)

    def _conversation(self, peer: PeerId) -> Exchange:
        return Exchange(
            own=dict(self._book.memberships),
            wall_s=self._environment.wall_time(),
            voiding=self._revocations.voiding,
            told_revoked=self._told_revoked,
            admit=partial(self._members.admit, peer),
        )

    def _told_revoked(self, sealed: bytes) -> None:
        """A member shows by what this node's membership, that it had shown, is void.

        Raises:
            RemoteProtocolError: It is no revocation.
        """
        try:
            revocation = open_revocation(sealed, wall_s=self._environment.wall_time())
        except StaleRecord:
            return
        if revocation.network_id in self._book.memberships and self.take_revocation(revocation):
            _tell(self._on_revoked, revocation)

    def _is_valid(self, membership: proto.Membership) -> bool:
        """Whether a peer's membership, and this node's own of that network, are valid now."""
        oldest = self._environment.wall_time() - proto.CLOCK_SKEW_S
        return (
            membership.not_after_wall_s >= oldest
            and membership.network_id in self._book.memberships
            and not self._revocations.is_void(membership)
        )

    # Renewal -------------------------------------------------------------------------

    async def _renew(self, network_id: NetworkId) -> bool:
        """Ask the members that may sign for a new record where this node's own ends soon."""
        own = self._book.memberships[network_id]
        wall_time = self._environment.wall_time
        left_s = own.not_after_wall_s - wall_time()
        if left_s >= proto.RENEW_BELOW_S or self._book.is_founder(network_id):
            return False
        shown = (self._members.memberships(peer).get(network_id) for peer in self.members())
        for peer in renewers(own, filter(None, shown)):
            try:
                renewed = await ask_renewal(self._host, peer, own, wall_time=wall_time)
            except (NetworkError, ProtocolError, NotAMember) as error:
                logger.debug("membership.renewal_failed", extra={"peer": peer, "error": str(error)})
                continue
            if renewed is not None:
                self._book.store(renewed)
                return True
        return False

    # Invites, at the issuer ------------------------------------------------------------

    async def _serve_invite(self, stream: Stream) -> None:
        self._count_conversation(stream.peer)
        with (
            self._members.joining(stream.peer),
            within(CONVERSATION_TIMEOUT_S, "redeeming an invite"),
        ):
            await self._desk.serve(MessageStream(stream))

    def _count_conversation(self, peer: PeerId) -> None:
        """Let a peer that asks without end go: strangers too may make this node verify signatures.

        Raises:
            RemoteProtocolError: It has begun too many conversations in this minute.
        """
        now_s = NowSeconds(trio.current_time())
        if self._begun.is_blocked(peer, now_s=now_s):
            raise RemoteProtocolError(
                f"more than {CONVERSATIONS_MAX} conversations in a minute", peer=peer, penalty=10
            )
        self._begun.add(peer, now_s=now_s)


def _tell(callbacks: list[Callable[[Subject], None]], subject: Subject) -> None:
    for callback in callbacks:
        callback(subject)
