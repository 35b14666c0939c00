"""A child that makes models deeper by layers of zeros, and says what logits they give.

Such a layer adds nothing, so logits stay as they are unless the library looks at the depth. Its own
process, since llama.cpp ends it where metadata does not suit it. One JSON line a depth.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from gguf_architectures import Value
from gguf_models import metadata_of, random_tensor, wanted_tensors, write_gguf

from swarmpy.plugins.llama.context import ContextSettings, NativeContext
from swarmpy.plugins.llama.library import Library, find_library, open_library
from swarmpy.shards.gguf import GgmlType, read_header
from swarmpy.shards.gguf_cut import is_separable

LAYERS = 4
"""Of random numbers, at the front; a model's pattern of layers is no longer."""

FACTOR = "layer_output_scale"
"""What a layer's whole output is multiplied by must be 1, to let the rest through."""

DIVISORS = ("ffn_act", "ffn.act", "ffn_gate_inp_shexp", ".ffn_norm.weight")
"""Tensors by which, or by whose products, the library divides; what it divides is 0."""

BASE = 13
"""The depth that others are compared with."""


def differing_depths(names: Iterable[str], depths: Iterable[int]) -> dict[str, str]:
    """Return, by model, at which depths logits differ where parts are allowed, or do not where not.

    In child processes; empty where all is as the cuts have it.
    """
    return {name: _differing(name, [BASE, *depths]) for name in names}


def _differing(name: str, depths: list[int]) -> str:
    child = subprocess.run(
        [sys.executable, __file__, name, json.dumps(depths)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = map(json.loads, child.stdout.splitlines())
    found = {depth: (digest, is_alike) for depth, digest, is_alike in lines}
    if len(found) < len(set(depths)):
        return f"the process ended: {child.stderr.strip().rpartition(chr(10))[2]}"
    wrong = [
        depth
        for depth, (digest, is_alike) in found.items()
        if (digest == found[BASE][0]) is not is_alike
    ]
    return f"at depths {wrong}" if wrong else ""


# In the child -----------------------------------------------------------------


def metadata_at(name: str, depth: int) -> dict[str, Value]:
    """Return a model's metadata at another depth, its arrays repeated."""
    metadata, family = metadata_of(name), name.partition("+")[0]
    layers = metadata[f"{family}.block_count"]
    for key, value in metadata.items():
        if not isinstance(value, (str, bool, int, float)) and len(value) == layers:
            metadata[key] = [value[index % len(value)] for index in range(depth)]  # type: ignore[assignment]
    return metadata | {f"{family}.block_count": depth}


def write_deep(library: Library, path: Path, name: str, depth: int) -> None:
    """Write a model of which only the first layers are not zeros."""
    metadata = metadata_at(name, depth)
    write_gguf(path, metadata, {})
    tensors = {}
    for tensor, shape in wanted_tensors(library, path).items():
        made = random_tensor(tensor, shape, GgmlType.F16)
        is_divisor = any(mark in tensor for mark in DIVISORS)
        if tensor.startswith("blk.") and int(tensor.split(".")[1]) >= LAYERS and not is_divisor:
            is_factor = FACTOR in tensor
            raw = np.full(made.shape, is_factor, np.float32).tobytes()[: len(made.raw)]
            made = type(made)(made.type, made.shape, raw)
        tensors[tensor] = made
    write_gguf(path, metadata, tensors)


def digest_of(library: Library, path: Path) -> str:
    settings = ContextSettings(sequences=1, tokens=64, threads=1, gpu_layers=0)
    native = NativeContext(library, path, settings, gives_hidden=False)
    ids = np.random.default_rng(1).integers(0, native.vocabulary_size, 20, np.int32)
    logits = native.decode(ids, np.arange(20, dtype=np.int32), [0] * 20, np.ones(20, np.bool_))
    native.close()
    assert np.isfinite(logits).all(), path
    assert logits.std() > 0.1, path
    return hashlib.sha256(logits.tobytes()).hexdigest()


if __name__ == "__main__":
    opened = open_library(find_library())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_deep(opened, file, sys.argv[1], BASE)
        base = read_header(file)
        for depth in json.loads(sys.argv[2]):
            write_deep(opened, file, sys.argv[1], depth)
            is_alike = is_separable(base, depth, layers=BASE)
            print(json.dumps([depth, digest_of(opened, file), is_alike]), flush=True)
