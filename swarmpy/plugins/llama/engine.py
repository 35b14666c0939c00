"""llama.cpp as an engine: GGUF models by layer range, in the types of the file.

Cheap to import; the library is opened by the first call, in the child that computes. What a file
says is read by our own reader, and the library is given a file of which we wrote the header.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from swarmpy import abc
from swarmpy.abc import Format, Inspection, Progress, Shard, Suitability
from swarmpy.environment import measured_memory_bytes
from swarmpy.errors import ConfigError, DoesNotFit, ModelRefused
from swarmpy.pipeline.fit import fit
from swarmpy.plugins.llama.architectures import Architecture, architecture_of
from swarmpy.plugins.llama.devices import find_gpus, fitting_gpu_layers, wanted_gpu_layers
from swarmpy.plugins.llama.inspection import inspect_header
from swarmpy.plugins.llama.layers import layers_of
from swarmpy.plugins.llama.library import Library, find_library, open_library
from swarmpy.plugins.llama.mapping import drop_mapped
from swarmpy.shards.gguf import GgmlType, GgufHeader, read_header
from swarmpy.shards.gguf_cut import GgufCut, cut_layers, why_undivided, write_cut

if TYPE_CHECKING:
    from swarmpy.plugins.llama.context import ContextSettings, NativeContext

THREADS_VARIABLE = "OPENBLAS_NUM_THREADS"
"""Where an engine's child is told its threads, whatever computes in it."""

THREADS_MAX = 512
"""ggml's own bound (`GGML_MAX_N_THREADS`)."""

CELLS = 256
"""Positions of a slot are reserved in multiples of this (llama.cpp's `n_ctx_seq`)."""

BATCH_EXACT_TYPES = frozenset({GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q8_0})
"""Types of matrices for which 2 to 8 sequences in one batch gave each the bits it gets alone, with
one thread. Those of F16 never did; of Q4_K from 4 sequences on and of Q6_K with 8 they did not."""

BATCH_EXACT_BUILD = "x86_64 SSE3+SSSE3+AVX+AVX2+F16C+FMA+BMI2+LLAMAFILE+OPENMP+REPACK"
"""What that was measured on; other code paths have other kernels."""


class LlamaEngine(abc.Engine):
    """Runs layer ranges of GGUF files with llama.cpp."""

    name = "llama"

    @classmethod
    def suits(cls, model_format: Format) -> Suitability | None:
        if model_format != "gguf":
            return None
        return Suitability(2, "llama.cpp computes with the weights as the file packs them")

    def inspect(self, folder: Path) -> Inspection:
        return inspect_header(_read(folder), build_id=_build_id(open_library(find_library())))

    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        library = open_library(find_library())
        header = _read(folder)
        inspection = inspect_header(header, build_id=_build_id(library))
        if slots > inspection.slots_max:
            raise DoesNotFit(f"{slots} slots asked for, {inspection.slots_max} are possible")
        for cut in (start, end):
            if 0 < cut < inspection.layer_count and cut not in inspection.cuts:
                reason = why_undivided(header) or f"only before {inspection.cuts}"
                raise ModelRefused(
                    f"{inspection.architecture} cannot be cut before layer {cut}: {reason:.500}"
                )
        if context > inspection.context_max:
            raise ModelRefused(
                f"a context of {context}, {inspection.architecture} has {inspection.context_max}"
            )
        part = cut_layers(header, start, end)
        # A slot's cells are all there from the start, in whole blocks: nothing is copied to grow.
        cells = -(-context // CELLS) * CELLS
        terms = fit(inspection, start, end, slots=slots, context=cells)
        terms = replace(terms, weights=part.fetched_bytes, growth=0)
        gpus = find_gpus(library)
        gpu_layers = wanted_gpu_layers()
        if gpu_layers is None or not gpus:
            gpu_layers = fitting_gpu_layers(
                inspection, start, end, slots=slots, context=cells, gpus=gpus
            )
        available = measured_memory_bytes()
        if available is not None and gpu_layers:
            available += sum(gpu.room_bytes for gpu in gpus if gpu.is_apart)
        if available is not None and terms.sum_bytes > available:
            raise DoesNotFit(f"{terms}, but {available} bytes are left")
        from swarmpy.plugins.llama.context import BATCH_TOKENS, ContextSettings
        from swarmpy.plugins.llama.shard import EXACT_ROWS_MIN, LlamaShard

        threads = threads_from_environment()
        is_last = end == inspection.layer_count
        native = self._load_native(
            library,
            part,
            settings=ContextSettings(
                sequences=slots, tokens=context, threads=threads, gpu_layers=gpu_layers
            ),
            gives_hidden=not is_last,
            takes_hidden=start > 0,
            architecture=architecture_of(header),
        )
        rows_min: int | None = 2
        if exact:
            is_batched = not gpu_layers and is_batch_exact(header, library, threads=threads)
            rows_min = EXACT_ROWS_MIN if is_batched else None
        exactness = [inspection.build_id, f"threads {threads}", f"ubatch {BATCH_TOKENS}"]
        if any("rope_factors" in name for name in header.tensors):
            # Which of two sets of factors is used depends on the context.
            exactness.append(f"context {context}")
        if gpu_layers:
            exactness.append(f"gpu layers {gpu_layers}")
            if len(gpus) > 1:  # How layers are shared out follows from what each has free.
                exactness += [f"{gpu.name} {gpu.free_bytes} bytes free" for gpu in gpus]
        if not exact:
            exactness.append("not exact")
        return LlamaShard(
            native,
            is_first=start == 0,
            is_last=is_last,
            slots=slots,
            context=context,
            batch_rows_min=rows_min,
            state_kind=inspection.state_kind,
            weight_bytes=part.fetched_bytes,
            exactness="; ".join(exactness),
            window_rows=_window_rows(header, start, end),
        )

    def _load_native(
        self,
        library: Library,
        part: GgufCut,
        settings: ContextSettings,
        *,
        gives_hidden: bool,
        takes_hidden: bool,
        architecture: Architecture,
    ) -> NativeContext:
        """Write the shard's file, load it, and remove it: what is mapped stays until it is closed.

        The machine's temporary folder must have room for the shard until then.
        """
        from swarmpy.plugins.llama.context import NativeContext

        with tempfile.TemporaryDirectory(prefix="swarmpy-llama-") as folder:
            path = Path(folder) / "shard.gguf"
            write_cut(part, path, self._report)
            native = NativeContext(
                library,
                path,
                settings,
                gives_hidden=gives_hidden,
                takes_hidden=takes_hidden,
                architecture=architecture,
            )
            drop_mapped(path, part.holes)
            return native

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(Progress(step="load", done=done, total=total))


def threads_from_environment() -> int:
    """Return the threads the node gave this process; one where it did not say.

    Raises:
        ConfigError: The variable is no number of threads.
    """
    text = os.environ.get(THREADS_VARIABLE, "1")
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) > 0):
        raise ConfigError(f"{THREADS_VARIABLE} is {text!r:.40}, expected a number of threads")
    return min(int(text), THREADS_MAX)


def is_batch_exact(header: GgufHeader, library: Library, *, threads: int) -> bool:
    """Whether a batch of several sequences gives each the bits it gets alone, on a CPU."""
    is_measured = all(
        len(tensor.shape) < 2 or (len(tensor.shape) == 2 and tensor.type in BATCH_EXACT_TYPES)
        for tensor in header.tensors.values()
    )
    has_keys = not any(layer.state_bytes for layer in layers_of(header))
    is_known = library.build_id.endswith(BATCH_EXACT_BUILD)
    return threads == 1 and is_measured and has_keys and is_known


def _window_rows(header: GgufHeader, start: int, end: int) -> Callable[[int], int] | None:
    """Return how many positions of so many the second cache of a state holds; None: not known.

    What picks keys by an index holds all. A window holds its length, but where it begins anew with
    each stretch of positions (llama4).
    """
    kinds = frozenset[str]().union(*(layer.kinds for layer in layers_of(header)[start:end]))
    window = header.integer(f"{header.architecture}.attention.sliding_window", 0)
    if "index" in kinds:
        return lambda count: count
    if "window" in kinds and window > 0 and header.architecture != "llama4":
        return lambda count: min(count, window)
    return None


def _read(path: Path) -> GgufHeader:
    if path.is_dir():
        raise ModelRefused(f"{path.name} is a folder; the llama engine runs GGUF files")
    return read_header(path)


def _build_id(library: Library) -> str:
    gpus = find_gpus(library) if wanted_gpu_layers() != 0 else []
    return " ".join([library.build_id, *(f"gpu {gpu.name}" for gpu in gpus)])
