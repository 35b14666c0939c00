"""A child that quantises GGUF models and runs a token through what came of each.

Its own process: llama.cpp ends it over a tensor of a type that it does not expect. One JSON line a
model, as of `llama_cuts`, whose parent starts it.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import numpy as np
from llama_cuts import Outcome
from shard_rows import run

from swarmpy.plugins.llama.engine import LlamaEngine
from swarmpy.plugins.llama.file_types import file_type
from swarmpy.plugins.llama.inspection import inspect_header
from swarmpy.plugins.llama.library import find_library, open_library
from swarmpy.plugins.llama.quantize_child import Converter, write_quantised
from swarmpy.plugins.llama.quantized_file import quantized_file
from swarmpy.shards.gguf import read_header


def quantised_path(model: Path, target: str) -> Path:
    """Where the quantised model lies."""
    return model.with_name(f"{model.name}.{target}")


def quantise(model: Path, target: str, converter: Converter) -> Path:
    path = quantised_path(model, target)
    planned = quantized_file(read_header(model), file_type(target), derived_from="5" * 64)
    write_quantised(planned, path, converter, threads=1, report=lambda done, total: None)
    return path


def run_once(model: Path) -> None:
    end = inspect_header(read_header(model), build_id="").layer_count
    shard = LlamaEngine().load(model, start=0, end=end, slots=1, context=8, exact=False)
    logits = run(shard, [1], 0)
    shard.close()
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


if __name__ == "__main__":
    converter = Converter(open_library(find_library()))
    for name, path, target in json.load(sys.stdin):
        error = ""
        try:
            run_once(quantise(Path(path), target, converter))
        except Exception:  # noqa: BLE001 - whatever it is, it is the outcome
            error = traceback.format_exc().strip()
        print(json.dumps(asdict(Outcome(name=name, check=target, error=error))), flush=True)
