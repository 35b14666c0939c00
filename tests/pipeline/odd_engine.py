"""An engine that misbehaves on demand: the first token of a row says how."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from swarmpy.abc import Engine, Inspection, Output, Progress, Row, Shard, StateKind, Want
from swarmpy.errors import ModelRefused, RowError
from swarmpy.proto.tensor import Tensor, TensorSpec

WIDTH = 8
LAYERS = 4
VOCABULARY = 100

FINE = 0
CRASH = 1
EXIT = 2
SLEEP = 3
NOT_FINITE = 4
WRONG_SHAPE = 5
WRONG_SLOT = 6


class OddShard(Shard):
    weight_bytes = 1000
    exactness = "odd"

    def __init__(self, *, is_last: bool) -> None:
        self._is_last = is_last

    def step(self, rows: Sequence[Row]) -> Sequence[Output]:
        return [self._run(row) for row in rows]

    def _run(self, row: Row) -> Output:
        what = FINE if row.token_ids is None else int(row.token_ids[0])
        match what:
            case 1:
                os.abort()
            case 2:
                print("the model does not like it", file=sys.stderr)
                os._exit(3)
            case 3:
                time.sleep(3600)
        if row.want is Want.LAST_LOGITS and self._is_last:
            numbers = np.arange(VOCABULARY, dtype=np.float32)
            return Output(slot=row.slot, logits=_tensor(numbers))
        numbers = np.full((row.count, WIDTH), row.position, np.float32)
        if what == NOT_FINITE:
            numbers[0, 0] = np.nan
        if what == WRONG_SHAPE:
            numbers = numbers[:, :-1]
        slot = row.slot + 1 if what == WRONG_SLOT else row.slot
        return Output(slot=slot, hidden=(_tensor(np.ascontiguousarray(numbers)),))

    def truncate(self, slot: int, position: int) -> None:
        raise RowError(f"cannot cut slot {slot} back to {position}")

    def snapshot(self, slot: int) -> int:
        return slot + 10

    def restore(self, slot: int, snapshot: int) -> None:
        pass

    def export_state(self, slot: int, start: int, end: int) -> Mapping[str, Tensor]:
        return {"keys": _tensor(np.arange(start, end, dtype=np.float32))}

    def import_state(self, slot: int, start: int, end: int, state: Mapping[str, Tensor]) -> None:
        if state["keys"].shape != (end - start,):
            raise RowError(f"state of {state['keys'].shape}")

    def free(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


class OddEngine(Engine):
    name = "odd"

    def inspect(self, folder: Path) -> Inspection:
        if folder.name == "refused":
            raise ModelRefused("this model asks for code to be run")
        cuts = tuple(range(1, LAYERS))
        return Inspection(
            engine="odd",
            build_id=" ".join(sorted(os.environ)),
            architecture=os.getcwd(),
            layer_count=LAYERS,
            hidden_size=WIDTH,
            vocabulary_size=VOCABULARY,
            context_max=1000,
            cuts=cuts,
            wire_specs={cut: (TensorSpec("float32", (-1, WIDTH)),) for cut in cuts},
            token_layers=(0,),
            layer_weight_bytes=(100,) * LAYERS,
            embedding_weight_bytes=10,
            head_weight_bytes=10,
            is_tied=False,
            kv_bytes_per_token=(4,) * LAYERS,
            state_bytes=(0,) * LAYERS,
            state_kind=StateKind.KV,
            slots_max=4,
            head_cost_layers=0.5,
        )

    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        if folder.name == "crashes":
            os.abort()
        if self.progress is not None:
            self.progress(Progress(step="load", done=1, total=2))
            self.progress(Progress(step="load", done=2, total=2))
        return OddShard(is_last=end == LAYERS)


def _tensor(numbers: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    return Tensor("float32", numbers.shape, numbers.tobytes())
