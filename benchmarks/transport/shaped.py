"""swarmpy over a line that is slow and long: how much of it bulk fills, and who waits for whom.

Two network namespaces joined by link.py (30 ms there and back) with a token bucket at each end.
The bottleneck is the sender's own interface with a short queue, as where a machine's uplink is its
modem's. A deep buffer further away would delay everybody, and nothing an application does helps.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from transport.driver import HERE, STACKS, Pair, Unavailable, running
from transport.measures import quantile, rounded

DELAY_S = 0.015
BULK_RATE_MBIT = 100
BULK_BYTES = 128 << 20
QUICK_BULK_BYTES = 16 << 20

HOL_RATE_MBIT = 20
FRAME_BYTES = 16 * 1024
DECODE_COUNT = 400
QUICK_DECODE_COUNT = 60
IDLE_FACTOR = 1.2

BURST_BYTES = 3200
"""Two packets: a bucket that holds more lets short bursts pass faster than the line."""

QUEUE_BYTES = 64 * 1024
"""Of the token bucket. TCP keeps less than this there by itself (TCP small queues)."""

CONGESTION_CONTROL = "cubic"
"""What most machines have; a benchmark must not depend on this one's setting."""

NETWORK = "192.0.2.0/30"
ADDRESSES = ("192.0.2.1", "192.0.2.2")
Say = Callable[[str], None]


async def measure(
    folder: Path, say: Say, *, is_quick: bool
) -> tuple[dict[str, float | bool], dict[str, Any]]:
    """Return the values that have goals, and everything found.

    Raises:
        Unavailable: No right to make namespaces, or no tools for it.
    """
    _check()
    details: dict[str, Any] = {"rtt_ms": DELAY_S * 2e3, "congestion": CONGESTION_CONTROL}
    for name in ("raw", "swarmpy"):
        async with shaped_pair(folder, name, BULK_RATE_MBIT) as both:
            size = QUICK_BULK_BYTES if is_quick else BULK_BYTES
            took_s = await both.dialing.do("bulk", size=size)
            share = rounded(size * 8 / 1e6 / took_s / BULK_RATE_MBIT)
            details[f"bulk_over_link_{name}"] = share
            say(f"{name}: bulk fills {share:.1%} of {BULK_RATE_MBIT} Mbit/s")
    async with shaped_pair(folder, "swarmpy", HOL_RATE_MBIT) as both:
        count = QUICK_DECODE_COUNT if is_quick else DECODE_COUNT
        idle = await both.dialing.do("decode", count=count // 2, is_loaded=False)
        loaded = await both.dialing.do("decode", count=count, is_loaded=True)
    frame_ms = FRAME_BYTES * 8 / HOL_RATE_MBIT / 1e3
    bound_ms = frame_ms + IDLE_FACTOR * quantile(idle, 0.5)
    details["decode_ms"] = {
        "idle_p50": rounded(quantile(idle, 0.5)),
        "idle_p99": rounded(quantile(idle, 0.99)),
        "loaded_p50": rounded(quantile(loaded, 0.5)),
        "loaded_p99": rounded(quantile(loaded, 0.99)),
        "frame": rounded(frame_ms),
        "bound": rounded(bound_ms),
    }
    say(f"decode over {HOL_RATE_MBIT} Mbit/s: {details['decode_ms']}")
    return {
        "shaped_bulk_over_link": details["bulk_over_link_swarmpy"],
        "hol_ok": quantile(loaded, 0.99) <= bound_ms,
    }, details


def _check() -> None:
    if sys.platform != "linux":
        raise Unavailable("network namespaces are Linux's")
    if os.geteuid() != 0:
        raise Unavailable("making network namespaces needs root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} (iproute2) is not installed")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise Unavailable("/dev/net/tun is not there")


@asynccontextmanager
async def shaped_pair(folder: Path, stack: str, rate_mbit: int) -> AsyncIterator[Pair]:
    """Two connected peers of a stack, each in a namespace of its own."""
    names = tuple(f"swarmpy-bench-{os.getpid()}-{side}" for side in "ab")
    try:
        for name in names:
            _add(name)
        line = [sys.executable, str(HERE / "link.py"), *names, str(DELAY_S)]
        async with running(line):
            for name, address in zip(names, ADDRESSES, strict=True):
                _shape(name, address, rate_mbit)
            commands = [
                ["ip", "netns", "exec", name, *STACKS[stack](folder, address)]
                for name, address in zip(names, ADDRESSES, strict=True)
            ]
            async with running(commands[1]) as listening, running(commands[0]) as dialing:
                await dialing.do("dial", address=listening.address)
                yield Pair(listening, dialing)
    finally:
        for name in names:
            _delete(name)


def _shape(namespace: str, address: str, rate_mbit: int) -> None:
    within = ("-netns", namespace)
    _run("ip", *within, "address", "add", f"{address}/30", "dev", "line")
    _run("ip", *within, "link", "set", "line", "up")
    route = (NETWORK, "dev", "line", "congctl", CONGESTION_CONTROL)
    _run("ip", *within, "route", "change", *route)
    bucket = ("rate", f"{rate_mbit}mbit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES))
    _run("tc", *within, "qdisc", "add", "dev", "line", "root", "tbf", *bucket)


def _add(namespace: str) -> None:
    try:
        _run("ip", "netns", "add", namespace)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"no network namespace: {error.stderr.strip()}") from error


def _delete(namespace: str) -> None:
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
