"""Gossip: this node's own announcements, and what its neighbours tell, verified and sorted.

Every node verifies before it passes on, so whoever delivers a forged record made it or is broken,
and loses the connection. What then becomes of a record is for `spreading` (passing on), `catchup`
(comparing) and `liveness` (who is gone) to decide.
Spec: protocols/announce.md.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypedDict, Unpack, cast

import trio

from swarmpy.abc import Host, Stream
from swarmpy.agenda import Agenda
from swarmpy.discovery.catchup import CatchUp
from swarmpy.discovery.limits import Budgets
from swarmpy.discovery.link import PROTOCOL, Link
from swarmpy.discovery.liveness import Liveness
from swarmpy.discovery.records import Record, RecordTable
from swarmpy.discovery.spreading import EDGES_MIN, Spreading
from swarmpy.discovery.trust import Trust
from swarmpy.environment import Environment
from swarmpy.errors import ClockSkew, RemoteProtocolError, StaleRecord
from swarmpy.identity import Identity, PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto.announce import (
    ADDRESSES_MAX,
    ANNOUNCE_INTERVAL_S,
    ANNOUNCE_JITTER_S,
    Alive,
    AnnouncedModel,
    AnnouncedShard,
    Announcement,
    Branches,
    Have,
    Leave,
    Listing,
    Message,
    Probe,
    Prune,
    Records,
    Root,
    SignedAnnouncement,
    Want,
    open_announcement,
    seal_announcement,
)
from swarmpy.proto.endpoint import advertised
from swarmpy.proto.membership import NAME_MAX, Membership
from swarmpy.proto.revocation import SignedRevocation, open_revocation
from swarmpy.proto.summary import PREFIX_MAX, record_key
from swarmpy.proto.swim import SignedStatement, open_statement, seal_statement

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 10.0
"""How often this node's own addresses and the age of its announcement are looked at."""

WORK_MAX = 200.0
WORK_PER_S = 1000.0
"""Work that one peer may make at once and in the long run, in signatures: beyond it none of its
streams is read for a moment. A thousand signatures a second cost a tenth of a core."""

WORK_PER_MESSAGE = 0.1
WORK_PER_BYTE = 1 / 1000
"""Of any message, and of what it lists: 60 entries are looked up in the time of a signature."""

WORK_PER_PREFIX = 0.5
"""Of a prefix of a whole table's entries; a shorter one costs sixteen times as much a digit."""

REVOCATION_BYTES = 640
"""So much of a revocation's chain has a signature of its own."""

BREACH_PENALTY = 10

PUBLISH_SPACING_S = 0.5
PUBLISH_BURST = 4
"""Announcements at once, and the time until one more: each goes to everybody."""

REFUTE_BURST = 4
REFUTE_SPACING_S = 2.5
"""Refutations at once, and the time between more. One answers all that were said before it, and
must be everywhere within `SUSPICION_S` of the first of these: half of that is for the ways there
and back. There is no budget for each accuser here: one would be spent on this node alone by an
accuser that is believed elsewhere."""

CLOCK_WARNING_INTERVAL_S = 60.0
"""How often a clock that is wrong is spoken of: its node announces itself again and again."""

ALONE_S = 10.0
"""A node whose last neighbour was lost so long ago, and that found no other, sees nobody."""

FIRST_ROOT_S = 3.0
"""Whoever dialled compares first. What it sent before this node took it for a member was refused,
unnoticed over there: then this node begins."""

FAREWELL_S = 0.5
"""Time for the farewell to leave; the network finds out without it, a little later."""


class Changes(TypedDict, total=False):
    """What a node may change in its own announcement."""

    agent: str
    boot_id: str
    machine_id: str
    engine: str
    build_id: str
    memory_bytes_max: int
    memory_bytes_free: int
    speed_bytes_s: float
    models: tuple[AnnouncedModel, ...]
    shards: tuple[AnnouncedShard, ...]


class Gossip:
    """This node's own announcements, and those of the members of its networks."""

    def __init__(
        self,
        *,
        host: Host,
        environment: Environment,
        identity: Identity,
        name: str,
        trust: Trust,
        on_record: Callable[[SignedAnnouncement], None],
        on_gone: Callable[[Record], None],
        reach: Callable[[PeerId], None],
    ) -> None:
        """Serve the announcement protocol on `host`.

        Args:
            on_record: Called with each newly stored announcement of another member.
            on_gone: Called with the announcement of a member that left the view.
            reach: Dials a member that may be dead; see `Liveness`.
        """
        self._host = host
        self._environment = environment
        self._identity = identity
        self._name = name[:NAME_MAX]
        self._trust = trust
        self._on_record = on_record
        self._on_gone = on_gone
        self._changes = Changes()
        self._addresses: tuple[str, ...] = ()
        self._seq = 0
        self._next_wall_s = 0.0
        self._published = deque([-math.inf] * PUBLISH_BURST, maxlen=PUBLISH_BURST)
        self._is_publishing = False
        self._is_running = False
        self._is_refuting = False
        self._refuted = deque([-math.inf] * REFUTE_BURST, maxlen=REFUTE_BURST)
        self._work = Budgets(count_max=WORK_MAX, per_s=WORK_PER_S)
        self._alone_since_s = math.inf
        self._warned_s = -math.inf
        self._has_left = False
        self._agenda = Agenda(environment.call_at)
        self._table = RecordTable(identity.peer_id)
        self.links: dict[PeerId, Link] = {}
        self.spreading = Spreading(
            self._table, self.links, self._agenda, environment, networks=trust.own_memberships
        )
        self._catchup = CatchUp(self.spreading, environment, trust)
        self.liveness = Liveness(
            self.spreading,
            environment=environment,
            identity=identity,
            trust=trust,
            reach=reach,
            refute=self._refute,
            on_gone=on_gone,
        )
        host.set_handler(PROTOCOL, self._serve)

    # Own announcements -----------------------------------------------------------

    def announce(self, **changes: Unpack[Changes]) -> None:
        """Change this node's announcement; it goes out at once if that changed something."""
        merged = Changes(**{**self._changes, **changes})
        if merged != self._changes:
            self._changes = merged
            self.publish()

    def publish(self) -> None:
        """Announce this node anew: now, or a little later where it did so often of late.

        Before `run` nothing is said: a node that starts finds out about itself bit by bit.
        """
        if not self._is_running:
            return
        wait_s = self._published[0] + PUBLISH_BURST * PUBLISH_SPACING_S - trio.current_time()
        if wait_s <= 0:
            self._publish()
        elif not self._is_publishing:
            self._is_publishing = True
            self._agenda.after(wait_s, self._publish)

    def _publish(self, *, is_refresh: bool = False) -> None:
        """Sign this node's announcement anew, for each of its networks."""
        self._is_publishing = False
        if self._has_left:
            return
        wall_s = self._environment.wall_time()
        self._addresses = self._present_addresses()
        self._seq = max(self._seq + 1, int(wall_s * 1000))
        jitter_s = ANNOUNCE_JITTER_S * (2 * self._environment.random.random() - 1)
        self._next_wall_s = wall_s + ANNOUNCE_INTERVAL_S + jitter_s
        for membership in self._trust.own_memberships().values():
            sealed = seal_announcement(self._identity, self._own(membership, int(wall_s)))
            try:
                signed = open_announcement(sealed, wall_s=wall_s)
            except StaleRecord as error:
                # The membership has ended, or the clock was set to before it began: nobody would
                # believe what is said on its strength.
                logger.warning("announce.unbelievable", extra={"error": str(error)})
                continue
            if self._table.add(signed):
                self._published.append(trio.current_time())
                self.spreading.spread(
                    signed, source=None, is_refresh=is_refresh, is_urgent=self._is_refuting
                )
        self._is_refuting = False

    def _own(self, membership: Membership, wall_s: int) -> Announcement:
        return Announcement(
            peer=self._identity.peer_id,
            seq=self._seq,
            issued_wall_s=wall_s,
            membership=membership.proof,
            name=self._name,
            addresses=self._addresses,
            **self._changes,
        )

    def _present_addresses(self) -> tuple[str, ...]:
        return tuple(advertised(self._host.addresses, count_max=ADDRESSES_MAX))

    def _refute(self, seq: int) -> None:
        """Somebody says that this node is gone, or knows it by a higher number: speak louder."""
        if seq < self._seq or self._has_left:
            return
        self._seq = seq
        if self._is_refuting:
            return
        self._is_refuting = True
        now_s = trio.current_time()
        if now_s >= self._refuted[0] + REFUTE_BURST * REFUTE_SPACING_S:
            self._refute_now()
        else:
            wait_s = max(0.0, self._refuted[-1] + REFUTE_SPACING_S - now_s)
            self._agenda.after(wait_s, self._refute_now)

    def _refute_now(self) -> None:
        """Publish a refutation, unless something else to tell made one of itself meanwhile."""
        if self._is_refuting and self._is_running:
            self._refuted.append(trio.current_time())
            self._publish()

    async def leave(self) -> None:
        """Tell the neighbours that this node is leaving; nothing is announced after that."""
        if self._has_left:
            return
        self._has_left = True
        wall_s = self._environment.wall_time()
        for network_id in self._trust.own_memberships():
            sealed = seal_statement(
                self._identity,
                network_id=network_id,
                accused=self._identity.peer_id,
                seq=self._seq,
                wall_s=wall_s,
            )
            statement = open_statement(sealed, wall_s=wall_s)
            if self._table.add(statement):
                self.spreading.spread(statement, source=None, is_urgent=True, to_all=True)
        with trio.move_on_after(FAREWELL_S):
            while not all(link.is_idle for link in self.links.values()):  # noqa: ASYNC110 - no event
                await trio.sleep(FAREWELL_S / 30)

    # What is known ------------------------------------------------------------------

    def announcement(self, peer: PeerId) -> Announcement | None:
        """Return the newest announcement of a member, this node included."""
        wall_s = self._environment.wall_time()
        return self._table.newest(peer, self._trust.own_memberships(), wall_s=wall_s)

    def announced_peers(self) -> list[PeerId]:
        """Return the members in view, this node excluded, in PeerId order."""
        if trio.current_time() - self._alone_since_s > ALONE_S:
            return []
        wall_s = self._environment.wall_time()
        peers = {item.peer for item in self._table.announced() if item.expires_wall_s > wall_s}
        return sorted(peers - {self._identity.peer_id})

    def announcements(self) -> list[Announcement]:
        """Return the newest announcement of each other member, in PeerId order."""
        found = (self.announcement(peer) for peer in self.announced_peers())
        return [announcement for announcement in found if announcement is not None]

    def memberships(self, peer: PeerId) -> list[Membership]:
        """Return what a member announces of its memberships of this node's networks."""
        records = (
            self._table.get(record_key(network_id, peer))
            for network_id in self._trust.own_memberships()
        )
        return [item.membership for item in records if isinstance(item, SignedAnnouncement)]

    @property
    def table(self) -> RecordTable:
        """All that is known."""
        return self._table

    @property
    def agenda(self) -> Agenda:
        """What is to be done later, while `run` runs."""
        return self._agenda

    # Neighbours -----------------------------------------------------------------------

    def link_up(self, peer: PeerId) -> Link:
        """A member connected; return its link, whose `run` the caller starts."""
        former = self.links.get(peer)
        link = Link(
            self._host,
            peer,
            trust=self._trust,
            agenda=self._agenda,
            record_of=self.spreading.newest,
            on_broken=self._catchup.soon,
        )
        if former is not None:
            former.scope.cancel()
            link.is_eager = former.is_eager
        if link.is_eager:
            link.want([], is_graft=True)  # The former link may not have sent it.
        self.links[peer] = link
        self.spreading.met()
        if self._alone_since_s < math.inf:
            self.liveness.look_again()
        self._alone_since_s = math.inf
        connection = self._host.connection_to(peer)
        if connection is not None and connection.direction == "outbound":
            self._catchup.soon(link)
        else:
            self._agenda.after(FIRST_ROOT_S, partial(self._compare_unless_done, link))
        self.liveness.reached(peer)
        return link

    def _compare_unless_done(self, link: Link) -> None:
        if self.links.get(link.peer) is link and not link.has_compared:
            self._catchup.soon(link)

    def link_down(self, peer: PeerId) -> Link | None:
        """A member is not connected any more; return the link that it had."""
        link = self.links.pop(peer, None)
        if link is not None:
            link.scope.cancel()
            self.spreading.hold_on(edges_min=EDGES_MIN if link.is_eager else 1)
            if not self.links:
                self._alone_since_s = trio.current_time()
        return link

    def networks_changed(self) -> None:
        """This node is in a network more or less: announce, forget, and compare with everybody."""
        self._table.drop_networks(self._trust.own_memberships())
        if self._is_running:
            self._publish()
        for link in self.links.values():
            self._catchup.soon(link)

    # Running ------------------------------------------------------------------------

    async def run(self) -> None:
        """Repeat this node's announcements, watch the neighbours and compare with them."""
        for revocation in self._trust.revocations():
            self._table.add(revocation)
        self._is_running = True
        self._publish()
        self._agenda.after(0.0, self.liveness.run)
        self._agenda.after(CHECK_INTERVAL_S, self._check)
        self._agenda.after(0.0, self._catchup.run)
        await self._agenda.run()

    def _check(self) -> None:
        wall_s = self._environment.wall_time()
        if self._present_addresses() != self._addresses:
            self.publish()
        elif not self._next_wall_s - 2 * ANNOUNCE_INTERVAL_S <= wall_s < self._next_wall_s:
            self._publish(is_refresh=True)
        self._agenda.after(CHECK_INTERVAL_S, self._check)

    async def _serve(self, stream: Stream) -> None:
        messages = MessageStream(stream)
        kinds = cast("type[Message]", Message)
        link = self.links.get(stream.peer)
        if link is not None and link.is_eager and not link.is_asked:
            # What was said before this node was a member over there was refused, unnoticed.
            link.is_asked = True
            link.want([], is_graft=True)
        try:
            while (message := await messages.receive_or_end(kinds)) is not None:
                self._handle(message, stream.peer)
                now_s = trio.current_time()
                pause_s = self._work.spend(stream.peer, _work_of(message), now_s=now_s)
                if pause_s:
                    await trio.sleep(pause_s)
        except RemoteProtocolError as error:
            error.penalty = BREACH_PENALTY
            raise

    def _handle(self, message: Message, peer: PeerId) -> None:
        """Act on one message.

        Raises:
            RemoteProtocolError: It holds what is forged or malformed.
        """
        match message:
            case Records():
                self._take(message, peer)
            case Have():
                self.spreading.told(message, peer)
            case Want():
                self.spreading.asked(message, peer)
            case Prune():
                self.spreading.pruned(peer)
            case Root():
                self._catchup.root(message, peer)
            case Branches():
                self._catchup.branches(message, peer)
            case Listing():
                self._catchup.listing(message, peer)
            case Probe():
                self.liveness.asked(message, peer)
            case Alive():
                self.liveness.alive(message, peer)
            case Leave():
                if (link := self.links.get(peer)) is not None:
                    link.has_parted = True

    def _take(self, records: Records, deliverer: PeerId) -> None:
        """Store what is new, verified, and of a network in common; pass it on.

        Raises:
            RemoteProtocolError: A record is forged or malformed.
        """
        wall_s = self._environment.wall_time()
        networks = self._trust.shared_networks(deliverer)
        news: list[Record] = []
        known: list[Record] = []
        is_bulk = records.is_answer and self._catchup.is_bulk(deliverer, records.count)
        for sealed in records.revocations:
            try:
                revocation = open_revocation(sealed, wall_s=wall_s)
            except StaleRecord:
                continue
            if revocation.network_id in networks:
                is_news = self._take_revocation(revocation, deliverer)
                (news if is_news else known).append(revocation)
        for sealed in records.announcements:
            try:
                signed = open_announcement(sealed, wall_s=wall_s)
            except ClockSkew as error:
                self._warn_of_clock(error)
                continue
            except StaleRecord:
                continue  # Ordinary gossip.
            if signed.network_id in networks:
                is_news = self._take_announcement(signed, deliverer, is_bulk=is_bulk)
                (news if is_news else known).append(signed)
        for sealed in records.statements:
            try:
                statement = open_statement(sealed, wall_s=wall_s)
            except StaleRecord:
                continue
            if statement.network_id in networks:
                is_news = self.liveness.stated(statement, deliverer)
                (news if is_news else known).append(statement)
        if is_bulk and news:
            self._catchup.with_others()
        if not records.is_answer:
            self.spreading.pushed(deliverer, news, known)

    def _warn_of_clock(self, error: ClockSkew) -> None:
        """Say why a member is not believed: nobody else could tell its owner, or this node's."""
        now_s = trio.current_time()
        if now_s - self._warned_s >= CLOCK_WARNING_INTERVAL_S:
            self._warned_s = now_s
            logger.warning("announce.clock_skew", extra={"error": str(error)})

    def _take_announcement(
        self, signed: SignedAnnouncement, deliverer: PeerId, *, is_bulk: bool
    ) -> bool:
        """Store an announcement; False if it, or a newer one, was here already."""
        former = self._table.get(signed.key)
        if former is not None and signed.version <= former.version:
            if (link := self.links.get(deliverer)) is not None:
                link.heard(signed.key)
                if isinstance(former, SignedStatement):
                    self.spreading.answer(link, [signed.key])  # It is gone, which is news there.
            return False
        if signed.peer == self._identity.peer_id:
            # This node's own word from before its clock was set back.
            self._refute(signed.announcement.seq)
            return True
        if self._trust.is_void(signed.membership) or not self._table.add(signed):
            return True
        is_urgent = self.liveness.refuted(signed)
        is_refresh = isinstance(former, SignedAnnouncement) and former.contents == signed.contents
        if is_urgent or not is_bulk:
            self.spreading.spread(
                signed,
                source=deliverer,
                is_refresh=is_refresh,
                is_urgent=is_urgent,
            )
        self._on_record(signed)
        return True

    def _take_revocation(self, revocation: SignedRevocation, deliverer: PeerId) -> bool:
        if self._table.version(revocation.key) >= revocation.version:
            return False
        if self._trust.take_revocation(revocation):
            self.revoked(revocation, source=deliverer)
        return True

    def revoked(self, revocation: SignedRevocation, *, source: PeerId | None = None) -> None:
        """Drop the records that a revocation makes void, which membership took; pass it on.

        Whoever is revoked is out whether or not there is room to tell of it.
        """
        for record in list(self._table.announced()):
            if self._trust.is_void(record.membership):
                self.spreading.suspicions.pop(record.key, None)
                self._table.remove(record)
                self._on_gone(record)
        self._on_gone(revocation)
        is_own = revocation.network_id in self._trust.own_memberships()
        if is_own and self._table.add(revocation):
            # Not one may be missed, and they are rare: nobody is told and waited for.
            self.spreading.spread(revocation, source=source, to_all=True)


def _work_of(message: Message) -> float:
    """Return what a message costs whoever gets it, in signatures."""
    work = WORK_PER_MESSAGE
    match message:
        case Records():
            chains = sum(len(item) // REVOCATION_BYTES for item in message.revocations)
            work += message.count + chains
        case Have():
            work += len(message.entries) * WORK_PER_BYTE
        case Want():
            work += len(message.keys) * WORK_PER_BYTE
        case Branches() | Listing():
            parts = message.parts if isinstance(message, Listing) else message.branches
            digits = (PREFIX_MAX - len(part.prefix) for part in parts)
            work += sum(WORK_PER_PREFIX * 16**missing / 16 for missing in digits)
            if isinstance(message, Listing):
                work += sum(len(part.entries) for part in message.parts) * WORK_PER_BYTE
        case Probe() | Root() | Prune():
            work += 1
        case Alive() | Leave():
            pass
    return work
