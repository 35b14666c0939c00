"""Planner: which peer runs which layers, as a pure function of what was announced.

Route, don't split: a peer that can hold the whole model gets it. Else as few stages as fit, in
contiguous ranges whose times are as equal as memory, measured speed and the allowed cuts permit.
Shards that are loaded already are used as they are, and files that are there before any is fetched.
Spec: protocols/pipeline.md, section "Planning".
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from swarmpy.abc import Inspection
from swarmpy.config import PREFILL_CHUNK, STAGES_MAX
from swarmpy.errors import NoPipeline
from swarmpy.identity import PeerId
from swarmpy.pipeline.fit import FitTerms, fit, format_bytes, passed_bytes
from swarmpy.proto.tensor import TensorSpec

SPEED_UNKNOWN_BYTES_S = 4e9
"""Assumed for a peer that has not measured itself: weight bytes a second of two slow cores."""

RTT_UNKNOWN_S = 0.001
"""Assumed between two peers that have not measured each other."""

HOP_S = 0.0005
"""What a hop costs besides the round trip: encryption, scheduling and the engine's pipe."""

PREFILL_SPEEDUP = 10.0
"""How much faster a token passes in a 64-token chunk than alone (measured: 16 at best)."""

SLACK = 1.05
"""Plans whose slowest stage is this close to the fastest count as equal: nearness decides."""

PEERS_EXACT_MAX = 10
"""Peers among which every subset and order is searched; beyond it the ones with most memory."""

ENGINES_MAX = 4
"""Different engines that one plan considers: every group of them that agrees is searched."""

ORDERS_MAX = 1000
"""Orders that are balanced one by one; beyond it those of the first feasible subset alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a peer offers."""

    peer: PeerId
    name: str
    memory_bytes: int
    """For shards, in all; what it holds for this model now is part of it."""
    speed_bytes_s: float = 0.0
    """Weight bytes its engine passes over a second in decode; 0 if never measured."""
    rtt_s: Mapping[PeerId, float] = field(default_factory=dict)
    """Measured round trips to other peers."""
    holds_model: bool = True
    """Whether the model is listed there."""
    files: tuple[tuple[int, int], ...] | None = None
    """Ranges of layers whose files it has; None: of all."""
    fetches: bool = False
    """Whether it fetches the files that it lacks of layers it is to load."""
    engine: str = ""
    """The engine that runs the model there; "" where it has not told yet."""
    shards: tuple[tuple[int, int], ...] = ()
    """Ranges of this model it has loaded with the same slots, context and exactness."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage of a plan."""

    peer: PeerId
    name: str
    start: int
    end: int
    terms: FitTerms
    seconds: float
    """Predicted time of one token in this stage."""
    received: tuple[TensorSpec, ...] = ()
    sent: tuple[TensorSpec, ...] = ()
    """The tensors between this stage and its neighbours; none at the ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who runs what, and how fast it should be."""

    stages: tuple[StagePlan, ...]
    inspection: Inspection
    """What the first stage's engine knows of the model; all stages' engines agree on its shape."""
    slots: int
    context: int
    """Tokens of a slot: as many as were asked for, or as every stage's engine can."""
    tok_s: float
    """Predicted tokens a second of one session."""
    ttft_s: float
    """Predicted seconds to the first token of a prompt of one chunk."""

    @property
    def cuts(self) -> tuple[int, ...]:
        return (*(stage.start for stage in self.stages), self.stages[-1].end)

    @property
    def ring(self) -> tuple[PeerId, ...]:
        return tuple(stage.peer for stage in self.stages)


def plan(
    inspections: Sequence[Inspection],
    capacities: Sequence[Capacity],
    *,
    slots: int,
    context: int,
    coordinator: PeerId | None = None,
) -> Plan:
    """Lay the model's layers out over the peers.

    Args:
        inspections: What each engine knows of the model. Peers whose engine has not told are taken
            to run the first; those whose engine is not among them cannot take part.
        capacities: Members that may take part, the coordinator's own among them.
        coordinator: Preferred as the only stage, else as the first: the prompt stays at home and a
            token costs one hop less.

    Returns:
        The plan; equal input gives an equal plan, whatever the order of `capacities`.

    Raises:
        NoPipeline: Says how many bytes are missing and what each peer offered.
    """
    asked = sorted(capacities, key=lambda capacity: capacity.peer)
    mixes = mixes_of(inspections)
    searches = [_Search(mix, slots, context, coordinator) for mix in mixes]
    no_fetching = [replace(capacity, fetches=False) for capacity in asked]
    ways = [(_Search.loaded, asked), (_Search.best, no_fetching), (_Search.best, asked)]
    for way, peers in ways:
        found = [layout for search in searches if (layout := way(search, peers)) is not None]
        if found:
            return min(
                found,
                key=lambda plan: (len(plan.stages), plan.ring[0] != coordinator, -plan.tok_s),
            )
    # The reason that is told is of as many as could take part together.
    most = max(zip(mixes, searches, strict=True), key=lambda pair: len(pair[0].engines))
    raise NoPipeline(most[1].refusal(asked))


@dataclass(frozen=True, slots=True)
class Mix:
    """Engines that can be stages of one ring, and where."""

    engines: Mapping[str, Inspection]
    cuts: tuple[int, ...]
    """At which each of them hands on what all others take."""
    unknown: str
    """The engine that peers are taken to have who have not told."""

    @property
    def layer_count(self) -> int:
        return next(iter(self.engines.values())).layer_count

    def inspection(self, peer: Capacity) -> Inspection | None:
        """What a peer's engine knows of the model; None where it is not of this mix."""
        return self.engines.get(peer.engine or self.unknown)


def mixes_of(inspections: Sequence[Inspection]) -> list[Mix]:
    """Return each engine alone, each two that agree, and so on; the smallest first.

    Engines agree where they see the same layers, width and vocabulary, need token ids in the same
    layers, and hand on the same tensors. A ring is planned in the mix of just the engines it has,
    so that no other's limits are its own.
    """
    known = inspections[:ENGINES_MAX]
    mixes = []
    for size in range(1, len(known) + 1):
        for group in itertools.combinations(known, size):
            cuts = _common_cuts(group)
            if size == 1 or (cuts and len(set(map(_shape, group))) == 1):
                engines = {item.engine: item for item in group}
                mixes.append(Mix(engines, cuts, unknown=inspections[0].engine))
    return mixes


def _common_cuts(group: Sequence[Inspection]) -> tuple[int, ...]:
    first, *others = group
    return tuple(
        cut
        for cut in sorted(set(first.cuts).intersection(*(item.cuts for item in others)))
        if all(item.wire_specs[cut] == first.wire_specs[cut] for item in others)
    )


def _shape(inspection: Inspection) -> tuple[object, ...]:
    """What engines must agree on to be stages of one ring."""
    return (
        inspection.layer_count,
        inspection.hidden_size,
        inspection.vocabulary_size,
        inspection.token_layers,
    )


def _speed(peer: Capacity) -> float:
    return peer.speed_bytes_s if peer.speed_bytes_s > 0 else SPEED_UNKNOWN_BYTES_S


class _Search:
    """The terms and times of all ranges of one model, and the search over orders of peers."""

    def __init__(self, mix: Mix, slots: int, context: int, coordinator: PeerId | None) -> None:
        self._mix = mix
        self._slots = min(slots, *(item.slots_max for item in mix.engines.values()))
        self._context = min(context, *(item.context_max for item in mix.engines.values()))
        self._coordinator = coordinator
        self._count = mix.layer_count
        self._ends = [*mix.cuts, self._count]
        self._terms: dict[tuple[str, int, int], FitTerms] = {}
        self._passed: dict[tuple[str, int, int], float] = {}

    def best(self, asked: Sequence[Capacity]) -> Plan | None:
        """The best plan, None where these peers cannot hold the model."""
        peers = self._able(asked)
        whole = [peer for peer in peers if self.fits(peer, 0, self._count)]
        if whole:
            best = min(
                whole,
                key=lambda peer: (peer.peer != self._coordinator, -_speed(peer), peer.peer),
            )
            return self.build([best], [0, self._count])
        return self.split(peers)

    def _able(self, asked: Sequence[Capacity]) -> list[Capacity]:
        """Those that have the model, and an engine of this mix."""
        return [peer for peer in asked if peer.holds_model and self._mix.inspection(peer)]

    def _of(self, peer: Capacity) -> Inspection:
        inspection = self._mix.inspection(peer)
        assert inspection is not None, peer
        return inspection

    def terms(self, peer: Capacity, start: int, end: int) -> FitTerms:
        key = (peer.engine, start, end)
        if key not in self._terms:
            self._terms[key] = fit(
                self._of(peer), start, end, slots=self._slots, context=self._context
            )
        return self._terms[key]

    def fits(self, peer: Capacity, start: int, end: int) -> bool:
        if not _has_files(peer, start, end):
            return False
        return self.terms(peer, start, end).sum_bytes <= peer.memory_bytes

    def seconds(self, peer: Capacity, start: int, end: int) -> float:
        """Predicted time of one token in layers [start, end) on a peer."""
        key = (peer.engine, start, end)
        if key not in self._passed:
            self._passed[key] = passed_bytes(self._of(peer), start, end)
        return self._passed[key] / _speed(peer)

    def reach(self, peer: Capacity, start: int, seconds_max: float) -> int:
        """The furthest end a peer can take from `start` on; `start` if not even one range fits.

        What a range needs only grows with it, so that the furthest end is found by halving.
        """
        low = first = bisect_right(self._ends, start)
        high = len(self._ends)
        while low < high:
            middle = (low + high) // 2
            end = self._ends[middle]
            if self.fits(peer, start, end) and self.seconds(peer, start, end) <= seconds_max:
                low = middle + 1
            else:
                high = middle
        return self._ends[low - 1] if low > first else start

    def loaded(self, asked: Sequence[Capacity]) -> Plan | None:
        """The fewest loaded shards that make up the whole model, each on a peer of its own."""
        shards = sorted(
            (start, -end, peer.peer != self._coordinator, peer.peer, peer)
            for peer in self._able(asked)
            for start, end in peer.shards
            if end in self._ends
        )
        paths: dict[int, list[tuple[Capacity, int]]] = {0: []}
        for start, minus_end, _, _, peer in shards:
            if start not in paths or any(peer is other for other, _ in paths[start]):
                continue
            path = [*paths[start], (peer, -minus_end)]
            if -minus_end not in paths or len(path) < len(paths[-minus_end]):
                paths[-minus_end] = path
        found = paths.get(self._count)
        if not found or len(found) > STAGES_MAX:
            return None
        return self.build([peer for peer, _ in found], [0, *(end for _, end in found)])

    def split(self, peers: Sequence[Capacity]) -> Plan | None:
        """The best plan of as few stages as possible, None if the model fits nowhere."""
        fattest = sorted(peers, key=lambda peer: (-peer.memory_bytes, peer.peer))
        feasible = self._fewest(fattest[:PEERS_EXACT_MAX])
        if feasible is None:
            greedy = self._greedy(fattest)
            return None if greedy is None else self.build(*greedy)
        size = len(feasible)
        among = sorted(fattest[:PEERS_EXACT_MAX], key=lambda peer: peer.peer)
        if math.perm(len(among), size) > ORDERS_MAX:
            among = sorted(feasible, key=lambda peer: peer.peer)
        orders: Iterator[Sequence[Capacity]] = itertools.permutations(among, size)
        if math.perm(len(among), size) > ORDERS_MAX:
            orders = iter([feasible])
        return self._best(orders)

    def _fewest(self, peers: Sequence[Capacity]) -> Sequence[Capacity] | None:
        """A smallest set of peers, in a feasible order: how far each subset reaches, by size.

        Exact: whatever order reaches further leaves less for the rest.
        """
        reached: dict[int, tuple[int, list[Capacity]]] = {0: (0, [])}
        for _ in peers:
            further: dict[int, tuple[int, list[Capacity]]] = {}
            for mask, (start, order) in reached.items():
                for index, peer in enumerate(peers):
                    bit = 1 << index
                    if mask & bit:
                        continue
                    end = self.reach(peer, start, math.inf)
                    if end == self._count:
                        return [*order, peer]
                    if end > start and further.get(mask | bit, (0, []))[0] < end:
                        further[mask | bit] = (end, [*order, peer])
            reached = further
        return None

    def _greedy(self, peers: Sequence[Capacity]) -> tuple[list[Capacity], list[int]] | None:
        """Give each stretch to whoever reaches furthest, for swarms too large to search."""
        left, cuts = list(peers), [0]
        order: list[Capacity] = []
        while left and len(order) < STAGES_MAX:
            start = cuts[-1]
            furthest = max(left, key=lambda peer: self.reach(peer, start, math.inf))
            end = self.reach(furthest, start, math.inf)
            if end == start:
                return None
            left.remove(furthest)
            order.append(furthest)
            cuts.append(end)
            if end == self._count:
                return order, cuts
        return None

    def _best(self, orders: Iterator[Sequence[Capacity]]) -> Plan | None:
        """Balance each order; among those nearly as fast as the fastest, the first by `_rank`."""
        balanced = []
        for order in orders:
            cuts = self.balance(order)
            if cuts is not None:
                balanced.append((self.slowest(order, cuts), order, cuts))
        if not balanced:
            return None
        limit = min(slowest for slowest, _, _ in balanced) * SLACK
        _, order, cuts = min(
            (entry for entry in balanced if entry[0] <= limit),
            key=lambda entry: self._rank(*entry),
        )
        return self.build(order, cuts)

    def _rank(
        self, slowest: float, order: Sequence[Capacity], cuts: Sequence[int]
    ) -> tuple[object, ...]:
        names = [peer.peer for peer in order]
        at_home = names.index(self._coordinator) if self._coordinator in names else len(names)
        return (at_home, round(_ring_s(order), 6), slowest, names, tuple(cuts))

    def slowest(self, order: Sequence[Capacity], cuts: Sequence[int]) -> float:
        """The time of the slowest stage."""
        ranges = itertools.pairwise(cuts)
        return max(self.seconds(peer, *pair) for peer, pair in zip(order, ranges, strict=True))

    def balance(self, order: Sequence[Capacity]) -> list[int] | None:
        """The cuts that make the slowest stage of this order as fast as possible, None if none fit.

        The answer is the time of some range on some peer: those times are searched by halving.
        """
        best = self._cut(order, math.inf)
        if best is None:
            return None
        starts = [0, *self._ends[:-1]]
        times = sorted(
            {
                self.seconds(peer, start, end)
                for peer in order
                for start in starts
                for end in self._ends
                if start < end
            }
        )
        low, high = 0, len(times)
        while low < high:
            middle = (low + high) // 2
            cuts = self._cut(order, times[middle])
            if cuts is None:
                low = middle + 1
            else:
                best, high = cuts, middle
        return best

    def _cut(self, order: Sequence[Capacity], seconds_max: float) -> list[int] | None:
        """Cut so that every stage fits and takes at most `seconds_max`."""
        cuts = [0]
        for index, peer in enumerate(order):
            # One range must be left for each stage that follows.
            furthest = len(self._ends) - (len(order) - index)
            if furthest < 0:
                return None
            end = min(self.reach(peer, cuts[-1], seconds_max), self._ends[furthest])
            if end <= cuts[-1]:
                return None
            cuts.append(end)
        return cuts if cuts[-1] == self._count else None

    def refusal(self, asked: Sequence[Capacity]) -> str:
        """Say how many bytes are missing, and who was asked for them.

        Missing is what the layers need that are left over when every peer takes all it can.
        """
        start, left = 0, self._able(asked)
        while left and (end := max(self.reach(peer, start, math.inf) for peer in left)) > start:
            left.remove(next(it for it in left if self.reach(it, start, math.inf) == end))
            start = end
        engine = next(iter(self._mix.engines))
        any_peer = Capacity(peer=PeerId(""), name="", memory_bytes=0, engine=engine)
        missing = self.terms(any_peer, start, self._count).sum_bytes
        who = ", ".join(self._offer(peer) for peer in asked)
        who = who or "nobody: no peer with an engine is connected, or is left"
        return (
            f"the model needs {self.terms(any_peer, 0, self._count)}; {missing} bytes "
            f"({format_bytes(missing)}) are missing, for layers {start}-{self._count - 1}; "
            f"asked: {who}"
        )

    def _offer(self, peer: Capacity) -> str:
        """What a peer was asked for and has, in words."""
        if not peer.holds_model:
            return f"{peer.name} does not have the model"
        if self._mix.inspection(peer) is None:
            return f"{peer.name} runs it with {peer.engine}, of which nobody said what it needs"
        offer = f"{peer.name} offers {format_bytes(peer.memory_bytes)}"
        if peer.files is None or peer.fetches:
            return offer
        has = ", ".join(f"{start}-{end - 1}" for start, end in peer.files) or "none"
        return f"{offer} and has the files of layers {has}"

    def build(self, order: Sequence[Capacity], cuts: Sequence[int]) -> Plan:
        """Describe a layout and predict its speed."""
        stages = tuple(
            StagePlan(
                peer=peer.peer,
                name=peer.name,
                start=start,
                end=end,
                terms=self.terms(peer, start, end),
                seconds=self.seconds(peer, start, end),
                received=tuple(self._of(peer).wire_specs[start]) if start else (),
                sent=tuple(self._of(peer).wire_specs[end]) if end < self._count else (),
            )
            for peer, (start, end) in zip(order, itertools.pairwise(cuts), strict=True)
        )
        hops_s = _ring_s(order)
        if self._coordinator is not None and stages[0].peer != self._coordinator:
            away_s = hops_s + RTT_UNKNOWN_S
        else:
            away_s = hops_s
        compute_s = sum(stage.seconds for stage in stages)
        return Plan(
            stages=stages,
            inspection=self._of(order[0]),
            slots=self._slots,
            context=self._context,
            tok_s=1 / max(compute_s + hops_s, 1e-9),
            ttft_s=compute_s * PREFILL_CHUNK / PREFILL_SPEEDUP + away_s,
        )


def _has_files(peer: Capacity, start: int, end: int) -> bool:
    """Whether a peer has, or fetches, the files of layers [start, end)."""
    if peer.files is None or peer.fetches:
        return True
    return any(first <= start and end <= last for first, last in peer.files)


def _ring_s(order: Sequence[Capacity]) -> float:
    """Seconds a token spends between stages: half a round trip and the hop's own cost, each."""
    if len(order) == 1:
        return 0.0
    total = 0.0
    for left, right in zip(order, [*order[1:], order[0]], strict=True):
        measured = left.rtt_s.get(right.peer, right.rtt_s.get(left.peer, RTT_UNKNOWN_S))
        total += measured / 2 + HOP_S
    return total
