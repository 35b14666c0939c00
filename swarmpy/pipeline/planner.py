"""Planner: which peer runs which layers, as a pure function of what was announced.

Route, don't split: a peer that can hold the whole model gets it. Else as few stages as fit, in
contiguous ranges whose times are as equal as memory, measured speed and the allowed cuts permit.
Shards that are loaded already are used as they are.
Spec: protocols/pipeline.md, section "Planning".
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from swarmpy.abc import Inspection
from swarmpy.config import PREFILL_CHUNK, STAGES_MAX
from swarmpy.errors import NoPipeline
from swarmpy.identity import PeerId
from swarmpy.pipeline.fit import FitTerms, fit, format_bytes, passed_bytes

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
    """Whether it has the model's files."""
    engine: str = ""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who runs what, and how fast it should be."""

    stages: tuple[StagePlan, ...]
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
    inspection: Inspection,
    capacities: Sequence[Capacity],
    *,
    slots: int,
    context: int,
    coordinator: PeerId | None = None,
) -> Plan:
    """Lay the model's layers out over the peers.

    Args:
        capacities: Members that may take part, the coordinator's own among them.
        coordinator: Preferred as the only stage, else as the first: the prompt stays at home and a
            token costs one hop less.

    Returns:
        The plan; equal input gives an equal plan, whatever the order of `capacities`.

    Raises:
        NoPipeline: Says how many bytes are missing and what each peer offered.
    """
    asked = sorted(capacities, key=lambda capacity: capacity.peer)
    search = _Search(inspection, slots, context, coordinator)
    peers = [capacity for capacity in asked if capacity.holds_model]
    loaded = search.loaded(peers)
    if loaded is not None:
        return loaded
    whole = [peer for peer in peers if search.fits(peer, 0, inspection.layer_count)]
    if whole:
        best = min(whole, key=lambda peer: (peer.peer != coordinator, -_speed(peer), peer.peer))
        return search.build([best], [0, inspection.layer_count])
    split = search.split(peers)
    if split is None:
        raise NoPipeline(search.refusal(asked))
    return split


def _speed(peer: Capacity) -> float:
    return peer.speed_bytes_s if peer.speed_bytes_s > 0 else SPEED_UNKNOWN_BYTES_S


class _Search:
    """The terms and times of all ranges of one model, and the search over orders of peers."""

    def __init__(
        self, inspection: Inspection, slots: int, context: int, coordinator: PeerId | None
    ) -> None:
        self._inspection = inspection
        self._slots = min(slots, inspection.slots_max)
        self._context = context
        self._coordinator = coordinator
        self._count = inspection.layer_count
        self._ends = [*sorted(set(inspection.cuts)), self._count]
        self._terms: dict[tuple[int, int], FitTerms] = {}
        self._passed: dict[tuple[int, int], float] = {}

    def terms(self, start: int, end: int) -> FitTerms:
        key = (start, end)
        if key not in self._terms:
            self._terms[key] = fit(
                self._inspection, start, end, slots=self._slots, context=self._context
            )
        return self._terms[key]

    def fits(self, peer: Capacity, start: int, end: int) -> bool:
        return self.terms(start, end).sum_bytes <= peer.memory_bytes

    def seconds(self, peer: Capacity, start: int, end: int) -> float:
        """Predicted time of one token in layers [start, end) on a peer."""
        key = (start, end)
        if key not in self._passed:
            self._passed[key] = passed_bytes(self._inspection, start, end)
        return self._passed[key] / _speed(peer)

    def reach(self, peer: Capacity, start: int, seconds_max: float) -> int:
        """The furthest end a peer can take from `start` on; `start` if not even one range fits.

        Memory and time only grow with the range, so that the furthest end is found by halving.
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

    def loaded(self, peers: Sequence[Capacity]) -> Plan | None:
        """The fewest loaded shards that make up the whole model, each on a peer of its own."""
        shards = sorted(
            (start, -end, peer.peer != self._coordinator, peer.peer, peer)
            for peer in peers
            for start, end in peer.shards
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
            greedy = self._greedy(fattest[:STAGES_MAX])
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
        """Fill peer after peer, for swarms too large to search."""
        order: list[Capacity] = []
        cuts = [0]
        for peer in peers:
            end = self.reach(peer, cuts[-1], math.inf)
            if end > cuts[-1]:
                order.append(peer)
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
        start = 0
        holders = [peer for peer in asked if peer.holds_model]
        for peer in sorted(holders, key=lambda peer: (-peer.memory_bytes, peer.peer)):
            start = self.reach(peer, start, math.inf)
        missing = self.terms(start, self._count).sum_bytes
        offers = [
            f"{peer.name} offers {format_bytes(peer.memory_bytes)}"
            if peer.holds_model
            else f"{peer.name} does not have the model"
            for peer in asked
        ]
        who = ", ".join(offers) or "nobody: no peer with an engine is connected, or is left"
        return (
            f"the model needs {self.terms(0, self._count)}; {missing} bytes "
            f"({format_bytes(missing)}) are missing, for layers {start}-{self._count - 1}; "
            f"asked: {who}"
        )

    def build(self, order: Sequence[Capacity], cuts: Sequence[int]) -> Plan:
        """Describe a layout and predict its speed."""
        stages = tuple(
            StagePlan(
                peer=peer.peer,
                name=peer.name,
                start=start,
                end=end,
                terms=self.terms(start, end),
                seconds=self.seconds(peer, start, end),
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
            tok_s=1 / max(compute_s + hops_s, 1e-9),
            ttft_s=compute_s * PREFILL_CHUNK / PREFILL_SPEEDUP + away_s,
        )


def _ring_s(order: Sequence[Capacity]) -> float:
    """Seconds a token spends between stages: half a round trip and the hop's own cost, each."""
    if len(order) == 1:
        return 0.0
    total = 0.0
    for left, right in zip(order, [*order[1:], order[0]], strict=True):
        measured = left.rtt_s.get(right.peer, right.rtt_s.get(left.peer, RTT_UNKNOWN_S))
        total += measured / 2 + HOP_S
    return total
