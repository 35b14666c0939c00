"""Catching up: two neighbours compare what they know and exchange what differs, no more.

The roots of equal tables are equal; where they differ the comparison goes down by the keys' first
digits, and the entries below are listed. Spec: protocols/announce.md, States.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from swarmpy.discovery.limits import Budgets
from swarmpy.discovery.link import Link
from swarmpy.discovery.spreading import Spreading
from swarmpy.discovery.trust import Trust
from swarmpy.environment import Environment
from swarmpy.errors import BadMessage
from swarmpy.identity import PeerId
from swarmpy.proto.announce import ENTRIES_PER_MESSAGE_MAX, Branch, Branches, Listing, Part, Root
from swarmpy.proto.membership import NetworkId, key_hash_of, network_id_of
from swarmpy.proto.summary import (
    PREFIX_MAX,
    check_prefix,
    differing,
    is_gone,
    pack_entries,
    unpack_entries,
)

COMPARE_INTERVAL_S = 60.0
"""Between two comparisons with some neighbour: what no other way brought comes within minutes."""

COMPARISONS_MAX = 1
ANSWERED_MAX = 2
COMPARISON_S = 0.3
"""Comparisons at a time that this node begins, and that others begin with it, and how long one is
under way: of eight neighbours met at once one sends the whole table, not each."""

WAIT_S_MIN = 0.02

ROOTS_MAX = 64
ROOTS_PER_S = 1.0
"""Roots of one neighbour that are looked at: one a minute for each network, more where the
neighbours' tables change. Another's turn must come however many somebody sends."""

OTHERS_PAUSE_S = 2.0
"""From a comparison that brought much to those with the other neighbours: while many nodes start
every comparison brings much, and would be followed by one with everybody."""

PASSED_ON_MIN = 16
PASSED_ON_SHARE = 1 / 4
"""Of one comparison so many records, or so many for each that was here before, are passed on one by
one, as others are: the tree brought them nowhere beyond this node yet. With more the neighbours are
compared with: a newcomer is sent a whole table that they have, and after a cut each side lacks half
of it."""

BULK_PAUSE_S = 2.0
"""Answers of one neighbour that follow each other more closely are of one comparison."""

LISTED_MAX = 32
"""Entries under one prefix that are listed (512 bytes) instead of another level of hashes."""


@dataclass(slots=True)
class _Brought:
    """What a comparison brought so far."""

    known: int
    """Records that were here before it."""
    count: int = 0
    until_s: float = math.inf


class CatchUp:
    """Compares this node's table with its neighbours'."""

    def __init__(self, spreading: Spreading, environment: Environment, trust: Trust) -> None:
        self._spreading = spreading
        self._environment = environment
        self._trust = trust
        self._begun: dict[PeerId, float] = {}
        self._answered: dict[PeerId, float] = {}
        """Comparisons under way, and when their time is over."""
        self._waiting: dict[PeerId, None] = {}
        self._others_s = -math.inf
        self._bulk_s = -math.inf
        self._brought: dict[PeerId, _Brought] = {}
        self._roots = Budgets(count_max=ROOTS_MAX, per_s=ROOTS_PER_S)

    def run(self) -> None:
        """Compare with some neighbour now and from then on, by the agenda."""
        links = self._spreading.links
        if links:
            peers = sorted(links)
            chosen = peers[self._environment.random.randrange(len(peers))]
            self.soon(links[chosen])
        pause_s = COMPARE_INTERVAL_S * (0.75 + self._environment.random.random() / 2)
        self._spreading.agenda.after(pause_s, self.run)

    def soon(self, link: Link) -> None:
        """Compare with a neighbour as soon as those that wait already have had their time."""
        if not self._waiting and _engage(self._begun, link.peer, count_max=COMPARISONS_MAX):
            self._compare(link)
        elif link.peer not in self._waiting:
            if not self._waiting:
                wait_s = min(self._begun.values()) - trio.current_time()
                # The agenda's times are rounded: no look again at the very moment of this one.
                self._spreading.agenda.after(max(wait_s, WAIT_S_MIN), self._compare_next)
            self._waiting[link.peer] = None

    def is_bulk(self, peer: PeerId, count: int) -> bool:
        """Count records that a neighbour answered with; return if they are too many to pass on."""
        now_s = trio.current_time()
        for other in [item for item, last in self._brought.items() if last.until_s <= now_s]:
            del self._brought[other]
        brought = self._brought.setdefault(peer, _Brought(len(self._spreading.table)))
        brought.count += count
        brought.until_s = now_s + BULK_PAUSE_S
        return brought.count > max(PASSED_ON_MIN, PASSED_ON_SHARE * brought.known)

    def with_others(self) -> None:
        """Compare soon with all neighbours that were not compared with since: much was brought."""
        now_s = self._bulk_s = trio.current_time()
        if now_s >= self._others_s:
            self._others_s = now_s + OTHERS_PAUSE_S
            self._spreading.agenda.after(OTHERS_PAUSE_S, self._compare_others)

    def _compare_others(self) -> None:
        links = self._spreading.links
        for peer in sorted(links):
            if links[peer].compared_s < self._bulk_s:
                self.soon(links[peer])

    def _compare_next(self) -> None:
        """Compare with the neighbours that wait, as many as may, and put the others off again."""
        waiting, self._waiting = self._waiting, {}
        for peer in waiting:
            if (link := self._spreading.links.get(peer)) is not None:
                self.soon(link)

    def _compare(self, link: Link) -> None:
        self._sweep()
        link.compared_s = trio.current_time()
        for network_id in sorted(self._trust.shared_networks(link.peer)):
            root = self._spreading.table.summary(network_id).root
            link.say(Root(network=key_hash_of(network_id), root=root))

    def root(self, message: Root, peer: PeerId) -> None:
        """A neighbour tells its root."""
        found = self._shared(message.network, peer)
        if found is None:
            return
        link, network_id = found
        link.has_compared = True
        if not self._roots.take(peer, now_s=trio.current_time()):
            return
        self._sweep()
        summary = self._spreading.table.summary(network_id)
        if summary.root == message.root:
            return
        if not _engage(self._answered, peer, count_max=ANSWERED_MAX):
            self.soon(link)
        else:
            branch = Branch(prefix="", hashes=summary.children(""))
            link.say(Branches(network=message.network, branches=(branch,)))

    def branches(self, message: Branches, peer: PeerId) -> None:
        """A neighbour tells one level of hashes: answer with the next, or with entries.

        Raises:
            BadMessage: A prefix is none, or there twice.
        """
        _check_prefixes(message.branches, peer)
        found = self._shared(message.network, peer)
        if found is None:
            return
        link, network_id = found
        summary = self._spreading.table.summary(network_id)
        prefixes: list[str] = []
        for branch in message.branches:
            if len(branch.prefix) >= PREFIX_MAX:
                raise BadMessage(f"no prefix is longer than {branch.prefix!r}", peer=peer)
            ours = summary.children(branch.prefix)
            prefixes += differing(branch.prefix, ours, branch.hashes)
        deeper: list[Branch] = []
        listed: list[Part] = []
        size = 0
        for length in range(1, PREFIX_MAX + 1):
            alike = [prefix for prefix in prefixes if len(prefix) == length]
            for prefix, entries in self._spreading.table.entries(network_id, alike).items():
                size += len(entries)
                if length < PREFIX_MAX and len(entries) > LISTED_MAX:
                    deeper.append(Branch(prefix=prefix, hashes=summary.children(prefix)))
                elif size <= ENTRIES_PER_MESSAGE_MAX:
                    listed.append(Part(prefix=prefix, entries=pack_entries(entries)))
        if deeper:
            link.say(Branches(network=message.network, branches=tuple(deeper)))
        if listed:
            link.say(Listing(network=message.network, parts=tuple(listed)))

    def listing(self, message: Listing, peer: PeerId) -> None:
        """A neighbour lists its entries: send what it lacks, ask for what is missing here.

        Raises:
            BadMessage: A prefix is none, or there twice, or the entries are not whole.
        """
        _check_prefixes(message.parts, peer)
        found = self._shared(message.network, peer)
        if found is None:
            return
        link, network_id = found
        theirs: dict[bytes, int] = {}
        for part in message.parts:
            theirs.update(unpack_entries(part.entries))
        lacking: list[bytes] = []
        for length in range(PREFIX_MAX + 1):
            alike = [part.prefix for part in message.parts if len(part.prefix) == length]
            for entries in self._spreading.table.entries(network_id, alike).values():
                lacking += [key for key, version in entries if _is_news(version, theirs.get(key))]
        stored = self._spreading.table.get
        missing = [
            key
            for key, version in theirs.items()
            if _is_news(version, record.version if (record := stored(key)) is not None else None)
        ]
        self._spreading.answer(link, lacking)
        if missing:
            link.want(missing)

    def _shared(self, network: bytes, peer: PeerId) -> tuple[Link, NetworkId] | None:
        link = self._spreading.links.get(peer)
        network_id = network_id_of(network)
        is_shared = network_id in self._trust.shared_networks(peer)
        return (link, network_id) if link is not None and is_shared else None

    def _sweep(self) -> None:
        wall_s = self._environment.wall_time()
        self._spreading.table.sweep(wall_s=wall_s, now_s=trio.current_time())


def _engage(under_way: dict[PeerId, float], peer: PeerId, *, count_max: int) -> bool:
    """Whether a comparison with a peer may go on now; nobody's time is longer for asking again."""
    now_s = trio.current_time()
    for other in [other for other, until_s in under_way.items() if until_s <= now_s]:
        del under_way[other]
    if peer not in under_way and len(under_way) >= count_max:
        return False
    under_way.setdefault(peer, now_s + COMPARISON_S)
    return True


def _is_news(version: int, known: int | None) -> bool:
    """Whether a record is of use to who knows a version, or None; a death, only to who did not know
    that the member is gone."""
    if known is None:
        return not is_gone(version)
    return version > known and not (is_gone(version) and is_gone(known))


def _check_prefixes(parts: Sequence[Branch] | Sequence[Part], peer: PeerId) -> None:
    """Refuse prefixes that are none, or there twice: each costs a look at what is under it."""
    for part in parts:
        check_prefix(part.prefix)
    if len({part.prefix for part in parts}) < len(parts):
        raise BadMessage("a prefix is there twice", peer=peer)
