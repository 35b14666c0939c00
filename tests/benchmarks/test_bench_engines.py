"""What benchmarks/bench_engines.py makes of its replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swarmpy.pipeline.fit import fit
from swarmpy.testing.engine import EchoModel, inspection_of

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"

NAMES = ("llama_stock", "llama_whole", "llama_split", "mlx_whole", "mlx_split")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_engines

    return bench_engines


def replies(bench: Any, speeds: dict[str, list[float]]) -> dict[tuple[str, int], list[Any]]:
    """One reply a round of each contender after each prompt, 100 tokens a second where not said."""
    return {
        (name, length): [
            bench.Reply(token_ids=[1, 2], tok_s=tok_s, ttft_s=length / tok_s)
            for tok_s in speeds.get(name, [100.0] * 3)
        ]
        for name in NAMES
        for length in bench.PROMPTS
    }


def test_a_ratio_compares_replies_of_the_same_round(bench: Any) -> None:
    """Rounds of 0.5, 2 and 0.5; each contender's own median would make 1.25 of them."""
    found = bench.summary(
        replies(bench, {"llama_split": [50.0, 80.0, 10.0], "llama_whole": [100.0, 40.0, 20.0]})
    )
    assert found["llama_split_over_llama_whole"] == {
        "decode": 0.5,
        "prefill_128": 0.5,
        "prefill_512": 0.5,
    }


def test_one_other_token_in_one_round_is_told(bench: Any) -> None:
    found = replies(bench, {})
    odd = found["mlx_split", 512][1]
    found["mlx_split", 512][1] = bench.Reply(token_ids=[1, 3], tok_s=odd.tok_s, ttft_s=odd.ttft_s)
    assert bench.summary(found)["tokens_equal"] == {
        "llama": True,
        "mlx": False,
        "llama_stock": True,
    }


def test_budgets_of_thirds_hold_ten_layers_each_and_no_eleventh(bench: Any) -> None:
    inspection = inspection_of(EchoModel(layers=30))

    def need(start: int, end: int) -> int:
        return fit(inspection, start, end, slots=bench.SLOTS, context=bench.CONTEXT).sum_bytes

    first, middle, last = bench.thirds(inspection)

    assert need(0, 10) <= first < need(0, 11)
    assert need(10, 20) <= middle < need(10, 21)
    assert need(20, 30) <= last < need(19, 30)
