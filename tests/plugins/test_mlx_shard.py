"""Slots of an MLX shard: cut back, kept, moved and refused, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from shard_rows import logits_of, row, run
from tiny_models import LAYERS, save_model

from swarmpy.abc import Inspection, Row, Shard, Want
from swarmpy.errors import DoesNotFit, ModelRefused, RowError
from swarmpy.plugins.mlx import MlxEngine
from swarmpy.proto.tensor import Tensor

CONTEXT = 300
PROMPT = list(range(20, 60))
REPLY = [3, 77, 150, 4]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = ("llama", "gemma3_text", "mamba2", "qwen3_next")
    return {name: save_model(folder / name, name) for name in names}


@pytest.fixture(scope="module")
def shards(folders: Mapping[str, Path]) -> Mapping[str, Shard]:
    """A whole model of each kind of state; every test starts with freed slots."""
    return {name: load(folder) for name, folder in folders.items()}


@pytest.fixture(autouse=True)
def _free_slots(shards: Mapping[str, Shard]) -> None:
    for shard in shards.values():
        for slot in range(3):
            shard.free(slot)


def load(folder: Path, *, start: int = 0, end: int = LAYERS, slots: int = 3) -> Shard:
    return MlxEngine().load(folder, start=start, end=end, slots=slots, context=CONTEXT, exact=True)


def inspect(folder: Path) -> Inspection:
    return MlxEngine().inspect(folder)


def reply_logits(shard: Shard, position: int, *, slot: int = 0) -> list[bytes]:
    """Run the reply token by token and return each step's logits."""
    return [
        run(shard, [token], position + index, slot=slot).tobytes()
        for index, token in enumerate(REPLY)
    ]


# Rows -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba2", "qwen3_next"])
def test_a_slot_does_not_see_its_neighbours(shards: Mapping[str, Shard], name: str) -> None:
    """Goal: exactness. Method: one reply alone, then the same among others in one step."""
    shard = shards[name]
    run(shard, PROMPT, 0)
    alone = reply_logits(shard, len(PROMPT))
    shard.free(0)

    run(shard, PROMPT[:7], 0, slot=1)
    run(shard, PROMPT, 0, slot=0)
    among = []
    for index, token in enumerate(REPLY):
        rows = [row([9], 7 + index, slot=1), row([token], len(PROMPT) + index, slot=0)]
        among.append(logits_of(shard.step(rows)[1]).tobytes())

    assert among == alone


def test_the_last_logits_are_the_last_of_all_logits(shards: Mapping[str, Shard]) -> None:
    """Within rounding: the head then multiplies one row instead of many."""
    shard = shards["llama"]

    everything = logits_of(shard.step([row(PROMPT, 0, want=Want.ALL_LOGITS)])[0])
    last = run(shard, PROMPT, 0, slot=1)

    assert everything.shape == (len(PROMPT), len(last))
    np.testing.assert_allclose(everything[-1], last, atol=1e-4)


def test_a_row_that_wants_nothing_still_moves_the_slot(shards: Mapping[str, Shard]) -> None:
    shard = shards["llama"]
    expected = run(shard, PROMPT, 0, slot=1), run(shard, [5], len(PROMPT), slot=1)

    output = shard.step([row(PROMPT, 0, want=Want.NOTHING)])[0]

    assert (output.hidden, output.logits, output.error) == (None, None, "")
    assert run(shard, [5], len(PROMPT)).tobytes() == expected[1].tobytes()


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (row([1], 1), "a gap: the row starts at position 1, the slot ends at 0"),
        (row([1], 0, slot=3), "slot 3 of 3"),
        (row([], 0), "a row of 0 tokens"),
        (row([1] * (CONTEXT + 1), 0), f"exceed the context of {CONTEXT}"),
        (row(None, 0, count=1), "depend on the token ids"),
        (row([1], 0, want=Want.HIDDEN), "do not give hidden"),
        (row([1], 0, count=2), "token ids \\(1,\\) for 2 tokens"),
    ],
)
def test_a_bad_row_is_refused_and_leaves_the_others_alone(
    shards: Mapping[str, Shard], bad: Row, error: str
) -> None:
    shard = shards["llama"]
    expected = run(shard, PROMPT, 0, slot=2).tobytes()

    outputs = shard.step([bad, row(PROMPT, 0, slot=1)])

    assert re.search(error, outputs[0].error), outputs[0].error
    assert logits_of(outputs[1]).tobytes() == expected


def test_a_hidden_state_that_is_not_finite_is_refused(folders: Mapping[str, Path]) -> None:
    shard = load(folders["llama"], start=3)
    hidden = (Tensor("float32", (1, 64), np.full((1, 64), np.inf, np.float32).tobytes()),)

    output = shard.step([row(None, 0, hidden=hidden, count=1)])[0]

    assert output.error == "hidden state not finite"


def test_an_output_that_is_not_finite_is_an_error_and_frees_the_slot(tmp_path: Path) -> None:
    """Method: a model with a NaN in its final norm."""
    folder = save_model(tmp_path, "llama")
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    weights["model.norm.weight"] = mx.full((64,), float("nan"))
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, {"format": "mlx"})
    shard = load(folder)

    output = shard.step([row([1, 2], 0)])[0]
    after = shard.step([row([3], 2)])[0]

    assert output.error == "engine output not finite"
    assert "a gap" in after.error


def test_a_session_of_the_whole_context_is_computed(shards: Mapping[str, Shard]) -> None:
    shard = shards["llama"]
    for start in range(0, CONTEXT, 64):
        ids = [7] * min(64, CONTEXT - start)
        assert np.isfinite(run(shard, ids, start)).all()


# Cutting back ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_state_cut_back_is_as_if_nothing_had_followed(
    shards: Mapping[str, Shard], name: str
) -> None:
    shard = shards[name]
    run(shard, PROMPT, 0)
    expected = reply_logits(shard, len(PROMPT))

    shard.truncate(0, len(PROMPT))
    explicit = reply_logits(shard, len(PROMPT))
    by_row = reply_logits(shard, len(PROMPT))

    assert explicit == expected
    assert by_row == expected


def test_a_window_that_has_rolled_on_cannot_be_cut_back(shards: Mapping[str, Shard]) -> None:
    """The window of this model holds 48 tokens."""
    shard = shards["gemma3_text"]
    run(shard, [1] * 60, 0)

    with pytest.raises(RowError, match="cannot be cut back to position 30"):
        shard.truncate(0, 30)


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_a_recurrent_state_goes_back_by_snapshots_only(
    shards: Mapping[str, Shard], name: str
) -> None:
    shard = shards[name]
    run(shard, PROMPT, 0)
    kept = shard.snapshot(0)
    expected = reply_logits(shard, len(PROMPT))

    with pytest.raises(RowError, match="restore a snapshot"):
        shard.truncate(0, len(PROMPT))
    shard.restore(0, kept)

    assert reply_logits(shard, len(PROMPT)) == expected
    with pytest.raises(RowError, match="no snapshot"):
        shard.restore(0, kept)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba2", "qwen3_next"])
def test_any_state_can_start_again_from_nothing(shards: Mapping[str, Shard], name: str) -> None:
    shard = shards[name]
    expected = run(shard, PROMPT, 0).tobytes()
    run(shard, [1], len(PROMPT))

    assert run(shard, PROMPT, 0).tobytes() == expected


def test_a_slot_keeps_a_bounded_number_of_snapshots(shards: Mapping[str, Shard]) -> None:
    shard = shards["llama"]
    for _ in range(8):
        shard.snapshot(0)

    with pytest.raises(RowError, match="already has 8 snapshots"):
        shard.snapshot(0)


# Moving a state -------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba2", "qwen3_next"])
def test_an_exported_state_goes_on_elsewhere_bit_for_bit(
    shards: Mapping[str, Shard], folders: Mapping[str, Path], name: str
) -> None:
    shard, other = shards[name], load(folders[name])
    run(shard, PROMPT, 0)
    run(shard, [8], len(PROMPT))
    end = len(PROMPT) + 1
    state = shard.export_state(0, 0, end)
    expected = reply_logits(shard, end)

    other.import_state(2, 0, end, state)

    assert reply_logits(other, end, slot=2) == expected


def test_keys_and_values_can_be_moved_in_parts(shards: Mapping[str, Shard]) -> None:
    shard = shards["llama"]
    run(shard, PROMPT, 0)
    parts = [shard.export_state(0, 0, 13), shard.export_state(0, 13, len(PROMPT))]
    expected = reply_logits(shard, len(PROMPT))

    shard.import_state(1, 0, 13, parts[0])
    shard.import_state(1, 13, len(PROMPT), parts[1])

    assert reply_logits(shard, len(PROMPT), slot=1) == expected


def test_a_state_for_another_position_is_refused(shards: Mapping[str, Shard]) -> None:
    shard = shards["llama"]
    run(shard, PROMPT, 0)
    state = shard.export_state(0, 5, 10)

    with pytest.raises(RowError, match="for a slot that ends at 0"):
        shard.import_state(1, 5, 10, state)


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_a_state_of_another_shape_is_refused_and_changes_nothing(
    shards: Mapping[str, Shard], name: str
) -> None:
    shard = shards[name]
    run(shard, PROMPT, 0)
    state = dict(shard.export_state(0, 0, len(PROMPT)))
    expected = run(shard, PROMPT, 0, slot=1).tobytes()
    wrong = next(key for key, tensor in state.items() if tensor.dtype == "float32")
    state[wrong] = Tensor("float32", (1, 1, 1, 1), bytes(4))
    shard.free(1)

    with pytest.raises(RowError, match="expected float32"):
        shard.import_state(1, 0, len(PROMPT), state)

    assert run(shard, PROMPT, 0, slot=1).tobytes() == expected


def test_a_state_with_a_foreign_class_name_is_refused(shards: Mapping[str, Shard]) -> None:
    """mlx-lm restores lists of caches by looking class names up; a state must not choose them."""
    shard = shards["gemma3_text"]
    run(shard, PROMPT, 0)
    state = dict(shard.export_state(0, 0, len(PROMPT)))
    text = bytes(state["constants"].data).replace(b"48", b'"os"', 1)
    state["constants"] = Tensor("uint8", (len(text),), text)

    with pytest.raises(RowError, match="is str, not int"):
        shard.import_state(1, 0, len(PROMPT), state)


# Loading --------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(0, 2), (2, 4), (4, LAYERS), (0, LAYERS)])
def test_a_shard_holds_what_inspection_promised(
    folders: Mapping[str, Path], start: int, end: int
) -> None:
    shard = load(folders["llama"], start=start, end=end)

    assert shard.weight_bytes == inspect(folders["llama"]).weight_bytes(start, end)


def test_tied_embeddings_live_on_both_ends(folders: Mapping[str, Path]) -> None:
    inspection = inspect(folders["llama"])
    embedding = 160 * 64 * 4

    assert inspection.is_tied
    assert inspection.embedding_weight_bytes == embedding
    assert inspection.head_weight_bytes == embedding + 64 * 4  # And the final norm.


def test_more_slots_than_memory_do_not_fit(folders: Mapping[str, Path]) -> None:
    with pytest.raises(DoesNotFit, match="bytes are left"):
        MlxEngine().load(
            folders["llama"], start=0, end=LAYERS, slots=200, context=1 << 30, exact=True
        )


def test_a_cut_the_architecture_does_not_allow_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "gemma4_text")

    with pytest.raises(ModelRefused, match="cannot be cut before layer 5"):
        load(folder, end=5)


def test_the_exactness_class_names_all_that_decides_bits(shards: Mapping[str, Shard]) -> None:
    for word in ("mlx", "mlx-lm", "float32", "threads 1", "rows 8", "grid 64"):
        assert word in shards["llama"].exactness
