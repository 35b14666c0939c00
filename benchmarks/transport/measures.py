"""What is measured of a stack, how often, and what is made of it: rounds, medians, goals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transport.driver import Pair

RTT_SIZES = (64, 16 * 1024, 256 * 1024, 4 * 1024 * 1024)
RPS_STREAMS = 50
RPS_BYTES = 16 * 1024
MEASURES = ("bulk", "rtt", "rps", "open", "connect")
WITHOUT_STREAMS = ("raw", "aead")
"""Stacks of one stream a connection: a new stream is a new TCP connection there."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much of everything one round does. A stack that is slow does as much as time allows."""

    bulk_bytes: int = 256 << 20
    rtt_counts: Mapping[int, int] = field(
        default_factory=lambda: dict(zip(RTT_SIZES, (1000, 1000, 150, 15), strict=True))
    )
    rps_count: int = 4000
    open_count: int = 50
    connect_count: int = 5
    seconds_max: float = 2.0
    """Of each round-trip and request measure."""


QUICK = Load(
    bulk_bytes=64 << 20,
    rtt_counts=dict(zip(RTT_SIZES, (200, 200, 30, 4), strict=True)),
    rps_count=500,
    open_count=10,
    connect_count=2,
    seconds_max=0.5,
)


@dataclass
class Sample:
    """One stack in one round. Times in milliseconds, rates in MB (10^6 bytes) a second."""

    bulk_mb_s: float = 0.0
    sender_mb_per_cpu_s: float = 0.0
    receiver_mb_per_cpu_s: float = 0.0
    rtt_ms: dict[int, list[float]] = field(default_factory=dict)
    rps: float = 0.0
    open_ms: list[float] = field(default_factory=list)
    connect_ms: list[float] = field(default_factory=list)

    @property
    def bulk_mb_per_cpu_s(self) -> float:
        """By CPU-second of the busier end."""
        return min(self.sender_mb_per_cpu_s, self.receiver_mb_per_cpu_s)


async def take(sample: Sample, measure: str, pair: Pair, load: Load) -> None:
    """Take one measure of a stack."""
    dialing, listening = pair.dialing, pair.listening
    match measure:
        case "bulk":
            sent_s, received_s = dialing.cpu_s, listening.cpu_s
            took_s = await dialing.do("bulk", size=load.bulk_bytes)
            sent_s, received_s = dialing.cpu_s - sent_s, listening.cpu_s - received_s
            megabytes = load.bulk_bytes / 1e6
            sample.bulk_mb_s = megabytes / took_s
            sample.sender_mb_per_cpu_s = megabytes / sent_s
            sample.receiver_mb_per_cpu_s = megabytes / received_s
        case "rtt":
            for size, count in load.rtt_counts.items():
                sample.rtt_ms[size] = await dialing.do(
                    "rtt", size=size, count=count, seconds_max=load.seconds_max
                )
        case "rps":
            sample.rps = await dialing.do(
                "rps",
                streams=RPS_STREAMS,
                size=RPS_BYTES,
                count=load.rps_count,
                seconds_max=load.seconds_max,
            )
        case "open":
            sample.open_ms = await dialing.do("open", count=load.open_count)
        case "connect":
            sample.connect_ms = await dialing.do(
                "connect", address=listening.address, count=load.connect_count
            )


Round = Mapping[str, Sample]
"""By stack."""


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not under `share` of all."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def of_stack(samples: Sequence[Sample], measures: Sequence[str]) -> dict[str, Any]:
    """What all rounds say of one stack: medians of rounds, p99 over the times of all rounds."""

    def median(value: Callable[[Sample], float]) -> float:
        return rounded(statistics.median(value(sample) for sample in samples))

    found: dict[str, Any] = {}
    if "bulk" in measures:
        found["bulk_mb_s"] = median(lambda sample: sample.bulk_mb_s)
        found["bulk_mb_per_cpu_s"] = median(lambda sample: sample.bulk_mb_per_cpu_s)
        found["bulk_mb_per_cpu_s_sender"] = median(lambda sample: sample.sender_mb_per_cpu_s)
        found["bulk_mb_per_cpu_s_receiver"] = median(lambda sample: sample.receiver_mb_per_cpu_s)
    if "rtt" in measures:
        found["rtt_ms"] = {
            str(size): {
                "p50": median(_rtt(size)),
                "p99": rounded(quantile([ms for s in samples for ms in s.rtt_ms[size]], 0.99)),
            }
            for size in samples[0].rtt_ms
        }
    if "rps" in measures:
        found["rps50"] = median(lambda sample: sample.rps)
    if "open" in measures:
        found["open_ms_p50"] = median(lambda sample: quantile(sample.open_ms, 0.5))
    if "connect" in measures:
        found["connect_ms_p50"] = median(lambda sample: quantile(sample.connect_ms, 0.5))
    return found


def rounded(value: float) -> float:
    """Four digits, which is more than two runs agree on."""
    return float(f"{value:.4g}")


# Goals -------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A number at the top of the result, and what it should be."""

    name: str
    sign: str
    bound: float

    def judged(self, value: float | bool) -> dict[str, Any]:
        met = value >= self.bound if self.sign == ">=" else value <= self.bound
        shown = value if isinstance(value, bool) else rounded(value)
        goal = "true" if isinstance(value, bool) else f"{self.sign} {self.bound:g}"
        return {"value": shown, "goal": goal, "met": met}


GOALS = {
    goal.name: goal
    for goal in (
        Goal("bulk_cpu_over_ceiling", ">=", 0.80),
        Goal("bulk_cpu_over_py_libp2p", ">=", 4.0),
        Goal("rtt16k_over_aead", "<=", 1.15),
        Goal("rtt256k_over_aead", "<=", 1.6),
        Goal("rtt4m_over_aead", "<=", 2.2),
        Goal("rps50_over_py_libp2p", ">=", 4.0),
        Goal("connect_ms_p50", "<=", 8.0),
        Goal("open_round_trips", "<=", 1.1),
        Goal("shaped_bulk_over_link", ">=", 0.9),
        Goal("hol_ok", ">=", 1.0),
        Goal("rest_cpu_percent", "<=", 1.0),
        Goal("rest_rss_kb_per_connection", "<=", 100.0),
    )
}


def _bulk(sample: Sample) -> float:
    return sample.bulk_mb_per_cpu_s


def _rps(sample: Sample) -> float:
    return sample.rps


def _rtt(size: int) -> Callable[[Sample], float]:
    return lambda sample: quantile(sample.rtt_ms[size], 0.5)


RATIOS: Sequence[tuple[str, str, str, Callable[[Sample], float]]] = (
    ("bulk_cpu_over_ceiling", "bulk", "aead", _bulk),
    ("bulk_cpu_over_py_libp2p", "bulk", "py-libp2p", _bulk),
    ("rtt16k_over_aead", "rtt", "aead", _rtt(RTT_SIZES[1])),
    ("rtt256k_over_aead", "rtt", "aead", _rtt(RTT_SIZES[2])),
    ("rtt4m_over_aead", "rtt", "aead", _rtt(RTT_SIZES[3])),
    ("rps50_over_py_libp2p", "rps", "py-libp2p", _rps),
)
"""Name, measure, the stack that swarmpy is compared with, and by what."""


def ratios(rounds: Sequence[Round], measures: Sequence[str]) -> dict[str, list[float]]:
    """swarmpy against others, round by round: both ran within seconds of each other."""
    return {
        name: [rounded(value(item["swarmpy"]) / value(item[other])) for item in rounds]
        for name, measure, other, value in RATIOS
        if measure in measures and {"swarmpy", other} <= rounds[0].keys()
    }
