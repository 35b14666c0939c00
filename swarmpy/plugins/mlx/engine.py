"""MLX as an engine: any architecture that mlx-lm ships, by layer range, with no code for any one.

This module is cheap to import; MLX is imported by the first call, in the child that computes.
"""

from __future__ import annotations

import atexit
import platform
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from swarmpy import abc
from swarmpy.abc import Format, Inspection, Shard, Suitability
from swarmpy.config import SESSIONS_MAX
from swarmpy.environment import measured_memory_bytes
from swarmpy.errors import DoesNotFit
from swarmpy.pipeline.fit import fit

if TYPE_CHECKING:
    from swarmpy.plugins.mlx.models import OpenModel
    from swarmpy.plugins.mlx.recording import Layers, Recording


@dataclass(frozen=True, slots=True)
class _Opened:
    """A model that a load may use as it was inspected."""

    state: object
    """Of its files, when they were opened."""
    model: OpenModel
    layers: Layers
    recording: Recording


class MlxEngine(abc.Engine):
    """Runs layer ranges with MLX."""

    name = "mlx"

    @classmethod
    def suits(cls, model_format: Format) -> Suitability | None:
        if sys.platform == "darwin" and platform.machine() == "arm64":
            return Suitability(3, "MLX computes on the GPU of this Mac")
        if model_format == "safetensors":
            return Suitability(2, "MLX runs folders of safetensors")
        return Suitability(1, "MLX unpacks the weights and computes in float32")

    def __init__(self) -> None:
        self._opened: _Opened | None = None

    def inspect(self, folder: Path) -> Inspection:
        model, _, recording = self._open(folder)
        return describe(model, recording, build_id=_build_id(model))

    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        from swarmpy.plugins.mlx import blas
        from swarmpy.plugins.mlx.shard import MlxShard

        inspection = self.inspect(folder)
        if slots > inspection.slots_max:
            raise DoesNotFit(
                f"{slots} slots asked for, but {inspection.architecture} runs "
                f"{inspection.slots_max} session at a time"
            )
        model, layers, recording = self._open(folder)
        parameters = model.parameters()
        weights = sum(parameters[name].nbytes for name in recording.needs(start, end).parameters)
        terms = replace(fit(inspection, start, end, slots=slots, context=context), weights=weights)
        available = measured_memory_bytes()
        if available is not None and terms.sum_bytes > available:
            raise DoesNotFit(f"{terms}, but {available} bytes are left")
        threads = blas.set_threads_from_environment()
        # A shard changes the model: it cannot be loaded from a second time.
        self._opened = None
        return MlxShard(
            model,
            layers,
            recording,
            start=start,
            end=end,
            slots=slots,
            context=context,
            exact=exact,
            build_id=f"{inspection.build_id} threads {threads}",
            progress=self.progress,
        )

    def _open(self, path: Path) -> tuple[OpenModel, Layers, Recording]:
        """Open and record a model, or return the one opened last if no file of it has changed."""
        from swarmpy.plugins.mlx.models import files_state, open_model, refuse_failures
        from swarmpy.plugins.mlx.recording import Layers, record

        state = files_state(path)
        if self._opened is None or self._opened.state != state:
            self._opened = None
            _prepare()
            model = open_model(path)
            layers = Layers(model.module)
            recording = refuse_failures(model.architecture, partial(record, model.module, layers))
            self._opened = _Opened(state, model, layers, recording)
        return self._opened.model, self._opened.layers, self._opened.recording


def describe(model: OpenModel, recording: Recording, *, build_id: str) -> Inspection:
    """Return what the contract wants to know of a recorded model."""
    from swarmpy.plugins.mlx.state import state_kind

    sizes = {name: array.nbytes for name, array in model.parameters().items()}
    count = recording.layer_count
    first = recording.layer_needs[0].parameters - recording.own_parameters[0]
    head = recording.head_needs.parameters
    layer_bytes = tuple(
        sum(sizes[name] for name in (needs.parameters - first if index == 0 else needs.parameters))
        for index, needs in enumerate(recording.layer_needs)
    )
    token_layers = {i for i, needs in enumerate(recording.layer_needs) if needs.token_ids}
    if recording.head_needs.token_ids:
        token_layers.add(count - 1)
    head_bytes = sum(sizes[name] for name in head)
    last_shape = recording.leaves[-1][0].shape
    return Inspection(
        engine="mlx",
        build_id=build_id,
        architecture=model.architecture,
        layer_count=count,
        hidden_size=last_shape[-1] if last_shape else 0,
        vocabulary_size=recording.vocabulary_size,
        context_max=model.context_max,
        cuts=tuple(sorted(recording.carried)),
        wire_specs={cut: recording.wire_spec(cut) for cut in sorted(recording.carried)},
        token_layers=tuple(sorted(token_layers | {0})),
        layer_weight_bytes=layer_bytes,
        embedding_weight_bytes=sum(sizes[name] for name in first),
        head_weight_bytes=head_bytes,
        is_tied=bool(first & head),
        kv_bytes_per_token=_by_layer(recording, 0),
        state_bytes=_by_layer(recording, 1),
        state_kind=state_kind(recording.cache_kinds),
        slots_max=1 if recording.keeps_state_itself else SESSIONS_MAX,
        head_cost_layers=head_bytes / max(1.0, sum(layer_bytes) / count),
    )


def _by_layer(recording: Recording, index: int) -> tuple[int, ...]:
    return tuple(
        sum(recording.cache_bytes[number][index] for number in used) for used in recording.caches
    )


def _build_id(model: OpenModel) -> str:
    from swarmpy.plugins.mlx import blas
    from swarmpy.plugins.mlx.models import versions

    return f"{versions()} {platform.machine()} {model.dtype} {blas.bind_openblas().name}"


@cache
def _prepare() -> None:
    """Set MLX up for this process, once."""
    import mlx.core as mx

    # It would run the system's C++ compiler, and no gain was measured.
    mx.disable_compile()
    # A process may abort at its end while a stream's thread still waits for work.
    atexit.register(mx.clear_streams)
