"""What a model is worth on this machine: how well it predicts a text of ours, and how fast.

Perplexity is the exponential of the mean loss (natural logarithm) over tokens of `data/prose.txt`.
The text is cut into windows of 512 tokens (fewer where the model's context is shorter), each with
nothing before it but the vocabulary's bos token where it wants one, and only the second half of a
window is scored, so that every scored token has at least half a window to go by. Two models of one
vocabulary are compared token by token: most of the spread is the text's, and cancels.

Speeds are those inside the engine's own step, of a prompt of 128 tokens in chunks of 64 and of 48
tokens one by one (fewer where a context is shorter); the median of three rounds, after the
perplexity has warmed everything up. Models take turns in each round, so that what else the machine
does meets them alike.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import trio

from swarmpy.abc import Inspection, Output, Progress, Row, Want
from swarmpy.config import PREFILL_CHUNK, EngineConfig
from swarmpy.errors import DoesNotFit, ExtensionNotFound, ModelRefused, RowError, SwarmError
from swarmpy.pipeline.engine_host import EngineHost, HostedShard
from swarmpy.shards.gguf import read_header
from swarmpy.shards.tokenizer_files import tokenizer_json

WINDOW_TOKENS = 512
PROMPT_TOKENS = 128
REPLY_TOKENS = 48
ROUNDS = 3

ENGINE = "swarmpy.plugins.llama:LlamaEngine"

Losses = npt.NDArray[np.float64]

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokens:
    """A text in a model's vocabulary."""

    ids: Sequence[int]
    start: Sequence[int]
    """What the vocabulary puts before every text: its bos token, or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of one model."""

    losses: Losses
    """Of each scored token, in nats; none where there was no text in the model's vocabulary."""
    prefill_tok_s: float
    decode_tok_s: float

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss; not a number where nothing was scored."""
        return math.exp(float(self.losses.mean())) if self.losses.size else math.nan

    @property
    def perplexity_error(self) -> float:
        """Its standard error, from the spread of the losses."""
        return self.perplexity * _mean_error(self.losses)


def perplexity_ratio(before: Measured, after: Measured) -> tuple[float, float]:
    """Return how many times the perplexity is what it was, and the standard error of that.

    Both were measured on the same tokens. Not a number where nothing was scored.
    """
    assert before.losses.shape == after.losses.shape
    differences = after.losses - before.losses
    if not differences.size:
        return math.nan, math.nan
    ratio = math.exp(float(differences.mean()))
    return ratio, ratio * _mean_error(differences)


def _mean_error(values: Losses) -> float:
    count = values.size
    return float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan


def prose() -> str:
    """Return the text on which models are scored."""
    return resources.files(__package__).joinpath("data", "prose.txt").read_text("utf-8")


def prose_tokens(path: Path) -> TextTokens:
    """Return the text in the vocabulary of a GGUF.

    Raises:
        ModelRefused: The vocabulary is none that is converted, or contradicts itself.
        ExtensionNotFound: The tokenizers library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ExtensionNotFound(
            f"package tokenizers is not installed: {error}", fix='pip install "swarmpy[gateway]"'
        ) from error
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(read_header(path))))
    return TextTokens(
        ids=tokenizer.encode(prose(), add_special_tokens=False).ids, start=tokenizer.encode("").ids
    )


async def measure(
    paths: Sequence[Path],
    text: TextTokens | None,
    *,
    cache_folder: Path,
    threads: int,
    progress: Callable[[Progress], None],
) -> list[Measured]:
    """Measure models side by side, each in a child process of its own; all are in memory at once.

    Args:
        paths: The models' files; they share a vocabulary.
        text: In that vocabulary; None: nothing is scored, and any tokens give the speeds.
        threads: Of each engine.

    Returns:
        What was measured, in the order of `paths`.

    Raises:
        DoesNotFit: The models, with a slot each, exceed the memory that is left.
        ModelRefused: The engine does not run one of them, or its context is a single token.
        EngineLost: A child ended.
    """

    async def work(host: EngineHost) -> list[Measured]:
        inspections = [await host.inspect(path) for path in paths]
        lengths = _Lengths.within(min(item.context_max for item in inspections))
        shards = [
            await host.load(
                path, start=0, end=item.layer_count, slots=1, context=lengths.context, exact=False
            )
            for path, item in zip(paths, inspections, strict=True)
        ]
        vocabulary = min(item.vocabulary_size for item in inspections)
        scored = text or TextTokens(ids=[], start=[])
        return await _measure(shards, scored, lengths, vocabulary, progress)

    return await _hosted(work, cache_folder=cache_folder, threads=threads)


async def check_runs(path: Path, *, cache_folder: Path) -> None:
    """Load a model in a child process and run one token through it.

    Where it does not fit whole, its smallest parts do so one after the other.

    Raises:
        DoesNotFit: Such a part exceeds the memory that is left.
        ModelRefused: The engine does not run it.
        RowError: The token could not be computed.
        EngineLost: The child ended.
    """

    async def work(host: EngineHost) -> None:
        inspection = await host.inspect(path)
        try:
            await _run_token(host, path, inspection, cuts=())
        except DoesNotFit:
            await _run_token(host, path, inspection, cuts=inspection.cuts)

    await _hosted(work, cache_folder=cache_folder, threads=0)


async def _run_token(
    host: EngineHost, path: Path, inspection: Inspection, *, cuts: Sequence[int]
) -> None:
    """Run one token through parts, of which one is loaded at a time."""
    hidden = None
    for start, end in pairwise((0, *cuts, inspection.layer_count)):
        shard = await host.load(path, start=start, end=end, slots=1, context=1, exact=False)
        has_ids = start == 0 or inspection.needs_token_ids(start, end)
        row = Row(
            slot=0,
            position=0,
            count=1,
            token_ids=np.zeros(1, np.int32) if has_ids else None,
            hidden=hidden,
            want=Want.LAST_LOGITS if end == inspection.layer_count else Want.HIDDEN,
        )
        hidden = (await _run_row(shard, row))[0].hidden
        await shard.close()


async def _hosted(
    work: Callable[[EngineHost], Awaitable[_Result]], *, cache_folder: Path, threads: int
) -> _Result:
    """Do some work with an engine's children, all of which end with it; 0 threads: its share."""
    host = EngineHost(ENGINE, config=EngineConfig(threads=threads), cache_folder=cache_folder)
    result: _Result | SwarmError
    async with trio.open_nursery() as nursery:
        await nursery.start(_run_host, host)
        try:
            result = await work(host)
        except SwarmError as error:
            result = error  # Raised where no nursery makes a group of it.
        nursery.cancel_scope.cancel()
    if isinstance(result, SwarmError):
        raise result
    return result


async def _run_host(host: EngineHost, task_status: trio.TaskStatus[None]) -> None:
    await host.run(task_status=task_status)


@dataclass(frozen=True, slots=True)
class _Lengths:
    """How many tokens are run at a time, within a context."""

    window: int
    prompt: int
    reply: int

    @classmethod
    def within(cls, context_max: int) -> _Lengths:
        """Return them as they are wanted, shorter where a context is.

        Raises:
            ModelRefused: A context that has no room for a prompt and a reply.
        """
        if context_max < 2:
            raise ModelRefused(
                f"a context of {context_max} is too short to measure speeds, which takes 2 tokens",
                fix="Leave the comparison out: --no-measure.",
            )
        reply = min(REPLY_TOKENS, context_max // 2)
        return cls(
            window=min(WINDOW_TOKENS, context_max),
            prompt=min(PROMPT_TOKENS, context_max - reply),
            reply=reply,
        )

    @property
    def round(self) -> int:
        """Tokens of a prompt and its reply."""
        return self.prompt + self.reply

    @property
    def context(self) -> int:
        """What a slot must hold."""
        return max(self.window, self.round)


async def _measure(
    shards: Sequence[HostedShard],
    text: TextTokens,
    lengths: _Lengths,
    vocabulary_size: int,
    progress: Callable[[Progress], None],
) -> list[Measured]:
    windows = _windows(text, lengths.window)
    total = len(shards) * (sum(map(len, windows)) + ROUNDS * lengths.round)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(Progress(step="measuring", done=done, total=total, unit="tokens"))

    report(0)
    scored = [
        np.concatenate([np.empty(0), *[await losses(shard, ids, report) for ids in windows]])
        for shard in shards
    ]
    ids = text.ids or [index % vocabulary_size for index in range(lengths.round)]
    rounds = [
        [await _round(shard, ids, lengths, report) for shard in shards] for _ in range(ROUNDS)
    ]
    return [
        Measured(
            losses=found,
            prefill_tok_s=lengths.prompt / statistics.median(prefill_s for prefill_s, _ in times),
            decode_tok_s=lengths.reply / statistics.median(decode_s for _, decode_s in times),
        )
        for found, times in zip(scored, zip(*rounds, strict=True), strict=True)
    ]


def _windows(text: TextTokens, window: int) -> list[list[int]]:
    """Return the text in whole windows, each begun as a text of its own; the rest is left out."""
    size = window - len(text.start)
    return [
        [*text.start, *text.ids[begin : begin + size]]
        for begin in range(0, len(text.ids) - size + 1, size)
    ]


async def losses(
    shard: HostedShard, ids: Sequence[int], report: Callable[[int], None] = lambda count: None
) -> Losses:
    """Run one window and return the losses of the tokens behind its middle.

    Args:
        shard: A whole model; what slot 0 held is lost.
        ids: The window's tokens (T,).
        report: Called with the tokens of each chunk.

    Raises:
        RowError: A chunk could not be computed.
    """
    middle, found = len(ids) // 2, [np.empty(0)]
    for begin in range(0, len(ids), PREFILL_CHUNK):
        chunk = ids[begin : begin + PREFILL_CHUNK]
        end = begin + len(chunk)
        if end <= middle:
            await _step(shard, chunk, begin, Want.NOTHING)
        else:
            logits, _ = await _step(shard, chunk, begin, Want.ALL_LOGITS)
            # The logits of a token are of the one after it; the last has none.
            first, last = max(begin, middle), min(end, len(ids) - 1)
            found.append(_losses(logits[first - begin : last - begin], ids[first + 1 : last + 1]))
        report(len(chunk))
    return np.concatenate(found)


def _losses(logits: npt.NDArray[np.float32], ids: Sequence[int]) -> Losses:
    """Return minus the logarithm of the probability of each token, from logits (T, V)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    sums: Losses = np.log(np.exp(shifted).sum(axis=-1))
    sums -= shifted[np.arange(len(ids)), list(ids)]
    return sums


async def _round(
    shard: HostedShard, ids: Sequence[int], lengths: _Lengths, report: Callable[[int], None]
) -> tuple[float, float]:
    """Return the seconds of a prompt, and of as many steps as a reply has tokens."""
    prefill_s = decode_s = 0.0
    for begin in range(0, lengths.prompt, PREFILL_CHUNK):
        chunk = ids[begin : min(begin + PREFILL_CHUNK, lengths.prompt)]
        is_last = begin + len(chunk) == lengths.prompt
        want = Want.LAST_LOGITS if is_last else Want.NOTHING
        prefill_s += (await _step(shard, chunk, begin, want))[1]
        report(len(chunk))
    for position in range(lengths.prompt, lengths.round):
        decode_s += (await _step(shard, ids[position : position + 1], position, Want.LAST_LOGITS))[
            1
        ]
        report(1)
    return prefill_s, decode_s


async def _step(
    shard: HostedShard, ids: Sequence[int], position: int, want: Want
) -> tuple[npt.NDArray[np.float32], float]:
    """Run one row in slot 0; return its logits, none where none were wanted, and the seconds."""
    row = Row(
        slot=0,
        position=position,
        count=len(ids),
        token_ids=np.array(ids, np.int32),
        hidden=None,
        want=want,
    )
    output, engine_s = await _run_row(shard, row)
    if output.logits is None:
        return np.empty((0, 0), np.float32), engine_s
    logits = np.frombuffer(output.logits.data, np.float32).reshape(output.logits.shape)
    return logits, engine_s


async def _run_row(shard: HostedShard, row: Row) -> tuple[Output, float]:
    outcome = await shard.step([row])
    output = outcome.outputs[0]
    if output.error:
        raise RowError(output.error)
    return output, outcome.engine_s
