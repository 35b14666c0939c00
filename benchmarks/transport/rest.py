"""What a swarmpy host costs while a hundred connections lie idle: CPU and memory of its process.

The other ends are a hundred hosts in a second process. Keepalive pings go both ways all the time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from transport.driver import LOOPBACK, STACKS, running
from transport.measures import rounded

CONNECTIONS = 100
WARM_CONNECTIONS = 5
"""Made and closed before memory is read the first time: they load what every connection shares."""

SETTLE_S = 3.0
REST_S = 20.0
"""Several keepalive intervals."""

QUICK_REST_S = 10.0


async def measure(
    folder: Path, say: Callable[[str], None], *, is_quick: bool
) -> tuple[dict[str, float | bool], dict[str, Any]]:
    """Return the values that have goals, and everything found."""
    rest_s = QUICK_REST_S if is_quick else REST_S
    command = STACKS["swarmpy"](folder, LOOPBACK)
    async with running(command) as resting, running(command) as others:
        await others.do("connect", address=resting.address, count=WARM_CONNECTIONS)
        await trio.sleep(SETTLE_S)
        before_bytes = resting.rss_bytes
        await others.do("hold", address=resting.address, count=CONNECTIONS)
        await trio.sleep(SETTLE_S)
        before_s = resting.cpu_s
        await trio.sleep(rest_s)
        cpu_percent = (resting.cpu_s - before_s) / rest_s * 100
        after_bytes = resting.rss_bytes
        held = await resting.do("connections")
    found = {
        "rest_cpu_percent": rounded(cpu_percent),
        "rest_rss_kb_per_connection": rounded((after_bytes - before_bytes) / 1024 / CONNECTIONS),
    }
    say(f"at rest: {found}")
    return dict(found), {
        "connections": held,
        "seconds": rest_s,
        "rss_mb_before": rounded(before_bytes / 2**20),
        "rss_mb_after": rounded(after_bytes / 2**20),
    }
