"""Liveness: who is alive, as SWIM finds it out among a bounded set of neighbours.

A neighbour that falls silent is probed, by this node and by three others; where nobody reaches it a
signed suspicion goes round, and whoever is suspected has five seconds to announce itself anew. What
others claim is a suspicion here and no more, and of a member this node hears itself it is nothing.
Spec: protocols/swim.md.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from swarmpy.config import RECORDS_MAX
from swarmpy.discovery.limits import Budgets
from swarmpy.discovery.records import Record
from swarmpy.discovery.spreading import Spreading
from swarmpy.discovery.trust import Trust
from swarmpy.environment import Environment
from swarmpy.identity import Identity, PeerId
from swarmpy.proto.announce import Alive, Probe, SignedAnnouncement
from swarmpy.proto.membership import CLOCK_SKEW_S, read_peer_id
from swarmpy.proto.revocation import SignedRevocation
from swarmpy.proto.summary import record_key
from swarmpy.proto.swim import (
    ACCUSATION_INTERVAL_S,
    ACCUSATIONS_MAX,
    HELPERS,
    PROBE_TIMEOUT_S,
    SILENCE_S,
    SUSPICION_S,
    SignedStatement,
    is_plausible,
    open_statement,
    seal_statement,
)

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 2.0
"""Between two looks at when each neighbour was heard last, at least."""

ACCUSE_JITTER_S = 0.5
"""A member's neighbours find it dead at the same moment; whoever speaks first spares the others."""

HEARD_SINCE_S_MAX = 60.0
"""A suspect that this node hears itself is kept for so long without a refutation."""

REPROBE_S = 20.0
"""A neighbour that was lost is probed so often until it is heard, announces itself or is accused.
Who said that it lives is not asked again: it may not be true."""

LOST_MAX = 256
"""Lost neighbours that are probed again."""

REACH_INTERVAL_S = 15.0
"""Between two dials of one member that others ask this node to make, whoever asks."""

LOOK_DELAY_S = 10.0
LOOK_INTERVAL_S = 1.0
LOOKS_AT_ONCE = 4
LOOKS_MAX = 16
"""A node that was alone did not hear who died. When the neighbours' tables are compared it looks at
so many members at a time, until so many are alive one after the other."""

SUSPECTS_MAX = 2 * RECORDS_MAX
"""Members suspected at a time, each for five seconds."""

PASSED_MAX = 1024
PASSED_PER_S = 10.0
"""Suspicions of one accuser that are passed on, at once and in the long run."""

DELIVERED_MAX = 2 * RECORDS_MAX
DELIVERED_PER_S = 20.0
"""Statements that one neighbour may bring, whoever signed them."""

ASKED_MAX = 64
ASKED_PER_S = 1.0
"""Probes that one member may ask of this node: it has 16 neighbours, and all may fall silent."""

ASKERS_MAX = 16
PROBES_MAX = 256
"""Members probed for others at a time, and who waits for the answer about one."""

AFTERMATH_CHECKS = 8.0
"""Looks at random members, by the whole network together, for each member that is suspected: a cut
takes many, and some have no neighbour on this side who would miss them. To wait for the first
deaths would cost five seconds more."""

AFTERMATH_S = 60.0
"""For so long after a suspicion a member that cannot be dialled is a suspect too; at rest it may
merely be behind a router that lets nobody in."""


@dataclass(slots=True)
class _Probe:
    """A member of whom this node wants to know whether it lives."""

    started_s: float
    helpers: frozenset[PeerId]
    is_alive: bool = False
    """Whether it was heard itself."""
    vouchers: set[PeerId] = field(default_factory=set)
    """Who said that it lives."""


@dataclass(slots=True, eq=False)
class _Lost:
    """A neighbour that was lost here."""

    vouchers: set[PeerId] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Trial:
    """A suspicion that is acted upon, unless it is refuted."""

    statement: SignedStatement
    since_s: float


@dataclass(slots=True)
class _Relayed:
    """A member probed for others."""

    askers: dict[PeerId, float] = field(default_factory=dict)


class Liveness:
    """Probes neighbours, hears suspicions, and judges them."""

    def __init__(
        self,
        spreading: Spreading,
        *,
        environment: Environment,
        identity: Identity,
        trust: Trust,
        reach: Callable[[PeerId], None],
        refute: Callable[[int], None],
        on_gone: Callable[[Record], None],
    ) -> None:
        """Judge by what `spreading` knows.

        Args:
            reach: Dial a member, if it may be dialled; `reached` or `unreached` is called then. One
                that is connected is silent: others are needed in its place.
            refute: Announce this node with a higher number than the one given.
            on_gone: Called with the announcement of a member that left the view.
        """
        self._spreading = spreading
        self._environment = environment
        self._identity = identity
        self._trust = trust
        self._reach = reach
        self._refute = refute
        self._on_gone = on_gone
        self._probes: dict[PeerId, _Probe] = {}
        self._relayed: dict[PeerId, _Relayed] = {}
        self._lost: dict[PeerId, _Lost] = {}
        self._doubted: deque[PeerId] = deque()
        self._found_alive = 0
        self._suspects = spreading.suspicions
        self._trials: dict[bytes, _Trial] = {}
        self._accusers = Budgets(count_max=ACCUSATIONS_MAX, per_s=1 / ACCUSATION_INTERVAL_S)
        self._passed = Budgets(count_max=PASSED_MAX, per_s=PASSED_PER_S)
        self._askers = Budgets(count_max=ASKED_MAX, per_s=ASKED_PER_S)
        self._reached = Budgets(count_max=1, per_s=1 / REACH_INTERVAL_S)
        self._deliverers = Budgets(count_max=DELIVERED_MAX, per_s=DELIVERED_PER_S)
        self._alarm_s = -AFTERMATH_S
        self.silent: frozenset[PeerId] = frozenset()
        """Neighbours that fell silent, as of the last look at them."""

    # Probing --------------------------------------------------------------------------

    def run(self) -> None:
        """Look at the neighbours now and whenever one may have fallen silent, by the agenda."""
        now_s = oldest_s = trio.current_time()
        silent: set[PeerId] = set()
        for link in self._spreading.links.values():
            connection = link.connection
            if connection is None:
                continue
            heard_s = connection.heard_s
            if heard_s <= now_s - SILENCE_S:
                silent.add(link.peer)
            elif heard_s < oldest_s:
                oldest_s = heard_s
        self.silent = frozenset(silent)
        for peer in sorted(silent):
            self.probe(peer)
            self._reach(peer)
        wait_s = CHECK_INTERVAL_S if silent else oldest_s + SILENCE_S - now_s
        self._spreading.agenda.after(max(wait_s, CHECK_INTERVAL_S), self.run)

    def lost(self, peer: PeerId) -> None:
        """The connection to a member broke, and nobody said that it would."""
        self._reach(peer)
        lost = self._lost[peer] = _Lost()
        if len(self._lost) > LOST_MAX:
            del self._lost[next(iter(self._lost))]
        self._probe_lost(peer, lost)

    def _probe_lost(self, peer: PeerId, lost: _Lost) -> None:
        """Probe a lost neighbour now and then; while this node is alone nobody is judged."""
        if self._lost.get(peer) is not lost:
            return
        if peer in self._spreading.links or not self._records(peer):
            del self._lost[peer]
            return
        self.probe(peer)
        self._spreading.agenda.after(REPROBE_S, partial(self._probe_lost, peer, lost))

    def look_again(self) -> None:
        """This node was alone, and is not any more: look at the members that it remembers."""
        own = self._identity.peer_id
        peers = {item.peer: None for item in self._spreading.table.announced() if item.peer != own}
        if not self._doubted:
            self._spreading.agenda.after(LOOK_DELAY_S, self._look)
        self._doubted = deque(self._environment.random.sample(list(peers), len(peers)))
        self._found_alive = 0

    def _look(self) -> None:
        count = 0
        while self._doubted and count < LOOKS_AT_ONCE:
            peer = self._doubted.popleft()
            if peer not in self._spreading.links:
                self.probe(peer)
                count += 1
        if self._found_alive >= LOOKS_MAX or not self._spreading.links:
            self._doubted.clear()
        if self._doubted:
            self._spreading.agenda.after(LOOK_INTERVAL_S, self._look)

    def probe(self, peer: PeerId) -> None:
        """Find out whether a member lives, and accuse it if nobody can tell."""
        records = [record for record in self._records(peer) if self._is_unsuspected(record)]
        if not records or peer in self._probes or peer == self._identity.peer_id:
            return
        links, now_s = self._spreading.links, trio.current_time()
        lost = self._lost.get(peer)
        others = [
            other
            for other in sorted(links)
            if other != peer
            and (lost is None or other not in lost.vouchers)
            and any(links[other].shares(record.network_id, now_s) for record in records)
        ]
        helpers = self._environment.random.sample(others, min(HELPERS, len(others)))
        self._probes[peer] = _Probe(now_s, frozenset((*helpers, peer)))
        for asked in (peer, *helpers):
            if (link := links.get(asked)) is not None:
                link.say(Probe(peer=peer))
        delay_s = PROBE_TIMEOUT_S + ACCUSE_JITTER_S * self._environment.random.random()
        self._spreading.agenda.after(delay_s, partial(self._judge_probe, peer))

    def reached(self, peer: PeerId) -> None:
        """A member was dialled with success, or dialled this node: it lives."""
        if (probe := self._probes.get(peer)) is not None:
            probe.is_alive = True
        self._lost.pop(peer, None)
        self._answer_askers(peer)

    def unreached(self, peer: PeerId) -> None:
        """A member was dialled in vain.

        Who dialled because it was asked does not ask others in turn: each would, without end.
        """
        if peer not in self._relayed and trio.current_time() - self._alarm_s < AFTERMATH_S:
            self.probe(peer)

    def asked(self, message: Probe, asker: PeerId) -> None:
        """A member asks whether another, or this node, lives.

        Raises:
            BadMessage: It asks for no peer.
        """
        peer = read_peer_id(message.peer)
        link = self._spreading.links.get(asker)
        if link is None:
            return
        if peer == self._identity.peer_id:
            link.say(Alive(peer=peer))
            return
        now_s = trio.current_time()
        is_shared = any(link.shares(record.network_id, now_s) for record in self._records(peer))
        if not is_shared or not self._askers.take(asker, now_s=now_s):
            return
        if len(self._relayed) >= PROBES_MAX and peer not in self._relayed:
            return
        relayed = self._relayed.setdefault(peer, _Relayed())
        if asker not in relayed.askers and len(relayed.askers) >= ASKERS_MAX:
            return
        relayed.askers[asker] = now_s
        stop = partial(self._stop_relaying, peer, asker, now_s)
        self._spreading.agenda.after(PROBE_TIMEOUT_S, stop)
        known = self._spreading.links.get(peer)
        if known is not None and known.connection is not None:
            known.say(Probe(peer=peer))
        elif self._reached.take(peer, now_s=now_s):
            self._reach(peer)

    def alive(self, message: Alive, teller: PeerId) -> None:
        """A member says that it, or another, lives.

        Raises:
            BadMessage: It names no peer.
        """
        peer = read_peer_id(message.peer)
        probe = self._probes.get(peer)
        if peer == teller:
            self.reached(peer)
        elif probe is not None and teller in probe.helpers:
            probe.vouchers.add(teller)

    def _stop_relaying(self, peer: PeerId, asker: PeerId, since_s: float) -> None:
        """Whoever asked does not wait any more, unless it asked anew."""
        relayed = self._relayed.get(peer)
        if relayed is not None and relayed.askers.get(asker) == since_s:
            del relayed.askers[asker]
            if not relayed.askers:
                del self._relayed[peer]

    def _answer_askers(self, peer: PeerId) -> None:
        relayed = self._relayed.pop(peer, None)
        for asker in relayed.askers if relayed is not None else ():
            if (link := self._spreading.links.get(asker)) is not None:
                link.say(Alive(peer=peer))

    def _judge_probe(self, peer: PeerId) -> None:
        probe = self._probes.pop(peer)
        if not self._spreading.links:
            return  # Nobody could confirm it, or hear of it: it is this node that is cut off.
        if probe.is_alive or self._is_heard(peer, since_s=probe.started_s):
            self._lost.pop(peer, None)
        elif not probe.vouchers:
            self._lost.pop(peer, None)
            self._found_alive = 0
            self._accuse(peer)
            return
        elif (lost := self._lost.get(peer)) is not None:
            lost.vouchers |= probe.vouchers
        self._found_alive += 1

    def _accuse(self, peer: PeerId) -> None:
        """Say that a member is gone, unless somebody else did."""
        wall_s = self._environment.wall_time()
        for record in filter(self._is_unsuspected, self._records(peer)):
            sealed = seal_statement(
                self._identity,
                network_id=record.network_id,
                accused=peer,
                seq=record.announcement.seq,
                wall_s=wall_s,
            )
            logger.info("swim.suspected", extra={"peer": peer})
            self._suspect(open_statement(sealed, wall_s=wall_s), source=None)

    # Statements -----------------------------------------------------------------------

    def stated(self, statement: SignedStatement, source: PeerId) -> bool:
        """Hear a verified statement of a network in common; False where it was known already."""
        if statement.peer == self._identity.peer_id:
            # Whoever believes it may have a clock that is so far ahead of this one.
            if self._is_plausible(statement, skew_s=CLOCK_SKEW_S):
                self._refute(statement.seq)
            return True
        stored = self._spreading.table.get(statement.key)
        if stored is None:
            return True  # Of somebody unknown there is nothing to forget, or to keep.
        known = stored
        if statement.key in self._trials:
            known = self._suspects.get(statement.key, stored)
        if known.version >= statement.version:
            # Of several accusers one is passed on: the way the others came may be the tree's.
            return known.version == statement.version and known.envelope != statement.envelope
        is_alive = isinstance(stored, SignedAnnouncement)
        if is_alive and self._deliverers.take(source, now_s=trio.current_time()):
            if statement.is_farewell:
                self._bury(statement, source=source)
            else:
                return self._accused(statement, source)
        return True

    def _accused(self, statement: SignedStatement, source: PeerId) -> bool:
        """Hear a suspicion newer than any that is on trial; False where it is passed on already.

        One that is not acted upon makes room for one that is, and never takes its place.
        """
        told = self._suspects.get(statement.key)
        if told is not None and told.envelope == statement.envelope:
            return False
        if self._may_accuse(statement):
            counts = self._accusers.take(statement.signer, now_s=trio.current_time())
            is_first = told is None or told.version < statement.version
            if counts or (is_first and statement.key not in self._trials):
                self._suspect(statement, source=source, counts=counts)
        return True

    def refuted(self, record: SignedAnnouncement) -> bool:
        """A newer announcement came: what was said of an older one is over; return if it was."""
        if (probe := self._probes.get(record.peer)) is not None:
            probe.is_alive = True
        self._lost.pop(record.peer, None)
        suspect = self._suspects.get(record.key)
        if suspect is None:
            return False
        if suspect.version < record.version:
            self._release(record.key)
            return True
        trial = self._trials.get(record.key)
        if trial is not None and trial.statement.version < record.version:
            # It answered an older one: it has its time for this one, of which it may not know yet.
            self._try(suspect)
            self._spreading.spread(suspect, source=None, is_urgent=True)
        return False

    def _may_accuse(self, statement: SignedStatement) -> bool:
        """Whether a suspicion is one of a member, about a number there may be, and to be passed on.

        More of one accuser are passed on than are acted upon. Else the ones that this node acts on
        might be others than its neighbours let through to their victims.
        """
        table = self._spreading.table
        accuser = table.get(record_key(statement.network_id, statement.signer))
        if accuser is None or isinstance(accuser, SignedRevocation):
            return False
        if not self._is_plausible(statement):
            return False
        if statement.key not in self._suspects and len(self._suspects) >= SUSPECTS_MAX:
            return False
        return self._passed.take(statement.signer, now_s=trio.current_time())

    def _is_plausible(self, statement: SignedStatement, *, skew_s: float = 0.0) -> bool:
        stored = self._spreading.table.get(statement.key)
        known_seq = stored.announcement.seq if isinstance(stored, SignedAnnouncement) else 0
        wall_s = self._environment.wall_time()
        return is_plausible(statement.seq, known_seq=known_seq, wall_s=wall_s + skew_s)

    def _suspect(
        self, statement: SignedStatement, *, source: PeerId | None, counts: bool = True
    ) -> None:
        """Pass a suspicion on, and judge it in five seconds; it is nothing where it counts not."""
        self._suspects[statement.key] = statement
        self._spreading.spread(statement, source=source, is_urgent=True)
        if not counts:
            self._spreading.agenda.after(SUSPICION_S, partial(self._acquit, statement))
            return
        if statement.key not in self._trials:
            # A newer number gives the suspect no more time: a liar could name one after the other.
            self._try(statement)
        self._look_around()

    def _try(self, statement: SignedStatement) -> None:
        trial = self._trials[statement.key] = _Trial(statement, trio.current_time())
        self._spreading.agenda.after(SUSPICION_S, partial(self._judge_suspect, trial))

    def _judge_suspect(self, trial: _Trial) -> None:
        """Bury a suspect that did not refute; wait where this node itself hears it."""
        key, now_s = trial.statement.key, trio.current_time()
        if self._trials.get(key) is not trial:
            return
        is_heard = self._is_heard(trial.statement.peer, since_s=now_s - SILENCE_S)
        if is_heard and now_s - trial.since_s < HEARD_SINCE_S_MAX:
            judge = partial(self._judge_suspect, trial)
            self._spreading.agenda.after(CHECK_INTERVAL_S, judge)
            return
        newest = self._suspects.get(key, trial.statement)
        self._release(key)
        if not is_heard:
            self._bury(newest, source=None)

    def _acquit(self, statement: SignedStatement) -> None:
        """Forget a suspicion that is not to be acted upon."""
        if self._suspects.get(statement.key) is statement and statement.key not in self._trials:
            del self._suspects[statement.key]

    def _release(self, key: bytes) -> None:
        self._suspects.pop(key, None)
        self._trials.pop(key, None)

    def _bury(self, statement: SignedStatement, *, source: PeerId | None) -> None:
        """Take a member out of the view; the statement stays in its place."""
        table = self._spreading.table
        stored = table.get(statement.key)
        if not isinstance(stored, SignedAnnouncement) or stored.version >= statement.version:
            return  # It was revoked or forgotten meanwhile: there is nothing to end.
        if not table.add(statement):
            table.remove(stored)
        self._release(statement.key)
        if statement.is_farewell:
            self._spreading.spread(statement, source=source)
        logger.info("swim.gone", extra={"peer": statement.peer})
        self._on_gone(stored)

    def _look_around(self) -> None:
        """Look at some member that is no neighbour: where one fell silent others may have."""
        self._alarm_s = trio.current_time()
        table, links = self._spreading.table, self._spreading.links
        draw = self._environment.random
        if draw.random() * max(1, table.announcement_count) > AFTERMATH_CHECKS:
            return
        known = {*links, self._identity.peer_id}
        others = [
            item.peer
            for item in table.announced()
            if item.peer not in known and self._is_unsuspected(item)
        ]
        if others:
            self._reach(others[draw.randrange(len(others))])

    # What is known --------------------------------------------------------------------

    def _is_unsuspected(self, record: SignedAnnouncement) -> bool:
        """Whether no suspicion of an announcement is going round already."""
        suspect = self._suspects.get(record.key) if record.key in self._trials else None
        return suspect is None or suspect.seq < record.announcement.seq

    def _records(self, peer: PeerId) -> list[SignedAnnouncement]:
        """A member's announcements, one for each network in common."""
        found = (
            self._spreading.table.get(record_key(network_id, peer))
            for network_id in self._trust.own_memberships()
        )
        return [record for record in found if isinstance(record, SignedAnnouncement)]

    def _is_heard(self, peer: PeerId, *, since_s: float) -> bool:
        """Whether this node itself heard from a member lately."""
        link = self._spreading.links.get(peer)
        connection = link.connection if link is not None else None
        return connection is not None and connection.heard_s > since_s
