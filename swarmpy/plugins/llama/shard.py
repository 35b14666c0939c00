"""Layers [start, end) of a GGUF in llama.cpp's memory, with slots: one sequence each.

What must be fixed for a sequence's bits not to depend on its neighbours, measured with Q4_1:

* its cells: of its own, in order (`kv_unified` off), so a freed slot beside it changes nothing;
* the pieces of its prompt: 64 tokens in one batch and 32 twice differ by 0.9 in a logit, so chunks
  lie on the pipeline's grid and run alone;
* the batch of its decode steps: with one thread, 8 to 64 sequences together and each alone give
  equal bits. With two they do not, once a sequence has more than 256 positions: alone, attention
  over them is shared out among the threads and added up afterwards, in a batch it is not. Some
  types of weights have kernels that take several rows at once, and never give equal bits.

So exact rows are batched with one thread and types that were measured, else they run one by one;
and from `EXACT_ROWS_MIN` rows on, since one thread gains nothing from fewer.

Spec: protocols/engine.md, sections 2, 3 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from swarmpy import abc
from swarmpy.abc import Output, Row, StateKind, Want
from swarmpy.errors import BadMessage, ModelRefused, RowError
from swarmpy.pipeline.finite import is_finite
from swarmpy.plugins.llama.context import BATCH_TOKENS, Floats, NativeContext
from swarmpy.plugins.llama.state import (
    Numbers,
    StateLayout,
    first_position,
    from_tensors,
    to_tensors,
)
from swarmpy.proto.tensor import Tensor, TensorSpec, check_hidden

if TYPE_CHECKING:
    from swarmpy.abc.engine import TokenIds

SNAPSHOTS_MAX = 8
"""Snapshots of one slot; each keeps a whole state alive."""

EXACT_ROWS_MIN = 8
"""One thread computes, it does not wait for memory. Ten layers, one row against 2, 4, 8 in a batch:
Q4_1 1.8 ms, 4.1, 7.5, 13.7; Q4_0 1.5 ms, 2.7, 4.6, 8.9; Q8_0 1.9 ms, 7.5, 9.4, 10.0."""


class LlamaShard(abc.Shard):
    """A loaded layer range."""

    def __init__(
        self,
        native: NativeContext,
        *,
        is_first: bool,
        is_last: bool,
        slots: int,
        context: int,
        batch_rows_min: int | None,
        state_kind: StateKind,
        weight_bytes: int,
        exactness: str,
        window_rows: Callable[[int], int] | None = None,
    ) -> None:
        """Try one step; the shard closes the context from here on.

        Args:
            batch_rows_min: Fewest decode steps of different slots that run together; None: they
                never do.
            window_rows: Positions of a slot of so many that its windows, or what picks keys, hold.

        Raises:
            ModelRefused: The first step fails.
        """
        self.weight_bytes = weight_bytes
        self.exactness = exactness
        self._native = native
        self._is_first = is_first
        self._is_last = is_last
        self._context = context
        self._batch_rows_min = batch_rows_min
        self._state_kind = state_kind
        self._received = () if is_first else (TensorSpec("float32", (-1, native.hidden_size)),)
        self._ends = [0] * slots
        self._window_rows = window_rows
        self._is_tainted = [False] * slots
        """Slots whose recurrent state may hold what is no number, or would become that."""
        self._floors = [0] * slots
        """Positions below which a slot cannot be cut back: what was before them in its windows is
        not there."""
        self._snapshots: list[dict[int, tuple[bytes, int]]] = [{} for _ in range(slots)]
        self._next_snapshot = 1
        self._layout = self._warm_up()

    def _warm_up(self) -> StateLayout | None:
        """Run one step: what would fail later fails now, and the form of a state is known."""
        inputs = (
            np.zeros(1, np.int32)
            if self._is_first
            else np.zeros((1, self._native.hidden_size), np.float32)
        )
        try:
            self._native.decode(inputs, np.zeros(1, np.int32), [0], np.ones(1, np.bool_))
            state = self._native.state(0)
        except RowError as error:
            self._native.close()
            raise ModelRefused(f"a first step failed: {error}") from error
        self._forget(0)
        is_recurrent = self._state_kind is StateKind.RECURRENT
        return StateLayout.learn(state, len(self._ends), is_recurrent=is_recurrent)

    # Steps ------------------------------------------------------------------

    def step(self, rows: Sequence[Row]) -> Sequence[Output]:
        outputs: dict[int, Output] = {}
        batch: dict[int, Row] = {}
        for index, row in enumerate(rows):
            # A row that came alone goes the short way: what it costs is a part of every hop.
            is_batched = self._batch_rows_min is not None and row.count == 1 and len(rows) > 1
            if not is_batched or any(row.slot == other.slot for other in batch.values()):
                outputs |= self._run_batch(batch)
                batch = {}
            try:
                self._prepare(row)
            except (RowError, BadMessage) as error:
                outputs[index] = Output(slot=row.slot, error=str(error))
                continue
            if is_batched:
                batch[index] = row
            else:
                outputs[index] = self._run_chunk(row)
        outputs |= self._run_batch(batch)
        return [outputs[index] for index in range(len(rows))]

    def _prepare(self, row: Row) -> None:
        """Check a row against its slot and the range, and cut the slot back to where it starts.

        Raises:
            RowError: It cannot be computed here.
            BadMessage: Its tensors are not what this range takes.
        """
        end = self._end(row.slot)
        if row.count < 1:
            raise RowError(f"a row of {row.count} tokens")
        if row.position > end:
            raise RowError(
                f"a gap: the row starts at position {row.position}, the slot ends at {end}"
            )
        if row.position + row.count > self._context:
            raise RowError(
                f"positions up to {row.position + row.count} exceed the context of {self._context}"
            )
        self._check_inputs(row)
        wants_logits = row.want in (Want.LAST_LOGITS, Want.ALL_LOGITS)
        if (wants_logits and not self._is_last) or (row.want is Want.HIDDEN and self._is_last):
            raise RowError(f"these layers do not give {row.want}")
        self.truncate(row.slot, row.position)

    def _check_inputs(self, row: Row) -> None:
        check_hidden(row.hidden or (), self._received, count=row.count)
        if not self._is_first:
            if not all(map(is_finite, row.hidden or ())):
                raise RowError("hidden state not finite")
            return
        if row.token_ids is None:
            raise RowError("these layers depend on the token ids, and none came")
        if row.token_ids.shape != (row.count,):
            raise RowError(f"token ids {row.token_ids.shape} for {row.count} tokens")
        ids = row.token_ids.tolist()
        if min(ids) < 0 or max(ids) >= self._native.vocabulary_size:
            raise RowError(f"a token id outside the vocabulary of {self._native.vocabulary_size}")

    def _inputs(self, row: Row) -> TokenIds | Floats:
        if self._is_first:
            assert row.token_ids is not None
            return np.ascontiguousarray(row.token_ids, np.int32)
        assert row.hidden
        return np.frombuffer(row.hidden[0].data, np.float32).reshape(row.count, -1)

    def _run_chunk(self, row: Row) -> Output:
        """Run one row, in as few batches as it needs."""
        inputs, results = self._inputs(row), []
        wanted = np.full(row.count, row.want is Want.ALL_LOGITS)
        wanted[-1] |= row.want is Want.LAST_LOGITS
        try:
            for at in range(0, row.count, BATCH_TOKENS):
                part = slice(at, min(at + BATCH_TOKENS, row.count))
                count = part.stop - at
                positions = np.arange(row.position + at, row.position + part.stop, dtype=np.int32)
                slots = [row.slot] * count
                results.append(self._native.decode(inputs[part], positions, slots, wanted[part]))
        except RowError as error:
            return self._failed(row, str(error))
        return self._output(row, results[0] if len(results) == 1 else np.concatenate(results))

    def _run_batch(self, batch: Mapping[int, Row]) -> dict[int, Output]:
        """Run rows of one token each, of different slots; return their outputs by index.

        The library takes sequences together only if their numbers follow each other.
        """
        by_slot = sorted(batch.items(), key=lambda item: item[1].slot)
        runs: list[list[tuple[int, Row]]] = []
        for item in by_slot:
            follows = runs and runs[-1][-1][1].slot + 1 == item[1].slot
            if follows and len(runs[-1]) < BATCH_TOKENS:
                runs[-1].append(item)
            else:
                runs.append([item])
        outputs: dict[int, Output] = {}
        for run in runs:
            outputs |= self._run_together(run)
        return outputs

    def _run_together(self, items: Sequence[tuple[int, Row]]) -> dict[int, Output]:
        if len(items) < (self._batch_rows_min or 0):
            return {index: self._run_chunk(row) for index, row in items}
        rows = [row for _, row in items]
        inputs = np.concatenate([self._inputs(row) for row in rows])
        positions = np.array([row.position for row in rows], np.int32)
        wanted = np.array([row.want in (Want.LAST_LOGITS, Want.ALL_LOGITS) for row in rows])
        try:
            results = self._native.decode(inputs, positions, [row.slot for row in rows], wanted)
        except RowError as error:
            return {index: self._failed(row, str(error)) for index, row in items}
        places = np.cumsum(wanted) - 1 if self._is_last else np.arange(len(rows))
        return {
            index: self._output(row, results[place : place + 1])
            for (index, row), place in zip(items, places, strict=True)
        }

    def _output(self, row: Row, results: Floats) -> Output:
        """Return what a row gave: its hidden states (T, D), or logits (T, V) of what it wanted."""
        self._ends[row.slot] = row.position + row.count
        if row.want is Want.NOTHING:
            return Output(slot=row.slot)
        tensor = _tensor(results[-1] if row.want is Want.LAST_LOGITS else results)
        if not is_finite(tensor):
            return self._failed(row, "engine output not finite")
        if row.want is Want.HIDDEN:
            return Output(slot=row.slot, hidden=(tensor,))
        return Output(slot=row.slot, logits=tensor)

    def _failed(self, row: Row, error: str) -> Output:
        """Return an error's output; the state may be half changed, so nobody must go on from it."""
        self._is_tainted[row.slot] = True
        self._forget(row.slot)
        return Output(slot=row.slot, error=error[:1000])

    # State ------------------------------------------------------------------

    def _end(self, slot: int) -> int:
        if not 0 <= slot < len(self._ends):
            raise RowError(f"slot {slot} of {len(self._ends)}")
        return self._ends[slot]

    def _forget(self, slot: int) -> None:
        self._native.cut(slot, 0)
        self._ends[slot] = self._floors[slot] = 0
        if self._is_tainted[slot]:
            self._is_tainted[slot] = False
            self._wipe()

    def _wipe(self) -> None:
        """Overwrite the recurrent states that no slot holds.

        The library gives a freed one to any slot, and clears it by multiplying with 0: what is no
        number stays that, and would end every session that gets it.
        """
        if self._layout is None or self._state_kind is not StateKind.RECURRENT:
            return
        empty = [slot for slot, end in enumerate(self._ends) if not end]
        for slot in empty:
            self._native.set_state(slot, self._layout.join(self._layout.zeros(), slot, 1))
        for slot in empty:
            self._native.cut(slot, 0)

    def truncate(self, slot: int, position: int) -> None:
        end = self._end(slot)
        if position > end:
            raise RowError(f"position {position} lies beyond the slot's end {end}")
        if position == end:
            return
        if position == 0:
            self._forget(slot)
            return
        if (
            self._state_kind is StateKind.RECURRENT
            or position < self._floors[slot]
            or not self._native.cut(slot, position)
        ):
            raise RowError(
                f"this state cannot be cut back to position {position}: restore a snapshot"
            )
        self._ends[slot] = position

    def snapshot(self, slot: int) -> int:
        end, snapshots = self._end(slot), self._snapshots[slot]
        if len(snapshots) >= SNAPSHOTS_MAX:
            raise RowError(f"the slot already has {SNAPSHOTS_MAX} snapshots")
        number = self._next_snapshot
        self._next_snapshot += 1
        snapshots[number] = (self._native.state(slot) if end else b"", end)
        return number

    def restore(self, slot: int, snapshot: int) -> None:
        self._end(slot)
        if snapshot not in self._snapshots[slot]:
            raise RowError(f"the slot has no snapshot {snapshot}")
        state, end = self._snapshots[slot][snapshot]
        if self._layout is None or not end:
            self._replace(slot, state, end, floor=end)
        else:
            self._fill(slot, self._layout.split(state, slot, end), end)
        del self._snapshots[slot][snapshot]

    def export_state(self, slot: int, start: int, end: int) -> Mapping[str, Tensor]:
        held = self._end(slot)
        if not 0 <= start < end <= held:
            raise RowError(f"positions [{start}, {end}) of a slot that holds [0, {held})")
        layout = self._movable(is_whole=(start, end) == (0, held))
        numbers = layout.split(self._native.state(slot), slot, held)
        return to_tensors(layout, numbers, start, end)

    def import_state(self, slot: int, start: int, end: int, state: Mapping[str, Tensor]) -> None:
        held = self._end(slot)
        if held != start or end <= start:
            raise RowError(f"a state of [{start}, {end}) for a slot that ends at {held}")
        if end > self._context:
            raise RowError(f"positions up to {end} exceed the context of {self._context}")
        layout = self._movable(is_whole=not start)
        numbers = from_tensors(layout, end - start, state, window_rows=self._window_rows)
        if start:
            before = layout.split(self._native.state(slot), slot, start)
            numbers = {name: np.concatenate([before[name], numbers[name]]) for name in before}
        self._fill(slot, numbers, end)
        self._is_tainted[slot] = True  # Finite, yet of any size: a step may make more of it.

    @property
    def moves_in_ranges(self) -> bool:
        """Whether `export_state` gives any range of positions; else it gives all or nothing."""
        return self._layout is not None and self._layout.is_by_position

    @property
    def state_sizes(self) -> tuple[int, int]:
        """Bytes a slot's state has of each position, and whatever its length; 0 if unknown."""
        layout = self._layout
        return (layout.bytes_per_token, layout.fixed_bytes) if layout else (0, 0)

    def _movable(self, *, is_whole: bool) -> StateLayout:
        if self._layout is None:
            raise RowError("states of this architecture cannot be moved")
        if not is_whole and not self._layout.is_by_position:
            raise RowError("a state with windows or recurrent layers is moved whole, or not at all")
        return self._layout

    def _fill(self, slot: int, numbers: Mapping[str, Numbers], end: int) -> None:
        """Put the numbers of [0, end) into a slot."""
        assert self._layout is not None
        is_complete = first_position(numbers, self._layout, end) == 0
        state = self._layout.join(numbers, slot, end)
        self._replace(slot, state, end, floor=0 if is_complete else end)

    def _replace(self, slot: int, state: bytes, end: int, *, floor: int) -> None:
        """Put a state of [0, end) into a slot."""
        self._forget(slot)
        if not end:
            return
        if not self._native.set_state(slot, state) or self._native.end(slot) != end:
            self._forget(slot)
            raise RowError("llama.cpp does not take the state")
        self._ends[slot], self._floors[slot] = end, floor

    def free(self, slot: int) -> None:
        self._end(slot)
        self._forget(slot)
        self._snapshots[slot].clear()

    def close(self) -> None:
        self._native.close()


def _tensor(numbers: Floats) -> Tensor:
    return Tensor("float32", numbers.shape, numbers.tobytes())
