"""What benchmarks/bench_transport.py makes of its numbers, and that it runs at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_transport

    return bench_transport


def sample(bench: Any, *, raw: float) -> dict[str, Any]:
    """A round in which raw TCP moved so many MB/s."""
    return {"raw": bench.m.Sample(bulk_mb_s=raw)}


def test_rounds_with_raw_tcp_under_0_6_of_the_best_are_not_kept(bench: Any) -> None:
    """Also those before the best one: the best may come last."""
    rounds = [sample(bench, raw=raw) for raw in (599.0, 600.0, 1000.0)]
    assert bench.undisturbed(rounds) == rounds[1:]


def test_a_quantile_is_a_measured_value(bench: Any) -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert bench.m.quantile(values, 0.5) == 50.0
    assert bench.m.quantile(values, 0.99) == 99.0
    assert bench.m.quantile([7.0], 0.99) == 7.0


def test_bulk_is_judged_by_the_busier_end_and_round_by_round(bench: Any) -> None:
    def of(sender: float, receiver: float) -> Any:
        return bench.m.Sample(sender_mb_per_cpu_s=sender, receiver_mb_per_cpu_s=receiver)

    rounds = [
        {"swarmpy": of(80.0, 90.0), "aead": of(200.0, 100.0)},
        {"swarmpy": of(90.0, 30.0), "aead": of(40.0, 100.0)},
    ]
    assert bench.m.ratios(rounds, ["bulk"]) == {"bulk_cpu_over_ceiling": [0.8, 0.75]}


def test_a_goal_is_met_at_its_bound(bench: Any) -> None:
    most, least = bench.m.GOALS["rtt16k_over_aead"], bench.m.GOALS["bulk_cpu_over_ceiling"]
    assert [most.judged(value)["met"] for value in (1.15, 1.16)] == [True, False]
    assert [least.judged(value)["met"] for value in (0.80, 0.79)] == [True, False]
    assert bench.m.GOALS["hol_ok"].judged(True) == {"value": True, "goal": "true", "met": True}


def test_it_runs_and_echoes_come_back_whole() -> None:
    """Goal: the load, the ceiling and swarmpy's peer work. Method: one quick round, every size.

    The peers themselves compare each echo with what was sent.
    """
    command = [sys.executable, str(BENCHMARKS / "bench_transport.py"), "--json", "--quick"]
    options = ["--rounds", "1", "--stacks", "raw,aead,swarmpy", "--only", "bulk,rtt,rps,open"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for stack in ("raw", "aead", "swarmpy"):
        assert result["stacks"][stack]["bulk_mb_s"] > 0
        assert set(result["stacks"][stack]["rtt_ms"]) == {"64", "16384", "262144", "4194304"}
    assert result["bulk_cpu_over_ceiling"]["goal"] == ">= 0.8"
