"""A child that runs GGUF models whole and in parts, and says what differs.

Its own process: llama.cpp ends it where a file or a cut does not suit it. One JSON line a check.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from llama_ring import Ring

from swarmpy.abc import Inspection, StateKind
from swarmpy.config import PREFILL_CHUNK
from swarmpy.errors import RowError
from swarmpy.plugins.llama.context import ContextSettings, NativeContext
from swarmpy.plugins.llama.engine import LlamaEngine
from swarmpy.plugins.llama.inspection import inspect_header
from swarmpy.plugins.llama.layers import layers_of
from swarmpy.plugins.llama.library import find_library, open_library
from swarmpy.plugins.llama.shard import EXACT_ROWS_MIN, LlamaShard
from swarmpy.shards.gguf import read_header

_RANDOM = np.random.default_rng(1)


def _tokens(count: int) -> list[int]:
    return [int(token) for token in _RANDOM.integers(0, 64, count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What is run, one prompt a slot, in pieces of `chunk` tokens; the first prompt is several."""

    prompts: Sequence[list[int]]
    chunk: int
    context: int


SHORT = Texts(prompts=[_tokens(count) for count in (24, 12, 5)], chunk=17, context=64)
"""The first longer than the models' windows of 8."""

ANSWER = _tokens(4)

LONG = Texts(prompts=[_tokens(count) for count in (300, 130, 70)], chunk=PREFILL_CHUNK, context=320)
"""In whole chunks, and beyond the 256 positions that llama.cpp computes attention over at once."""

Bits = list[list[bytes]]
"""By slot: the logits after the prompt, and after each token of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one check of one model; no error where it held."""

    name: str
    check: str
    error: str = ""


def check_models(
    paths: Mapping[str, Path],
    checks: Mapping[str, Sequence[str]],
    *,
    child: Path = Path(__file__),
    is_long: bool = False,
) -> dict[str, dict[str, str]]:
    """Make each model's checks, in a child process, and return the errors by model and check.

    A child that ends early is a failed check; another goes on behind it.

    Args:
        child: The program of the child.
        is_long: With `LONG` texts, not `SHORT` ones; for the child that is this file.
    """
    command = [sys.executable, str(child), *(["long"] if is_long else [])]
    found: dict[str, dict[str, str]] = {name: {} for name in checks}
    left = [(name, check) for name in checks for check in checks[name]]
    while left:
        jobs = json.dumps([[name, str(paths[name]), check] for name, check in left])
        ended = subprocess.run(command, input=jobs, capture_output=True, text=True, check=False)
        done = [Outcome(**json.loads(line)) for line in ended.stdout.splitlines()]
        if len(done) < len(left):
            name, check = left[len(done)]
            last = ended.stderr.strip().rpartition("\n")[2]
            done.append(Outcome(name=name, check=check, error=f"the process ended: {last}"))
        for outcome in done:
            found[outcome.name][outcome.check] = outcome.error
        left = left[len(done) :]
    return found


# In the child -----------------------------------------------------------------


class Model:
    """One file, what is known of it, and what the library gives for it as it is."""

    def __init__(self, path: Path, texts: Texts) -> None:
        self.path = path
        self.texts = texts
        self.inspection: Inspection = inspect_header(read_header(path), build_id="")
        header = read_header(path)
        window = header.number(f"{header.architecture}.attention.sliding_window", math.inf)
        is_left = any("window" in layer.kinds for layer in layers_of(header))
        is_left &= window < len(texts.prompts[0])
        is_recurrent = self.inspection.state_kind is StateKind.RECURRENT
        self.forgets = is_left or is_recurrent
        """Whether a state that is moved whole can only be cut back to its own end."""
        self.expected = [self._alone(prompt) for prompt in texts.prompts]

    def _alone(self, prompt: list[int]) -> list[bytes]:
        """Return the bits of one session of the whole file, none of our cuts in it."""
        tokens = self.texts.context
        settings = ContextSettings(sequences=1, tokens=tokens, threads=1, gpu_layers=0)
        library = open_library(find_library())
        native = NativeContext(library, self.path, settings, gives_hidden=False)
        found, position = [], 0
        size = self.texts.chunk
        chunks = [prompt[at : at + size] for at in range(0, len(prompt), size)]
        for chunk in [*chunks, *([token] for token in ANSWER)]:
            count = len(chunk)
            positions = np.arange(position, position + count, dtype=np.int32)
            wanted = np.arange(count) == count - 1
            logits = native.decode(np.array(chunk, np.int32), positions, [0] * count, wanted)
            assert math.isfinite(logits.std()), "the whole gives no numbers"
            assert logits.std() > 0.1, "logits all alike would be equal however they were cut"
            found.append(logits.tobytes())
            position += count
        native.close()
        return found[len(chunks) - 1 :]

    def parts(self, cuts: Sequence[int]) -> list[int]:
        return [0, *cuts, self.inspection.layer_count]

    def thirds(self) -> list[int]:
        """Return the edges of three parts, of fewer where there are no such cuts."""
        cuts = self.inspection.cuts
        return self.parts([cuts[0], cuts[-1]] if len(cuts) > 1 else cuts)

    @contextmanager
    def ring(self, edges: Sequence[int], *, slots: int) -> Iterator[Ring]:
        engine, texts = LlamaEngine(), self.texts
        slots = min(slots, self.inspection.slots_max)
        shards = [
            engine.load(
                self.path, start=start, end=end, slots=slots, context=texts.context, exact=True
            )
            for start, end in pairwise(edges)
        ]
        yield Ring(shards, texts.prompts[:slots], ANSWER, chunk=texts.chunk)
        for shard in shards:
            shard.close()


def check_whole(model: Model) -> None:
    """Layers 0 to the last as one part: what there is where a model cannot be cut."""
    assert_given(model, model.parts([]))


def check_two(model: Model) -> None:
    cuts = model.inspection.cuts
    assert_given(model, model.parts([cuts[len(cuts) // 2]]))


def check_three(model: Model) -> None:
    assert_given(model, model.thirds())


def check_every(model: Model) -> None:
    """A part between each cut and the next."""
    assert_given(model, model.parts(model.inspection.cuts))


def assert_given(model: Model, edges: Sequence[int]) -> None:
    with model.ring(edges, slots=1) as ring:
        given = [ring.prompt(0), *ring.reply(0)]
    assert given == model.expected[0], f"other logits when cut at {edges}"


def check_sessions(model: Model) -> None:
    """Prompts beside each other, then all their answers in the same steps; whole, and in parts."""
    for edges in (model.parts([]), model.thirds()):
        with model.ring(edges, slots=len(model.texts.prompts)) as ring:
            after_prompts = [ring.prompt(slot) for slot in range(len(ring.prompts))]
            ends = {slot: len(prompt) for slot, prompt in enumerate(ring.prompts)}
            answers = ring.replies(ends)
        for slot, after_prompt in enumerate(after_prompts):
            given = [after_prompt, *answers[slot]]
            assert given == model.expected[slot], f"slot {slot} is disturbed in {edges}"


def check_batch(model: Model) -> None:
    """As many sessions in one step as are batched, each with the bits it gives alone.

    For models of which the engine batches exact steps: those of types that were measured.
    """
    slots, prompts = 2 * EXACT_ROWS_MIN, model.texts.prompts
    with model.ring(model.thirds(), slots=slots) as ring:
        ring.prompts = [prompts[slot % len(prompts)] for slot in range(slots)]
        for slot in range(slots):
            ring.prompt(slot)
        answers = ring.replies({slot: len(prompt) for slot, prompt in enumerate(ring.prompts)})
    for slot in range(slots):
        expected = model.expected[slot % len(prompts)][1:]
        assert answers[slot] == expected, f"slot {slot} is disturbed"


def check_back(model: Model) -> None:
    """Cut back, into the prompt too, and restored; refused where the state does not bear it."""
    is_recurrent = model.inspection.state_kind is StateKind.RECURRENT
    chunk = model.texts.chunk
    with model.ring(model.thirds(), slots=2) as ring:
        ring.prompt(0)
        kept = [shard.snapshot(0) for shard in ring.shards]
        ring.reply(0)
        if is_recurrent:
            assert all(refuses_to_cut(shard, 0, chunk) for shard in ring.shards)
        else:
            assert ring.reply(0) == model.expected[0][1:], "cut back behind the prompt"
            again = [ring.prompt(0, position=chunk), *ring.reply(0)]
            assert again == model.expected[0], "cut back into the prompt"
        ring.step({0: model.texts.prompts[1][:chunk]}, {0: 0})
        for shard, number in zip(ring.shards, kept, strict=True):
            shard.restore(0, number)
        assert ring.reply(0) == model.expected[0][1:], "restored"


def refuses_to_cut(shard: object, slot: int, position: int) -> bool:
    assert isinstance(shard, LlamaShard)
    try:
        shard.truncate(slot, position)
    except RowError:
        return True
    return False


def check_move(model: Model) -> None:
    """Into another slot of another ring, in two ranges where that is borne."""
    edges, chunk, prompt = model.thirds(), model.texts.chunk, model.texts.prompts[0]
    with model.ring(edges, slots=3) as ring, model.ring(edges, slots=2) as other:
        target = len(other.prompts) - 1
        ring.prompt(0)
        end = len(prompt)
        for source, shard in zip(ring.shards, other.shards, strict=True):
            assert isinstance(source, LlamaShard)
            ranges = [(0, chunk), (chunk, end)] if source.moves_in_ranges else [(0, end)]
            for start, stop in ranges:
                shard.import_state(target, start, stop, source.export_state(0, start, stop))
        moved = other.replies({target: end})[target]
        for shard in other.shards:
            assert isinstance(shard, LlamaShard)
            is_whole = not shard.moves_in_ranges and model.forgets
            assert refuses_to_cut(shard, target, chunk) is is_whole
        if not model.forgets or all(shard.moves_in_ranges for shard in other.shards):
            other.prompts[target] = prompt
            again = [other.prompt(target, position=chunk), *other.reply(target)]
            assert again == model.expected[0], "cut back after a move"
    assert moved == model.expected[0][1:], "moved"


def check_memory(model: Model) -> None:
    """The bytes a state has of each token, and whatever its length, are those that are planned."""
    inspection = model.inspection
    for edges, slots in ((model.thirds(), 2), (model.parts(inspection.cuts), 1)):
        with model.ring(edges, slots=slots) as ring:
            for shard, (start, end) in zip(ring.shards, pairwise(edges), strict=True):
                assert isinstance(shard, LlamaShard)
                planned = (
                    sum(inspection.kv_bytes_per_token[start:end]),
                    sum(inspection.state_bytes[start:end]),
                )
                found = shard.state_sizes
                assert found == planned, f"[{start}, {end}) has {found}, planned {planned}"


CHECKS: Mapping[str, Callable[[Model], None]] = {
    "whole": check_whole,
    "two": check_two,
    "three": check_three,
    "every": check_every,
    "sessions": check_sessions,
    "batch": check_batch,
    "back": check_back,
    "move": check_move,
    "memory": check_memory,
}


if __name__ == "__main__":
    texts = LONG if sys.argv[1:] == ["long"] else SHORT
    models: dict[str, Model] = {}
    for name, path, check in json.load(sys.stdin):
        error = ""
        try:
            if name not in models:
                models = {name: Model(Path(path), texts)}
            CHECKS[check](models[name])
        except Exception:  # noqa: BLE001 - whatever it is, it is the outcome
            error = traceback.format_exc().strip()
        print(json.dumps(asdict(Outcome(name=name, check=check, error=error))), flush=True)
