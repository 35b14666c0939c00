"""How well a model predicts a text, and how fast it is: the numbers themselves."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import trio
from gguf_models import write_models
from shard_rows import run

from swarmpy.abc import Progress
from swarmpy.errors import ExtensionNotFound, ModelRefused
from swarmpy.pipeline.engine_shards import InlineShard
from swarmpy.plugins.llama.library import find_library
from swarmpy.plugins.llama.measure import (
    PROMPT_TOKENS,
    REPLY_TOKENS,
    ROUNDS,
    Measured,
    TextTokens,
    losses,
    measure,
    perplexity_ratio,
    prose_tokens,
)
from swarmpy.plugins.llama.quantize import quantize_model
from swarmpy.shards.catalog import Catalog, ignore
from swarmpy.shards.gguf import read_header
from swarmpy.shards.gguf_write import uint32_value

try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)

from swarmpy.plugins.llama import LlamaEngine

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="engine children need POSIX")

WINDOW = 256
"""The tiny models' context."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"), ("llama", "mamba"))


def random_ids(count: int) -> list[int]:
    return np.random.default_rng(3).integers(0, 64, count).tolist()


async def measured(path: Path, text: TextTokens | None, cache: Path) -> Measured:
    (found,) = await measure([path], text, cache_folder=cache, threads=1, progress=ignore)
    return found


def measured_as(*nats: float) -> Measured:
    return Measured(losses=np.array(nats), prefill_tok_s=1.0, decode_tok_s=1.0)


def losses_one_by_one(path: Path, window: list[int]) -> list[float]:
    """The losses behind a window's middle, from the logits of single steps."""
    shard = LlamaEngine().load(path, start=0, end=6, slots=1, context=WINDOW, exact=True)
    found = []
    for at, token in enumerate(window[:-1]):
        chances = np.exp(run(shard, [token], at).astype(np.float64))
        if at >= len(window) // 2:
            found.append(-math.log(chances[window[at + 1]] / chances.sum()))
    shard.close()
    return found


@pytest.mark.parametrize("name", ["llama", "mamba"])
async def test_losses_are_those_of_the_tokens_behind_the_middle_of_each_window(
    tiny: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Method: two windows behind a bos, and some more, beside the same tokens one by one."""
    ids = random_ids(2 * (WINDOW - 1) + 40)

    found = await measured(tiny[name], TextTokens(ids=ids, start=[5]), tmp_path)

    windows = [[5, *ids[begin : begin + WINDOW - 1]] for begin in (0, WINDOW - 1)]
    expected = [loss for window in windows for loss in losses_one_by_one(tiny[name], window)]
    assert found.losses.shape == (2 * (WINDOW // 2 - 1),)
    assert np.allclose(found.losses, expected, atol=0.02)
    assert found.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=0.005)


@pytest.mark.parametrize("count", [150, 151, 100])
async def test_the_middle_of_a_window_may_lie_within_a_chunk(
    tiny: dict[str, Path], count: int
) -> None:
    ids = random_ids(count)
    shard = InlineShard(
        LlamaEngine(), tiny["llama"], start=0, end=6, slots=1, context=WINDOW, exact=True
    )

    found = await losses(shard, ids)
    await shard.close()

    assert np.allclose(found, losses_one_by_one(tiny["llama"], ids), atol=0.02)


async def test_a_model_beside_itself_has_a_ratio_of_one(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    text = TextTokens(ids=random_ids(WINDOW), start=[])
    paths = [tiny["llama"], tiny["llama"]]

    first, second = await measure(paths, text, cache_folder=tmp_path, threads=1, progress=ignore)

    assert perplexity_ratio(first, second) == (1.0, 0.0)


async def test_speeds_need_no_text(tiny: dict[str, Path], tmp_path: Path) -> None:
    told: list[Progress] = []

    paths = [tiny["llama"], tiny["mamba"]]

    found = await measure(paths, None, cache_folder=tmp_path, threads=1, progress=told.append)

    for item in found:
        assert math.isnan(item.perplexity)
        assert min(item.prefill_tok_s, item.decode_tok_s) > 0
    assert all(map(math.isnan, perplexity_ratio(*found)))
    assert told[-1].done == told[-1].total == 2 * ROUNDS * (PROMPT_TOKENS + REPLY_TOKENS)


def with_context(path: Path, tokens: int, folder: Path) -> Path:
    """A copy of a model that says it has a context of so many tokens."""
    offset, size = read_header(path).spans["llama.context_length"]
    raw = path.read_bytes()
    copy = folder / f"context-{tokens}.gguf"
    copy.write_bytes(raw[:offset] + uint32_value(tokens) + raw[offset + size :])
    return copy


@pytest.mark.parametrize("context", [2, 100, 175])
async def test_prompts_and_replies_are_shorter_where_the_context_is(
    tiny: dict[str, Path], tmp_path: Path, context: int
) -> None:
    told: list[Progress] = []
    path = with_context(tiny["llama"], context, tmp_path)

    (found,) = await measure([path], None, cache_folder=tmp_path, threads=1, progress=told.append)

    assert told[-1].done == told[-1].total == ROUNDS * context
    assert found.decode_tok_s > 0


async def test_a_context_without_room_for_a_reply_is_refused(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    path = with_context(tiny["llama"], 1, tmp_path)

    with pytest.raises(ModelRefused, match="context of 1 is too short"):
        await measured(path, None, tmp_path)


async def test_a_model_that_is_refused_is_refused_as_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    await trio.Path(path).write_bytes(b"nothing of the kind")

    with pytest.raises(ModelRefused, match="no GGUF file"):
        await measured(path, None, tmp_path / "cache")


def test_the_ratio_compares_token_by_token() -> None:
    """Method: losses that differ a lot among themselves, and by little from one to the other."""
    before, after = measured_as(1.0, 3.0, 5.0, 7.0), measured_as(1.1, 3.3, 5.1, 7.3)

    ratio, error = perplexity_ratio(before, after)

    assert before.perplexity == pytest.approx(math.exp(4.0))
    assert before.perplexity_error == pytest.approx(math.exp(4.0) * math.sqrt(20 / 3) / 2)
    assert ratio == pytest.approx(math.exp(0.2))
    assert error == pytest.approx(math.exp(0.2) * math.sqrt(0.04 / 3) / 2)


@pytest.mark.model
def test_the_text_fills_five_windows_of_the_default_model(default_gguf: Path) -> None:
    text = prose_tokens(default_gguf)

    assert len(text.ids) >= 5 * 512
    assert list(text.start) == []


@pytest.mark.model
@pytest.mark.slow
async def test_more_bits_lose_less_of_the_default_model(default_gguf: Path, tmp_path: Path) -> None:
    """Goal: the perplexity tells types apart that people tell apart.

    Method: Q8_0 has room for all that Q4_1 says, Q4_0 has not.
    """
    catalog = Catalog(tmp_path)
    original = await catalog.pull(str(default_gguf))
    text = prose_tokens(default_gguf)
    before = await measured(default_gguf, text, tmp_path)
    ratios = {}
    for target in ("q8_0", "q4_0"):
        made = await quantize_model(catalog, original, target)
        ratios[target] = perplexity_ratio(before, await measured(made.entry.path, text, tmp_path))[
            0
        ]

    assert 10 < before.perplexity < 60
    assert 0.98 < ratios["q8_0"] < 1.02
    assert 1.02 < ratios["q4_0"] < 1.5
