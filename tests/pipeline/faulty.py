"""Engines that break one promise each, for the failure tests; named as "faulty:NanEngine"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from swarmpy.abc import Inspection, Output, Row, Shard
from swarmpy.errors import EngineLost, ModelRefused
from swarmpy.proto.tensor import Tensor
from swarmpy.testing.engine import EchoEngine, EchoModel, EchoShard, inspection_of

POISON = 13
"""The token in a prompt at which a faulty engine shows its fault."""


class _Faulty(EchoEngine):
    shard_class: type[EchoShard]

    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        model = EchoModel.read(folder)
        return self.shard_class(model, start=start, end=end, slots=slots, context=context)


class _PoisonedShard(EchoShard):
    """Does something wrong with every row of a slot once it has seen 13 tokens at once."""

    def step(self, rows: Sequence[Row]) -> Sequence[Output]:
        outputs = super().step(rows)
        return [
            self.spoil(output) if row.count == POISON else output
            for row, output in zip(rows, outputs, strict=True)
        ]

    def spoil(self, output: Output) -> Output:
        raise NotImplementedError


class _NanShard(_PoisonedShard):
    def spoil(self, output: Output) -> Output:
        if output.hidden is None:
            return output
        floats = np.frombuffer(output.hidden[0].data, np.float32).copy()
        floats[-1] = np.nan
        return replace(output, hidden=(replace(output.hidden[0], data=floats.tobytes()),))


class NanEngine(_Faulty):
    """Sends a NaN on."""

    shard_class = _NanShard


class _ShapeShard(_PoisonedShard):
    def spoil(self, output: Output) -> Output:
        if output.hidden is None:
            return output
        return replace(output, hidden=(Tensor("float32", (1, 2), bytes(8)),))


class ShapeEngine(_Faulty):
    """Sends a hidden state of another shape on."""

    shard_class = _ShapeShard


class _RowShard(_PoisonedShard):
    def spoil(self, output: Output) -> Output:
        return Output(slot=output.slot, error="this row is refused")


class RowEngine(_Faulty):
    """Refuses one row."""

    shard_class = _RowShard


class _LostShard(EchoShard):
    def step(self, rows: Sequence[Row]) -> Sequence[Output]:
        if any(row.count == POISON for row in rows):
            raise EngineLost("the engine's process ended")
        return super().step(rows)


class LostEngine(_Faulty):
    """Is gone in the middle of a reply."""

    shard_class = _LostShard


class RefusingEngine(EchoEngine):
    """Inspects a model but refuses to load it."""

    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        raise ModelRefused("the tensors contradict the header")


class OtherSpecEngine(EchoEngine):
    """Carries other tensors between the same layers."""

    def inspect(self, folder: Path) -> Inspection:
        model = EchoModel.read(folder)
        other = inspection_of(EchoModel(layers=model.layers, hidden_size=model.hidden_size * 2))
        return replace(inspection_of(model), wire_specs=other.wire_specs)
