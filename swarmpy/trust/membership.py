"""Membership: which networks this node is in, which peers share one, and how either changes.

After each handshake the connection's initiator starts the membership conversation; until it has
ended well the gate serves the peer nothing but what a stranger may ask.
Spec: protocols/membership.md, protocols/invite.md; design: docs/architecture.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import trio

from swarmpy.abc import Connection, Host, NowSeconds, ProtocolId, Stream
from swarmpy.config import INVITE_TTL_S
from swarmpy.environment import Environment
from swarmpy.errors import (
    ConfigError,
    ConnectionLost,
    MembershipError,
    NetworkError,
    NotAMember,
    ProtocolError,
    RemoteProtocolError,
    StreamReset,
)
from swarmpy.identity import Identity, PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto import invite
from swarmpy.proto import membership as proto
from swarmpy.proto.invite import SignedInvite
from swarmpy.proto.membership import Hello, NetworkId, Renew
from swarmpy.proto.revocation import SignedRevocation
from swarmpy.status import InviteCreated, InviteShown, Joined
from swarmpy.store import open_database
from swarmpy.trust import invites, networks, revocations
from swarmpy.trust.attempts import CONVERSATIONS_MAX, Attempts
from swarmpy.trust.exchange import CONVERSATION_TIMEOUT_S, Exchange, Shared, within
from swarmpy.trust.gate import MembershipGate
from swarmpy.trust.issuing import InviteDesk
from swarmpy.trust.networks import NetworkBook
from swarmpy.trust.redeeming import addresses_of, redeem_at
from swarmpy.trust.renewing import ask_renewal, renewal_for
from swarmpy.trust.revocations import RevocationBook
from swarmpy.trust.revoking import RevocationDesk
from swarmpy.trust.views import InviteView, NetworkView

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

Subject = TypeVar("Subject")

PROTOCOL = ProtocolId(proto.PROTOCOL)
INVITE_PROTOCOL = ProtocolId(invite.PROTOCOL)

EXCHANGE_ATTEMPTS_MAX = 3
"""Of two connections made at once one is closed, maybe in the middle of the conversation."""

STRANGER_TIMEOUT_S = 30.0
"""A connected stranger has this long to become a member; a person confirming a join is quicker,
and redials where not."""

SWEEP_INTERVAL_S = 5.0
RENEW_INTERVAL_S = 600.0


@dataclass(slots=True)
class _Member:
    """What is known of a connected peer's membership."""

    shared: dict[NetworkId, proto.Membership] = field(default_factory=dict)
    connection: Connection | None = None
    """Where both sides confirmed; None before."""


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
            is_revoked=self._revocations.is_revoked,
        )
        self._revoking = RevocationDesk(
            self._book, identity=identity, environment=environment, given=self._desk.proofs_given
        )
        self._peers: dict[PeerId, _Member] = {}
        self._conversations = Attempts(CONVERSATIONS_MAX)
        self._running: dict[PeerId, trio.Event] = {}
        self._redeeming: dict[PeerId, int] = {}
        self._changed = trio.Event()
        self._on_member: list[Callable[[PeerId], None]] = []
        self._on_lost: list[Callable[[PeerId], None]] = []
        self._on_network: list[Callable[[NetworkId], None]] = []
        self._on_revoked: list[Callable[[SignedRevocation], None]] = []
        self.gate = MembershipGate(self._is_admitted)
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
            MembershipError: The issuer cannot admit anybody now.
        """
        started_s = trio.current_time()
        signed = self._desk.open_code(code)
        was_member = signed.network_id in self._book.memberships
        with self._redeeming_with(signed.issuer):
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
                await self._meet(signed)
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
        known = self._peers.get(peer)
        return known is not None and known.connection is not None and bool(self._valid(known))

    def members(self) -> list[PeerId]:
        """Return the connected members in PeerId order."""
        return [peer for peer in sorted(self._peers) if self.is_member(peer)]

    def shared_networks(self, peer: PeerId) -> frozenset[NetworkId]:
        """Return the networks of this node that a connected peer has proven to be in.

        Already true of a peer that the gate admits and whose conversation has not ended yet: what
        it sends on the strength of that must not be taken for a stranger's.
        """
        known = self._peers.get(peer)
        return frozenset() if known is None else frozenset(self._valid(known))

    async def confirm(self, peer: PeerId) -> bool:
        """Have the membership conversation with a connected peer, or wait for the one under way.

        Returns:
            Whether the peer is a member now. Where somebody joins through it just now, that is
            awaited first.

        Raises:
            NetworkError: The connection broke meanwhile.
        """
        if (running := self._running.get(peer)) is not None:
            await running.wait()
        if not self.is_member(peer):
            await self._exchange(peer)
        while not self.is_member(peer) and self._redeeming.get(peer):
            await self._changed.wait()
        return self.is_member(peer)

    async def wait_member(self, peer: PeerId) -> None:
        """Wait until a peer is a member."""
        while not self.is_member(peer):
            await self._changed.wait()

    def on_member(self, callback: Callable[[PeerId], None]) -> None:
        """Call back when a peer and this node serve each other; again after each reconnection."""
        self._on_member.append(callback)

    def on_lost(self, callback: Callable[[PeerId], None]) -> None:
        """Call back when a member's last connection closed, or its membership ended."""
        self._on_lost.append(callback)

    def on_network(self, callback: Callable[[NetworkId], None]) -> None:
        """Call back when this node made or joined a network, or has a new record of one."""
        self._on_network.append(callback)

    # Revocation --------------------------------------------------------------------

    def revoke(
        self, peer: PeerId, *, announced: Sequence[proto.Membership] = ()
    ) -> list[NetworkId]:
        """End a member's membership of each network where this node has the authority to.

        That is where this node holds the network's key, or stands above the member in the chain of
        its membership. What the member signed is void with it.

        Args:
            announced: The member's memberships as far as its announcements show them.

        Returns:
            The networks, at least one.

        Raises:
            NotAMember: It is no member that this node could revoke.
            MembershipError: There is no room for another revocation.
        """
        known = self._peers.get(peer)
        shown = known.shared.values() if known is not None else ()
        made = self._revoking.revoke(peer, [*announced, *shown])
        for revocation in made:
            self.take_revocation(revocation)
            if not self._revocations.is_revoked(revocation.network_id, peer):
                raise MembershipError("this node keeps as many revocations as there may be")
            _tell(self._on_revoked, revocation)
        return [revocation.network_id for revocation in made]

    def revocations(self) -> list[SignedRevocation]:
        """Return the revocations that hold, of this node's networks and of former ones."""
        return self._revocations.all()

    def is_void(self, membership: proto.Membership) -> bool:
        """Whether a membership rests on a revoked one."""
        return self._revocations.is_void(membership)

    def take_revocation(self, revocation: SignedRevocation) -> None:
        """Keep a verified revocation, and serve nobody any more whose membership it voids."""
        if not self._revocations.add(revocation):
            return
        logger.warning(
            "membership.revoked",
            extra={"peer": revocation.peer, "network_id": revocation.network_id},
        )
        for network_id in self._book.drop_ended():
            _tell(self._on_network, network_id)
        for peer in sorted(self._peers):
            if self._valid(self._peers[peer]):
                continue
            for connection in self._host.connections:
                if connection.peer == peer:
                    connection.close()
            self._forget(peer)

    def on_revoked(self, callback: Callable[[SignedRevocation], None]) -> None:
        """Call back when this node revoked a member."""
        self._on_revoked.append(callback)

    # Running -----------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Show memberships on new connections, renew, and send strangers away, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_connections, nursery)
            nursery.start_soon(self._sweep_forever)
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
            nursery.start_soon(self._try_exchange, connection.peer)
        task_status.started()
        async for event in events:
            peer = event.connection.peer
            if event.kind == "closed":
                self._connection_closed(event.connection, nursery)
            elif event.connection.direction == "outbound":
                nursery.start_soon(self._try_exchange, peer)

    def _connection_closed(self, connection: Connection, nursery: trio.Nursery) -> None:
        peer = connection.peer
        known = self._peers.get(peer)
        if known is None:
            return
        if self._host.connection_to(peer) is None:
            self._forget(peer)
        elif known.connection is connection:
            # The other end may have restarted on the connection that is left: show it again.
            nursery.start_soon(self._try_exchange, peer)

    async def _sweep_forever(self) -> None:
        strangers_since: dict[Connection, float] = {}
        while True:
            await trio.sleep(SWEEP_INTERVAL_S)
            for peer in sorted(self._peers):
                is_connected = self._host.connection_to(peer) is not None
                if not is_connected or not self._valid(self._peers[peer]):
                    self._forget(peer)
            strangers = [item for item in self._host.connections if not self.is_member(item.peer)]
            now = trio.current_time()
            strangers_since = {item: strangers_since.get(item, now) for item in strangers}
            for connection, since in strangers_since.items():
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
            self._book.drop_ended()
            self._revocations.drop_over()
            for network_id in renewed:
                _tell(self._on_network, network_id)
            if renewed:
                for peer in self.members():
                    await self._try_exchange(peer)
            await trio.sleep(RENEW_INTERVAL_S)

    # The conversation ----------------------------------------------------------------

    async def _try_exchange(self, peer: PeerId) -> None:
        """Have the conversation; a peer that breaks off or speaks none stays a stranger."""
        try:
            await self._exchange(peer)
        except (NetworkError, RemoteProtocolError, NotAMember) as error:
            logger.debug("membership.exchange_failed", extra={"peer": peer, "error": str(error)})

    async def _exchange(self, peer: PeerId) -> None:
        """Start a conversation, after the one under way if there is one.

        Raises:
            NetworkError: Every attempt broke, and the peer is not a member.
            NotAMember: The peer refused this node's membership.
        """
        while (running := self._running.get(peer)) is not None:
            await running.wait()
        self._running[peer] = trio.Event()
        try:
            for attempt in range(EXCHANGE_ATTEMPTS_MAX):
                try:
                    return await self._exchange_once(peer)
                except (ConnectionLost, StreamReset):
                    is_last = attempt == EXCHANGE_ATTEMPTS_MAX - 1
                    if is_last or self._host.connection_to(peer) is None:
                        raise
        finally:
            self._running.pop(peer).set()

    async def _meet(self, signed: SignedInvite) -> None:
        """Become a member to the issuer of an invite, over another connection if one breaks."""
        for attempt in range(EXCHANGE_ATTEMPTS_MAX):
            await self._host.dial(signed.issuer, addresses_of(signed))
            try:
                return await self._exchange(signed.issuer)
            except (ConnectionLost, StreamReset):
                if attempt == EXCHANGE_ATTEMPTS_MAX - 1:
                    raise

    async def _exchange_once(self, peer: PeerId) -> None:
        with within(CONVERSATION_TIMEOUT_S, "the membership conversation"):
            stream = await self._host.open_stream(peer, [PROTOCOL], allow_limited=True)
            try:
                shared = await self._conversation(peer).initiate(MessageStream(stream))
                await stream.close_write()
            except BaseException:
                stream.reset()
                raise
        self._confirmed(stream, shared)

    async def _serve_membership(self, stream: Stream) -> None:
        self._count_conversation(stream.peer)
        messages = MessageStream(stream)
        with within(CONVERSATION_TIMEOUT_S, "the membership conversation"):
            match await messages.receive(cast("type[Hello | Renew]", Hello | Renew)):
                case Hello() as hello:
                    shared = await self._conversation(stream.peer).respond(hello, messages)
                    self._confirmed(stream, shared)
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
            is_void=self._revocations.is_void,
            admit=partial(self._admit, peer),
        )

    def _admit(self, peer: PeerId, shared: Shared) -> None:
        known = self._peers.setdefault(peer, _Member()).shared
        for network_id, membership in shared.items():
            # Of two conversations at once the one that ends last may have begun before a renewal.
            before = known.get(network_id)
            if before is None or before.not_after_wall_s < membership.not_after_wall_s:
                known[network_id] = membership

    def _confirmed(self, stream: Stream, shared: Shared) -> None:
        """Both sides serve each other from here on."""
        peer = stream.peer
        if not shared or self._host.connection_to(peer) is None:
            return
        known = self._peers.setdefault(peer, _Member(shared=dict(shared)))
        if known.connection is not stream.connection:
            known.connection = stream.connection
            _tell(self._on_member, peer)
        self._wake()

    def _is_admitted(self, peer: PeerId) -> bool:
        known = self._peers.get(peer)
        return known is not None and bool(self._valid(known))

    def _valid(self, known: _Member) -> list[NetworkId]:
        """Networks in which both the peer's membership and this node's are valid now."""
        oldest = self._environment.wall_time() - proto.CLOCK_SKEW_S
        return [
            network_id
            for network_id, membership in known.shared.items()
            if membership.not_after_wall_s >= oldest
            and network_id in self._book.memberships
            and not self._revocations.is_void(membership)
        ]

    def _forget(self, peer: PeerId) -> None:
        known = self._peers.pop(peer, None)
        if known is not None and known.connection is not None:
            _tell(self._on_lost, peer)
        self._wake()

    # Renewal -------------------------------------------------------------------------

    async def _renew(self, network_id: NetworkId) -> bool:
        """Ask the members that may sign for a new record where this node's own ends soon."""
        own = self._book.memberships[network_id]
        wall_time = self._environment.wall_time
        left_s = own.not_after_wall_s - wall_time()
        if left_s >= proto.RENEW_BELOW_S or self._book.is_founder(network_id):
            return False
        for peer in self.members():
            theirs = self._peers[peer].shared.get(network_id) if peer in self._peers else None
            if theirs is None or not theirs.can_invite:
                continue
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
            self._redeeming_with(stream.peer),
            within(CONVERSATION_TIMEOUT_S, "redeeming an invite"),
        ):
            await self._desk.serve(MessageStream(stream))

    def _count_conversation(self, peer: PeerId) -> None:
        """Let a peer that asks without end go: strangers too may make this node verify signatures.

        Raises:
            RemoteProtocolError: It has begun too many conversations in this minute.
        """
        now_s = NowSeconds(trio.current_time())
        if self._conversations.is_blocked(peer, now_s=now_s):
            raise RemoteProtocolError(
                f"more than {CONVERSATIONS_MAX} conversations in a minute", peer=peer, penalty=10
            )
        self._conversations.add(peer, now_s=now_s)

    @contextmanager
    def _redeeming_with(self, peer: PeerId) -> Iterator[None]:
        """Keep `confirm` from calling a peer a stranger while it joins, or lets this node join."""
        self._redeeming[peer] = self._redeeming.get(peer, 0) + 1
        try:
            yield
        finally:
            self._redeeming[peer] -= 1
            if not self._redeeming[peer]:
                del self._redeeming[peer]
            self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


def _tell(callbacks: list[Callable[[Subject], None]], subject: Subject) -> None:
    for callback in callbacks:
        callback(subject)
