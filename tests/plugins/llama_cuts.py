"""A child that runs GGUF models whole and in parts, and says whether both give the same bits.

Its own process: llama.cpp ends it where a file or a cut does not suit it. One JSON line a cut.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from swarmpy.plugins.llama.context import ContextSettings, Floats, NativeContext
from swarmpy.plugins.llama.library import Library, find_library, open_library
from swarmpy.shards.gguf import read_header
from swarmpy.shards.gguf_cut import cut_layers, layer_count, write_cut

CHUNKS = (17, 7, 1, 1, 1, 1)
"""Tokens of each step: a prompt of 24 in two chunks, then four tokens one by one."""

SETTINGS = ContextSettings(sequences=1, tokens=64, threads=1, gpu_layers=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one way to cut one model."""

    name: str
    edges: list[int]
    is_equal: bool
    spread: float
    """Standard deviation of the whole's logits; not a number where one of them is none."""
    error: str = ""


def compare(
    paths: Mapping[str, Path], edges: Mapping[str, Sequence[Sequence[int]]]
) -> list[Outcome]:
    """Run each model whole and cut at each of its lists of edges, in a child process.

    A child that ends early is a failed outcome of the model it was at; another goes on behind it.
    """
    outcomes: list[Outcome] = []
    left = [(name, list(cut)) for name in edges for cut in edges[name]]
    while left:
        jobs = json.dumps([[name, str(paths[name]), cut] for name, cut in left])
        child = subprocess.run(
            [sys.executable, __file__], input=jobs, capture_output=True, text=True, check=False
        )
        done = [Outcome(**json.loads(line)) for line in child.stdout.splitlines()]
        outcomes += done
        left = left[len(done) :]
        if left:
            name, cut = left.pop(0)
            last = child.stderr.strip().rpartition("\n")[2]
            failed = Outcome(name=name, edges=cut, is_equal=False, spread=0.0, error=last)
            outcomes.append(failed)
    return outcomes


def logits_of(library: Library, parts: Iterable[tuple[Path, bool]]) -> Floats:
    """Return the logits after the first chunk, of each token of the second, and of each step.

    Args:
        parts: Files in order, and whether each gives hidden states.
    """
    contexts = [
        NativeContext(library, path, SETTINGS, gives_hidden=gives_hidden)
        for path, gives_hidden in parts
    ]
    ids = np.random.default_rng(1).integers(0, contexts[-1].vocabulary_size, sum(CHUNKS), np.int32)
    found = []
    position = 0
    for number, count in enumerate(CHUNKS):
        values: Floats = ids[position : position + count]
        positions = np.arange(position, position + count, dtype=np.int32)
        wanted = np.full(count, number > 0)
        wanted[-1] = True
        for context in contexts:
            values = context.decode(values, positions, [0] * count, wanted)
        found.append(values)
        position += count
    for context in contexts:
        context.close()
    return np.concatenate(found)


def run(library: Library, name: str, path: Path, edges: list[int], folder: Path) -> Outcome:
    header = read_header(path)
    layers = layer_count(header)
    parts = []
    for start, end in pairwise(edges):
        part = folder / f"{start}-{end}.gguf"
        write_cut(cut_layers(header, start, end), part)
        parts.append((part, end < layers))
    whole = logits_of(library, [(path, False)])
    split = logits_of(library, parts)
    return Outcome(
        name=name,
        edges=edges,
        is_equal=whole.tobytes() == split.tobytes(),
        spread=float(whole.std()),
    )


if __name__ == "__main__":
    opened = open_library(find_library())
    for name, path, edges in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(opened, name, Path(path), edges, Path(folder))
        print(json.dumps(asdict(outcome)), flush=True)
