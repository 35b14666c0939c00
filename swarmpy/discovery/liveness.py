"""Liveness: who is alive, as SWIM finds it out among a bounded set of neighbours.

A neighbour that falls silent is probed, by this node and by three others; where nobody reaches it a
signed suspicion goes round, and whoever is suspected has five seconds to announce itself anew. What
others claim is a suspicion here and no more, and of a member this node hears itself it is nothing.
Spec: protocols/swim.md.
"""

from __future__ import annotations

import logging
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
from swarmpy.identity import Identity, PeerId, parse_peer_id
from swarmpy.proto.announce import Alive, Probe, SignedAnnouncement
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
"""Between two looks at when each neighbour was heard last."""

ACCUSE_JITTER_S = 0.5
"""A member's neighbours find it dead at the same moment; whoever speaks first spares the others."""

HEARD_SINCE_S_MAX = 60.0
"""A suspect that this node hears itself is kept for so long without a refutation."""

SUSPECTS_MAX = 2 * RECORDS_MAX
"""Members suspected at a time, each for five seconds."""

PASSED_MAX = 1024
PASSED_PER_S = 10.0
"""Suspicions of one accuser that are passed on, at once and in the long run."""

ASKED_MAX = 64
ASKED_PER_S = 1.0
"""Probes that one member may ask of this node: it has 16 neighbours, and all may fall silent."""

ASKERS_MAX = 16
PROBES_MAX = 256
"""Members probed for others at a time, and who waits for the answer about one."""

AFTERMATH_CHECKS = 8.0
"""Looks at random members, by the whole network together, for each member that is found dead: a cut
takes many, and some have no neighbour on this side who would miss them."""

AFTERMATH_S = 60.0
"""For so long after a death a member that cannot be dialled is a suspect; at rest it may merely be
behind a router that lets nobody in."""


@dataclass(slots=True)
class _Probe:
    """A member of whom this node wants to know whether it lives."""

    started_s: float
    helpers: frozenset[PeerId]
    is_alive: bool = False


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
            reach: Dial a member, if it may be dialled; `reached` or `unreached` is called then.
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
        self._suspects = spreading.suspicions
        self._accusers = Budgets(count_max=ACCUSATIONS_MAX, per_s=1 / ACCUSATION_INTERVAL_S)
        self._passed = Budgets(count_max=PASSED_MAX, per_s=PASSED_PER_S)
        self._askers = Budgets(count_max=ASKED_MAX, per_s=ASKED_PER_S)
        self._death_s = -AFTERMATH_S

    # Probing --------------------------------------------------------------------------

    def run(self) -> None:
        """Look at the neighbours now and from then on, by the agenda."""
        silent_s = trio.current_time() - SILENCE_S
        for link in list(self._spreading.links.values()):
            connection = link.connection
            if connection is not None and connection.heard_s < silent_s:
                self.probe(link.peer)
            link.check(connection)
        self._spreading.agenda.after(CHECK_INTERVAL_S, self.run)

    def lost(self, peer: PeerId) -> None:
        """The connection to a member broke, and nobody said that it would."""
        self._reach(peer)
        self.probe(peer)

    def probe(self, peer: PeerId) -> None:
        """Find out whether a member lives, and accuse it if nobody can tell."""
        if peer in self._probes or peer == self._identity.peer_id or not self._records(peer):
            return
        links = self._spreading.links
        others = [other for other in sorted(links) if other != peer]
        helpers = self._environment.random.sample(others, min(HELPERS, len(others)))
        self._probes[peer] = _Probe(trio.current_time(), frozenset((*helpers, peer)))
        for asked in (peer, *helpers):
            if (link := links.get(asked)) is not None:
                link.say(Probe(peer=peer))
        delay_s = PROBE_TIMEOUT_S + ACCUSE_JITTER_S * self._environment.random.random()
        self._spreading.agenda.after(delay_s, partial(self._judge_probe, peer))

    def reached(self, peer: PeerId) -> None:
        """A member was dialled with success, or dialled this node: it lives."""
        if (probe := self._probes.get(peer)) is not None:
            probe.is_alive = True
        self._answer_askers(peer)

    def unreached(self, peer: PeerId) -> None:
        """A member could not be dialled."""
        if trio.current_time() - self._death_s < AFTERMATH_S:
            self.probe(peer)

    def asked(self, message: Probe, asker: PeerId) -> None:
        """A member asks whether another, or this node, lives.

        Raises:
            BadMessage: It asks for no peer.
        """
        peer = parse_peer_id(message.peer)
        link = self._spreading.links.get(asker)
        if link is None:
            return
        if peer == self._identity.peer_id:
            link.say(Alive(peer=peer))
            return
        now_s = trio.current_time()
        if not self._records(peer) or not self._askers.take(asker, now_s=now_s):
            return
        if len(self._relayed) >= PROBES_MAX and peer not in self._relayed:
            return
        relayed = self._relayed.setdefault(peer, _Relayed())
        if len(relayed.askers) < ASKERS_MAX:
            relayed.askers[asker] = now_s
        self._spreading.agenda.after(PROBE_TIMEOUT_S, partial(self._stop_relaying, peer))
        known = self._spreading.links.get(peer)
        if known is not None and known.connection is not None:
            known.say(Probe(peer=peer))
        else:
            self._reach(peer)

    def alive(self, message: Alive, teller: PeerId) -> None:
        """A member says that it, or another, lives.

        Raises:
            BadMessage: It names no peer.
        """
        peer = parse_peer_id(message.peer)
        probe = self._probes.get(peer)
        if probe is not None and teller in probe.helpers:
            probe.is_alive = True
        if peer == teller:
            self._answer_askers(peer)

    def _stop_relaying(self, peer: PeerId) -> None:
        self._relayed.pop(peer, None)

    def _answer_askers(self, peer: PeerId) -> None:
        relayed = self._relayed.pop(peer, None)
        for asker in relayed.askers if relayed is not None else ():
            if (link := self._spreading.links.get(asker)) is not None:
                link.say(Alive(peer=peer))

    def _judge_probe(self, peer: PeerId) -> None:
        probe = self._probes.pop(peer)
        if not self._spreading.links:
            return  # Nobody could confirm it, or hear of it: it is this node that is cut off.
        if not probe.is_alive and not self._is_heard(peer, since_s=probe.started_s):
            self._accuse(peer)

    def _accuse(self, peer: PeerId) -> None:
        """Say that a member is gone, unless somebody else did."""
        wall_s = self._environment.wall_time()
        for record in self._records(peer):
            seq = record.announcement.seq
            suspect = self._suspects.get(record.key)
            if suspect is not None and suspect.seq >= seq:
                continue
            sealed = seal_statement(
                self._identity,
                network_id=record.network_id,
                accused=peer,
                seq=seq,
                wall_s=wall_s,
            )
            logger.info("swim.suspected", extra={"peer": peer})
            self._suspect(open_statement(sealed, wall_s=wall_s), source=None)

    # Statements -----------------------------------------------------------------------

    def stated(self, statement: SignedStatement, source: PeerId) -> bool:
        """Hear a verified statement of a network in common; False where it was known already."""
        if statement.peer == self._identity.peer_id:
            if self._is_plausible(statement):
                self._refute(statement.seq)
            return True
        if statement.version <= self._spreading.table.version(statement.key):
            return False
        if statement.is_farewell:
            self._bury(statement, source=source)
            return True
        suspect = self._suspects.get(statement.key)
        if suspect is not None and suspect.seq >= statement.seq:
            return False
        if self._may_accuse(statement):
            now_s = trio.current_time()
            counts = self._accusers.take(statement.signer, now_s=now_s)
            self._suspect(statement, source=source, counts=counts)
        return True

    def refuted(self, record: SignedAnnouncement) -> bool:
        """A newer announcement came: what was said of an older one is over; return if it was."""
        if (probe := self._probes.get(record.peer)) is not None:
            probe.is_alive = True
        suspect = self._suspects.get(record.key)
        if suspect is None or suspect.version > record.version:
            return False
        del self._suspects[record.key]
        return True

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
        if len(self._suspects) >= SUSPECTS_MAX:
            return False
        return self._passed.take(statement.signer, now_s=trio.current_time())

    def _is_plausible(self, statement: SignedStatement) -> bool:
        stored = self._spreading.table.get(statement.key)
        known_seq = stored.announcement.seq if isinstance(stored, SignedAnnouncement) else 0
        wall_s = self._environment.wall_time()
        return is_plausible(statement.seq, known_seq=known_seq, wall_s=wall_s)

    def _suspect(
        self, statement: SignedStatement, *, source: PeerId | None, counts: bool = True
    ) -> None:
        """Pass a suspicion on, and judge it in five seconds; it is nothing where it counts not."""
        self._suspects[statement.key] = statement
        self._spreading.spread(statement, source=source, is_urgent=True)
        judge = partial(
            self._judge_suspect if counts else self._acquit, statement, trio.current_time()
        )
        self._spreading.agenda.after(SUSPICION_S, judge)

    def _judge_suspect(self, statement: SignedStatement, since_s: float) -> None:
        """Bury a suspect that did not refute; wait where this node itself hears it."""
        if self._suspects.get(statement.key) is not statement:
            return
        is_waiting = trio.current_time() - since_s < HEARD_SINCE_S_MAX
        if self._is_heard(statement.peer, since_s=trio.current_time() - SILENCE_S):
            if is_waiting:
                judge = partial(self._judge_suspect, statement, since_s)
                self._spreading.agenda.after(CHECK_INTERVAL_S, judge)
            else:
                del self._suspects[statement.key]
            return
        del self._suspects[statement.key]
        self._bury(statement, source=None)

    def _acquit(self, statement: SignedStatement, _: float) -> None:
        """Forget a suspicion that is not to be acted upon."""
        if self._suspects.get(statement.key) is statement:
            del self._suspects[statement.key]

    def _bury(self, statement: SignedStatement, *, source: PeerId | None) -> None:
        """Take a member out of the view; the statement stays in its place."""
        table = self._spreading.table
        stored = table.get(statement.key)
        if stored is not None and stored.version >= statement.version:
            return
        if not table.add(statement) and stored is not None:
            table.remove(stored)
        self._suspects.pop(statement.key, None)
        if statement.is_farewell:
            self._spreading.spread(statement, source=source)
        if isinstance(stored, SignedAnnouncement):
            logger.info("swim.gone", extra={"peer": statement.peer})
            self._on_gone(stored)
            if not statement.is_farewell:
                self._look_around()

    def _look_around(self) -> None:
        """After a death look at some member that is no neighbour: some node looks at each."""
        self._death_s = trio.current_time()
        table, links = self._spreading.table, self._spreading.links
        draw = self._environment.random
        if draw.random() * max(1, table.announcement_count) > AFTERMATH_CHECKS:
            return
        known = {*links, self._identity.peer_id}
        others = [item.peer for item in table.announced() if item.peer not in known]
        if others:
            self._reach(others[draw.randrange(len(others))])

    # What is known --------------------------------------------------------------------

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
