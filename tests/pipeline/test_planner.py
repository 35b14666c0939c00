"""Planner: what is feasible is planned, what is planned fits, equal input gives equal plans."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmpy.abc import Inspection
from swarmpy.errors import NoPipeline
from swarmpy.identity import PeerId
from swarmpy.pipeline.fit import fit, format_bytes
from swarmpy.pipeline.planner import Capacity, Plan, plan
from swarmpy.proto.tensor import TensorSpec
from swarmpy.testing.engine import EchoModel, inspection_of

SLOTS, CONTEXT = 2, 512
A, B, C, D = (PeerId(name) for name in "ABCD")


def small(**changes: object) -> Inspection:
    return inspection_of(EchoModel(layers=6, **changes))  # type: ignore[arg-type]


def need(inspection: Inspection, start: int, end: int) -> int:
    return fit(inspection, start, end, slots=SLOTS, context=CONTEXT).sum_bytes


def capacity(peer: PeerId, memory_bytes: int, **changes: object) -> Capacity:
    return Capacity(
        peer=peer,
        name=peer.lower(),
        memory_bytes=memory_bytes,
        **changes,  # type: ignore[arg-type]
    )


def lay_out(inspection: Inspection, peers: list[Capacity], coordinator: PeerId = A) -> Plan:
    return plan([inspection], peers, slots=SLOTS, context=CONTEXT, coordinator=coordinator)


def ranges(layout: Plan) -> list[tuple[str, int, int]]:
    return [(stage.peer, stage.start, stage.end) for stage in layout.stages]


def joined(layers: set[int]) -> tuple[tuple[int, int], ...]:
    """Layers as ranges that are in order and apart from each other."""
    starts = sorted(layer for layer in layers if layer - 1 not in layers)
    ends = sorted(layer + 1 for layer in layers if layer + 1 not in layers)
    return tuple(zip(starts, ends, strict=True))


PEERS = st.lists(
    st.tuples(st.floats(0, 1.3), st.floats(1e8, 1e11), st.booleans()), min_size=1, max_size=4
)
MODELS = st.builds(
    EchoModel,
    layers=st.integers(2, 6),
    layer_weight_bytes=st.integers(10**6, 3 * 10**8),
    embedding_weight_bytes=st.integers(0, 5 * 10**8),
    head_weight_bytes=st.integers(0, 5 * 10**8),
    is_tied=st.booleans(),
    head_cost_layers=st.floats(0, 8),
)


def swarm(inspection: Inspection, drawn: list[tuple[float, float, bool]]) -> list[Capacity]:
    whole = need(inspection, 0, inspection.layer_count)
    return [
        capacity(peer, int(share * whole), speed_bytes_s=speed, holds_model=holds_model)
        for peer, (share, speed, holds_model) in zip((A, B, C, D), drawn, strict=False)
    ]


def can_run(inspection: Inspection, peer: Capacity, start: int, end: int) -> bool:
    """Whether a peer has the files of layers, or fetches them, and room for them."""
    has = peer.files is None or any(low <= start and end <= high for low, high in peer.files)
    return (has or peer.fetches) and need(inspection, start, end) <= peer.memory_bytes


def is_feasible(inspections: dict[str, Inspection], peers: list[Capacity]) -> bool:
    """By trying every order and every cut that the engines in it share."""
    able = [peer for peer in peers if peer.holds_model]
    count = inspections["echo"].layer_count
    for size in range(1, len(able) + 1):
        for order in itertools.permutations(able, size):
            told = [inspections[peer.engine or "echo"] for peer in order]
            shared = set.intersection(*(set(item.cuts) for item in told))
            for inner in itertools.combinations(sorted(shared), size - 1):
                pairs = itertools.pairwise([0, *inner, count])
                stages = zip(told, order, pairs, strict=True)
                if all(can_run(item, peer, *pair) for item, peer, pair in stages):
                    return True
    return False


def mixed_swarm(draw: random.Random) -> tuple[dict[str, Inspection], list[Capacity]]:
    """Two engines that agree, the second with other weights and fewer cuts, and peers with files.

    Most of them make up the model together, and few alone.
    """
    layers = draw.randint(3, 6)
    model = EchoModel(
        layers=layers,
        layer_weight_bytes=draw.choice((10**8, 10**9)),
        is_tied=draw.random() < 0.5,
    )
    echo = inspection_of(model)
    other = replace(
        echo,
        engine="other",
        cuts=tuple(cut for cut in echo.cuts if draw.random() < 0.8),
        layer_weight_bytes=(int(model.layer_weight_bytes * draw.uniform(0.3, 2)),) * layers,
    )
    peers = []
    for peer in (A, B, C, D)[: draw.randint(2, 4)]:
        held = {layer for layer in range(layers) if draw.random() < 0.7}
        held |= set(range(draw.choice((0, layers // 2)), layers))
        peers.append(
            capacity(
                peer,
                int(need(echo, 0, layers) * draw.uniform(0.2, 1)),
                speed_bytes_s=draw.choice((1e9, 3e9, 1e10)),
                holds_model=draw.random() < 0.9,
                files=draw.choice((None, joined(held), joined({*range(layers // 2 + 1)}))),
                fetches=draw.random() < 0.3,
                engine=draw.choice(("", "echo", "other")),
            )
        )
    return {"echo": echo, "other": other}, peers


@settings(max_examples=300, deadline=None)
@given(model=MODELS, drawn=PEERS)
def test_any_plan_tiles_the_layers_and_fits_and_exists_where_one_can(
    model: EchoModel, drawn: list[tuple[float, float, bool]]
) -> None:
    inspections = {"echo": inspection_of(model)}
    check_plan(inspections, swarm(inspections["echo"], drawn))


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_plan_over_two_engines_and_peers_with_files_exists_where_one_can(seed: int) -> None:
    check_plan(*mixed_swarm(random.Random(seed)))


def check_plan(inspections: dict[str, Inspection], peers: list[Capacity]) -> None:
    """Plan, and check that the plan can be run, or that none could."""
    if not is_feasible(inspections, peers):
        with pytest.raises(NoPipeline):
            lay_out_mixed(list(inspections.values()), peers)
        return
    layout = lay_out_mixed(list(inspections.values()), peers)

    by_peer = {peer.peer: peer for peer in peers}
    count = inspections["echo"].layer_count
    assert layout.cuts[0] == 0
    assert layout.cuts[-1] == count
    assert all(stage.start < stage.end for stage in layout.stages)
    assert len(set(layout.ring)) == len(layout.ring)
    for stage, (start, end) in zip(layout.stages, itertools.pairwise(layout.cuts), strict=True):
        inspection = inspections[by_peer[stage.peer].engine or "echo"]
        assert (stage.start, stage.end) == (start, end)
        assert {start, end} <= {0, *inspection.cuts, count}
        assert need(inspection, start, end) == stage.terms.sum_bytes
        assert can_run(inspection, by_peer[stage.peer], start, end)


@settings(max_examples=100, deadline=None)
@given(model=MODELS, drawn=PEERS, seed=st.integers(0, 100))
def test_any_order_of_the_same_capacities_gives_the_same_plan(
    model: EchoModel, drawn: list[tuple[float, float, bool]], seed: int
) -> None:
    inspection = inspection_of(model)
    peers = swarm(inspection, drawn)
    shuffled = list(peers)
    random.Random(seed).shuffle(shuffled)
    if is_feasible({"echo": inspection}, peers):
        assert lay_out(inspection, peers) == lay_out(inspection, shuffled)


@settings(max_examples=100, deadline=None)
@given(model=MODELS, speeds=st.lists(st.floats(1e8, 1e11), min_size=3, max_size=3))
def test_any_balanced_plan_has_the_fastest_slowest_stage_within_the_slack(
    model: EchoModel, speeds: list[float]
) -> None:
    """Against every order and cut of three stages that fit."""
    inspection = inspection_of(model)
    if model.layers < 3:
        return
    most = max(need(inspection, 0, model.layers - 2), need(inspection, 2, model.layers))
    peers = [
        capacity(peer, min(most, need(inspection, 0, model.layers) - 1), speed_bytes_s=speed)
        for peer, speed in zip((A, B, C), speeds, strict=True)
    ]
    layout = lay_out(inspection, peers)
    speed_of = {peer.peer: peer.speed_bytes_s for peer in peers}

    def slowest(order: tuple[PeerId, ...], cuts: list[int]) -> float:
        times = []
        for peer, (start, end) in zip(order, itertools.pairwise(cuts), strict=True):
            cost = (end - start) * model.layer_weight_bytes
            if end == model.layers:
                cost += model.head_cost_layers * model.layer_weight_bytes
            times.append(cost / speed_of[peer])
        return max(times)

    def fits(cuts: list[int]) -> bool:
        return all(
            need(inspection, *pair) <= peers[0].memory_bytes for pair in itertools.pairwise(cuts)
        )

    size = len(layout.ring)
    best = min(
        slowest(order, [0, *inner, model.layers])
        for order in itertools.permutations((A, B, C), size)
        for inner in itertools.combinations(inspection.cuts, size - 1)
        if fits([0, *inner, model.layers])
    )
    assert slowest(layout.ring, list(layout.cuts)) <= best * 1.0501


def test_whoever_can_hold_it_all_gets_it_all_the_coordinator_first() -> None:
    inspection = small()
    whole = need(inspection, 0, 6)
    peers = [
        capacity(A, whole),
        capacity(B, whole * 9, speed_bytes_s=9e9),
        capacity(C, whole, speed_bytes_s=99e9),
    ]

    assert ranges(lay_out(inspection, peers, coordinator=A)) == [(A, 0, 6)]
    assert ranges(lay_out(inspection, peers[1:], coordinator=A)) == [(C, 0, 6)]


def test_a_head_as_costly_as_six_layers_shortens_the_last_stage() -> None:
    inspection = inspection_of(EchoModel(layers=30, head_cost_layers=6.0))
    room = need(inspection, 0, 20)

    layout = lay_out(inspection, [capacity(peer, room // 2 + room // 5) for peer in (A, B, C)])

    assert [stage.end - stage.start for stage in layout.stages] == [12, 12, 6]


def test_a_peer_twice_as_fast_gets_twice_the_layers() -> None:
    inspection = inspection_of(EchoModel(layers=31, head_cost_layers=0.0))
    room = need(inspection, 0, 22)
    peers = [
        capacity(A, room, speed_bytes_s=1e9),
        capacity(B, room, speed_bytes_s=2e9),
    ]

    layers = {stage.peer: stage.end - stage.start for stage in lay_out(inspection, peers).stages}

    assert layers == {A: 10, B: 21} or layers == {A: 11, B: 20}


def test_the_coordinator_is_the_first_stage_and_the_ring_follows_the_round_trips() -> None:
    inspection = inspection_of(EchoModel(layers=12))
    room = need(inspection, 0, 4) + 10**8
    near, far = 0.001, 0.2
    peers = [
        capacity(A, room, rtt_s={C: near}),
        capacity(B, room, rtt_s={A: far, D: near}),
        capacity(C, room, rtt_s={D: near, B: near}),
    ]
    layout = lay_out(inspection, peers, coordinator=C)

    assert layout.ring[0] == C


def test_the_nearest_of_equal_peers_are_taken() -> None:
    inspection = inspection_of(EchoModel(layers=12))
    room = need(inspection, 0, 7)
    peers = [
        capacity(A, room, rtt_s={B: 0.3, C: 0.002, D: 0.3}),
        capacity(B, room),
        capacity(C, room),
        capacity(D, room),
    ]

    assert lay_out(inspection, peers).ring == (A, C)


def test_shards_that_are_loaded_are_used_as_they_are() -> None:
    """Another coordinator's ring; nobody has room for more."""
    inspection = small()
    peers = [
        capacity(A, 0, shards=((2, 4),)),
        capacity(B, 0, shards=((0, 2),)),
        capacity(C, 0, shards=((4, 6), (0, 1))),
    ]

    assert ranges(lay_out(inspection, peers)) == [(B, 0, 2), (A, 2, 4), (C, 4, 6)]


def test_loaded_shards_with_a_hole_are_not_a_plan() -> None:
    inspection = small()
    peers = [capacity(A, 0, shards=((0, 2),)), capacity(B, 0, shards=((3, 6),))]

    with pytest.raises(NoPipeline):
        lay_out(inspection, peers)


def test_forbidden_cuts_are_not_made() -> None:
    inspection = small()
    allowed = (2, 3)
    inspection = type(inspection)(
        **{
            **{name: getattr(inspection, name) for name in inspection.__slots__},
            "cuts": allowed,
        }
    )
    room = need(inspection, 0, 4)

    layout = lay_out(inspection, [capacity(A, room), capacity(B, room)])

    assert set(layout.cuts[1:-1]) <= set(allowed)


def test_a_refusal_says_what_is_missing_and_who_was_asked() -> None:
    """One peer takes four of six layers; the other has room for all, and not the files."""
    inspection = small()
    room = need(inspection, 0, 4)
    peers = [capacity(A, room), capacity(B, room * 2, holds_model=False)]

    with pytest.raises(NoPipeline) as caught:
        lay_out(inspection, peers)

    message = str(caught.value)
    assert f"{need(inspection, 4, 6)} bytes" in message
    assert "layers 4-5" in message
    assert f"a offers {format_bytes(room)}" in message
    assert "b does not have the model" in message
    assert "weights" in message


# Files -----------------------------------------------------------------------------------------


def test_a_peer_runs_only_layers_whose_files_it_has() -> None:
    inspection = small()
    room = need(inspection, 0, 6)
    peers = [capacity(A, room, files=((2, 6),)), capacity(B, room, files=((0, 3),))]

    (first, start, middle), (second, _, end) = ranges(lay_out(inspection, peers))

    assert (first, second, start, end) == (B, A, 0, 6)
    assert middle in (2, 3)


def test_files_that_are_there_come_before_files_to_fetch() -> None:
    inspection = small()
    room = need(inspection, 0, 6)
    peers = [capacity(A, room, files=(), fetches=True), capacity(B, room)]

    assert ranges(lay_out(inspection, peers)) == [(B, 0, 6)]


def test_what_nobody_has_is_fetched_where_it_may_be() -> None:
    inspection = small()
    room = need(inspection, 0, 6)
    peers = [capacity(A, room, files=((0, 2),)), capacity(B, room, files=(), fetches=True)]

    assert ranges(lay_out(inspection, peers)) == [(B, 0, 6)]


def test_a_refusal_says_which_files_a_peer_has() -> None:
    inspection = small()
    peers = [capacity(A, need(inspection, 0, 6), files=((0, 2), (3, 4)))]

    with pytest.raises(NoPipeline, match="has the files of layers 0-1, 3-3"):
        lay_out(inspection, peers)


# Engines ---------------------------------------------------------------------------------------


def of_engine(inspection: Inspection, engine: str, **changes: object) -> Inspection:
    return replace(inspection, engine=engine, **changes)  # type: ignore[arg-type]


def lay_out_mixed(inspections: list[Inspection], peers: list[Capacity]) -> Plan:
    return plan(inspections, peers, slots=SLOTS, context=CONTEXT, coordinator=A)


def test_each_peer_is_counted_with_what_its_engine_needs() -> None:
    """The same layers take four times the memory in the other engine."""
    packed = small()
    unpacked = of_engine(small(layer_weight_bytes=400_000_000), "unpacked")
    peers = [
        capacity(A, need(unpacked, 0, 2), engine="unpacked"),
        capacity(B, need(packed, 2, 6), engine="echo"),
    ]

    layout = lay_out_mixed([packed, unpacked], peers)

    assert ranges(layout) == [(A, 0, 2), (B, 2, 6)]
    assert [stage.terms.sum_bytes for stage in layout.stages] == [
        need(unpacked, 0, 2),
        need(packed, 2, 6),
    ]


def test_engines_share_a_ring_only_where_both_may_cut() -> None:
    """Alone, either would be cut in the middle."""
    any_cut = small(head_cost_layers=0.0)
    even = of_engine(any_cut, "even", cuts=(2, 4))
    room = need(even, 0, 4)
    peers = [capacity(A, room, engine="echo"), capacity(B, room, engine="even")]

    assert lay_out_mixed([any_cut], [replace(peer, engine="") for peer in peers]).cuts[1] == 3
    assert lay_out_mixed([any_cut, even], peers).cuts[1] in (2, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocabulary_size": 300},
        {"hidden_size": 32},
        {"token_layers": (0, 1)},
        {"wire_specs": dict.fromkeys(range(1, 6), (TensorSpec("float16", (-1, 64)),))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_engines_that_do_not_agree_are_not_in_one_ring(changes: dict[str, object]) -> None:
    other = of_engine(small(), "other", **changes)
    room = need(small(), 0, 4)
    peers = [capacity(A, room, engine="echo"), capacity(B, room, engine="other")]

    with pytest.raises(NoPipeline):
        lay_out_mixed([small(), other], peers)


def test_engines_that_do_not_agree_still_run_the_model_by_themselves() -> None:
    other = of_engine(small(), "other", token_layers=(0, 1))
    room = need(small(), 0, 4)
    peers = [capacity(peer, room, engine="other") for peer in (B, C)]

    layout = lay_out_mixed([small(), other], [capacity(A, room, engine="echo"), *peers])

    assert set(layout.ring) == {B, C}
    assert layout.inspection.token_layers == (0, 1)


def test_a_ring_takes_the_shortest_context_and_the_fewest_slots_of_its_engines() -> None:
    other = of_engine(small(), "other", context_max=CONTEXT // 2, slots_max=1)
    room = need(small(), 0, 4)
    peers = [capacity(A, room, engine="echo"), capacity(B, room, engine="other")]

    layout = lay_out_mixed([small(), other], peers)

    assert (layout.slots, layout.context) == (1, CONTEXT // 2)


@pytest.mark.parametrize("limit", [{"cuts": (3,)}, {"context_max": CONTEXT // 2}, {"slots_max": 1}])
def test_an_engine_that_is_in_no_stage_does_not_limit_the_ring(limit: dict[str, object]) -> None:
    """The peer that runs it has no memory at all."""
    inspections = [small(), of_engine(small(), "other"), of_engine(small(), "third", **limit)]
    room = max(need(small(), 0, 2), need(small(), 2, 4), need(small(), 4, 6))
    peers = [
        capacity(peer, room, engine=engine)
        for peer, engine in ((A, "echo"), (B, "other"), (C, "echo"))
    ]

    layout = lay_out_mixed(inspections, [*peers, capacity(D, 0, engine="third")])

    assert layout == lay_out_mixed(inspections[:2], peers)
    assert layout.cuts == (0, 2, 4, 6)
    assert (layout.slots, layout.context) == (SLOTS, CONTEXT)


def test_engines_that_agree_share_a_ring_where_the_coordinators_own_does_not() -> None:
    own = of_engine(small(), "own", vocabulary_size=300)
    inspections = [own, of_engine(small(), "one"), of_engine(small(), "two")]
    room = need(small(), 0, 4)
    peers = [
        capacity(A, room, engine="own"),
        capacity(B, room, engine="one"),
        capacity(C, room, engine="two"),
    ]

    assert set(lay_out_mixed(inspections, peers).ring) == {B, C}


def test_a_refusal_is_told_where_the_coordinators_own_engine_agrees_with_none() -> None:
    """A peer that has not told its engine is taken to have the coordinator's."""
    own = of_engine(small(), "own", vocabulary_size=300)
    inspections = [own, of_engine(small(), "one"), of_engine(small(), "two")]
    peers = [capacity(A, 0), capacity(B, 1000, engine="one"), capacity(C, 1000, engine="two")]

    with pytest.raises(NoPipeline, match=r"layers 0-5; .*b offers 1 kB, c offers 1 kB"):
        lay_out_mixed(inspections, peers)


def test_a_peer_whose_engine_nobody_described_is_left_out_and_named() -> None:
    room = need(small(), 0, 4)
    peers = [capacity(A, room, engine="echo"), capacity(B, room, engine="warp")]

    with pytest.raises(NoPipeline, match="b runs it with warp, of which nobody said"):
        lay_out_mixed([small()], peers)


def test_a_refusal_without_any_peer_says_so() -> None:
    with pytest.raises(NoPipeline, match="nobody"):
        lay_out(small(), [])


def test_forty_peers_are_filled_one_after_the_other() -> None:
    """Beyond what is searched exactly there is still a plan."""
    inspection = inspection_of(EchoModel(layers=40))
    room = need(inspection, 0, 2)
    peers = [capacity(PeerId(f"P{index:02}"), room) for index in range(40)]

    layout = lay_out(inspection, peers, coordinator=PeerId("P00"))

    assert layout.cuts[-1] == 40
    assert len(layout.stages) >= 20


@pytest.mark.parametrize("fattest", ["the first", "the last", "nobody"])
def test_twelve_peers_with_a_layers_files_each_make_a_ring(fattest: str) -> None:
    """Beyond what is searched exactly, whoever has most memory need not come first."""
    growth = {"the first": -1, "the last": 1, "nobody": 0}[fattest]
    peers = [
        capacity(PeerId(f"P{index:02}"), 10**12 + growth * index, files=((index, index + 1),))
        for index in range(12)
    ]

    layout = lay_out(inspection_of(EchoModel(layers=12)), peers)

    assert layout.ring == tuple(peer.peer for peer in peers)


def test_two_peers_that_have_the_files_are_found_behind_ten_with_more_memory() -> None:
    room = 10**12
    fat = [capacity(PeerId(f"P{index:02}"), 2 * room, files=((0, 1),)) for index in range(10)]
    peers = [*fat, capacity(A, room, files=((0, 6),)), capacity(B, room, files=((6, 12),))]

    assert lay_out(inspection_of(EchoModel(layers=12)), peers).ring == (A, B)


def test_the_speed_is_predicted_from_bytes_and_round_trips() -> None:
    inspection = small(head_cost_layers=0.0)
    room = need(inspection, 0, 4)
    peers = [
        capacity(A, room, speed_bytes_s=6e9, rtt_s={B: 0.1}),
        capacity(B, room, speed_bytes_s=6e9),
    ]
    layout = lay_out(inspection, peers)

    assert 1 / layout.tok_s == pytest.approx(6e8 / 6e9 + 2 * 0.05 + 2 * 0.0005)
