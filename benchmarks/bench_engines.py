"""llama.cpp and MLX, whole and split over three processes, round by round on one machine.

    python benchmarks/bench_engines.py [--json] [--rounds 7] [--tokens 64] [--threads 1] [--quick]

A round is every contender in turn: llama.cpp as it is, and for each engine one engine child with
all layers and no node around it ("whole") and three node processes on loopback ("split", ten layers
each). Each answers a prompt of 128 tokens and one of 512, greedily. One round warms up.

Goals: llama_split_over_llama_whole decode >= 0.90 and prefill >= 0.95, hop_us.llama <= 300,
memory.llama.middle_over_whole_rss <= 0.45, demo.over_llama_stock >= 0.67 (100 tokens a second where
it has 150). benchmarks/README.md has the numbers, and what they mean.
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
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import trio
from engines.hop_parts import measure_parts
from engines.replies import (
    LineProcess,
    Reply,
    Ring,
    end,
    engine_children,
    reply_of_ring,
    reply_of_whole,
    ring,
)

from swarmpy.abc import Inspection
from swarmpy.config import EngineConfig
from swarmpy.pipeline.engine_host import EngineHost, HostedShard
from swarmpy.pipeline.fit import fit
from swarmpy.shards.catalog import Catalog, ModelEntry
from swarmpy.shards.sources import DEFAULT_MODEL

CONTEXT = 1024
SLOTS = 2
NODES = 3
PROMPTS = (128, 512)
"""Tokens; two and eight chunks of a ring."""

BUDGET_SLACK = 1.002
"""Over what a third of the model needs: too little for one layer more."""

READY_TIMEOUT_S = 60.0
DEMO_TIMEOUT_S = 120.0
QUICK_ROUNDS = 2
QUICK_TOKENS = 48

Answer = Callable[[list[int], int], Awaitable[Reply]]
"""Gives the reply of so many tokens to a prompt."""


@dataclass
class Contenders:
    """What takes turns in a round, by name, and what it showed while it was set up."""

    answers: dict[str, Answer] = field(default_factory=dict)
    ranges: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Layers of each stage, by engine."""
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    """By engine."""
    inspection: Inspection | None = None


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    cache = Path(os.environ.get("SWARMPY_CACHE") or platformdirs.user_cache_path("swarmpy"))
    entry = await Catalog(cache).pull(DEFAULT_MODEL, lambda _: None)
    async with contenders(arguments, entry, cache) as found:
        replies: dict[tuple[str, int], list[Reply]] = {}
        for number in range(arguments.rounds + 1):
            for name, answer in found.answers.items():
                for length in PROMPTS:
                    prompt = [int(token) for token in np.arange(length) * 37 % 40_000 + 100]
                    reply = await answer(prompt, arguments.tokens)
                    if number:  # the first round warms up
                        replies.setdefault((name, length), []).append(reply)
                    say(
                        arguments,
                        f"round {number} {name:>11} {length:3}: "
                        f"{length / reply.ttft_s:7.1f} tok/s prefill, {reply.tok_s:6.1f} decode",
                    )
    result = summary(replies) | {"ranges": found.ranges, "memory": found.memory}
    assert found.inspection is not None
    parts = await measure_parts(
        hidden_size=found.inspection.hidden_size,
        vocabulary_size=found.inspection.vocabulary_size,
    )
    total = result["hop_us"]["llama"]
    result["hop_us"] |= {
        "parts": {name: round(value, 1) for name, value in asdict(parts).items()}
        | {"wake_ups": round(total - parts.sum, 1)}
    }
    return result | {"demo": demo(arguments, stock_tok_s=result["decode_tok_s"]["llama_stock"])}


@asynccontextmanager
async def contenders(
    arguments: argparse.Namespace, entry: ModelEntry, cache: Path
) -> AsyncIterator[Contenders]:
    """Start everything that is measured; it idles until it is its turn."""
    found = Contenders()
    async with AsyncExitStack() as stack:
        found.answers["llama_stock"] = await stack.enter_async_context(
            stock(entry, threads=arguments.threads)
        )
        for engine in ("llama", "mlx"):
            whole = await stack.enter_async_context(whole_child(engine, arguments, entry, cache))
            budgets = thirds(whole.inspection)
            split = await stack.enter_async_context(
                ring(
                    budgets,
                    engine=engine,
                    model=DEFAULT_MODEL,
                    cache=cache,
                    threads=arguments.threads,
                )
            )
            found.answers[f"{engine}_whole"] = whole_answer(whole.shard)
            found.answers[f"{engine}_split"] = split_answer(split)
            found.ranges[engine] = [(stage["start"], stage["end"]) for stage in split.stages]
            # After some tokens: before, keys, values and buffers have no memory yet.
            for answer in (whole_answer(whole.shard), split_answer(split)):
                await answer(list(range(1, 65)), 2)
            found.memory[engine] = memory(whole, split)
            if engine == "llama":
                found.inspection = whole.inspection
        yield found


@asynccontextmanager
async def stock(entry: ModelEntry, *, threads: int) -> AsyncIterator[Answer]:
    """llama.cpp without anything of ours but the calls."""
    script = Path(__file__).with_name("engines") / "stock_llama.py"
    process = await LineProcess.start(
        script, {"path": str(entry.path), "threads": threads, "context": CONTEXT}
    )
    try:
        with trio.fail_after(READY_TIMEOUT_S):
            await process.read()

        async def answer(prompt: list[int], count: int) -> Reply:
            return Reply(**await process.do("generate", token_ids=prompt, max_tokens=count))

        yield answer
    finally:
        with trio.CancelScope(shield=True):
            await end([process])


@dataclass(frozen=True)
class WholeChild:
    """All layers in one engine child."""

    inspection: Inspection
    shard: HostedShard
    bare: dict[str, int]
    """The child's memory before it loaded, its engine imported and the model inspected."""


@asynccontextmanager
async def whole_child(
    engine: str, arguments: argparse.Namespace, entry: ModelEntry, cache: Path
) -> AsyncIterator[WholeChild]:
    settings = EngineConfig(threads=arguments.threads, context=CONTEXT, slots=SLOTS)
    host = EngineHost(engine, config=settings, cache_folder=cache)
    others = {child.pid for child in engine_children(os.getpid())}
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        inspection = await host.inspect(entry.path)
        (spare,) = (child for child in engine_children(os.getpid()) if child.pid not in others)
        bare = memory_of(spare.pid)
        shard = await host.load(
            entry.path,
            start=0,
            end=inspection.layer_count,
            slots=SLOTS,
            context=CONTEXT,
            exact=True,
        )
        assert shard.pid == spare.pid, "the child that inspected did not load"
        yield WholeChild(inspection, shard, bare)
        nursery.cancel_scope.cancel()


def thirds(inspection: Inspection) -> list[int]:
    """Budgets of three nodes with which each holds a third of the layers, in this order."""
    count = inspection.layer_count
    bounds = [count * index // NODES for index in range(NODES + 1)]
    return [
        round(fit(inspection, start, stop, slots=SLOTS, context=CONTEXT).sum_bytes * BUDGET_SLACK)
        for start, stop in pairwise(bounds)
    ]


def whole_answer(shard: HostedShard) -> Answer:
    return lambda prompt, count: reply_of_whole(shard, prompt, count)


def split_answer(split: Ring) -> Answer:
    return lambda prompt, count: reply_of_ring(split.nodes, prompt, count)


def memory_of(pid: int) -> dict[str, int]:
    """A process's resident, proportional and unique memory in bytes (Linux; else nothing)."""
    found = {}
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()[1:]
    except OSError:
        return {}
    for line in lines:
        name, kilobytes = line.split()[:2]
        found[name.rstrip(":")] = int(kilobytes) * 1024
    unique = found["Private_Clean"] + found["Private_Dirty"]
    return {"rss": found["Rss"], "pss": found["Pss"], "uss": unique}


def memory(whole: WholeChild, split: Ring) -> dict[str, float]:
    """What layers cost in an engine child: resident memory over the child before it loaded, MB."""
    middle = split.stages[1]
    pids = [child.pid for child in engine_children(split.node_of(middle).process.pid)]
    # A child that only inspected may be there too; it is smaller.
    shard = max((memory_of(pid) for pid in pids), key=lambda found: found.get("rss", 0))
    all_layers = memory_of(whole.shard.pid)
    told = {
        f"{name}_{kind}_mb": round(found[kind] / 1e6, 1)
        for name, found in (("bare", whole.bare), ("whole", all_layers), ("middle", shard))
        for kind in found
    }
    if not told:
        return {}
    over = {
        kind: (shard[kind] - whole.bare[kind]) / (all_layers[kind] - whole.bare[kind])
        for kind in shard
    }
    return {f"middle_over_whole_{kind}": round(ratio, 3) for kind, ratio in over.items()} | told


def demo(arguments: argparse.Namespace, *, stock_tok_s: float) -> dict[str, Any]:
    """What `swarmpy demo` tells of itself, as a user would start it."""
    command = [sys.executable, "-m", "swarmpy_cli", "demo", "--json"]
    with tempfile.TemporaryDirectory(prefix="swarmpy-bench-") as folder:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DEMO_TIMEOUT_S, cwd=folder
        )
    if done.returncode:
        return {"error": done.stderr.strip()[-300:]}
    told = json.loads(done.stdout)
    say(arguments, f"demo: {told['tok_s']:.1f} tok/s")
    return {
        "tok_s": round(told["tok_s"], 1),
        "over_llama_stock": round(told["tok_s"] / stock_tok_s, 3),
        "ttft_s": round(told["ttft_s"], 3),
        "hop_overhead_us_p50": round(told["hop_overhead_ms_p50"] * 1e3),
        "layers": [(stage["start"], stage["end"]) for stage in told["layers"]],
    }


# Numbers ----------------------------------------------------------------------

Replies = Mapping[tuple[str, int], Sequence[Reply]]
"""By contender and tokens of the prompt, one a round."""


def summary(replies: Replies) -> dict[str, Any]:
    """Medians over the rounds, of ratios within a round where two are compared."""
    names = list(dict.fromkeys(name for name, _ in replies))
    engines = ("llama", "mlx")
    return {
        "llama_split_over_llama_whole": ratios(replies, "llama_split", "llama_whole"),
        "llama_split_over_llama_stock": ratios(replies, "llama_split", "llama_stock"),
        "llama_whole_over_llama_stock": ratios(replies, "llama_whole", "llama_stock"),
        "mlx_split_over_mlx_whole": ratios(replies, "mlx_split", "mlx_whole"),
        "llama_over_mlx": {
            kind: ratios(replies, f"llama_{kind}", f"mlx_{kind}") for kind in ("whole", "split")
        },
        "hop_us": {
            engine: median(
                (reply.hop_overhead_ms * 1e3 for reply in every(replies, f"{engine}_split")), 1
            )
            for engine in engines
        },
        "tokens_equal": {
            engine: are_equal(replies, f"{engine}_whole", f"{engine}_split") for engine in engines
        }
        | {"llama_stock": are_equal(replies, "llama_whole", "llama_stock")},
        "decode_tok_s": {
            name: median((reply.tok_s for reply in every(replies, name)), 1) for name in names
        },
        "prefill_tok_s": {
            name: {
                str(length): median((length / reply.ttft_s for reply in replies[name, length]), 1)
                for length in PROMPTS
            }
            for name in names
        },
        "engine_ms_p50": {
            name: median(reply.engine_ms for reply in every(replies, name))
            for name in names
            if name != "llama_stock"
        },
        "node_cpu_ms_per_token": {
            f"{engine}_split": median(
                reply.node_cpu_ms_per_token for reply in every(replies, f"{engine}_split")
            )
            for engine in engines
        },
        "decode_by_round": {
            f"after_{length}": [
                round(one.tok_s / other.tok_s, 3)
                for one, other in rounds(replies, "llama_split", "llama_whole", length)
            ]
            for length in PROMPTS
        },
    }


def ratios(replies: Replies, above: str, below: str) -> dict[str, float]:
    """One's speed over another's, round by round; decode after any of the prompts."""
    found = {
        "decode": median(
            one.tok_s / other.tok_s
            for length in PROMPTS
            for one, other in rounds(replies, above, below, length)
        )
    }
    for length in PROMPTS:
        found[f"prefill_{length}"] = median(
            other.ttft_s / one.ttft_s for one, other in rounds(replies, above, below, length)
        )
    return found


def rounds(replies: Replies, one: str, other: str, length: int) -> Iterator[tuple[Reply, Reply]]:
    return zip(replies[one, length], replies[other, length], strict=True)


def every(replies: Replies, name: str) -> list[Reply]:
    return [reply for length in PROMPTS for reply in replies[name, length]]


def are_equal(replies: Replies, *names: str) -> bool:
    """Whether all gave the same tokens to the same prompt, in every round."""
    return all(
        len({tuple(reply.token_ids) for name in names for reply in replies[name, length]}) == 1
        for length in PROMPTS
    )


def median(values: Iterable[float], digits: int = 3) -> float:
    return round(statistics.median(values), digits)


def say(arguments: argparse.Namespace, line: str) -> None:
    if not arguments.json:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two rounds of 48 tokens")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.tokens = QUICK_ROUNDS, QUICK_TOKENS
    load = os.getloadavg()
    result = trio.run(measure, arguments) | {
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "threads": arguments.threads,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "load_before": [round(value, 2) for value in load],
        "load_after": [round(value, 2) for value in os.getloadavg()],
    }
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
