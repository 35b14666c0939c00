"""The neighbourhood: which members a node keeps connections to, and whom it dials to get there.

One task decides, however many peers are known: it dials members until eight are connected, looks at
strangers once, and gives idle connections up beyond sixteen. A swarm of up to nine is fully meshed.
Spec: protocols/announce.md, section 3 and States.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from swarmpy.abc import Address, Connection, Host
from swarmpy.config import NetworkConfig
from swarmpy.discovery.gossip import Gossip
from swarmpy.discovery.link import Link
from swarmpy.discovery.peers import REDIAL_PAUSE_S_MAX, Peer, PeerBook
from swarmpy.discovery.records import Record
from swarmpy.discovery.trust import Trust
from swarmpy.environment import Environment
from swarmpy.errors import (
    DialFailed,
    MembershipError,
    MembershipRevoked,
    NetworkError,
    NotAMember,
    RemoteProtocolError,
)
from swarmpy.identity import PeerId
from swarmpy.proto.announce import SignedAnnouncement

logger = logging.getLogger(__name__)

NEIGHBOURS_MIN = 8
"""Connections to members that a node sees to. With eight each, a network of 1,000 where one in ten
vanishes at once stays whole, and word goes round in four hops."""

NEIGHBOURS_SOON = 4
FILL_INTERVAL_S = 8.0
"""In a larger network so many are dialled at once, and then one in so much time, about: the others
dial too. Where all dialled eight, all had sixteen, and twice the cost of them."""

NEIGHBOURS_MAX = 16
"""Connections to members beyond which idle ones are given up. Strangers do not count: a crowd of
them must not keep this node from its network."""

DRAWN_MAX = 64
"""Members looked at to find a few that were never met; the table may hold thousands."""

DIALS_MAX = 16
"""Dials under way at a time."""

SLOW_DIAL_S = 1.0
"""A dial that takes longer is not waited for: another is made beside it."""

DIAL_SPACING_S = 0.2
"""Shortest pause between two dials of one peer, however often it is sighted."""

SETTLED_S = 10.0
"""A connection is left alone for so long before it may be given up: somebody may be joining."""

PARTED_S = 60.0
"""A member that gave a connection up, or was given up, is not dialled again for so long."""

RECHECK_S = 300.0
"""A peer whose membership is not valid by one of the two clocks is looked at again after this."""

SHUFFLE_INTERVAL_S = 600.0
"""Between two changes of a neighbour for another: no corner of a network stays by itself."""

REVIVAL_INTERVAL_S = 60.0
"""Between two looks at a member that was found dead within the hour: after a cut the two sides find
each other this way."""

REVIVALS = 4
"""Of such looks at one member in that time, by the whole network together: after a cut there are as
many of the dead as of the living, and everybody looks."""

IDLE_STREAMS = 2
"""Streams of a connection that nothing but announcements uses: one in each direction."""

FLUSH_INTERVAL_S = 10.0
"""Between two writes of the cache."""


class Neighbourhood:
    """Dials and gives up connections. Works while `run` runs."""

    def __init__(
        self,
        *,
        host: Host,
        environment: Environment,
        config: NetworkConfig,
        trust: Trust,
        book: PeerBook,
        gossip: Gossip,
        start: Callable[[Callable[[], Awaitable[None]]], None],
    ) -> None:
        """Make a neighbourhood of nobody.

        Args:
            start: Starts a task; of those there are as many as dials and connections.
        """
        self._host = host
        self._environment = environment
        self._config = config
        self._trust = trust
        self._book = book
        self._gossip = gossip
        self._start = start
        self._wake = trio.Event()
        self._dials: dict[PeerId, float] = {}
        self._next_fill_s = -math.inf
        self._reaching: dict[PeerId, None] = {}
        self._buried: dict[PeerId, tuple[Address, ...]] = {}

    # What happens -------------------------------------------------------------------

    def wake_up(self) -> None:
        """Look again at who is to be dialled."""
        self._wake.set()

    def heard(self) -> None:
        """An announcement came: of somebody to dial, where there are too few neighbours."""
        if len(self._gossip.links) < NEIGHBOURS_MIN:
            self._wake.set()

    def joined(self, link: Link) -> None:
        """A member connected."""
        self._start(link.run)
        self._buried.pop(link.peer, None)
        if self._surplus() > 0:
            self._gossip.agenda.after(SETTLED_S, self._trim)

    def lost(self, peer: PeerId, link: Link | None) -> None:
        """A member is not connected any more."""
        now_s = trio.current_time()
        entry = self._book.get(peer)
        has_parted = link is not None and link.has_parted
        if entry is not None:
            entry.start_over(now_s + PARTED_S if has_parted else now_s)
            entry.is_lost = not has_parted
        if not has_parted and self._host.connection_to(peer) is None:
            self._gossip.liveness.lost(peer)
        self.wake_up()

    def gone(self, record: Record) -> None:
        """A member left the view: it is looked for now and then, where it was."""
        if isinstance(record, SignedAnnouncement):
            addresses = tuple(Address(item) for item in record.announcement.addresses)
            self._buried[record.peer] = addresses
            while len(self._buried) > NEIGHBOURS_MAX * NEIGHBOURS_MAX:
                del self._buried[next(iter(self._buried))]

    def forget(self, peer: PeerId) -> None:
        """Whoever was revoked in the last network in common is a stranger: it is not looked for."""
        self._buried.pop(peer, None)
        self._reaching.pop(peer, None)
        if (entry := self._book.get(peer)) is not None:
            self._book.disown(entry)
            entry.refused_until_s = math.inf

    def reach(self, peer: PeerId) -> None:
        """Dial a member now, whether it is needed as a neighbour or not (`Liveness`).

        One that is connected and silent is not dialled: another is looked for in its place.
        """
        if self._host.connection_to(peer) is None:
            self._reaching[peer] = None
        self.wake_up()

    async def connect(self, peer: PeerId) -> Connection:
        """Return a connection to a member; dial it where it was reached, or says that it is.

        Raises:
            DialFailed: It cannot be reached, may not be dialled again so soon, or is no member.
            HandshakeFailed: Somebody else answers there.
        """
        if self._host.connection_to(peer) is None or not self._trust.is_member(peer):
            entry = self._entry_of(peer)
            addresses: Sequence[Address] = ()
            if entry is not None:
                # One dial serves all who want the peer; another one must be allowed.
                is_under_way = entry.is_dialling
                addresses = entry.addresses if is_under_way else self._book.dialable(entry)[0]
            if self._host.connection_to(peer) is None and not addresses:
                raise DialFailed(f"no address of {peer} is known that may be dialled now")
            connection = await self._host.dial(peer, addresses)
            if entry is not None and connection.direction == "outbound":
                self._book.reached(entry, connection)
            await self._confirm(peer)
        found = self._host.connection_to(peer)
        if found is None:
            raise DialFailed(f"the connection to {peer} was lost")
        return found

    async def _confirm(self, peer: PeerId) -> None:
        try:
            if await self._trust.confirm(peer):
                return
        except MembershipError as error:
            raise DialFailed(f"{peer} is no member any more: {error}") from error
        raise DialFailed(f"{peer} showed no membership of a network of this node")

    # Running ------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep members connected and look at strangers, until cancelled."""
        agenda = self._gossip.agenda
        agenda.after(self._about(SHUFFLE_INTERVAL_S), self._shuffle)
        agenda.after(self._about(REVIVAL_INTERVAL_S), self._revive)
        agenda.after(FLUSH_INTERVAL_S, self._flush)
        while True:
            self._wake = trio.Event()
            # Where a dial that is due must wait for others to end, their end wakes this up.
            next_s = max(self._tend(), trio.current_time() + DIAL_SPACING_S)
            with trio.move_on_at(next_s):
                await self._wake.wait()

    def _tend(self) -> float:
        """Start the dials that are due; return when to look again at the latest."""
        now_s = trio.current_time()
        for peer in list(self._reaching):
            del self._reaching[peer]
            entry = self._entry_of(peer)
            if entry is not None and not entry.is_dialling:
                self._dial(entry)
        waiting: list[Peer] = []
        next_s = math.inf
        for entry in sorted(self._book, key=_by_peer):
            if entry.is_known_member or self._host.connection_to(entry.peer) is not None:
                waiting.append(entry)
            elif entry.is_due(now_s):
                if not self._dial(entry):
                    next_s = min(next_s, entry.next_dial_s)
            elif not entry.is_dialling and (entry.proven or entry.claimed):
                next_s = min(next_s, max(entry.next_dial_s, entry.refused_until_s))
        return min(next_s, self._fill(waiting, now_s))

    def _fill(self, known: Sequence[Peer], now_s: float) -> float:
        """Dial members until there are enough; return when to look again."""
        fresh = [item for item in self._dials.values() if item + SLOW_DIAL_S > now_s]
        present = self._heard_count() + len(fresh)
        missing = NEIGHBOURS_MIN - present
        if missing <= 0:
            return min(fresh, default=math.inf) + SLOW_DIAL_S
        is_large = self._gossip.table.announcement_count > NEIGHBOURS_MAX
        if is_large and present >= NEIGHBOURS_SOON:
            if now_s < self._next_fill_s:
                return self._next_fill_s
            missing = 1
        elif is_large:
            missing = NEIGHBOURS_SOON - present
        self._next_fill_s = now_s + self._about(2 * FILL_INTERVAL_S)
        unconnected = [item for item in known if self._host.connection_to(item.peer) is None]
        due = [entry for entry in unconnected if entry.is_due(now_s)]
        candidates = self._in_random_order(due)
        candidates.sort(key=lambda entry: self._gossip.announcement(entry.peer) is None)
        strangers = self._strangers(missing)
        for entry in (*candidates, *filter(None, map(self._entry_of, strangers))):
            if missing and self._dial(entry):
                missing -= 1
        if not missing:
            return now_s + SLOW_DIAL_S
        times = [
            max(entry.next_dial_s, entry.refused_until_s)
            for entry in unconnected
            if not entry.is_dialling and (entry.proven or entry.claimed)
        ]
        return min((time_s for time_s in times if time_s > now_s), default=math.inf)

    def _strangers(self, count: int) -> list[PeerId]:
        """Return some members in view, by chance, that have no entry yet."""
        records = list(self._gossip.table)
        drawn = self._environment.random.sample(records, min(DRAWN_MAX, len(records)))
        own = self._host.identity.peer_id
        peers = [record.peer for record in drawn if isinstance(record, SignedAnnouncement)]
        return [peer for peer in peers if peer != own and self._book.get(peer) is None][:count]

    def _heard_count(self) -> int:
        """How many neighbours can tell this node something: who is silent may be cut off.

        Their connections end seconds later; a node that waited for that would hear of the dead
        later than the others.
        """
        links, silent = self._gossip.links, self._gossip.liveness.silent
        return len(links) - sum(peer in links for peer in silent)

    def _in_random_order(self, entries: Sequence[Peer]) -> list[Peer]:
        return self._environment.random.sample(entries, len(entries))

    def _entry_of(self, peer: PeerId) -> Peer | None:
        """Return the entry of a member, made of its announcement where it has none yet."""
        entry = self._book.entry(peer, "announce", is_member=True)
        if entry is None:
            return None
        announcement = self._gossip.announcement(peer)
        told = self._buried.get(peer, ())
        if announcement is not None:
            entry.name = announcement.name
            entry.is_known_member = True
            told = tuple(Address(item) for item in announcement.addresses)
        if told:
            # An announcement names all present addresses: older hearsay is out of date.
            entry.claimed = {address: True for address, is_lan in entry.claimed.items() if is_lan}
            self._book.claim(entry, told, is_lan=False)
        return entry

    # Dialling -------------------------------------------------------------------------

    def _dial(self, entry: Peer) -> bool:
        """Start to dial a peer; False where it may not be dialled now, or needs not."""
        now_s = trio.current_time()
        if len(self._dials) >= DIALS_MAX or self._host.connection_to(entry.peer) is not None:
            return False
        if now_s < entry.dialled_s + DIAL_SPACING_S:
            entry.next_dial_s = entry.dialled_s + DIAL_SPACING_S
            return False
        addresses, wait_s = self._book.dialable(entry)
        if not addresses:
            entry.next_dial_s = now_s + wait_s
            return False
        entry.is_dialling = True
        entry.dialled_s = self._dials[entry.peer] = now_s
        self._start(partial(self._dial_now, entry, addresses))
        return True

    async def _dial_now(self, entry: Peer, addresses: Sequence[Address]) -> None:
        try:
            connection = await self._host.dial(entry.peer, addresses)
        except (NetworkError, RemoteProtocolError) as error:
            logger.debug("discovery.dial_failed", extra={"peer": entry.peer, "error": str(error)})
            self._failed(entry)
        else:
            entry.start_over(trio.current_time())
            if connection.direction == "outbound":
                self._book.reached(entry, connection)
            self._gossip.liveness.reached(entry.peer)
            # Until it is known what it is, it counts as somebody being dialled.
            await self.settle(entry.peer)
        finally:
            entry.is_dialling = False
            self._dials.pop(entry.peer, None)
            self.wake_up()

    def _failed(self, entry: Peer) -> None:
        entry.is_lost = True
        if not entry.is_known_member:
            # A stranger that does not answer is tried again when it is sighted again.
            entry.next_dial_s = math.inf
            return
        pause_s = entry.pause_s or self._config.redial_interval_s
        entry.next_dial_s = trio.current_time() + self._about(pause_s)
        entry.pause_s = min(pause_s * 2, REDIAL_PAUSE_S_MAX)
        self._gossip.liveness.unreached(entry.peer)

    async def settle(self, peer: PeerId) -> None:
        """Find out what a connected peer is; a connection dialled to a stranger is closed."""
        entry = self._book.get(peer)
        is_member = self._trust.is_member(peer)
        if entry is None or is_member:
            return
        refused_s = math.inf
        try:
            is_member = await self._trust.confirm(peer)
        except NetworkError as error:
            logger.debug("discovery.silent", extra={"peer": peer, "error": str(error)})
            if entry.is_known_member:
                return  # it said nothing: nothing is known that was not known before
        except (RemoteProtocolError, MembershipError) as error:
            logger.debug("discovery.refused", extra={"peer": peer, "error": str(error)})
            if isinstance(error, NotAMember) and not isinstance(error, MembershipRevoked):
                refused_s = RECHECK_S  # a clock may be set right
        connection = self._host.connection_to(peer)
        if is_member or connection is None:
            return
        entry.refused_until_s = trio.current_time() + refused_s
        self._book.disown(entry)
        if connection.direction == "outbound":
            connection.close()

    # Giving up ------------------------------------------------------------------------

    def _trim(self) -> None:
        """Give idle connections up that are too many."""
        surplus = self._surplus()
        if surplus <= 0:
            return
        idle = self._idle_links()
        for link in self._environment.random.sample(idle, min(surplus, len(idle))):
            link.part()
        if surplus > len(idle):
            self._gossip.agenda.after(SETTLED_S, self._trim)

    def _surplus(self) -> int:
        """How many neighbours are too many, those not counted that are being given up."""
        kept = sum(not link.has_parted for link in self._gossip.links.values())
        return kept - NEIGHBOURS_MAX

    def _idle_links(self) -> list[Link]:
        """Neighbours, in PeerId order, whose connections nothing else uses."""
        oldest_s = trio.current_time() - SETTLED_S
        links = self._gossip.links
        return [
            links[peer]
            for peer in sorted(links)
            if links[peer].since_s <= oldest_s
            and not links[peer].has_parted
            and (connection := links[peer].connection) is not None
            and connection.stream_count <= IDLE_STREAMS
        ]

    def _shuffle(self) -> None:
        """Change one neighbour for some other member."""
        self._gossip.agenda.after(self._about(SHUFFLE_INTERVAL_S), self._shuffle)
        links = self._gossip.links
        others = [item.peer for item in self._gossip.table.announced() if item.peer not in links]
        others = [peer for peer in others if peer != self._host.identity.peer_id]
        if others and len(links) >= NEIGHBOURS_MIN:
            self.reach(others[self._environment.random.randrange(len(others))])
            idle = self._idle_links()
            if idle:
                idle[self._environment.random.randrange(len(idle))].part()

    def _revive(self) -> None:
        """Look at one of the members that were found dead and did not announce themselves since."""
        self._gossip.agenda.after(self._about(REVIVAL_INTERVAL_S), self._revive)
        buried = [peer for peer in self._buried if self._gossip.announcement(peer) is None]
        draw = self._environment.random.random() * self._gossip.table.announcement_count
        if buried and draw <= REVIVALS * len(buried):
            self.reach(buried[self._environment.random.randrange(len(buried))])

    def _flush(self) -> None:
        self._book.flush()
        self._gossip.agenda.after(FLUSH_INTERVAL_S, self._flush)

    def _about(self, seconds: float) -> float:
        """Return half of it to all of it, by chance."""
        return seconds * (0.5 + self._environment.random.random() / 2)


def _by_peer(entry: Peer) -> PeerId:
    return entry.peer
