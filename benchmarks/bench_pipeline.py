"""What splitting costs: the whole model in one engine child against 1, 2 and 3 nodes in a ring.

Seven interleaved rounds on one machine, same model, threads, chunks and exactness, every node in a
process of its own on loopback. "Whole" is our engine child with all layers and no node around it.

    python benchmarks/bench_pipeline.py [--json] [--rounds 7] [--tokens 48] [--threads 1] [--awake]

Goals: split_over_whole >= 0.90, hop_overhead_ms_p50 <= 0.8, node_cpu_ms_per_token <= 4,
echo_tok_s >= 300. benchmarks/README.md has the numbers, and what they mean.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import psutil
import trio
from engines.replies import LineProcess, Reply, reply_of_ring, reply_of_whole, ring

from swarmpy.config import EngineConfig
from swarmpy.pipeline.engine_host import EngineHost
from swarmpy.shards.catalog import Catalog
from swarmpy.shards.sources import DEFAULT_MODEL
from swarmpy.testing.engine import EchoModel
from swarmpy_cli.budget import split_budget

CONTEXT = 1024
SLOTS = 2
PROMPT_TOKENS = 100
ECHO = "swarmpy.testing.engine:EchoEngine"
SPIN = "spin_engine:SpinEngine"
ECHO_TOKENS = 600
AWAKE_S_MAX = 900
"""The loop of `--awake` ends after this long in any case."""


def part(nodes: Sequence[LineProcess]) -> None:
    """Give the nodes the first CPU, which is kept awake, and their engine children the others."""
    others = list(range(1, os.cpu_count() or 1))
    for node in nodes:
        process = psutil.Process(node.process.pid)
        process.cpu_affinity([0])
        for child in process.children():
            for thread in child.threads():
                os.sched_setaffinity(thread.id, others)


@contextmanager
def first_cpu_awake() -> Iterator[None]:
    """Keep the first CPU from going to sleep, by a loop that runs where nothing else wants to."""
    code = (
        "import os, time; os.sched_setaffinity(0, {0}); "
        "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); "
        f"ends = time.monotonic() + {AWAKE_S_MAX}; parent = os.getppid()\n"
        "while time.monotonic() < ends and os.getppid() == parent: pass"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    cache = Path(os.environ.get("SWARMPY_CACHE") or platformdirs.user_cache_path("swarmpy"))
    entry = await Catalog(cache).pull(DEFAULT_MODEL, lambda _: None)
    prompt = [int(token) for token in np.arange(PROMPT_TOKENS) * 37 % 40_000 + 100]
    settings = EngineConfig(threads=arguments.threads, context=CONTEXT, slots=SLOTS)
    results: dict[str, list[Reply]] = {name: [] for name in ("whole", "1", "2", "3")}
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        host = EngineHost("mlx", config=settings, cache_folder=cache)
        await nursery.start(host.run)
        inspection = await host.inspect(entry.path)
        whole = await host.load(
            entry.path,
            start=0,
            end=inspection.layer_count,
            slots=SLOTS,
            context=CONTEXT,
            exact=True,
        )
        rings = {}
        for count in (1, 2, 3):
            budget = split_budget(inspection, count, slots=SLOTS, context=CONTEXT)
            rings[str(count)] = await stack.enter_async_context(
                ring(
                    [budget] * count,
                    engine="mlx",
                    model=DEFAULT_MODEL,
                    cache=cache,
                    threads=arguments.threads,
                )
            )
            if arguments.awake:
                part(rings[str(count)].nodes)
        for number in range(arguments.rounds + 1):
            for name, replies in results.items():
                if name == "whole":
                    reply = await reply_of_whole(whole, prompt, arguments.tokens)
                else:
                    reply = await reply_of_ring(rings[name].nodes, prompt, arguments.tokens)
                if number:  # the first round warms up
                    replies.append(reply)
                say(arguments, f"round {number} {name:>5}: {reply.tok_s:6.2f} tok/s")
        nursery.cancel_scope.cancel()
    echo = await replies_of_echo(arguments, ECHO, ECHO_TOKENS)
    spin = await replies_of_echo(arguments, SPIN, arguments.tokens)
    return summary(results) | {
        "echo_tok_s": round(statistics.median(reply.tok_s for reply in echo), 1),
        "hop_overhead_spin_ms_p50": round(
            statistics.median(reply.hop_overhead_ms for reply in spin), 3
        ),
    }


async def replies_of_echo(arguments: argparse.Namespace, engine: str, count: int) -> list[Reply]:
    """Replies of a ring of three processes whose engine computes nothing, or spins."""
    with tempfile.TemporaryDirectory() as folder:
        model = EchoModel(
            layers=12, layer_weight_bytes=50_000_000, vocabulary_size=50_000, hidden_size=576
        )
        path = model.write(Path(folder) / "echo")
        async with ring(
            [480_000_000] * 3,
            engine=engine,
            model=str(path),
            cache=Path(folder) / "cache",
            threads=1,
        ) as echo:
            if arguments.awake:
                part(echo.nodes)
            replies = []
            for _ in range(arguments.rounds):
                replies.append(await reply_of_ring(echo.nodes, [1, 2, 3], count))
                say(arguments, f"{engine.split(':')[1]}: {replies[-1].tok_s:.0f} tok/s")
    return replies


def summary(results: dict[str, list[Reply]]) -> dict[str, Any]:
    def median(name: str, field_name: str) -> float:
        return statistics.median(getattr(reply, field_name) for reply in results[name])

    ratios = [
        split.tok_s / whole.tok_s
        for split, whole in zip(results["3"], results["whole"], strict=True)
    ]
    tokens = {tuple(reply.token_ids) for replies in results.values() for reply in replies}
    return {
        "split_over_whole": round(statistics.median(ratios), 3),
        "hop_overhead_ms_p50": round(median("3", "hop_overhead_ms"), 3),
        "node_cpu_ms_per_token": round(median("3", "node_cpu_ms_per_token"), 3),
        "tokens_equal": len(tokens) == 1,
        "tok_s": {name: round(median(name, "tok_s"), 2) for name in results},
        "ttft_s": {name: round(median(name, "ttft_s"), 4) for name in results},
        "engine_ms_p50": {name: round(median(name, "engine_ms"), 2) for name in ("1", "2", "3")},
        "split_over_whole_by_round": [round(ratio, 3) for ratio in ratios],
    }


def say(arguments: argparse.Namespace, line: str) -> None:
    if not arguments.json:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--awake",
        action="store_true",
        help="keep the first CPU awake for the nodes, the others for the engines (Linux)",
    )
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with first_cpu_awake() if arguments.awake else nullcontext():
        result = trio.run(measure, arguments)
    result |= {
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "threads": arguments.threads,
        "awake": arguments.awake,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "load_before": round(load, 2),
    }
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
