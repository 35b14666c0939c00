"""Layers [start, end) of an mlx-lm model in memory, with slots.

The architecture's own forward runs on every shard. Layers before `start` return what was received,
layers from `end` on return what layer `end` - 1 gave; MLX is lazy, so nothing else is computed, and
nothing else was read from the disk. Token ids are zeros where the output does not depend on them.
Spec: protocols/engine.md, section 4.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from swarmpy import abc
from swarmpy.abc import Output, Progress, Row, Want
from swarmpy.config import PREFILL_CHUNK
from swarmpy.errors import BadMessage, ModelRefused, RowError
from swarmpy.pipeline.finite import is_finite
from swarmpy.plugins.mlx.arrays import mlx_type, to_mlx, to_tensor
from swarmpy.plugins.mlx.exact import ROW_TILE, Tiles
from swarmpy.plugins.mlx.models import OpenModel
from swarmpy.plugins.mlx.recording import Layers, Recording, Tree
from swarmpy.plugins.mlx.state import Slot, SlotStates
from swarmpy.proto.tensor import Hidden, Tensor, check_hidden


class MlxShard(abc.Shard):
    """A loaded layer range."""

    def __init__(
        self,
        model: OpenModel,
        layers: Layers,
        recording: Recording,
        *,
        start: int,
        end: int,
        slots: int,
        context: int,
        exact: bool,
        build_id: str,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        """Read the range's weights and try one step.

        Raises:
            ModelRefused: The architecture cannot be cut there.
        """
        for cut in (start, end):
            if 0 < cut < recording.layer_count and cut not in recording.carried:
                raise ModelRefused(f"{model.architecture} cannot be cut before layer {cut}")
        self._range = _Range(recording, start, end)
        self._model = model
        self._layers = layers
        self._is_first = start == 0
        self._is_last = end == recording.layer_count
        self._vocabulary_size = recording.vocabulary_size
        self._context = context
        self._received = () if self._is_first else recording.wire_spec(start)
        needs = recording.needs(start, end)
        # The first stage has them anyway; elsewhere they would show the prompt for nothing.
        self._needs_token_ids = self._is_first or needs.token_ids
        self._tiles = Tiles()
        if exact:
            self._tiles.install(model.module)
        self._is_exact = exact
        grid = f"rows {ROW_TILE} grid {PREFILL_CHUNK}" if exact else "not exact"
        self.exactness = f"{build_id}; {grid}"
        self.weight_bytes = model.read(sorted(needs.parameters), progress)
        local = sorted(frozenset[int]().union(*recording.caches[start:end]))
        self._states = SlotStates(model.module, local)
        self._slots = [self._states.new() for _ in range(slots)]
        layers.calls = self._range
        self._warm_up()

    # Steps ------------------------------------------------------------------

    def step(self, rows: Sequence[Row]) -> Sequence[Output]:
        return [self._run_row(row) for row in rows]

    def _run_row(self, row: Row) -> Output:
        try:
            slot = self._slot(row.slot)
            self._check_row(row, slot)
            self._states.truncate(slot, row.position)
        except (RowError, BadMessage) as error:
            return Output(slot=row.slot, error=str(error))
        try:
            return self._compute(row, slot)
        except (RuntimeError, ValueError, RowError) as error:
            # The state may be half changed: nobody must go on from it.
            self._slots[row.slot] = self._states.new()
            return Output(slot=row.slot, error=f"{error}"[:1000])

    def _check_row(self, row: Row, slot: Slot) -> None:
        """Check a row against the slot and the range.

        Raises:
            RowError: It cannot be computed here.
            BadMessage: Its tensors are not what this range takes.
        """
        if row.count < 1:
            raise RowError(f"a row of {row.count} tokens")
        if row.position > slot.end:
            raise RowError(
                f"a gap: the row starts at position {row.position}, the slot ends at {slot.end}"
            )
        if row.position + row.count > self._context:
            raise RowError(
                f"positions up to {row.position + row.count} exceed the context of {self._context}"
            )
        if self._needs_token_ids and row.token_ids is None:
            raise RowError("these layers depend on the token ids, and none came")
        if row.token_ids is not None and row.token_ids.shape != (row.count,):
            raise RowError(f"token ids {row.token_ids.shape} for {row.count} tokens")
        wants_logits = row.want in (Want.LAST_LOGITS, Want.ALL_LOGITS)
        if (wants_logits and not self._is_last) or (row.want is Want.HIDDEN and self._is_last):
            raise RowError(f"these layers do not give {row.want}")
        check_hidden(row.hidden or (), self._received, count=row.count)

    def _compute(self, row: Row, slot: Slot) -> Output:
        hidden = row.hidden or ()
        if not all(is_finite(tensor) for tensor in hidden):
            raise RowError("hidden state not finite")
        logits = self._forward(row, slot, hidden)
        self._states.advance(slot, row.count)
        match row.want:
            case Want.NOTHING:
                mx.eval(self._states.arrays(slot))
                return Output(slot=row.slot)
            case Want.HIDDEN:
                leaves = self._range.sent()
                mx.eval(leaves, self._states.arrays(slot))
                return Output(slot=row.slot, hidden=_finite(self._tensors(leaves, row.count)))
            case Want.LAST_LOGITS | Want.ALL_LOGITS:
                shape: tuple[int, ...] = (row.count, self._vocabulary_size)
                if row.want is Want.LAST_LOGITS:
                    logits, shape = logits[:, -1], shape[1:]
                logits = logits.astype(mx.float32)
                mx.eval(logits, self._states.arrays(slot))
                return Output(slot=row.slot, logits=_finite((to_tensor(logits, shape),))[0])

    def _forward(self, row: Row, slot: Slot, hidden: Hidden) -> mx.array:
        """Build the graph of a row; the logits mean nothing where the range is not the last."""
        if self._needs_token_ids and row.token_ids is not None:
            token_ids = mx.array(row.token_ids)[None]
        else:
            token_ids = mx.zeros((1, row.count), mx.int32)
        self._range.receive(hidden, row.count, last_only=row.want is Want.LAST_LOGITS)
        self._tiles.is_on = self._is_exact and row.count == 1
        logits: mx.array = self._model.module(token_ids, cache=slot.caches)
        return logits

    def _tensors(self, leaves: Sequence[mx.array], count: int) -> Hidden:
        specs = self._range.sent_specs
        shapes = [tuple(count if n == -1 else n for n in spec.shape) for spec in specs]
        return tuple(to_tensor(leaf, shape) for leaf, shape in zip(leaves, shapes, strict=True))

    def _warm_up(self) -> None:
        """Run one step in a slot of its own: what would fail later fails now, and the pattern of a
        state is known. On the last shard also find out how the head treats positions."""
        slot = self._states.new()
        hidden = tuple(
            Tensor(spec.dtype, shape, bytes(mx.zeros(shape, mlx_type(spec.dtype)).nbytes))
            for spec in self._received
            for shape in [tuple(1 if n == -1 else n for n in spec.shape)]
        )
        row = Row(
            slot=0,
            position=0,
            count=1,
            token_ids=np.zeros(1, np.int32),
            hidden=hidden or None,
            want=Want.LAST_LOGITS if self._is_last else Want.HIDDEN,
        )
        try:
            self._compute(row, slot)
        except (RuntimeError, ValueError) as error:
            raise ModelRefused(f"a first step failed: {error}") from error
        except RowError:
            pass  # Zeros may give infinities; a real state may not, and is checked.
        self._states.learn(slot)
        if self._is_last:
            self._range.can_cut_positions = self._is_head_by_position()
        # What lives now lives as long as the shard: the collector need not look at it again.
        gc.collect()
        gc.freeze()

    def _is_head_by_position(self) -> bool:
        """Whether the last position's logits depend on the last position's hidden state alone.

        True of every head seen so far; tried on random numbers, for a prompt's last chunk is much
        cheaper then.
        """
        if not self._range.is_cuttable:
            return False
        hidden = mx.random.normal((1, 3, self._range.last_leaf.shape_for(1)[2]))
        logits = []
        for part in (hidden, hidden[:, -1:]):
            self._layers.calls = _Constant(part)
            token_ids = mx.zeros((1, part.shape[1]), mx.int32)
            slot = self._states.new()
            logits.append(self._model.module(token_ids, cache=slot.caches)[:, -1])
        self._layers.calls = self._range
        return bool(mx.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3))

    # State ------------------------------------------------------------------

    def _slot(self, slot: int) -> Slot:
        if not 0 <= slot < len(self._slots):
            raise RowError(f"slot {slot} of {len(self._slots)}")
        return self._slots[slot]

    def truncate(self, slot: int, position: int) -> None:
        self._states.truncate(self._slot(slot), position)

    def snapshot(self, slot: int) -> int:
        return self._states.snapshot(self._slot(slot))

    def restore(self, slot: int, snapshot: int) -> None:
        self._states.restore(self._slot(slot), snapshot)

    def export_state(self, slot: int, start: int, end: int) -> Mapping[str, Tensor]:
        return self._states.export(self._slot(slot), start, end)

    def import_state(self, slot: int, start: int, end: int, state: Mapping[str, Tensor]) -> None:
        if end > self._context:
            raise RowError(f"positions up to {end} exceed the context of {self._context}")
        self._states.import_(self._slot(slot), start, end, state)

    def free(self, slot: int) -> None:
        self._slot(slot)
        self._slots[slot] = self._states.new()

    def close(self) -> None:
        self._slots.clear()
        self._model.read((), None)
        self._layers.calls = None
        gc.unfreeze()
        gc.collect()
        mx.clear_cache()


class _Range:
    """Runs layers [start, end) and lets everything before and after pass through."""

    def __init__(self, recording: Recording, start: int, end: int) -> None:
        self._start = start
        self._end = end
        self._output: Tree = None
        self._received: Tree = None
        self._last_only = False
        self.can_cut_positions = False
        is_last = end == recording.layer_count
        self._carried_in = recording.carried[start] if start else ()
        self._leaves_in = recording.leaves[start - 1] if start else ()
        self._tree_in = recording.trees[start - 1] if start else None
        self._carried_out = () if is_last else recording.carried[end]
        self.sent_specs = () if is_last else recording.wire_spec(end)
        self.last_leaf = recording.leaves[-1][0]
        last_shape = self.last_leaf.shape or ()
        self.is_cuttable = (
            is_last
            and isinstance(recording.trees[-1], mx.array)
            and recording.head_needs.leaves == {(recording.layer_count - 1, 0)}
            and not recording.head_needs.token_ids
            and last_shape[:2] == (1, -1)
            and len(last_shape) == 3
        )

    def receive(self, hidden: Hidden, count: int, *, last_only: bool) -> None:
        """Set what the layers before the range return in the next forward."""
        self._output = None
        self._last_only = last_only and self.can_cut_positions and count > 1
        if not self._start:
            return
        arrays: list[mx.array] = []
        carried = dict(zip(self._carried_in, hidden, strict=True))
        for index, leaf in enumerate(self._leaves_in):
            if index in carried:
                arrays.append(to_mlx(carried[index], leaf.shape_for(count)))
            elif leaf.shape is not None:
                arrays.append(mx.zeros(leaf.shape_for(count), leaf.dtype))
            else:
                arrays.append(mx.zeros((1,), leaf.dtype))
        remaining = iter(arrays)
        self._received = tree_map(
            lambda value: next(remaining) if isinstance(value, mx.array) else value, self._tree_in
        )

    def call(self, index: int, compute: Callable[[], Tree], _: Sequence[object]) -> Tree:
        if index < self._start:
            return self._received
        if index < self._end:
            self._output = compute()
            if self._last_only and index == self._end - 1:
                assert isinstance(self._output, mx.array)
                self._output = self._output[:, -1:]
        return self._output

    def sent(self) -> list[mx.array]:
        """Return the arrays that go on to the next range, and forget them."""
        arrays = [v for _, v in tree_flatten([self._output]) if isinstance(v, mx.array)]
        self._output = self._received = None
        return [arrays[index] for index in self._carried_out]


class _Constant:
    """Has every layer return one array: what is left is the head."""

    def __init__(self, array: mx.array) -> None:
        self._array = array

    def call(self, index: int, compute: Callable[[], Tree], _: Sequence[object]) -> Tree:
        return self._array


def _finite(tensors: Hidden) -> Hidden:
    """Return the tensors if all their numbers are finite.

    Raises:
        RowError: One is NaN or infinite.
    """
    if not all(is_finite(tensor) for tensor in tensors):
        raise RowError("engine output not finite")
    return tensors
