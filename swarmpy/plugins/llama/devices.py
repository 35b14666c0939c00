"""GPUs that the library sees, and how many layers of a shard they hold.

The pinned wheel sees none on Linux and Metal's on a Mac; builds of the same version for CUDA, ROCm
or Vulkan (`SWARMPY_LLAMA_LIBRARY`) see theirs. llama.cpp puts the head on GPUs first, as if it were
one layer more, and then layers from the last on; what is left is computed on the CPU.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from ctypes import c_int, c_size_t, c_void_p
from dataclasses import dataclass

from swarmpy.abc import Inspection
from swarmpy.errors import ConfigError
from swarmpy.pipeline.fit import fit
from swarmpy.plugins.llama.library import Library

GPU_LAYERS_VARIABLE = "SWARMPY_LLAMA_GPU_LAYERS"
"""Environment: layers of a shard that are put on GPUs; unset: as many as fit."""

GPU_LAYERS_MAX = 4096

GPU_SHARE = 0.9
"""Part of a GPU's free memory that is counted on: drivers and kernels take some of it later."""

_DISCRETE, _INTEGRATED = 1, 2
"""Of `ggml_backend_dev_type`. Metal's are told as the first, and share the machine's memory too."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as the library describes it."""

    name: str
    """Its model, "NVIDIA H200": two with one name compute alike."""
    free_bytes: int
    is_apart: bool = True
    """Whether its memory is its own, and not the machine's."""

    @property
    def room_bytes(self) -> int:
        """What is counted on."""
        return int(self.free_bytes * GPU_SHARE)


def find_gpus(library: Library) -> list[Gpu]:
    """Return the GPUs that the library computes on, in its order."""
    native = library.native
    native.ggml_backend_dev_count.restype = c_size_t
    native.ggml_backend_dev_get.restype = c_void_p
    native.ggml_backend_dev_get.argtypes = (c_size_t,)
    native.ggml_backend_dev_type.restype = c_int
    native.ggml_backend_dev_type.argtypes = (c_void_p,)
    native.ggml_backend_dev_description.restype = ctypes.c_char_p
    native.ggml_backend_dev_description.argtypes = (c_void_p,)
    native.ggml_backend_dev_memory.restype = None
    native.ggml_backend_dev_memory.argtypes = (
        c_void_p,
        ctypes.POINTER(c_size_t),
        ctypes.POINTER(c_size_t),
    )
    gpus = []
    for index in range(native.ggml_backend_dev_count()):
        device = native.ggml_backend_dev_get(index)
        kind = native.ggml_backend_dev_type(device)
        if kind in (_DISCRETE, _INTEGRATED):
            free, total = c_size_t(), c_size_t()
            native.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            name = (native.ggml_backend_dev_description(device) or b"").decode("utf-8", "replace")
            is_apart = kind == _DISCRETE and sys.platform != "darwin"
            gpus.append(Gpu(name, free.value, is_apart))
    return gpus


def wanted_gpu_layers(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return how many layers go to GPUs by the settings; None: as many as fit.

    Raises:
        ConfigError: The variable is no number.
    """
    text = environment.get(GPU_LAYERS_VARIABLE, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 8):
        raise ConfigError(f"{GPU_LAYERS_VARIABLE} is {text!r:.40}, expected a number of layers")
    return min(int(text), GPU_LAYERS_MAX)


def fitting_gpu_layers(
    inspection: Inspection, start: int, end: int, *, slots: int, context: int, gpus: Sequence[Gpu]
) -> int:
    """Return what `n_gpu_layers` is for layers [start, end): what the GPUs hold, slots included.

    That is the head, counted in shards without one too, and layers from the end; 0 where not even
    one fits with it. A layer lies on one GPU, so the room of one layer is not counted on of each
    GPU beyond the first.
    """
    if not gpus:
        return 0
    terms = [
        fit(inspection, layer, layer + 1, slots=slots, context=context)
        for layer in range(start, end)
    ]
    layers = [
        inspection.layer_weight_bytes[start + index] + term.slots
        for index, term in enumerate(terms)
    ]
    largest = max(layers)
    room = sum(gpu.room_bytes for gpu in gpus) - (len(gpus) - 1) * largest
    room -= len(gpus) * (terms[0].activations + terms[-1].logits)
    if end == inspection.layer_count:
        room -= inspection.head_weight_bytes
    held = sum(needed <= room for needed in itertools.accumulate(reversed(layers)))
    return held + 1 if held else 0
