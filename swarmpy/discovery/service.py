"""Discovery: merges what the sources see, and keeps this node connected to its networks.

A sighting is hearsay until dialled: the handshake proves the peer, the membership conversation
whether it belongs to a network of this node. Some members are kept connected (`neighbourhood`); of
the others this node has their announcements (`gossip`) and connects when it wants them.
Spec: protocols/announce.md, protocols/swim.md, protocols/mdns.md.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Literal, Unpack

import msgspec
import trio

from swarmpy.abc import Address, Connection, ConnectionEvent, DiscoverySource, Host, Sighting
from swarmpy.config import NetworkConfig
from swarmpy.discovery.cache import PeerCache
from swarmpy.discovery.gossip import Changes, Gossip
from swarmpy.discovery.neighbourhood import Neighbourhood
from swarmpy.discovery.peers import Peer, PeerBook
from swarmpy.discovery.records import Record
from swarmpy.discovery.trust import Trust
from swarmpy.environment import Environment
from swarmpy.identity import Identity, PeerId
from swarmpy.proto.announce import Announcement, SignedAnnouncement
from swarmpy.proto.membership import Membership, NetworkId
from swarmpy.proto.revocation import SignedRevocation

logger = logging.getLogger(__name__)

State = Literal["member", "known", "visible", "connecting", "lost"]


class PeerView(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a peer."""

    peer: PeerId
    name: str
    addresses: tuple[Address, ...]
    state: State
    """member: connected, in a network of this node. known: a member that lives, as others say, and
    is connected when it is needed. visible: seen, not joined. lost: a member that cannot be
    reached."""
    source: str
    """How it was first heard of: cache, mdns, invite, announce, inbound."""
    rtt_ms: float | None
    last_seen_wall_s: float


class Discovery:
    """The peers a node knows of. Works while `run` runs."""

    def __init__(
        self,
        *,
        host: Host,
        environment: Environment,
        identity: Identity,
        name: str,
        config: NetworkConfig,
        trust: Trust,
        sources: Sequence[DiscoverySource],
        cache: PeerCache | None = None,
    ) -> None:
        """Serve announcements on `host`.

        Args:
            name: This node's name, in its announcements.
            sources: Who reports sightings; the cache among them, if it is to.
            cache: Where confirmed members are remembered.
        """
        self._host = host
        self._environment = environment
        self._identity = identity
        self._trust = trust
        self._sources = tuple(sources)
        self._on_announcement: list[Callable[[Announcement], None]] = []
        self._work: deque[Callable[[], Awaitable[None]]] = deque()
        self._more_work = trio.Event()
        self._gossip = Gossip(
            host=host,
            environment=environment,
            identity=identity,
            name=name,
            trust=trust,
            on_record=self._heard,
            on_gone=self._gone,
            reach=lambda peer: self._neighbourhood.reach(peer),
        )
        self._book = PeerBook(
            host=host,
            environment=environment,
            cache=cache,
            is_in_view=lambda peer: self._gossip.announcement(peer) is not None,
            is_member=trust.is_member,
        )
        self._neighbourhood = Neighbourhood(
            host=host,
            environment=environment,
            config=config,
            trust=trust,
            book=self._book,
            gossip=self._gossip,
            start=self._start,
        )

    # What is known -----------------------------------------------------------------

    def peers(self) -> list[PeerView]:
        """Return the peers this node knows of, in PeerId order."""
        self._book.drop_old()
        met = {entry.peer for entry in self._book}
        return [self._view(peer) for peer in sorted(met.union(self._gossip.announced_peers()))]

    def announcement(self, peer: PeerId) -> Announcement | None:
        """Return the newest announcement of a member, this node included."""
        return self._gossip.announcement(peer)

    def announcements(self) -> list[Announcement]:
        """Return the newest announcement of each other member, connected or not."""
        return self._gossip.announcements()

    def reachable(self) -> list[Announcement]:
        """Return the announcement of each member that is connected or can be, in PeerId order."""
        lost = {entry.peer for entry in self._book if entry.is_lost}
        return [
            announcement
            for announcement in self._gossip.announcements()
            if announcement.peer not in lost or self._trust.is_member(PeerId(announcement.peer))
        ]

    def memberships(self, peer: PeerId) -> list[Membership]:
        """Return what a member announces of its memberships of this node's networks."""
        return self._gossip.memberships(peer)

    def announce(self, **changes: Unpack[Changes]) -> None:
        """Change this node's own announcement; it goes out at once if that changed something.

        Beyond 4 KiB the last models are left out, then the last shards.
        """
        self._gossip.announce(**changes)

    def on_announcement(self, callback: Callable[[Announcement], None]) -> None:
        """Call back with each newer announcement of another member."""
        self._on_announcement.append(callback)

    async def connect(self, peer: PeerId) -> Connection:
        """Return a connection to a member, dialled if there is none.

        Raises:
            DialFailed: It cannot be reached, may not be dialled again so soon, or is no member.
            HandshakeFailed: Somebody else answers there.
        """
        return await self._neighbourhood.connect(peer)

    async def leave(self) -> None:
        """Tell the neighbours that this node is leaving, before its connections close."""
        await self._gossip.leave()

    def _view(self, peer: PeerId) -> PeerView:
        entry = self._book.get(peer)
        told = self._gossip.announcement(peer)
        addresses = list(entry.addresses) if entry is not None else []
        for address in told.addresses if told is not None else ():
            if Address(address) not in addresses:
                addresses.append(Address(address))
        connection = self._host.connection_to(peer)
        rtt_s = connection.rtt_s if connection is not None else None
        seen_wall_s = entry.seen_wall_s if entry is not None else 0.0
        return PeerView(
            peer=peer,
            name=told.name if told is not None else entry.name if entry is not None else "",
            addresses=tuple(addresses),
            state=self._state(peer, entry, is_in_view=told is not None),
            source=entry.source if entry is not None else "announce",
            rtt_ms=None if rtt_s is None else rtt_s * 1000,
            last_seen_wall_s=max(seen_wall_s, told.issued_wall_s if told is not None else 0.0),
        )

    def _state(self, peer: PeerId, entry: Peer | None, *, is_in_view: bool) -> State:
        if self._trust.is_member(peer):
            return "member"
        if entry is None:
            return "known"
        if not entry.is_known_member:
            is_looking = entry.is_dialling and trio.current_time() >= entry.refused_until_s
            return "connecting" if is_looking else "visible"
        if entry.is_dialling or self._host.connection_to(peer) is not None:
            return "connecting"
        return "known" if is_in_view and not entry.is_lost else "lost"

    # What is heard -------------------------------------------------------------------

    def see(self, sighting: Sighting) -> None:
        """Take a sighting of any source. Addresses that are no IP literals are left out."""
        if sighting.peer == self._identity.peer_id:
            return
        is_cached = sighting.source == "cache"
        entry = self._book.entry(sighting.peer, sighting.source, is_member=is_cached)
        if entry is None:
            return
        self._noticed(entry)
        if is_cached:
            self._book.recall(entry)
        is_lan = sighting.source == "mdns"
        if self._book.claim(entry, sighting.addresses, is_lan=is_lan):
            # A stranger with a new address may have started anew, in our network this time.
            entry.refused_until_s = -math.inf
        if not self._trust.is_member(entry.peer):
            entry.start_over(trio.current_time())
            self._neighbourhood.wake_up()

    def member_joined(self, peer: PeerId) -> None:
        """A peer and this node serve each other now (`Membership.on_member`)."""
        connection = self._host.connection_to(peer)
        is_outbound = connection is not None and connection.direction == "outbound"
        entry = self._book.entry(peer, "invite" if is_outbound else "inbound", is_member=True)
        if entry is not None:
            entry.is_known_member = True
            entry.is_lost = False
            entry.refused_until_s = -math.inf
            self._noticed(entry)
            if connection is not None and is_outbound:
                self._book.reached(entry, connection)
            self._book.remember(entry)
        self._neighbourhood.joined(self._gossip.link_up(peer))

    def member_lost(self, peer: PeerId) -> None:
        """The last connection to a member closed (`Membership.on_lost`)."""
        entry = self._book.get(peer)
        if entry is not None:
            self._noticed(entry)
        self._neighbourhood.lost(peer, self._gossip.link_down(peer))

    def member_revoked(self, revocation: SignedRevocation) -> None:
        """A member was revoked here, or this node elsewhere (`Membership.on_revoked`)."""
        self._gossip.revoked(revocation)

    def networks_changed(self, network_id: NetworkId) -> None:
        """This node made, joined or left a network (`Membership.on_network`)."""
        logger.debug("discovery.network", extra={"network_id": network_id})
        self._gossip.networks_changed()
        for entry in self._book:
            # Strangers may be in it.
            entry.refused_until_s = -math.inf
            entry.start_over(trio.current_time())
        self._neighbourhood.wake_up()

    def _heard(self, signed: SignedAnnouncement) -> None:
        """A verified announcement: its signer is a member of a network of this node."""
        announcement = signed.announcement
        entry = self._book.get(signed.peer)
        if entry is not None:
            entry.name = announcement.name
            entry.is_known_member = True
            # An announcement names all present addresses: older hearsay is out of date.
            entry.claimed.clear()
            self._book.claim(
                entry, [Address(item) for item in announcement.addresses], is_lan=False
            )
            if self._trust.is_member(entry.peer):
                self._book.remember(entry)
            else:
                entry.refused_until_s = -math.inf
                entry.start_over(trio.current_time())
        self._neighbourhood.heard()
        for callback in self._on_announcement:
            callback(announcement)

    def _gone(self, record: Record) -> None:
        match record:
            case SignedAnnouncement():
                is_out = self._trust.is_void(record.membership)
            case SignedRevocation():
                # A member's word says nothing of what others vouched for.
                is_out = record.is_by_key
            case _:
                is_out = False
        if not is_out:
            self._neighbourhood.gone(record)
        elif self._gossip.announcement(record.peer) is None:
            self._neighbourhood.forget(record.peer)

    def _noticed(self, entry: Peer) -> None:
        entry.seen_wall_s = self._environment.wall_time()
        entry.seen_s = trio.current_time()

    # Running -------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen to the sources and keep members connected, until cancelled or the host closes."""
        async with trio.open_nursery() as nursery:
            events = self._host.connection_events()
            nursery.start_soon(self._watch_connections, events, nursery.cancel_scope)
            nursery.start_soon(self._gossip.run)
            nursery.start_soon(self._neighbourhood.run)
            for source in self._sources:
                nursery.start_soon(source.run, self.see)
            task_status.started()
            while True:
                more = self._more_work
                while self._work:
                    nursery.start_soon(self._work.popleft())
                await more.wait()

    async def _watch_connections(
        self, events: AsyncIterator[ConnectionEvent], running: trio.CancelScope
    ) -> None:
        for connection in self._host.connections:
            self._connection_changed(connection.peer)
        async for event in events:
            self._connection_changed(event.connection.peer)
        running.cancel()  # the host closed: nothing is left to dial with

    def _connection_changed(self, peer: PeerId) -> None:
        best = self._host.connection_to(peer)
        is_connected = best is not None
        if (link := self._gossip.links.get(peer)) is not None:
            link.check(best)
        entry = self._book.entry(peer, "inbound") if is_connected else self._book.get(peer)
        if entry is not None:
            self._noticed(entry)
            if is_connected and not self._trust.is_member(peer):
                self._start(partial(self._neighbourhood.settle, peer))
            self._neighbourhood.wake_up()

    def _start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Have `run` start a task. Bounded by the dials under way and the connections."""
        self._work.append(work)
        more, self._more_work = self._more_work, trio.Event()
        more.set()
