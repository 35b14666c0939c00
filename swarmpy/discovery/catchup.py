"""Catching up: two neighbours compare what they know and exchange what differs, no more.

The roots of equal tables are equal; where they differ the comparison goes down by the keys' first
digits, and the entries below are listed. Spec: protocols/announce.md, section 6.
"""

from __future__ import annotations

import trio

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
    pack_entries,
    unpack_entries,
)

COMPARE_INTERVAL_S = 60.0
"""Between two comparisons with some neighbour: what no other way brought comes within minutes."""

COMPARISONS_MAX = 2
COMPARISON_S = 0.3
"""Comparisons at a time, and how long one is under way: of eight neighbours met at once not each
must send the whole table."""

LISTED_MAX = 32
"""Entries under one prefix that are listed (512 bytes) instead of another level of hashes."""


class CatchUp:
    """Compares this node's table with its neighbours'."""

    def __init__(self, spreading: Spreading, environment: Environment, trust: Trust) -> None:
        self._spreading = spreading
        self._environment = environment
        self._trust = trust
        self._until_s: dict[PeerId, float] = {}
        self._waiting: dict[PeerId, None] = {}

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
        """Compare with a neighbour as soon as the comparisons under way have had their time."""
        if self._engage(link.peer):
            self._compare(link)
        elif link.peer not in self._waiting:
            if not self._waiting:
                wait_s = min(self._until_s.values()) - trio.current_time()
                self._spreading.agenda.after(wait_s, self._compare_next)
            self._waiting[link.peer] = None

    def _compare_next(self) -> None:
        """Compare with the neighbours that wait, as many as may, and put the others off again."""
        waiting, self._waiting = self._waiting, {}
        for peer in waiting:
            if (link := self._spreading.links.get(peer)) is not None:
                self.soon(link)

    def _engage(self, peer: PeerId) -> bool:
        """Whether a comparison with a peer may go on now; it is under way then."""
        now_s = trio.current_time()
        over = [other for other, until_s in self._until_s.items() if until_s <= now_s]
        for other in over:
            del self._until_s[other]
        if peer not in self._until_s and len(self._until_s) >= COMPARISONS_MAX:
            return False
        self._until_s[peer] = now_s + COMPARISON_S
        return True

    def _compare(self, link: Link) -> None:
        self._sweep()
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
        self._sweep()
        summary = self._spreading.table.summary(network_id)
        if summary.root == message.root:
            return
        if not self._engage(peer):
            self.soon(link)
        else:
            branch = Branch(prefix="", hashes=summary.children(""))
            link.say(Branches(network=message.network, branches=(branch,)))

    def branches(self, message: Branches, peer: PeerId) -> None:
        """A neighbour tells one level of hashes: answer with the next, or with entries.

        Raises:
            BadMessage: A prefix is none.
        """
        found = self._shared(message.network, peer)
        if found is None:
            return
        link, network_id = found
        summary = self._spreading.table.summary(network_id)
        prefixes: list[str] = []
        for branch in message.branches:
            check_prefix(branch.prefix)
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
            BadMessage: A prefix is none, or the entries are not whole.
        """
        found = self._shared(message.network, peer)
        if found is None:
            return
        link, network_id = found
        theirs: dict[bytes, int] = {}
        for part in message.parts:
            check_prefix(part.prefix)
            theirs.update(unpack_entries(part.entries))
        lacking: list[bytes] = []
        for length in range(PREFIX_MAX + 1):
            alike = [part.prefix for part in message.parts if len(part.prefix) == length]
            for entries in self._spreading.table.entries(network_id, alike).values():
                lacking += [key for key, version in entries if version > theirs.get(key, -1)]
        version_of = self._spreading.table.version
        missing = [key for key, version in theirs.items() if version > version_of(key)]
        self._spreading.answer(link, lacking)
        if missing:
            link.want(missing)

    def _shared(self, network: bytes, peer: PeerId) -> tuple[Link, NetworkId] | None:
        link = self._spreading.links.get(peer)
        network_id = network_id_of(network)
        is_shared = network_id in self._trust.shared_networks(peer)
        return (link, network_id) if link is not None and is_shared else None

    def _sweep(self) -> None:
        self._spreading.table.sweep(wall_s=self._environment.wall_time())
