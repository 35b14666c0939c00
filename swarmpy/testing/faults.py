"""Faults drawn from the seed: each seed draws which kinds happen, how often, and when.

A kind that a seed draws does not happen at all in about half of all seeds: a fault that is always
there hides what only shows without it.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import trio

from swarmpy.testing.paths import Link

if TYPE_CHECKING:
    from swarmpy.testing.nodes import SimNode
    from swarmpy.testing.simulation import Simulation

KIND_PROBABILITY = 0.5
"""Part of the seeds in which a kind of fault happens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """The worst that a seed may draw; 0 leaves a kind out."""

    latency_s: float = 0.05
    jitter_s: float = 0.05
    loss: float = 0.05
    torn: float = 0.5
    skew_s: float = 60.0
    """Machines' clocks differ by up to so much; members accept 300 s."""
    nat: float = 0.5
    """Part of the machines behind a NAT. The first never is: somebody must be reachable."""
    partitions_per_minute: float = 2.0
    stalls_per_minute: float = 6.0
    resets_per_minute: float = 6.0
    freezes_per_minute: float = 2.0
    crashes_per_minute: float = 2.0
    lost_disks: float = 0.0
    """Part of the crashes after which the machine comes back empty."""
    outage_s: float = 20.0
    """Longest partition, freeze and time between crash and restart."""

    def drawn(self, chance: random.Random) -> Faults:
        """Return what one seed makes of it."""
        values: dict[str, float] = {}
        for field in fields(self):
            happens, share = chance.random() < KIND_PROBABILITY, chance.random()
            worst = getattr(self, field.name)
            is_always = field.name in ("latency_s", "outage_s")
            values[field.name] = worst * share if happens or is_always else 0.0
        return Faults(**values)


NO_FAULTS = Faults(
    **dict.fromkeys((field.name for field in fields(Faults)), 0.0),
)
"""Nothing goes wrong: a base for tests that want one kind alone (`dataclasses.replace`)."""


async def inject(simulation: Simulation, worst: Faults) -> None:
    """Do to a swarm what its seed draws, until cancelled."""
    chance = simulation.random_for("faults")
    faults = worst.drawn(chance)
    simulation.log_fault(f"drew {_shown(faults)}")
    _shape(simulation, faults, chance)
    kinds: list[tuple[float, Callable[[], Awaitable[None]]]] = [
        (faults.partitions_per_minute, partial(_partition, simulation, faults, chance)),
        (faults.stalls_per_minute, partial(_stall, simulation, chance)),
        (faults.resets_per_minute, partial(_reset, simulation, chance)),
        (faults.freezes_per_minute, partial(_freeze, simulation, faults, chance)),
        (faults.crashes_per_minute, partial(_crash, simulation, faults, chance)),
    ]
    async with trio.open_nursery() as nursery:
        for rate, strike in kinds:
            if rate:
                nursery.start_soon(_strike_at, rate, strike, chance)


async def _strike_at(
    per_minute: float, strike: Callable[[], Awaitable[None]], chance: random.Random
) -> None:
    while True:
        await trio.sleep(chance.expovariate(per_minute / 60))
        await strike()


def _shape(simulation: Simulation, faults: Faults, chance: random.Random) -> None:
    """Give every pair of machines its link, and machines their clocks and NATs."""
    nodes = simulation.nodes
    for near in nodes:
        near.skew_s = chance.uniform(-0.5, 0.5) * faults.skew_s
        if near.index and chance.random() < faults.nat:
            simulation.world.set_nat(near.ip)
        for far in nodes:
            if near is not far:
                link = Link(
                    latency_s=chance.random() * faults.latency_s,
                    jitter_s=chance.random() * faults.jitter_s,
                    loss=chance.random() * faults.loss,
                    torn=chance.random() * faults.torn,
                )
                simulation.world.set_link(near.ip, far.ip, link)


async def _partition(simulation: Simulation, faults: Faults, chance: random.Random) -> None:
    names = [node.ip for node in simulation.nodes]
    side = chance.sample(names, chance.randrange(1, max(2, len(names))))
    others = [name for name in names if name not in side]
    one_way = chance.random() < 0.3
    arrow = "->" if one_way else "|"
    simulation.world.partition(side, others, one_way=one_way)
    simulation.log_fault(f"partition {_listed(simulation, side)} {arrow} the others")
    await _outage(faults, chance)
    simulation.world.repair(side, others, one_way=one_way)
    simulation.log_fault(f"repaired {_listed(simulation, side)} {arrow} the others")


async def _stall(simulation: Simulation, chance: random.Random) -> None:
    near, far = chance.sample(simulation.nodes, 2)
    for_s = chance.uniform(0.1, 5.0)
    simulation.world.stall(near.ip, far.ip, for_s=for_s)
    simulation.log_fault(f"{near.name} - {far.name} stall for {for_s:.1f} s")


async def _reset(simulation: Simulation, chance: random.Random) -> None:
    near, far = chance.sample(simulation.nodes, 2)
    simulation.world.reset(near.ip, far.ip)
    simulation.log_fault(f"{near.name} - {far.name} reset")


async def _freeze(simulation: Simulation, faults: Faults, chance: random.Random) -> None:
    node = chance.choice(simulation.nodes)
    simulation.world.freeze(node.ip)
    simulation.log_fault(f"{node.name} frozen")
    await _outage(faults, chance)
    simulation.world.thaw(node.ip)
    simulation.log_fault(f"{node.name} thawed")


async def _crash(simulation: Simulation, faults: Faults, chance: random.Random) -> None:
    up: list[SimNode] = list(simulation.up)
    if not up:
        return
    node = chance.choice(up)
    # A machine is down or up, whenever the faults end: not in between.
    with trio.CancelScope(shield=True):
        await node.crash()
    await _outage(faults, chance)
    if not node.is_up:
        with trio.CancelScope(shield=True):
            await node.restart(lose_disk=chance.random() < faults.lost_disks)


async def _outage(faults: Faults, chance: random.Random) -> None:
    await trio.sleep(chance.random() * faults.outage_s)


def _listed(simulation: Simulation, ips: list[str]) -> str:
    return ",".join(node.name for node in simulation.nodes if node.ip in ips)


def _shown(faults: Faults) -> str:
    values = {field.name: getattr(faults, field.name) for field in fields(faults)}
    return ", ".join(f"{name} {value:.2g}" for name, value in values.items() if value) or "nothing"
