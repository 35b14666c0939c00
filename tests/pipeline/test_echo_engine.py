"""EchoEngine: it keeps the engine contract that the rings of the other tests are built on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.abc import Row, Want
from swarmpy.errors import DoesNotFit, ModelRefused, RowError
from swarmpy.proto.tensor import check_hidden
from swarmpy.testing.engine import EchoEngine, EchoModel, EchoShard, inspection_of, reply

MODEL = EchoModel(layers=6, token_layers=(0, 4))
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def load(start: int, end: int, *, slots: int = 2) -> EchoShard:
    return EchoShard(MODEL, start=start, end=end, slots=slots, context=100)


def run(shards: list[EchoShard], ids: list[int], position: int, *, slot: int = 0) -> np.ndarray:
    """Run token ids through shards and return the logits of each."""
    hidden, logits = None, None
    for index, shard in enumerate(shards):
        is_last = index == len(shards) - 1
        row = Row(
            slot=slot,
            position=position,
            count=len(ids),
            token_ids=np.array(ids, np.int32),
            hidden=hidden,
            want=Want.ALL_LOGITS if is_last else Want.HIDDEN,
        )
        (output,) = shard.step([row])
        assert not output.error
        hidden, logits = output.hidden, output.logits
    assert logits is not None
    return np.frombuffer(logits.data, np.float32).reshape(logits.shape)


@given(cuts=st.sets(st.integers(1, 5)), chunk=st.integers(1, 8))
def test_any_cut_and_chunking_gives_the_same_logits(cuts: set[int], chunk: int) -> None:
    ends = [*sorted(cuts), 6]
    shards = [load(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    rows = [
        run(shards, PROMPT[start : start + chunk], start) for start in range(0, len(PROMPT), chunk)
    ]

    assert (np.concatenate(rows) == run([load(0, 6)], PROMPT, 0)).all()


@given(st.lists(st.integers(0, 255), min_size=2, max_size=8), st.integers(0, 7))
def test_any_token_of_the_prompt_changes_the_reply(prompt: list[int], index: int) -> None:
    changed = list(prompt)
    changed[index % len(prompt)] ^= 1

    assert reply(MODEL, prompt, 12) != reply(MODEL, changed, 12)


def test_the_likeliest_token_is_the_reply_s() -> None:
    assert int(run([load(0, 6)], PROMPT, 0)[-1].argmax()) == reply(MODEL, PROMPT, 1)[0]


def test_a_position_before_the_end_cuts_the_slot_back() -> None:
    shard = load(0, 6)
    run([shard], PROMPT, 0)

    again = run([shard], PROMPT[3:], 3)

    assert (again == run([load(0, 6)], PROMPT, 0)[3:]).all()


def test_a_gap_is_an_error_of_that_row_alone() -> None:
    shard = load(0, 6)
    rows = [
        Row(slot=slot, position=position, count=1, token_ids=None, hidden=None, want=Want.NOTHING)
        for slot, position in ((0, 5), (1, 0))
    ]

    outputs = shard.step(rows)

    assert [bool(output.error) for output in outputs] == [True, False]


def test_a_snapshot_brings_a_state_back_once() -> None:
    shard = load(0, 6)
    run([shard], PROMPT[:4], 0)
    snapshot = shard.snapshot(0)
    run([shard], [77, 78], 4)
    shard.restore(0, snapshot)

    assert (run([shard], PROMPT[4:], 4) == run([load(0, 6)], PROMPT, 0)[4:]).all()
    with pytest.raises(RowError):
        shard.restore(0, snapshot)


def test_an_exported_state_goes_on_in_another_shard() -> None:
    shard, other = load(0, 6), load(0, 6)
    run([shard], PROMPT[:5], 0)
    other.import_state(1, 0, 3, shard.export_state(0, 0, 3))
    other.import_state(1, 3, 5, shard.export_state(0, 3, 5))

    logits = run([other], PROMPT[5:], 5, slot=1)

    assert (logits == run([load(0, 6)], PROMPT, 0)[5:]).all()


@pytest.mark.parametrize(("start", "end"), [(0, 6), (-1, 2), (3, 2)])
def test_positions_a_slot_does_not_have_are_not_exported(start: int, end: int) -> None:
    shard = load(0, 6)
    run([shard], PROMPT[:5], 0)
    with pytest.raises(RowError):
        shard.export_state(0, start, end)


def test_truncating_and_freeing_forget() -> None:
    shard = load(0, 6)
    run([shard], PROMPT, 0)
    shard.truncate(0, 3)
    with pytest.raises(RowError):
        shard.truncate(0, 4)
    assert shard.used_slots == [0]

    shard.free(0)

    assert shard.used_slots == []


def test_the_hidden_state_is_what_the_wire_spec_says() -> None:
    shard = load(0, 3)
    row = Row(
        slot=0,
        position=0,
        count=8,
        token_ids=np.array(PROMPT, np.int32),
        hidden=None,
        want=Want.HIDDEN,
    )
    (output,) = shard.step([row])

    assert output.hidden is not None
    check_hidden(output.hidden, inspection_of(MODEL).wire_specs[3], count=8)


def test_a_model_is_what_its_folder_says(tmp_path: Path) -> None:
    engine = EchoEngine()

    assert engine.inspect(MODEL.write(tmp_path / "model")) == inspection_of(MODEL)
    assert engine.inspect(tmp_path / "no such folder") == inspection_of(EchoModel())


def test_a_malformed_model_is_refused(tmp_path: Path) -> None:
    path = MODEL.write(tmp_path) / "config.json"
    path.write_text(path.read_text().replace('"layers":6', '"layers":0'))

    with pytest.raises(ModelRefused, match=r"config\.json"):
        EchoEngine().inspect(tmp_path)


def test_layers_outside_the_model_are_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit):
        EchoEngine().load(tmp_path, start=0, end=99, slots=1, context=64, exact=True)
