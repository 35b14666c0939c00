"""Spreading: records travel along a tree among the neighbours, and word of them beside it.

As in Plumtree: a record is pushed to the eager neighbours at once, the others are told of it a
little later; who is pushed what it has already cuts that edge, who is told of what it lacks asks
for it and mends the tree. Spec: protocols/announce.md, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import trio

from swarmpy.config import RECORDS_MAX
from swarmpy.discovery.agenda import Agenda
from swarmpy.discovery.limits import Budgets
from swarmpy.discovery.link import Link
from swarmpy.discovery.records import Record, RecordTable
from swarmpy.environment import Environment
from swarmpy.identity import PeerId
from swarmpy.proto.announce import Have, Prune, Want
from swarmpy.proto.summary import is_gone, unpack_entries, unpack_keys
from swarmpy.proto.swim import SignedStatement

TELL_URGENT_S = 0.25
GRAFT_URGENT_S = 0.1
"""The same two for a suspicion and its refutation: both must get round within five seconds."""

TELL_CHANGE_S = 1.0
"""Until the lazy neighbours are told of news: a push over six hops was there before."""

TELL_REFRESH_S = 10.0
"""Until they are told of an announcement that says nothing new: nobody waits for it."""

GRAFT_S = 0.5
"""What a node was told of and did not get by then it asks for, and again from the next teller."""

TELLERS_MAX = 4
"""Neighbours remembered for one missing record, and tries to get it."""

KNOWN_MAX = 64
"""Neighbours remembered that told of a record before they were told."""

MISSING_MAX = 2 * RECORDS_MAX

ANSWERS_MAX = 2 * RECORDS_MAX
ANSWERS_PER_S = 20.0
"""Records that one neighbour is sent because it asked: two tables in a row, then a table in three
minutes. One that asks for all of it again and again costs no more."""


@dataclass(slots=True)
class _Missing:
    version: int
    tellers: list[PeerId] = field(default_factory=list)
    tries: int = 0


class Spreading:
    """The table, the links to the neighbours, and how records pass from one to the others."""

    def __init__(
        self,
        table: RecordTable,
        links: Mapping[PeerId, Link],
        agenda: Agenda,
        environment: Environment,
    ) -> None:
        """Args: links: The neighbours, kept up to date by whoever made them."""
        self._random = environment.random
        self.table = table
        self.links = links
        self.agenda = agenda
        self.suspicions: dict[bytes, SignedStatement] = {}
        """Statements that are not in the table yet, because their victims may refute them."""
        self._soon: dict[bytes, list[PeerId | None]] = {}
        self._late: dict[bytes, list[PeerId | None]] = {}
        self._urgent: dict[bytes, list[PeerId | None]] = {}
        self._missing: dict[bytes, _Missing] = {}
        self._budgets = Budgets(count_max=ANSWERS_MAX, per_s=ANSWERS_PER_S)

    def newest(self, key: bytes) -> Record | None:
        """Return what is to be told of a key: a suspicion before the announcement it is about."""
        return self.suspicions.get(key) or self.table.get(key)

    def version(self, key: bytes) -> int:
        """Return the version of the newest record of a key, -1 without any."""
        record = self.newest(key)
        return -1 if record is None else record.version

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
            to_all: Push it to every neighbour: whoever leaves has no time for the lazy way.
        """
        key = record.key
        is_lazy = False
        for link in self.links.values():
            if link.peer == source:
                link.heard(key)
            elif link.is_eager:
                link.push(key)
            elif to_all:
                link.answer(key)
            else:
                is_lazy = True
        if not is_lazy:
            return
        waiting, delay_s = self._soon, TELL_CHANGE_S
        if is_urgent:
            waiting, delay_s = self._urgent, TELL_URGENT_S
        elif is_refresh:
            waiting, delay_s = self._late, TELL_REFRESH_S
        if not waiting:
            # Of two neighbours that would tell each other only the first one to do so does.
            delay_s *= 0.75 + self._random.random() / 2
            self.agenda.after(delay_s, partial(self._tell, waiting))
        waiting[key] = [source]

    def is_known(self, peer: PeerId) -> None:
        """A neighbour pushed what is here already: that edge is not part of the tree."""
        link = self.links.get(peer)
        if link is not None and link.is_eager:
            link.is_eager = False
            link.say(Prune())

    def pruned(self, peer: PeerId) -> None:
        """A neighbour asks to be pushed nothing."""
        if (link := self.links.get(peer)) is not None:
            link.is_eager = False

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
            if key in link.answers:
                continue
            if not self._budgets.take(link.peer, now_s=now_s):
                return
            link.answer(key)

    def told(self, have: Have, peer: PeerId) -> None:
        """A neighbour says what it has; what does not come by itself is asked for."""
        link = self.links.get(peer)
        late: list[bytes] = []
        is_urgent = False
        for key, version in unpack_entries(have.entries):
            if link is not None:
                link.heard(key)
            for waiting in (self._urgent, self._soon, self._late):
                if key in waiting and len(waiting[key]) < KNOWN_MAX:
                    waiting[key].append(peer)
            if self.version(key) >= version:
                continue
            missing = self._missing.get(key)
            if missing is None or missing.version < version:
                if len(self._missing) >= MISSING_MAX:
                    return
                missing = self._missing[key] = _Missing(version)
                late.append(key)
                is_urgent = is_urgent or is_gone(version) or key in self.suspicions
            if len(missing.tellers) < TELLERS_MAX and peer not in missing.tellers:
                missing.tellers.append(peer)
        if late:
            delay_s = GRAFT_URGENT_S if is_urgent else GRAFT_S
            self.agenda.after(delay_s, partial(self._graft, late))

    def _tell(self, waiting: dict[bytes, list[PeerId | None]]) -> None:
        """Tell the lazy neighbours of what was pushed to the others."""
        told = [
            (key, knowing, record.version)
            for key, knowing in waiting.items()
            if (record := self.newest(key)) is not None
        ]
        waiting.clear()
        for link in self.links.values():
            if not link.is_eager:
                for key, knowing, version in told:
                    if link.peer not in knowing:
                        link.tell(key, version)

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
