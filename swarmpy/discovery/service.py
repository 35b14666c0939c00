"""Discovery: merges what the sources see, and keeps connections to the members among it.

A sighting is hearsay until dialled: the handshake proves the peer, the membership conversation
whether it belongs to a network of this node. Members are kept connected and redialled at once when
they are lost; strangers are looked at once and listed as visible.
Spec: protocols/announce.md, section 5; protocols/mdns.md.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Unpack

import msgspec
import trio

from swarmpy.abc import (
    Address,
    Connection,
    ConnectionEvent,
    DiscoverySource,
    Host,
    NowSeconds,
    Sighting,
)
from swarmpy.config import RECORDS_MAX, NetworkConfig
from swarmpy.discovery.cache import PeerCache
from swarmpy.discovery.gossip import Changes, Gossip
from swarmpy.discovery.limits import DialLimits
from swarmpy.discovery.trust import Trust
from swarmpy.environment import Environment
from swarmpy.errors import BadMessage, MembershipError, NetworkError, RemoteProtocolError
from swarmpy.identity import Identity, PeerId
from swarmpy.proto.announce import Announcement, SignedAnnouncement
from swarmpy.proto.endpoint import IpAddress, ip_endpoint
from swarmpy.proto.membership import NetworkId

logger = logging.getLogger(__name__)

STRANGERS_MAX = 256
"""Visible strangers listed; on a link with more, the rest is not looked at."""

UNSEEN_TTL_S = 600.0
"""A peer that nobody spoke of for so long is not listed any more, unless it is a member whose
announcement is still good or that is in the cache."""

CONNECTIONS_KEPT_MAX = 128
"""Connections to members beyond which no more are dialled; gossip reaches the others through them.
Strangers do not count: a crowd of them must not keep this node from its network."""

ADDRESSES_PER_PEER_MAX = 16

PROVEN_MAX = 4

REDIAL_PAUSE_S_MAX = 60.0
"""Longest pause between two dials of a lost member."""

DIAL_SPACING_S = 0.2
"""Shortest pause between two dials of one peer, however often it is sighted."""

State = Literal["member", "visible", "connecting", "lost"]


class PeerView(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a peer."""

    peer: PeerId
    name: str
    addresses: tuple[Address, ...]
    state: State
    """member: connected, in a network of this node. visible: seen, not joined. lost: a member that
    is not connected."""
    source: str
    """How it was first heard of: cache, mdns, invite, announce, inbound."""
    rtt_ms: float | None
    last_seen_wall_s: float


@dataclass(slots=True, kw_only=True)
class _Peer:
    """One peer, and what its `_keep` task decides by."""

    peer: PeerId
    source: str
    name: str = ""
    proven: list[Address] = field(default_factory=list)
    """Where this node reached it; never counted against the dial limits."""
    claimed: dict[Address, bool] = field(default_factory=dict)
    """Hearsay, and whether it was heard on the own link."""
    is_known_member: bool = False
    was_refused: bool = False
    """The membership conversation found no network in common; no reason to dial again."""
    is_dialling: bool = False
    dialled_s: float = -1e9
    seen_wall_s: float = 0.0
    seen_s: float = 0.0
    wake: trio.Event = field(default_factory=trio.Event)

    @property
    def addresses(self) -> list[Address]:
        return [*self.proven, *(item for item in self.claimed if item not in self.proven)]

    def wake_up(self) -> None:
        wake, self.wake = self.wake, trio.Event()
        wake.set()


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
        self._config = config
        self._trust = trust
        self._sources = tuple(sources)
        self._cache = cache
        self._peers: dict[PeerId, _Peer] = {}
        self._limits = DialLimits(self._own_ips)
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
        )

    # What is known -----------------------------------------------------------------

    def peers(self) -> list[PeerView]:
        """Return the peers this node knows of, in PeerId order."""
        self._drop_old()
        return [self._view(self._peers[peer]) for peer in sorted(self._peers)]

    def announcement(self, peer: PeerId) -> Announcement | None:
        """Return the newest announcement of a member, this node included."""
        return self._gossip.announcement(peer)

    def announcements(self) -> list[Announcement]:
        """Return the newest announcement of each other member, connected or not."""
        return self._gossip.announcements()

    def announce(self, **changes: Unpack[Changes]) -> None:
        """Change this node's own announcement; it goes out at once if that changed something.

        Beyond 4 KiB the last models are left out, then the last shards.
        """
        self._gossip.announce(**changes)

    def on_announcement(self, callback: Callable[[Announcement], None]) -> None:
        """Call back with each newer announcement of another member."""
        self._on_announcement.append(callback)

    def _view(self, entry: _Peer) -> PeerView:
        connection = self._host.connection_to(entry.peer)
        rtt_s = connection.rtt_s if connection is not None else None
        return PeerView(
            peer=entry.peer,
            name=entry.name,
            addresses=tuple(entry.addresses),
            state=self._state(entry),
            source=entry.source,
            rtt_ms=None if rtt_s is None else rtt_s * 1000,
            last_seen_wall_s=entry.seen_wall_s,
        )

    def _state(self, entry: _Peer) -> State:
        if self._trust.is_member(entry.peer):
            return "member"
        if not entry.is_known_member:
            return "connecting" if entry.is_dialling and not entry.was_refused else "visible"
        is_under_way = entry.is_dialling or self._host.connection_to(entry.peer) is not None
        return "connecting" if is_under_way else "lost"

    # What is heard -------------------------------------------------------------------

    def see(self, sighting: Sighting) -> None:
        """Take a sighting of any source. Addresses that are no IP literals are left out."""
        if sighting.peer == self._identity.peer_id:
            return
        is_cached = sighting.source == "cache"
        entry = self._entry(sighting.peer, sighting.source, is_member=is_cached)
        if entry is None:
            return
        entry.seen_wall_s = self._environment.wall_time()
        entry.seen_s = trio.current_time()
        if is_cached:
            self._recall(entry)
        is_lan = sighting.source == "mdns"
        if self._claim(entry, sighting.addresses, is_lan=is_lan):
            # A stranger with a new address may have started anew, in our network this time.
            entry.was_refused = False
        if not self._trust.is_member(entry.peer):
            entry.wake_up()

    def member_joined(self, peer: PeerId) -> None:
        """A peer and this node serve each other now (`Membership.on_member`)."""
        connection = self._host.connection_to(peer)
        is_outbound = connection is not None and connection.direction == "outbound"
        entry = self._entry(peer, "invite" if is_outbound else "inbound", is_member=True)
        if entry is not None:
            entry.is_known_member = True
            entry.was_refused = False
            entry.seen_wall_s = self._environment.wall_time()
            if connection is not None and is_outbound:
                self._reached(entry, connection)
            self._remember(entry)
            entry.wake_up()
        self._push_to(peer)

    def member_lost(self, peer: PeerId) -> None:
        """The last connection to a member closed (`Membership.on_lost`)."""
        entry = self._peers.get(peer)
        if entry is not None:
            entry.seen_wall_s = self._environment.wall_time()
            entry.wake_up()

    def networks_changed(self, network_id: NetworkId) -> None:
        """This node made or joined a network (`Membership.on_network`): strangers may be in it."""
        logger.debug("discovery.network", extra={"network_id": network_id})
        self._gossip.publish()
        for peer in sorted(self._peers):
            self._peers[peer].was_refused = False
            self._peers[peer].wake_up()

    def _heard(self, signed: SignedAnnouncement) -> None:
        """A verified announcement: its signer is a member of a network of this node."""
        announcement = signed.announcement
        entry = self._entry(signed.peer, "announce", is_member=True)
        if entry is not None:
            entry.name = announcement.name
            entry.is_known_member = True
            entry.was_refused = False
            # An announcement names all present addresses: older hearsay is out of date.
            entry.claimed.clear()
            self._claim(entry, [Address(item) for item in announcement.addresses], is_lan=False)
            if self._trust.is_member(entry.peer):
                self._remember(entry)
            else:
                entry.wake_up()
        for callback in self._on_announcement:
            callback(announcement)

    # Running -------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen to the sources and keep members connected, until cancelled or the host closes."""
        async with trio.open_nursery() as nursery:
            events = self._host.connection_events()
            nursery.start_soon(self._watch_connections, events, nursery.cancel_scope)
            nursery.start_soon(self._gossip.run)
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
        is_connected = self._host.connection_to(peer) is not None
        entry = self._entry(peer, "inbound") if is_connected else self._peers.get(peer)
        if entry is not None:
            entry.seen_wall_s = self._environment.wall_time()
            entry.seen_s = trio.current_time()
            entry.wake_up()

    async def _keep(self, entry: _Peer) -> None:
        """Keep a member connected; look at a stranger once."""
        pause_s = self._config.redial_interval_s
        while self._peers.get(entry.peer) is entry:
            wake = entry.wake
            wait_s = math.inf
            if self._host.connection_to(entry.peer) is not None:
                await self._settle(entry)
                pause_s = self._config.redial_interval_s
            elif entry.addresses and not entry.was_refused:
                addresses, wait_s = self._dialable(entry)
                if addresses:
                    if await self._dial(entry, addresses):
                        continue
                    # A stranger that does not answer is tried again when it is sighted again.
                    wait_s = self._jitter(pause_s) if entry.is_known_member else math.inf
                    pause_s = min(pause_s * 2, REDIAL_PAUSE_S_MAX)
            with trio.move_on_after(wait_s) as waiting:
                await wake.wait()
            if not waiting.cancelled_caught:
                pause_s = self._config.redial_interval_s

    async def _settle(self, entry: _Peer) -> None:
        """Find out what a connected peer is; a connection dialled to a stranger is closed."""
        try:
            is_member = await self._trust.confirm(entry.peer)
        except (NetworkError, RemoteProtocolError, MembershipError) as error:
            logger.debug("discovery.refused", extra={"peer": entry.peer, "error": str(error)})
            if entry.is_known_member and isinstance(error, NetworkError):
                return  # it said nothing: nothing is known that was not known before
            is_member = False
        connection = self._host.connection_to(entry.peer)
        if is_member or connection is None:
            return
        entry.was_refused = True
        entry.is_known_member = False
        if self._cache is not None:
            self._cache.forget(entry.peer)
        if connection.direction == "outbound":
            connection.close()

    def _dialable(self, entry: _Peer) -> tuple[list[Address], float]:
        """Return the addresses that may be dialled now, or in how many seconds to look again."""
        members = sum(self._trust.is_member(item.peer) for item in self._host.connections)
        if members >= CONNECTIONS_KEPT_MAX:
            return [], REDIAL_PAUSE_S_MAX
        now_s = NowSeconds(trio.current_time())
        allowed = list(entry.proven)
        waits = [REDIAL_PAUSE_S_MAX]
        for address in entry.addresses[len(entry.proven) :]:
            is_lan = entry.claimed[address]
            wait_s = self._limits.wait_s(address, is_lan=is_lan, now_s=now_s)
            if wait_s:
                waits.append(wait_s)
            else:
                self._limits.count(address, is_lan=is_lan, now_s=now_s)
                allowed.append(address)
        return allowed, min(waits)

    async def _dial(self, entry: _Peer, addresses: Sequence[Address]) -> bool:
        await trio.sleep_until(entry.dialled_s + DIAL_SPACING_S)
        entry.is_dialling = True
        entry.dialled_s = trio.current_time()
        try:
            connection = await self._host.dial(entry.peer, addresses)
        except (NetworkError, RemoteProtocolError) as error:
            logger.debug("discovery.dial_failed", extra={"peer": entry.peer, "error": str(error)})
            return False
        finally:
            entry.is_dialling = False
        if connection.direction == "outbound":
            self._reached(entry, connection)
        return True

    def _jitter(self, pause_s: float) -> float:
        return pause_s * (0.5 + self._environment.random.random() / 2)

    # Entries -------------------------------------------------------------------------

    def _entry(self, peer: PeerId, source: str, *, is_member: bool = False) -> _Peer | None:
        """Return a peer's entry, a new one if there is room: strangers cannot fill the table."""
        entry = self._peers.get(peer)
        if entry is not None:
            return entry
        if not self._has_room(is_member=is_member):
            self._drop_old()
            if not self._has_room(is_member=is_member):
                return None
        entry = _Peer(peer=peer, source=source, is_known_member=is_member)
        entry.seen_s = trio.current_time()
        self._peers[peer] = entry
        self._start(partial(self._keep, entry))
        return entry

    def _has_room(self, *, is_member: bool) -> bool:
        alike = sum(item.is_known_member is is_member for item in self._peers.values())
        return alike < (RECORDS_MAX if is_member else STRANGERS_MAX)

    def _drop_old(self) -> None:
        """Forget peers that are not connected and that nobody spoke of for long."""
        now_s = trio.current_time()
        for peer, entry in list(self._peers.items()):
            if self._host.connection_to(peer) is not None:
                continue
            if entry.is_known_member:
                is_cached = self._cache is not None and self._cache.get(peer) is not None
                if is_cached or self._gossip.announcement(peer) is not None:
                    continue
            if now_s - entry.seen_s >= UNSEEN_TTL_S:
                del self._peers[peer]
                entry.wake_up()

    def _claim(self, entry: _Peer, addresses: Sequence[Address], *, is_lan: bool) -> bool:
        """Add hearsay addresses; return whether one was new."""
        own = set(self._host.addresses)
        is_new = False
        for address in addresses[:ADDRESSES_PER_PEER_MAX]:
            try:
                ip, _ = ip_endpoint(address)
            except BadMessage:
                continue
            if address in own:
                continue
            is_new = is_new or address not in entry.addresses
            # A forged record on the own link may name a victim far away: that is hearsay.
            entry.claimed[address] = entry.claimed.get(address, False) or (is_lan and ip.is_private)
        while len(entry.claimed) > ADDRESSES_PER_PEER_MAX:
            del entry.claimed[next(iter(entry.claimed))]
        return is_new

    def _reached(self, entry: _Peer, connection: Connection) -> None:
        """Note where a peer was reached, the last such address first."""
        address = connection.remote_address
        others = [item for item in entry.proven if item != address]
        entry.proven = [address, *others][:PROVEN_MAX]

    def _recall(self, entry: _Peer) -> None:
        cached = self._cache.get(entry.peer) if self._cache is not None else None
        if cached is not None:
            entry.name = entry.name or cached.name
            entry.proven += [item for item in cached.proven if item not in entry.proven]
            entry.is_known_member = True
            entry.seen_wall_s = cached.seen_wall_s

    def _remember(self, entry: _Peer) -> None:
        if self._cache is not None and entry.addresses:
            self._cache.put(
                entry.peer,
                name=entry.name,
                proven=entry.proven,
                claimed=[item for item in entry.claimed if item not in entry.proven],
                wall_s=self._environment.wall_time(),
            )

    def _push_to(self, peer: PeerId) -> None:
        self._start(partial(self._gossip.push, peer))

    def _start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Have `run` start a task. Bounded by the peers in the table and the members connected."""
        self._work.append(work)
        more, self._more_work = self._more_work, trio.Event()
        more.set()

    def _own_ips(self) -> set[IpAddress]:
        ips = set()
        for address in self._host.addresses:
            try:
                ips.add(ip_endpoint(address)[0])
            except BadMessage:
                continue
        return ips
