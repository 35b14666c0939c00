"""Sampling: which token a row of logits becomes, as a pure function.

Order of the filters: repetition penalty, temperature, top-k, top-p, min-p. The only randomness is
Philox4x64-10 keyed by the session's seed and counted by the token's position, so that a token never
depends on its neighbours in a batch, on the order of requests or on what was recovered.
Spec: protocols/pipeline.md (revision 1), section "Sampling".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarmpy.errors import RowError, SamplingError
from swarmpy.proto.pipeline import SEED_MAX, TOP_LOGPROBS_MAX, Sampling

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

_NUCLEUS_FIRST = 256
"""Candidates sorted first for top-p; most nuclei are smaller; a round takes 8 times more."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A sampled token; natural log probabilities, before any filter, where asked for."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, log probability), most likely first, equal ones by lowest id."""


def check(spec: Sampling) -> None:
    """Check every parameter against its range.

    Raises:
        SamplingError: Names the parameter, its range and what came.
    """
    _check(spec.temperature, 0 <= spec.temperature <= 2, "temperature must be between 0 and 2")
    _check(spec.top_p, 0 < spec.top_p <= 1, "top_p must be above 0 and at most 1")
    _check(spec.top_k, spec.top_k >= 0, "top_k must be 0 (off) or more")
    _check(spec.min_p, 0 <= spec.min_p < 1, "min_p must be at least 0 and below 1")
    _check(
        spec.repetition_penalty,
        0 < spec.repetition_penalty <= 2,
        "repetition_penalty must be above 0 and at most 2 (1 is off)",
    )
    _check(spec.seed, 0 <= spec.seed <= SEED_MAX, f"seed must be between 0 and {SEED_MAX}")
    _check(
        spec.logprobs,
        0 <= spec.logprobs <= TOP_LOGPROBS_MAX,
        f"logprobs must be between 0 and {TOP_LOGPROBS_MAX}",
    )


def _check(value: float, is_valid: bool, sentence: str) -> None:
    if not is_valid:
        raise SamplingError(f"{sentence}, got {value!r}")


def needs_history(spec: Sampling) -> bool:
    """Whether the sampler must know the prompt and the reply so far."""
    return spec.repetition_penalty != 1.0


def sample(logits: Floats, spec: Sampling, *, position: int, history: Iterable[int] = ()) -> Choice:
    """Choose the token at `position` of the sequence.

    Args:
        logits: One row (V,) float32; -inf marks tokens that cannot come. It is not changed.
        spec: Already checked.
        position: Index of the new token in the sequence, from 0: the generator's counter.
        history: Prompt ids and reply so far; only a repetition penalty looks at them.

    Raises:
        RowError: The row holds a NaN or +inf, or no token is possible.
    """
    top = int(logits.argmax())  # The first maximum: ties go to the lowest id. NaN counts as one.
    if not math.isfinite(logits[top]):
        raise RowError(f"the largest logit at position {position} is {logits[top]}")
    scores = _penalised(logits, spec.repetition_penalty, history)
    if spec.temperature == 0:
        token = top if scores is logits else int(scores.argmax())
    else:
        token = _draw(scores, spec, uniform(spec.seed, position))
    if not spec.logprobs:
        return Choice(token)
    return _with_logprobs(logits, token, spec.logprobs)


def _penalised(logits: Floats, penalty: float, history: Iterable[int]) -> Floats:
    """Divide positive logits of tokens that already came by `penalty`, multiply negative ones."""
    if penalty == 1.0:
        return logits
    seen = np.unique(np.fromiter(history, np.int64))
    seen = seen[(seen >= 0) & (seen < len(logits))]
    scores = logits.copy()
    old = scores[seen]
    scores[seen] = np.where(old > 0, old / np.float32(penalty), old * np.float32(penalty))
    return scores


def _draw(scores: Floats, spec: Sampling, chance: float) -> int:
    """Pick a token by the inverse of the cumulative distribution.

    Tokens stand by id where top-k and top-p are off, most likely first elsewhere.
    """
    if spec.top_k == 1:
        return int(scores.argmax())
    peak = scores.max()
    if 0 < spec.top_k < len(scores):
        ids = largest(scores, spec.top_k)
        weights = _exp(scores[ids], peak, spec.temperature)
        total = float(weights.sum())
    else:
        weights = _exp(scores, peak, spec.temperature)
        if spec.top_p == 1:
            weights[weights < spec.min_p] = 0.0
            return _pick_unsorted(weights, chance)
        total = float(weights.sum())
        ids = _nucleus(scores, weights, spec.top_p * total)
        weights = weights[ids]
    if spec.top_p < 1:
        weights = weights[: int(np.searchsorted(np.cumsum(weights), spec.top_p * total)) + 1]
    return int(ids[_pick(weights[weights >= spec.min_p], chance)])


def _exp(scores: Floats, peak: np.float32, temperature: float) -> Doubles:
    """Unnormalised probabilities: 1 for the most likely token. Only sums need doubles."""
    shifted = scores - peak
    # A tiny temperature pushes all but the peak to -inf, whose exponential is the 0 that is meant.
    with np.errstate(over="ignore"):
        np.divide(shifted, np.float32(max(temperature, 1e-6)), out=shifted)
    np.exp(shifted, out=shifted)
    return shifted.astype(np.float64)


def _nucleus(scores: Floats, weights: Doubles, needed: float) -> Indices:
    """Return enough of the most likely ids, in order, to hold `needed` of the weight."""
    count = _NUCLEUS_FIRST
    while count < len(scores):
        ids = largest(scores, count)
        if float(weights[ids].sum()) >= needed:
            return ids
        count *= 8
    return _sorted(scores, np.arange(len(scores)))


def largest(scores: Floats, count: int) -> Indices:
    """Return the ids of the `count` largest scores, in order; equal ones by lowest id.

    The cut is made by value: a partition may order equal scores differently on another machine.
    """
    if count >= len(scores):
        return _sorted(scores, np.arange(len(scores)))
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    return _sorted(scores, np.flatnonzero(scores >= threshold))[:count]


def _sorted(scores: Floats, ids: Indices) -> Indices:
    """Order ids by falling score, equal ones by rising id.

    Score and id are sorted as one 64-bit number: a float's bits compare like the float once those
    of the positive ones are flipped. Ten times faster than a stable argsort of a whole vocabulary.
    """
    bits = (scores[ids] + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0: they are equal.
    falling = np.where(bits >> 31, bits, bits ^ np.uint32(0x7FFFFFFF))
    keys = (falling.astype(np.uint64) << np.uint64(32)) | ids.astype(np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)


def _pick(weights: Doubles, chance: float) -> int:
    """Index of the weight at `chance` (0 <= chance < 1) of the total; never one of weight 0."""
    sums = np.cumsum(weights)
    index = int(np.searchsorted(sums, chance * sums[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))


def _pick_unsorted(weights: Doubles, chance: float) -> int:
    """`_pick` over a whole vocabulary: sums of blocks first, because a running sum is slow."""
    block = 256
    whole = len(weights) // block * block
    sums = weights[:whole].reshape(-1, block).sum(axis=1)
    sums = np.append(sums, weights[whole:].sum())
    index = int(np.searchsorted(np.cumsum(sums), chance * sums.sum(), side="right"))
    index = min(index, int(np.flatnonzero(sums)[-1]))
    inside = weights[index * block : min((index + 1) * block, len(weights))]
    before = float(sums[:index].sum())
    share = (chance * float(sums.sum()) - before) / float(inside.sum())
    return index * block + _pick(inside, min(max(share, 0.0), math.nextafter(1.0, 0.0)))


def _with_logprobs(logits: Floats, token: int, count: int) -> Choice:
    values = logits.astype(np.float64)
    peak = values.max()
    total = float(peak + np.log(np.exp(values - peak).sum()))
    ids = [int(index) for index in largest(logits, count) if math.isfinite(logits[index])]
    return Choice(
        token,
        logprob=min(0.0, float(values[token]) - total),
        top_logprobs=tuple((index, min(0.0, float(values[index]) - total)) for index in ids),
    )


# Philox4x64-10 (Salmon et al., SC11) --------------------------------------------

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return the four 64-bit words of Philox4x64-10 for a key and a counter."""
    a, b, c, d = counter
    left, right = key
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 64) ^ b ^ left,
            second & _MASK,
            (first >> 64) ^ d ^ right,
            first & _MASK,
        )
        left, right = (left + _WEYL[0]) & _MASK, (right + _WEYL[1]) & _MASK
    return a, b, c, d


def uniform(seed: int, position: int) -> float:
    """The chance, 0 <= x < 1 in steps of 2**-53, that belongs to a seed and a position."""
    return (philox((seed, 0), (position, 0, 0, 0))[0] >> 11) * 2.0**-53
