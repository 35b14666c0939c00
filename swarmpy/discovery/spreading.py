"""Spreading: records travel along a tree among the neighbours, and word of them beside it.

As in Plumtree: a record is pushed to the eager neighbours at once, the others are told of it a
little later; who is pushed what it has already cuts that edge, who is told of what it lacks asks
for it and mends the tree. Spec: protocols/announce.md, States.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from swarmpy.agenda import Agenda
from swarmpy.config import RECORDS_MAX
from swarmpy.discovery.limits import Budgets
from swarmpy.discovery.link import Link
from swarmpy.discovery.records import Record, RecordTable
from swarmpy.environment import Environment
from swarmpy.identity import PeerId
from swarmpy.proto.announce import Have, Prune, Want
from swarmpy.proto.membership import NetworkId
from swarmpy.proto.summary import is_gone, unpack_entries, unpack_keys
from swarmpy.proto.swim import SignedStatement

TELL_CHANGE_S = 1.0
"""Until the lazy neighbours are told of news: a push over six hops was there before."""

TELL_SPACING_S = 8.0
"""Between two times that they are told of news: where there is always some, several share the
message, which each pair of neighbours would cost otherwise."""

TELL_REFRESH_S = 10.0
"""Until they are told of an announcement that says nothing new: nobody waits for it."""

GRAFT_S = 0.5
"""What a node was told of and did not get by then it asks for, and again from the next teller."""

STORM_MEMBERS = 5
STORM_S = 5.0
GRAFT_STORM_S = 5.0
"""The same where there was news of so many members within so long: pushes that wait for each other
take longer, and whoever asks too early makes a cycle of the tree."""

TELL_URGENT_S = 0.25
GRAFT_URGENT_S = 0.1
"""The same for a suspicion and its refutation, which must get round within five seconds. A member
that died breaks the tree, but into parts each of which has a neighbour that finds it dead."""

TOLD_AT_ONCE = 2
"""Lazy neighbours that are told, by chance: each part of a broken tree has many, and one that hears
of news is enough. Three cost a tenth more messages, and brought it no sooner."""

EDGES_MIN = 2
MEND_S = 10.0
"""Edges of the tree that a node sees to, so long after it met somebody or when a storm is over:
graphs in which each node picks two others are whole, as good as always, and what is a cycle of them
is cut by the next news. With one each they fall into dozens of parts where many start at once."""

MEND_S_MAX = 60.0
"""A storm puts that off no longer than this."""

PRUNE_SPACING_S = 1.0
"""Between two prunes: the records of several members that go round a cycle at once meet in several
places of it, and cut everywhere it would be two trees."""

PUSHED_MAX = 256
"""Records remembered that were pushed to this node: a cycle shows within seconds."""

TELLERS_MAX = 4
"""Neighbours remembered for one missing record, and tries to get it."""

KNOWN_MAX = 64
"""Neighbours remembered that told of a record before they were told."""

MISSING_MAX = 2 * RECORDS_MAX

TOLD_MAX = RECORDS_MAX
TOLD_PER_S = 20.0
"""Missing records of which one neighbour may tell, at once and in the long run: less than there is
room for, so that one which tells of what there is not leaves the others some."""

ANSWERS_MAX = 2 * RECORDS_MAX
ANSWERS_PER_S = 20.0
"""Records that one neighbour is sent because it asked: two tables in a row, then a table in three
minutes. One that asks for all of it again and again costs no more."""


@dataclass(slots=True)
class _Missing:
    version: int
    tellers: list[PeerId] = field(default_factory=list)
    tries: int = 0


@dataclass(slots=True)
class _Untold:
    """Records that the lazy neighbours are to be told of, some time after they came."""

    delay_s: float
    keys: dict[bytes, tuple[float, list[PeerId | None]]] = field(default_factory=dict)
    """When each came, and which neighbours know it."""
    next_s: float = -math.inf
    """When they may be told again."""


class Spreading:
    """The table, the links to the neighbours, and how records pass from one to the others."""

    def __init__(
        self,
        table: RecordTable,
        links: Mapping[PeerId, Link],
        agenda: Agenda,
        environment: Environment,
        *,
        networks: Callable[[], Iterable[NetworkId]],
    ) -> None:
        """Args: links: The neighbours, kept up to date. networks: Those that this node is in."""
        self._random = environment.random
        self._networks = networks
        self.table = table
        self.links = links
        self.agenda = agenda
        self.suspicions: dict[bytes, SignedStatement] = {}
        """Statements that are not in the table yet, because their victims may refute them."""
        self._soon = _Untold(TELL_CHANGE_S)
        self._late = _Untold(TELL_REFRESH_S)
        self._urgent = _Untold(TELL_URGENT_S)
        self._pruned_s = -math.inf
        self._is_mending = False
        self._mend_by_s = -math.inf
        self._news: dict[PeerId, float] = {}
        """When there was news of some members last, the oldest first."""
        self._missing: dict[bytes, _Missing] = {}
        self._pushed: dict[bytes, int] = {}
        """Versions of the records that were pushed here last."""
        self._tellers = Budgets(count_max=TOLD_MAX, per_s=TOLD_PER_S)
        self._budgets = Budgets(count_max=ANSWERS_MAX, per_s=ANSWERS_PER_S)

    def newest(self, key: bytes) -> Record | None:
        """Return what is to be told of a key: a suspicion before the announcement it is about."""
        return self.suspicions.get(key) or self.table.get(key)

    def version(self, key: bytes) -> int:
        """Return the version of the newest record of a key, -1 without any."""
        suspect = self.suspicions.get(key) if self.suspicions else None
        return self.table.version(key) if suspect is None else suspect.version

    def spread(
        self,
        record: Record,
        *,
        source: PeerId | None,
        is_refresh: bool = False,
        is_urgent: bool = False,
        to_all: bool = False,
    ) -> None:
        """Pass on a record that is in the table, or a suspicion.

        Args:
            source: Who brought it; None for this node's own.
            is_refresh: It says nothing new.
            is_urgent: It is a suspicion or refutes one.
            to_all: Send it to every neighbour, without the lazy way.
        """
        key, network_id, now_s = record.key, record.network_id, trio.current_time()
        if not is_refresh:
            self._news.pop(record.peer, None)
            self._news[record.peer] = now_s
            if len(self._news) > STORM_MEMBERS:
                del self._news[next(iter(self._news))]
        if (missing := self._missing.get(key)) is not None and missing.version <= record.version:
            del self._missing[key]
        is_lazy = False
        for link in self.links.values():
            if link.peer == source:
                link.heard(key)
            elif link.is_eager:
                if link.shares(network_id, now_s):
                    link.push(key, is_urgent=is_urgent)
            elif to_all:
                if link.shares(network_id, now_s):
                    link.answer(key)
            elif not is_lazy:
                is_lazy = link.shares(network_id, now_s)
        if not is_lazy:
            return
        if is_urgent:
            self._tell_later(self._urgent, key, source)
        self._tell_later(self._late if is_refresh else self._soon, key, source)

    def _tell_later(self, untold: _Untold, key: bytes, source: PeerId | None) -> None:
        if not untold.keys:
            self._schedule(untold)
        untold.keys[key] = (trio.current_time(), [source])

    def _schedule(self, untold: _Untold) -> None:
        # Of two neighbours that would tell each other only the first one to do so does.
        delay_s = max(untold.delay_s, untold.next_s - trio.current_time())
        delay_s *= 0.75 + self._random.random() / 2
        self.agenda.after(delay_s, partial(self._tell, untold))

    def pushed(self, peer: PeerId, news: Sequence[Record], known: Sequence[Record]) -> None:
        """A neighbour pushed records: where another had pushed them its edge makes a cycle.

        What came as an answer says nothing of the tree: an edge that is slower than a comparison is
        needed all the same.
        """
        met = sum(self._pushed.get(record.key, -1) >= record.version for record in known)
        for record in news:
            self._pushed.pop(record.key, None)
            self._pushed[record.key] = record.version
        while len(self._pushed) > PUSHED_MAX:
            del self._pushed[next(iter(self._pushed))]
        link = self.links.get(peer)
        now_s = trio.current_time()
        is_cycle = 2 * met >= max(1, len(news) + len(known)) and not self._is_storm(now_s)
        if link is not None and is_cycle and now_s >= self._pruned_s + PRUNE_SPACING_S:
            # A neighbour may push where this node does not: then too it is asked to stop.
            link.is_eager = False
            self._pruned_s = now_s
            link.say(Prune())
            self.hold_on(but=peer)
        elif link is not None and news:
            link.is_eager = True  # Over there this node is one of those that news is pushed to.

    def hold_on(self, *, edges_min: int = 1, but: PeerId | None = None) -> None:
        """Be part of each network's tree by so many edges at least.

        Args:
            but: An edge to this one was just cut: where there is no other it is taken again, later.
        """
        now_s = trio.current_time()
        for network_id in sorted(self._networks()):
            sharing = [
                peer for peer in sorted(self.links) if self.links[peer].shares(network_id, now_s)
            ]
            lazy = [peer for peer in sharing if not self.links[peer].is_eager]
            if lazy and len(sharing) - len(lazy) < edges_min:
                choice = [peer for peer in lazy if peer != but]
                if not choice:
                    self._mend_later()
                    continue
                link = self.links[choice[self._random.randrange(len(choice))]]
                link.is_eager = True
                link.want([], is_graft=True)

    def met(self) -> None:
        """There is a neighbour more: hold on by an edge now, and by one more in a quiet moment."""
        self.hold_on()
        self._mend_later()

    def _mend_later(self) -> None:
        if not self._is_mending:
            self._is_mending = True
            self._mend_by_s = trio.current_time() + MEND_S_MAX
            self.agenda.after(MEND_S * (0.5 + self._random.random() / 2), self._mend)

    def _mend(self) -> None:
        now_s = trio.current_time()
        if self._is_storm(now_s) and now_s < self._mend_by_s:
            self.agenda.after(STORM_S, self._mend)
        else:
            self._is_mending = False
            self.hold_on(edges_min=EDGES_MIN)

    def pruned(self, peer: PeerId) -> None:
        """A neighbour asks to be pushed nothing."""
        if (link := self.links.get(peer)) is not None:
            link.is_eager = False
            self.hold_on(but=peer)

    def asked(self, want: Want, peer: PeerId) -> None:
        """A neighbour asks for records."""
        link = self.links.get(peer)
        if link is None:
            return
        link.is_eager = link.is_eager or want.is_graft
        self.answer(link, unpack_keys(want.keys))

    def answer(self, link: Link, keys: list[bytes]) -> None:
        """Send a neighbour the records it lacks, within its budget."""
        now_s = trio.current_time()
        for key in keys:
            record = self.newest(key)
            if key in link.answers or record is None or not link.shares(record.network_id, now_s):
                continue
            if not self._budgets.take(link.peer, now_s=now_s):
                return
            link.answer(key)

    def told(self, have: Have, peer: PeerId) -> None:
        """A neighbour says what it has; what does not come by itself is asked for."""
        link = self.links.get(peer)
        if link is None:
            return
        late: list[bytes] = []
        urgent: list[bytes] = []
        # Most of what a node of a large network hears is told here: little may be done for each.
        is_drained = link.is_drained
        queues = [item.keys for item in (self._urgent, self._soon, self._late) if item.keys]
        for key, version in unpack_entries(have.entries):
            if not is_drained:
                link.heard(key)
            for keys in queues:
                if key in keys and len(keys[key][1]) < KNOWN_MAX:
                    keys[key][1].append(peer)
            if self.version(key) >= version or not self._is_missed(key, version, link):
                continue
            missing = self._missing.get(key)
            if missing is None or missing.version < version:
                if not self._has_room(key, peer):
                    break
                known = missing.tellers if missing is not None else []
                missing = self._missing[key] = _Missing(version, known)
                is_urgent = is_gone(version) or key in self.suspicions
                (urgent if is_urgent else late).append(key)
            if len(missing.tellers) < TELLERS_MAX and peer not in missing.tellers:
                missing.tellers.append(peer)
        if urgent:
            self.agenda.after(GRAFT_URGENT_S, partial(self._graft, urgent))
        if late:
            delay_s = GRAFT_STORM_S if self._is_storm(trio.current_time()) else GRAFT_S
            self.agenda.after(delay_s, partial(self._graft, late))

    def _is_storm(self, now_s: float) -> bool:
        oldest_s = next(iter(self._news.values()), -math.inf)
        return len(self._news) == STORM_MEMBERS and now_s < oldest_s + STORM_S

    def _is_missed(self, key: bytes, version: int, link: Link) -> bool:
        """Whether a record that a neighbour tells of is of use here.

        That somebody is gone is not, where nothing is known of it or it is gone already.
        """
        known = self.newest(key)
        if known is None:
            return not is_gone(version)
        if known.version >= version or not link.shares(known.network_id, trio.current_time()):
            return False
        return not (is_gone(version) and isinstance(self.table.get(key), SignedStatement))

    def _has_room(self, key: bytes, teller: PeerId) -> bool:
        is_full = key not in self._missing and len(self._missing) >= MISSING_MAX
        return not is_full and self._tellers.take(teller, now_s=trio.current_time())

    def _tell(self, untold: _Untold) -> None:
        """Tell the lazy neighbours of what was pushed to the others a while ago."""
        now_s = trio.current_time()
        lazy = [link for link in self.links.values() if not link.is_eager]
        drawn: dict[NetworkId, list[Link]] = {}
        if untold is self._soon:
            untold.next_s = now_s + TELL_SPACING_S
        for key in self._take_old(untold, now_s - untold.delay_s / 2):
            record, knowing = self.newest(key), untold.keys.pop(key)[1]
            if record is None:
                continue  # Its member was revoked meanwhile.
            network_id = record.network_id
            if network_id not in drawn:
                sharing = [link for link in lazy if link.shares(network_id, now_s)]
                drawn[network_id] = self._random.sample(sharing, min(TOLD_AT_ONCE, len(sharing)))
            for link in drawn[network_id]:
                if link.peer not in knowing:
                    link.tell(key, record.version)
        if untold.keys:
            self._schedule(untold)

    def _take_old(self, untold: _Untold, before_s: float) -> list[bytes]:
        """Return what came before a time: the rest may be on its way to the neighbours still."""
        return [key for key, (came_s, _) in untold.keys.items() if came_s <= before_s]

    def _graft(self, keys: list[bytes]) -> None:
        """Ask for what is still missing, and mend the tree with whoever has it."""
        asked: dict[PeerId, list[bytes]] = {}
        still: list[bytes] = []
        for key in keys:
            missing = self._missing.get(key)
            if missing is None:
                continue
            tellers = [peer for peer in missing.tellers if peer in self.links]
            is_over = missing.tries >= TELLERS_MAX or not tellers
            if is_over or self.version(key) >= missing.version:
                del self._missing[key]
                continue
            asked.setdefault(tellers[missing.tries % len(tellers)], []).append(key)
            missing.tries += 1
            still.append(key)
        for peer, wanted in asked.items():
            link = self.links[peer]
            link.is_eager = True
            link.want(wanted, is_graft=True)
        if still:
            self.agenda.after(GRAFT_S, partial(self._graft, still))
