"""The default model whole and in three shards: the same bits, whatever the slots have been through.

Method: prompts in chunks on the grid and replies token by token; logits compared as bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from llama_ring import Ring
from shard_rows import logits_of, row

from swarmpy.abc import Row, Shard, Want
from swarmpy.config import PREFILL_CHUNK
from swarmpy.errors import ExtensionNotFound, RowError
from swarmpy.plugins.llama.library import find_library, open_library
from swarmpy.proto.tensor import Tensor
from swarmpy.shards.gguf import read_header

try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)

from swarmpy.plugins.llama import LlamaEngine
from swarmpy.plugins.llama.context import ContextSettings, NativeContext
from swarmpy.plugins.llama.shard import LlamaShard

pytestmark = pytest.mark.model

CONTEXT = 300
SLOTS = 4
EDGES = [0, 10, 20, 30]
RANDOM = np.random.default_rng(3)
PROMPTS = [[int(token) for token in RANDOM.integers(10, 40_000, n)] for n in (260, 64, 17, 90)]
"""One a slot, of lengths around the library's own blocks of 64 and 256 positions."""
REPLY = [5, 150, 33]


def ring_of(shards: Sequence[Shard]) -> Ring:
    return Ring(shards, PROMPTS, REPLY)


def load(path: Path, start: int, end: int, *, exact: bool = True, slots: int = SLOTS) -> LlamaShard:
    shard = LlamaEngine().load(
        path, start=start, end=end, slots=slots, context=CONTEXT, exact=exact
    )
    assert isinstance(shard, LlamaShard)
    return shard


@pytest.fixture(scope="module")
def whole(default_gguf: Path) -> Iterator[Ring]:
    shard = load(default_gguf, 0, 30)
    yield ring_of([shard])
    shard.close()


@pytest.fixture(scope="module")
def thirds(default_gguf: Path) -> Iterator[Ring]:
    shards = [load(default_gguf, start, end) for start, end in pairwise(EDGES)]
    yield ring_of(shards)
    for shard in shards:
        shard.close()


@pytest.fixture(params=["whole", "thirds"])
def ring(request: pytest.FixtureRequest) -> Ring:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Ring)
    return found


# Whole and split ------------------------------------------------------------


@pytest.mark.parametrize("slot", range(SLOTS))
def test_three_shards_give_the_wholes_bits(whole: Ring, thirds: Ring, slot: int) -> None:
    assert thirds.prompt(slot) == whole.prompt(slot)
    assert thirds.reply(slot) == whole.reply(slot)


def test_the_whole_gives_what_the_library_gives_for_the_file_itself(
    whole: Ring, default_gguf: Path
) -> None:
    settings = ContextSettings(sequences=1, tokens=CONTEXT, threads=1, gpu_layers=0)
    stock = NativeContext(open_library(find_library()), default_gguf, settings, gives_hidden=False)
    prompt = np.array(PROMPTS[1], np.int32)
    wanted = np.zeros(len(prompt), np.bool_)
    wanted[-1] = True

    logits = stock.decode(prompt, np.arange(len(prompt), dtype=np.int32), [0] * 64, wanted)
    stock.close()

    assert whole.prompt(1) == logits.tobytes()


def test_a_shard_keeps_its_own_tensors_only(thirds: Ring) -> None:
    """The embedding is tied: the last shard has it again as its head."""
    first, middle, last = (shard.weight_bytes for shard in thirds.shards)

    assert middle == 10 * 2_216_448
    assert first == middle + 30_081_024
    assert last == first + 2304


def test_all_logits_are_those_of_each_position(whole: Ring) -> None:
    shard = whole.shards[0]
    expected = [logits_of(shard.step([row([token], at)])[0]) for at, token in enumerate(REPLY)]

    everything = logits_of(shard.step([row(REPLY, 0, want=Want.ALL_LOGITS)])[0])

    assert everything.shape == (len(REPLY), 49152)
    assert np.abs(everything - np.stack(expected)).max() < 5  # Another batch, other bits.
    assert (everything.argmax(1) == np.stack(expected).argmax(1)).all()


def test_a_row_longer_than_a_batch_is_cut_on_the_grid(whole: Ring) -> None:
    """Whoever sends a whole prompt at once gets the bits of one who sends it in chunks."""
    shard = whole.shards[0]
    expected = whole.prompt(0)
    shard.free(0)

    assert logits_of(shard.step([row(PROMPTS[0], 0)])[0]).tobytes() == expected


def test_a_row_that_wants_nothing_still_moves_the_slot(whole: Ring) -> None:
    expected = whole.prompt(1), whole.reply(1)
    shard = whole.shards[0]
    shard.free(1)

    output = shard.step([row(PROMPTS[1], 0, slot=1, want=Want.NOTHING)])[0]

    assert (output.hidden, output.logits, output.error) == (None, None, "")
    assert whole.reply(1) == expected[1]


# Neighbours -----------------------------------------------------------------


@pytest.mark.parametrize("slots", [[3, 0, 2, 1], [0, 2, 3]])
def test_a_slot_does_not_see_its_neighbours(ring: Ring, slots: list[int]) -> None:
    """Goal: exactness. Method: each reply alone, then all in the same steps, in any order."""
    alone = {}
    for slot in slots:
        ring.prompt(slot)
        alone[slot] = ring.reply(slot)

    for slot in slots:
        ring.prompt(slot)
    ends = {slot: len(PROMPTS[slot]) for slot in slots}
    together: dict[int, list[bytes]] = {slot: [] for slot in slots}
    for token in REPLY:
        for slot, output in ring.step({slot: [token] for slot in slots}, ends).items():
            together[slot].append(logits_of(output).tobytes())

    assert together == alone


def test_eight_sequences_in_one_batch_do_not_see_each_other(default_gguf: Path) -> None:
    """Goal: exactness where rows are computed together. Method: the rest of the model; lengths on
    both sides of the 256 positions behind which attention is another kernel's."""
    shard = load(default_gguf, 20, 30, slots=8)
    random = np.random.default_rng(9)
    lengths = [3, 255, 64, 256, 1, 30, 7, 100]

    def chunk(slot: int, position: int, count: int, want: Want = Want.LAST_LOGITS) -> Row:
        numbers = random.standard_normal((count, 576)).astype(np.float32)
        hidden = (Tensor("float32", numbers.shape, numbers.tobytes()),)
        return row(None, position, slot=slot, count=count, hidden=hidden, want=want)

    for slot, length in enumerate(lengths):
        shard.step([chunk(slot, 0, length, Want.NOTHING)])
    rows = [chunk(slot, length, 1) for slot, length in enumerate(lengths)]

    alone = [logits_of(shard.step([asked])[0]).tobytes() for asked in rows]
    together = [logits_of(output).tobytes() for output in shard.step(rows)]
    shard.close()

    assert together == alone


def test_a_prompt_and_a_reply_in_one_step_do_not_see_each_other(ring: Ring) -> None:
    expected = ring.prompt(2), ring.prompt(1), ring.reply(1)
    ring.prompt(1)
    for shard in ring.shards:
        shard.free(2)

    outputs = ring.step({1: REPLY[:1], 2: PROMPTS[2]}, {1: len(PROMPTS[1]), 2: 0})

    assert logits_of(outputs[2]).tobytes() == expected[0]
    assert logits_of(outputs[1]).tobytes() == expected[2][0]


def test_two_threads_do_not_make_neighbours_visible(
    default_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, two threads share out attention over more than 256 positions; in a batch they do not.

    So exact rows must not be batched then.
    """
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    shard = load(default_gguf, 0, 30)
    ring = ring_of([shard])
    ring.prompt(0)
    alone = ring.reply(0)[0]
    ring.prompt(0)
    ring.prompt(1)

    outputs = ring.step({0: REPLY[:1], 1: REPLY[:1]}, {0: len(PROMPTS[0]), 1: len(PROMPTS[1])})
    shard.close()

    assert logits_of(outputs[0]).tobytes() == alone
    assert "threads 2;" in shard.exactness


def test_rows_that_need_not_be_exact_are_batched(default_gguf: Path) -> None:
    exact, loose = load(default_gguf, 28, 30), load(default_gguf, 28, 30, exact=False)

    assert loose._batch_rows_min == 2
    assert loose.exactness == exact.exactness + "; not exact"
    for shard in (exact, loose):
        shard.close()


# Errors of rows -------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (row([1], 1), "a gap: the row starts at position 1, the slot ends at 0"),
        (row([1], 0, slot=SLOTS), f"slot {SLOTS} of {SLOTS}"),
        (row([], 0), "a row of 0 tokens"),
        (row([1] * (CONTEXT + 1), 0), f"exceed the context of {CONTEXT}"),
        (row(None, 0, count=1), "depend on the token ids"),
        (row([1], 0, want=Want.HIDDEN), "do not give hidden"),
        (row([1], 0, count=2), r"token ids \(1,\) for 2 tokens"),
        (row([49152], 0), "outside the vocabulary of 49152"),
        (row([-1], 0), "outside the vocabulary"),
    ],
)
def test_a_bad_row_is_refused_and_leaves_the_others_alone(
    whole: Ring, bad: Row, error: str
) -> None:
    """Before the bad row, behind it, and in the batch it would have been in."""
    shard = whole.shards[0]
    whole.prompt(1)
    expected = whole.reply(1)[0], whole.prompt(2)
    whole.prompt(1)
    for slot in (0, 2):
        shard.free(slot)

    rows = [row(REPLY[:1], len(PROMPTS[1]), slot=1), bad, row(PROMPTS[2], 0, slot=2)]
    outputs = shard.step(rows)

    assert re.search(error, outputs[1].error), outputs[1].error
    assert logits_of(outputs[0]).tobytes() == expected[0]
    assert logits_of(outputs[2]).tobytes() == expected[1]


@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_a_hidden_state_that_is_not_finite_is_refused(thirds: Ring, number: float) -> None:
    hidden = (Tensor("float32", (1, 576), np.full((1, 576), number, np.float32).tobytes()),)

    output = thirds.shards[1].step([row(None, 0, hidden=hidden, count=1, want=Want.HIDDEN)])[0]

    assert output.error == "hidden state not finite"


def test_a_hidden_state_of_another_shape_is_refused(thirds: Ring) -> None:
    hidden = (Tensor("float32", (1, 575), bytes(575 * 4)),)

    output = thirds.shards[1].step([row(None, 0, hidden=hidden, count=1, want=Want.HIDDEN)])[0]

    assert "expected float32 (1, 576)" in output.error


def test_an_output_that_is_not_finite_is_an_error_and_frees_the_slot(
    whole: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: a library that gives a NaN once."""
    shard = whole.shards[0]
    whole.prompt(2)
    with monkeypatch.context() as patch:
        patch.setattr(shard._native, "decode", lambda *_: np.full((1, 49152), np.nan, np.float32))
        output = shard.step([row([1], 17, slot=2)])[0]

    after = shard.step([row([1], 18, slot=2)])[0]

    assert output.error == "engine output not finite"
    assert "the slot ends at 0" in after.error


def test_a_batch_that_fails_costs_its_own_slots(
    whole: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: a library that fails once; slots 0 and 1 are one batch, slot 3 is another."""
    shard = whole.shards[0]
    monkeypatch.setattr(shard, "_batch_rows_min", 2)
    whole.prompt(3)
    expected = whole.reply(3)[0]
    for slot, tokens in ((0, [9]), (1, [9]), (3, PROMPTS[3])):
        whole.prompt(slot, tokens=tokens)

    decode = shard._native.decode

    def fail(*_: object) -> None:
        monkeypatch.setattr(shard._native, "decode", decode)
        raise RowError("llama_decode failed (-3)")

    monkeypatch.setattr(shard._native, "decode", fail)
    rows = [row([5], 1), row(REPLY[:1], len(PROMPTS[3]), slot=3), row([5], 1, slot=1)]
    outputs = shard.step(rows)

    assert outputs[0].error == outputs[2].error == "llama_decode failed (-3)"
    assert logits_of(outputs[1]).tobytes() == expected
    assert "the slot ends at 0" in shard.step([row([5], 1)])[0].error


def test_a_session_of_the_whole_context_is_computed(whole: Ring) -> None:
    for start in range(0, CONTEXT, PREFILL_CHUNK):
        ids = [7] * min(PREFILL_CHUNK, CONTEXT - start)
        assert np.isfinite(logits_of(whole.shards[0].step([row(ids, start)])[0])).all()


# Cutting back ---------------------------------------------------------------


@pytest.mark.parametrize("position", [256, 200, 1])
def test_a_state_cut_back_is_as_if_nothing_had_followed(ring: Ring, position: int) -> None:
    """Explicitly, and by a row that lies before the slot's end; and beside another session."""
    ring.prompt(0, tokens=PROMPTS[0][: position // PREFILL_CHUNK * PREFILL_CHUNK or 1])
    ends = {0: position // PREFILL_CHUNK * PREFILL_CHUNK or 1}
    if ends[0] < position:
        ring.step({0: PROMPTS[0][ends[0] : position]}, ends)
    expected = ring.reply(0, position=position)
    ring.prompt(1)

    by_row = ring.reply(0, position=position)
    for shard in ring.shards:
        shard.truncate(0, position)
    explicit = ring.reply(0, position=position)

    assert by_row == expected
    assert explicit == expected


def test_a_slot_can_be_cut_back_to_nothing(ring: Ring) -> None:
    expected = ring.prompt(1)
    for shard in ring.shards:
        shard.truncate(1, 0)

    assert ring.prompt(1) == expected


def test_a_slot_cannot_be_cut_beyond_its_end(whole: Ring) -> None:
    whole.prompt(2)

    with pytest.raises(RowError, match="beyond the slot's end 17"):
        whole.shards[0].truncate(2, 18)


def test_a_state_goes_back_to_a_snapshot_once(ring: Ring) -> None:
    ring.prompt(1)
    kept = [shard.snapshot(1) for shard in ring.shards]
    expected = ring.reply(1)
    ring.step({1: PROMPTS[2]}, {1: 0})

    for shard, number in zip(ring.shards, kept, strict=True):
        shard.restore(1, number)

    assert ring.reply(1) == expected
    with pytest.raises(RowError, match="no snapshot"):
        ring.shards[0].restore(1, kept[0])


def test_a_slot_keeps_eight_snapshots(whole: Ring) -> None:
    shard = whole.shards[0]
    whole.prompt(2)
    for _ in range(8):
        shard.snapshot(2)

    with pytest.raises(RowError, match="already has 8 snapshots"):
        shard.snapshot(2)
    shard.free(2)
    shard.snapshot(2)


# Moving states --------------------------------------------------------------


def test_a_state_moves_to_another_slot_and_shard_in_ranges(ring: Ring, default_gguf: Path) -> None:
    ring.prompt(0)
    expected = ring.reply(0)
    with_others = [
        load(default_gguf, start, end, slots=2)
        for start, end in pairwise([0, 30] if len(ring.shards) == 1 else EDGES)
    ]

    for shard, other in zip(ring.shards, with_others, strict=True):
        for start, end in pairwise([0, 100, 259, 260]):
            other.import_state(1, start, end, shard.export_state(0, start, end))

    assert ring_of(with_others).reply(1, position=260) == expected
    for shard in with_others:
        shard.close()


def test_a_state_is_named_by_layer(thirds: Ring) -> None:
    thirds.prompt(1)

    state = thirds.shards[1].export_state(1, 10, 30)

    assert len(state) == 20
    assert state["9.values"].dtype == "float16"
    assert state["9.values"].shape == (20, 192)


@pytest.mark.parametrize(
    ("name", "tensor", "error"),
    [
        ("0.keys", None, "a state of 19 tensors, expected 20"),
        ("10.keys", Tensor("float16", (4, 192), bytes(1536)), "21 tensors"),
        ("0.keys", Tensor("float32", (4, 192), bytes(3072)), r"expected \(4, 192\)"),
        ("0.keys", Tensor("float16", (5, 192), bytes(1920)), r"expected \(4, 192\)"),
        ("0.keys", Tensor("float16", (4, 192), bytes(1535)), "cut off"),
        ("0.keys", Tensor("float16", (4, 192), b"\x00\x7c" * 768), "not finite"),
    ],
)
def test_a_state_of_other_layers_is_refused_and_changes_nothing(
    thirds: Ring, name: str, tensor: Tensor | None, error: str
) -> None:
    shard = thirds.shards[1]
    thirds.prompt(1)
    state = dict(shard.export_state(1, 0, 4))
    shard.free(2)
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor

    with pytest.raises(RowError, match=error):
        shard.import_state(2, 0, 4, state)

    with pytest.raises(RowError, match="slot that holds"):
        shard.export_state(2, 0, 1)


def test_a_state_must_begin_where_the_slot_ends(whole: Ring) -> None:
    shard = whole.shards[0]
    whole.prompt(2)
    state = shard.export_state(2, 0, 17)

    with pytest.raises(RowError, match="for a slot that ends at 17"):
        shard.import_state(2, 0, 17, state)
    with pytest.raises(RowError, match="of a slot that holds"):
        shard.export_state(2, 5, 18)
    shard.free(3)
    with pytest.raises(RowError, match="exceed the context"):
        shard.import_state(3, 0, CONTEXT + 1, state)


def test_the_header_the_tests_count_on_is_that_of_the_default_model(default_gguf: Path) -> None:
    header = read_header(default_gguf)

    assert header.integer("llama.block_count") == EDGES[-1]
