"""Opens a model's files as an mlx-lm model whose weights are still on the disk.

A model is data: only architectures that mlx-lm ships are built, and nothing in the model's folder
is ever imported. Parameters are lazy until a shard reads the ones it needs, each cast on the way to
the type that is computed in: float32 on CPUs, where half and quantised types are 8 to 40 times
slower.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm import utils as mlx_lm_utils

from swarmpy.abc import Progress
from swarmpy.errors import ModelRefused
from swarmpy.shards.gguf import GgufHeader, dequantize
from swarmpy.shards.gguf import read_header as read_gguf_header
from swarmpy.shards.llama import llama_config
from swarmpy.shards.manifest import state_of
from swarmpy.shards.refusals import check_folder
from swarmpy.shards.safetensors import read_folder, tensor_bytes, tensor_files

T = TypeVar("T")

BROKEN_ON_CPU = {
    "bitnet": "needs Metal kernels",
    "phi3small": "corrupts memory in MLX on CPUs",
}
"""Model types that MLX cannot run on a CPU, and why."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
"""Where configurations state their longest sequence, by frequency."""

CONTEXT_UNSTATED = 1 << 20
"""Longest sequence where none is stated: recurrent models have no limit of their own."""

GGUF_NAMES = (
    ("blk.", "model.layers."),
    ("ffn_gate.", "mlp.gate_proj."),
    ("ffn_down.", "mlp.down_proj."),
    ("ffn_up.", "mlp.up_proj."),
    ("attn_q.", "self_attn.q_proj."),
    ("attn_k.", "self_attn.k_proj."),
    ("attn_v.", "self_attn.v_proj."),
    ("attn_output.", "self_attn.o_proj."),
    ("attn_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("token_embd.", "model.embed_tokens."),
    ("output_norm.", "model.norm."),
)
"""llama.cpp's tensor names and mlx-lm's, for architecture llama."""


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model that can be called, whose parameters are read only where a shard needs them."""

    module: nn.Module
    architecture: str
    context_max: int
    dtype: str
    """What is computed in, for the exactness class: "float32", or "mixed" where the model's own."""
    _read: Callable[[str], mx.array | None]

    def parameters(self) -> dict[str, mx.array]:
        """Return the parameters by name, lazy where they were not read."""
        return dict(tree_flatten(self.module.parameters()))

    def read(self, names: Sequence[str], progress: Callable[[Progress], None] | None) -> int:
        """Bring parameters into memory, one at a time, and let go of all others.

        Returns:
            The bytes they take.
        """
        parameters = self.parameters()
        wanted = set(names)
        total = sum(parameters[name].nbytes for name in wanted)
        stand_ins = {
            name: mx.zeros(array.shape, array.dtype)
            for name, array in parameters.items()
            if name not in wanted
        }
        self.module.update(tree_unflatten(list(stand_ins.items())))
        del stand_ins
        done = 0
        for name in names:
            array = self._read(name)
            if array is None:
                array = parameters[name]
            else:
                self.module.update(tree_unflatten([(name, array)]))
            mx.eval(array)
            done += array.nbytes
            del parameters[name]
            if progress is not None:
                progress(Progress(step="load", done=done, total=total))
        return total


def files_state(path: Path) -> object:
    """Return what changes when a file that `open_model` reads does.

    Raises:
        ModelRefused: A file is missing.
    """
    files = [path / "config.json", *tensor_files(path)] if path.is_dir() else [path]
    return [(file, state_of(file)) for file in files]


def open_model(path: Path) -> OpenModel:
    """Build a model from a folder of safetensors or a GGUF file, reading only headers.

    Raises:
        ModelRefused: Its files ask for code to be run, contradict themselves, or are of a type that
            mlx-lm does not ship or cannot run here.
    """
    if path.is_dir():
        return _open_folder(path)
    return _open_gguf(path)


def _open_folder(folder: Path) -> OpenModel:
    config = check_folder(folder)
    model_type = _check_model_type(config)
    read_folder(folder)
    # A folder with nothing in it but what was checked: mlx-lm reads whatever else it finds.
    with tempfile.TemporaryDirectory() as name:
        view = Path(name)
        (view / "config.json").write_text(json.dumps(config), "utf-8")
        for number, file in enumerate(tensor_files(folder)):
            (view / f"model-{number:05}.safetensors").symlink_to(file.resolve())
        module, _ = refuse_failures(
            model_type, partial(mlx_lm_utils.load_model, view, lazy=True, strict=True)
        )
    return OpenModel(
        _in_computed_type(module), model_type, _context_max(config), _dtype_name(), _read_nothing
    )


def _read_nothing(_: str) -> None:
    """Safetensors need no reading of ours: MLX's lazy arrays read their own ranges."""


# GGUF -----------------------------------------------------------------------


def _open_gguf(path: Path) -> OpenModel:
    header = read_gguf_header(path)
    config = llama_config(header)
    from mlx_lm.models import llama

    def build() -> nn.Module:
        module: nn.Module = llama.Model(llama.ModelArgs.from_dict(config))
        stand_ins = [(_mlx_name(name), mx.zeros(t.shape)) for name, t in header.tensors.items()]
        module.load_weights(stand_ins, strict=True)
        module.eval()
        return module

    module = refuse_failures("llama", build)
    return OpenModel(
        module, "llama", _context_max(config), "float32", partial(_read_gguf, header, config)
    )


def _mlx_name(name: str) -> str:
    if name.startswith("output."):
        return "lm_head." + name.removeprefix("output.")
    for theirs, ours in GGUF_NAMES:
        name = name.replace(theirs, ours)
    return name


def _read_gguf(header: GgufHeader, config: Mapping[str, object], name: str) -> mx.array:
    """Read one parameter's tensor and return its numbers in float32, in mlx-lm's order."""
    tensor = next(t for t in header.tensors.values() if _mlx_name(t.name) == name)
    numbers = dequantize(tensor_bytes(tensor), tensor.type, tensor.shape)
    for part, heads_key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f".self_attn.{part}." in name:
            heads = config[heads_key]
            assert isinstance(heads, int)
            # llama.cpp interleaves the two rotary halves of each head.
            halves = numbers.reshape(heads, -1, 2, *numbers.shape[1:])
            numbers = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(numbers.shape)
    return mx.array(numbers)


# Checks ---------------------------------------------------------------------


def _check_model_type(config: Mapping[str, object]) -> str:
    """Return the model type if mlx-lm ships it; it becomes part of a module's name.

    Raises:
        ModelRefused: It does not, or it cannot run here.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelRefused("config.json names no model_type")
    folder = Path(mlx_lm_utils.__file__).parent / "models"
    shipped = {file.stem for file in folder.glob("*.py")}
    module_name = mlx_lm_utils.MODEL_REMAPPING.get(model_type, model_type)
    if module_name not in shipped or module_name.startswith("_"):
        raise ModelRefused(f"model type {model_type!r:.60} is none that mlx-lm ships")
    if mx.default_device() == mx.cpu and module_name in BROKEN_ON_CPU:
        raise ModelRefused(f"model type {model_type!r} {BROKEN_ON_CPU[module_name]}")
    return model_type


def refuse_failures(model_type: str, build: Callable[[], T]) -> T:
    """Build or try a model; whatever mlx-lm does not like about the files is the files' fault.

    Raises:
        ModelRefused: It failed.
    """
    try:
        return build()
    except ModelRefused:
        raise
    except (Exception, SystemExit) as error:
        # SystemExit too: one shipped module ends the process where its package is missing.
        what = f"{type(error).__name__}: {error}"
        raise ModelRefused(f"mlx-lm cannot build this {model_type}: {what:.500}") from error


def _context_max(config: Mapping[str, object]) -> int:
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in CONTEXT_KEYS:
                value = part.get(key)
                if isinstance(value, int) and value > 0:
                    return value
    return CONTEXT_UNSTATED


# Types ----------------------------------------------------------------------


def _in_computed_type(module: nn.Module) -> nn.Module:
    """On a CPU, make every parameter float32, lazily, quantised ones included."""
    if mx.default_device() != mx.cpu:
        return module
    _cast_parameters(module)
    module = mlx_lm_utils.dequantize_model(module)
    _cast_parameters(module)
    return module


def _cast_parameters(module: nn.Module) -> None:
    def cast(array: mx.array) -> mx.array:
        return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array

    module.update(tree_map(cast, module.parameters()))


def _dtype_name() -> str:
    return "float32" if mx.default_device() == mx.cpu else "mixed"


def versions() -> str:
    """Return the versions of MLX and mlx-lm, for the exactness class."""
    names = ("mlx", "mlx-lm")
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
