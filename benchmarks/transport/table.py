"""The result as the tables of benchmarks/README.md, and a round as one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transport.measures import GOALS, Round

ROWS: Mapping[str, tuple[str, ...]] = {
    "bulk, MB/s": ("bulk_mb_s",),
    "bulk, MB per CPU-second, sender": ("bulk_mb_per_cpu_s_sender",),
    "bulk, MB per CPU-second, receiver": ("bulk_mb_per_cpu_s_receiver",),
    "round trip of 64 B, ms p50 / p99": ("rtt_ms", "64"),
    "16 KiB": ("rtt_ms", "16384"),
    "256 KiB": ("rtt_ms", "262144"),
    "4 MiB": ("rtt_ms", "4194304"),
    "16 KiB echoes a second over 50 streams": ("rps50",),
    "connect until identify is done, ms": ("connect_ms_p50",),
    "first reply on a new stream, ms": ("open_ms_p50",),
    "the same in round trips": ("open_round_trips",),
}
"""Row titles, and where a stack's result has the value."""


def short(found: Round) -> str:
    """A round's bulk per CPU-second and 16 KiB round trip, to be followed while it runs."""
    parts = []
    for name, sample in found.items():
        bulk = f"{sample.bulk_mb_per_cpu_s:.0f}" if sample.bulk_mb_s else "-"
        times = sorted(sample.rtt_ms.get(16 * 1024, []))
        rtt = f"{times[len(times) // 2]:.3f}" if times else "-"
        parts.append(f"{name} {bulk}/{rtt}")
    return ", ".join(parts)


def markdown(result: Mapping[str, Any]) -> str:
    """Two tables: goals, and stacks side by side."""
    lines = ["| | measured | goal |", "|---|---|---|"]
    for name in GOALS:
        if name in result:
            judged = result[name]
            missed = "" if judged["met"] else ", **missed**"
            lines.append(f"| `{name}` | {_shown(judged['value'])} | {judged['goal']}{missed} |")
    stacks = result["stacks"]
    if stacks:
        lines += ["", f"| | {' | '.join(stacks)} |", "|---" * (len(stacks) + 1) + "|"]
    for title, path in ROWS.items():
        cells = [_shown(_at(found, path)) for found in stacks.values()]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    for name in ("shaped", "rest"):
        if name in result:
            lines += ["", f"{name}: `{result[name]}`"]
    versions = (f"{name}: {found['version']}" for name, found in stacks.items())
    lines += ["", "; ".join(versions)]
    lines += [f"{name} was skipped: {reason}" for name, reason in result["skipped"].items()]
    lines += [f"{result['machine']}, Python {result['python']}, load {result['load_before']}"]
    return "\n".join(lines)


def _at(found: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        found = found.get(key)
        if found is None:
            return None
    return found


def _shown(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case {"p50": p50, "p99": p99}:
            return f"{_shown(p50)} / {_shown(p99)}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
