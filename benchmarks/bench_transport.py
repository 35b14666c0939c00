"""What swarmpy's transport costs: beside raw TCP, bare AEAD frames, and libp2p in three languages.

Every stack runs as two processes on loopback, one that listens and one that dials; all of them take
turns within each round, and ratios are taken round by round. A round in which raw TCP falls under
0.6 of the best round is measured again (another program had the machine), 20 rounds at most.

    python benchmarks/bench_transport.py [--json | --markdown] [--rounds 7] [--quick]
        [--stacks raw,aead,swarmpy,py-libp2p,js-libp2p,go-libp2p]
        [--only bulk,rtt,rps,open,connect,trips,shaped,rest]

benchmarks/README.md says what is measured and has the numbers. Progress goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio
from transport import measures as m
from transport import rest, shaped, table
from transport.driver import (
    LOOPBACK,
    STACKS,
    Pair,
    PeerFailed,
    PeerProcess,
    Unavailable,
    delayed,
    pair,
    running,
)

RAW_SHARE_MIN = 0.6
"""Of the best round's raw TCP: under it, something else had the machine."""

ROUNDS_MAX = 20
DELAY_S = 0.025
"""Held this long each way to count round trips: 50 ms beside which computing does not count."""

TRIP_COUNT = 20
ONLY = (*m.MEASURES, "trips", "shaped", "rest")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def available(names: Sequence[str], folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The command of each stack, and why others are left out."""
    commands, skipped = {}, {}
    for name in names:
        try:
            commands[name] = STACKS[name](folder, LOOPBACK)
        except Unavailable as error:
            skipped[name] = str(error)
            say(f"{name} is skipped: {error}")
    return commands, skipped


async def one_round(pairs: dict[str, Pair], only: Sequence[str], load: m.Load) -> m.Round:
    """Every measure of every stack once; the stacks take turns measure by measure."""
    samples = {name: m.Sample() for name in pairs}
    for measure in m.MEASURES:
        if measure in only:
            for name, sample in samples.items():
                try:
                    await m.take(sample, measure, pairs[name], load)
                except PeerFailed as error:
                    raise PeerFailed(f"{name}: {error}") from error
    return samples


def undisturbed(rounds: Sequence[m.Round]) -> list[m.Round]:
    """The rounds whose raw TCP was not far under the best."""
    if "raw" not in rounds[0]:
        return list(rounds)
    best = max(item["raw"].bulk_mb_s for item in rounds)
    return [item for item in rounds if item["raw"].bulk_mb_s >= RAW_SHARE_MIN * best]


async def measure_rounds(
    pairs: dict[str, Pair], only: Sequence[str], load: m.Load, count: int
) -> tuple[list[m.Round], int]:
    """`count` undisturbed rounds, or as many as there are among 20; and how many were run."""
    say("a round to warm up")
    await one_round(pairs, only, m.QUICK)
    rounds: list[m.Round] = []
    while len(rounds) < ROUNDS_MAX:
        rounds.append(await one_round(pairs, only, load))
        kept = undisturbed(rounds)
        say(f"round {len(rounds)}, {len(kept)} kept: {table.short(rounds[-1])}")
        if len(kept) >= count:
            break
    return kept, len(rounds)


async def round_trips(name: str, command: Sequence[str], listening: PeerProcess) -> float:
    """Round trips until the first reply on a new stream, over a line with a delay."""
    async with delayed(listening.address, DELAY_S) as address, running(command) as dialing:
        await dialing.do("dial", address=address)
        echoes = await dialing.do("rtt", size=64, count=TRIP_COUNT, seconds_max=10.0)
        opened = await dialing.do("open", count=TRIP_COUNT)
    trips = m.quantile(opened, 0.5) / m.quantile(echoes, 0.5)
    say(f"{name}: the first reply of a new stream takes {trips:.2f} round trips")
    return m.rounded(trips)


async def measure_stacks(
    commands: Mapping[str, list[str]], arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return what has goals, and everything found of every stack."""
    only = arguments.only
    values: dict[str, float] = {}
    details: dict[str, Any] = {}
    stacks: dict[str, dict[str, Any]] = {}
    async with AsyncExitStack() as stack:
        pairs: dict[str, Pair] = {}
        for name, command in commands.items():
            pairs[name] = await stack.enter_async_context(pair(command))
            stacks[name] = {"version": pairs[name].listening.version}
        if set(only) & set(m.MEASURES):
            load = m.QUICK if arguments.quick else m.Load()
            kept, run = await measure_rounds(pairs, only, load, arguments.rounds)
            for name, found in stacks.items():
                found |= m.of_stack([item[name] for item in kept], only)
            by_round = m.ratios(kept, only)
            values |= {name: statistics.median(ratios) for name, ratios in by_round.items()}
            details |= {"rounds_kept": len(kept), "rounds_run": run, "by_round": by_round}
        if "trips" in only:
            for name, both in pairs.items():
                if name not in m.WITHOUT_STREAMS:
                    trips = await round_trips(name, commands[name], both.listening)
                    stacks[name]["open_round_trips"] = trips
    ours = stacks.get("swarmpy", {})
    values |= {name: ours[name] for name in ("connect_ms_p50", "open_round_trips") if name in ours}
    return values, details | {"stacks": stacks}


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    values: dict[str, float | bool] = {}
    details: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    if set(arguments.only) - {"shaped", "rest"}:
        commands, skipped = available(arguments.stacks, folder)
        by_ratio, details = await measure_stacks(commands, arguments)
        values |= by_ratio
    for name, part in (("shaped", shaped.measure), ("rest", rest.measure)):
        if name in arguments.only:
            try:
                found, details[name] = await part(folder, say, is_quick=arguments.quick)
                values |= found
            except Unavailable as error:
                skipped[name] = str(error)
                say(f"{name} is skipped: {error}")
    judged = {name: goal.judged(values[name]) for name, goal in m.GOALS.items() if name in values}
    return judged | {"stacks": {}} | details | {"skipped": skipped}


def listed(allowed: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: not among {', '.join(allowed)}"
            )
        return [name for name in allowed if name in chosen]

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--markdown", action="store_true", help="print the tables of README.md")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small loads: see that it works")
    parser.add_argument("--stacks", type=listed(tuple(STACKS)), default=list(STACKS))
    parser.add_argument("--only", type=listed(ONLY), default=list(ONLY))
    arguments = parser.parse_args()
    machine = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "quick": arguments.quick,
    }
    with tempfile.TemporaryDirectory(prefix="swarmpy-bench-") as folder:
        result = trio.run(measure, arguments, Path(folder)) | machine
    if arguments.markdown:
        print(table.markdown(result))
    else:
        print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
