"""How many events a second the simulator runs, from 10 to 1,000 real nodes on one core.

Whole `Node`s without engines on `SimHost`: discovery, announcements, membership, caches. All are in
one network from the start (the network's key signed each node's record; no invites), start within
the first virtual minute, and from then on 1 % of them a minute crash and come back later.
Run `python benchmarks/bench_simulation.py [--json] [--nodes 10,100,1000] [--minutes 10]`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from typing import Any

import trio

from swarmpy.testing import Link, Simulation, run_simulation
from swarmpy.testing.checkers import members_missing
from swarmpy.testing.nodes import NodeSettings, SimNode

CHURN_PER_MINUTE = 0.01
START_S = 60.0
"""Nodes start within this: a swarm that appears at one instant is another story."""

DOWN_S = 45.0
"""Time between a crash and the restart."""

TICK_S = 0.005
"""Deliveries are rounded up to its multiples: those of five milliseconds share a step."""

LINK = Link(latency_s=0.02, jitter_s=0.01)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--nodes", default="10,30,100,300,1000", help="sizes, comma-separated")
    parser.add_argument("--minutes", type=float, default=10.0, help="virtual minutes each")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sizes = [int(size) for size in options.nodes.split(",")]
    runs = []
    for size in sizes:
        runs.append(measure(size, minutes=options.minutes, seed=options.seed))
        if not options.json:
            print(shown(runs[-1]), flush=True)
    result: dict[str, Any] = {"cores": os.cpu_count(), "runs": runs}
    for run in runs:
        if run["nodes"] == 1000:
            result["nodes1000_real_s"] = run["real_s"]
            result["nodes1000_cpu_s"] = run["cpu_s"]
    if options.json:
        print(json.dumps(result, indent=2))


def measure(count: int, *, minutes: float, seed: int) -> dict[str, Any]:
    """Run one swarm and return what it took."""
    simulation = Simulation(seed, LINK, tick_s=TICK_S, is_traced=False)
    found: dict[str, Any] = {}

    async def story(sim: Simulation) -> None:
        settings = NodeSettings(host="sim", engine="", start_within_s=START_S)
        async with sim.swarm(count, settings):
            await churn(sim, until_s=minutes * 60)
            found["knows_of_up"] = 1 - members_missing(sim)

    real_s, cpu_s = time.perf_counter(), time.process_time()
    run_simulation(story, seed=seed, simulation=simulation)
    real_s, cpu_s = time.perf_counter() - real_s, time.process_time() - cpu_s
    traffic = simulation.world.traffic()
    events = traffic.messages
    return {
        "nodes": count,
        "virtual_s": minutes * 60,
        "real_s": round(real_s, 2),
        "cpu_s": round(cpu_s, 2),
        "messages": events,
        "events_per_s": round(events / cpu_s),
        "virtual_over_real": round(minutes * 60 / real_s, 1),
        "payload_bytes_node_minute": round(traffic.bytes / count / minutes),
        "crashes": sum(" crashed" in line for line in simulation.fault_log),
        "knows_of_up": round(found["knows_of_up"], 5),
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


async def churn(sim: Simulation, *, until_s: float) -> None:
    """Crash 1 % of the nodes a minute, at least one in all, and let each come back."""
    rate = len(sim.nodes) * CHURN_PER_MINUTE / 60

    async def come_back(node: SimNode) -> None:
        await trio.sleep(DOWN_S)
        await node.restart()

    async with trio.open_nursery() as nursery:
        with trio.move_on_at(until_s):
            await trio.sleep_until(START_S)
            while True:
                await trio.sleep(sim.random.expovariate(rate))
                node = sim.random.choice(sim.up)
                with trio.CancelScope(shield=True):
                    await node.crash()
                nursery.start_soon(come_back, node)
        nursery.cancel_scope.cancel()


def shown(run: dict[str, Any]) -> str:
    """Return one line for people."""
    return (
        f"{run['nodes']:5d} nodes: {run['real_s']:7.2f} s real, {run['cpu_s']:7.2f} s CPU for"
        f" {run['virtual_s'] / 60:g} virtual minutes, {run['messages']} messages"
        f" ({run['events_per_s']}/s), {run['payload_bytes_node_minute']} B a node and minute,"
        f" views {run['knows_of_up']:.2%} complete, {run['rss_mb']} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
