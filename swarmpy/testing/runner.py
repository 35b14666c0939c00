"""`@simulate`: a pytest test that runs once for each seed, in a swarm of real nodes.

    @simulate(nodes=6, seeds=20, faults=Faults())
    async def test_replies_survive(sim: Simulation) -> None: ...

While the test runs its seed's faults happen and the invariants are checked; `await sim.heal()` ends
the faults, and `sim.within` says how long whatever must happen then may take.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from swarmpy.config import Config
from swarmpy.testing.checkers import standard_checkers
from swarmpy.testing.faults import Faults
from swarmpy.testing.nodes import ECHO_ENGINE, SIM_HOST_NODES, NodeSettings
from swarmpy.testing.paths import Link
from swarmpy.testing.simulation import LivenessFailed, Simulation, run_simulation

Test = Callable[..., Awaitable[None]]

SIMULATED = "swarmpy_simulated"
"""Attribute by which the pytest plugin knows a test made by `simulate`."""

FAULTS_SHOWN_MAX = 60
EVENTS_SHOWN_MAX = 15

TICK_S = 0.001
"""In large swarms what arrives within a millisecond arrives at its end: one step of the clock."""

TIME_MAX_S = 3600.0
"""Virtual time after which a test that says nothing else has hung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `simulate` was asked for."""

    nodes: int
    seeds: int
    link: Link
    faults: Faults | None
    settings: NodeSettings
    time_max_s: float
    is_checked: bool


def simulate(
    *,
    nodes: int,
    seeds: int = 10,
    link: Link | None = None,
    faults: Faults | None = None,
    engine: str = ECHO_ENGINE,
    is_joined: bool = True,
    change: Callable[[int, Config], Config] | None = None,
    time_max_s: float = TIME_MAX_S,
) -> Callable[[Test], Callable[..., None]]:
    """Make a pytest test of a scenario: `async def test_x(sim: Simulation, ...fixtures)`.

    Args:
        nodes: How many machines with a node on each; from 50 on they run on `SimHost`.
        seeds: Runs with the seeds 0, 1, ...; `--sim-runs` and `--sim-seed` say otherwise.
        link: Between any two machines, where no fault changes it; 10 ms by default.
        faults: The worst that a seed may draw; None: nothing goes wrong but what the test does.
        engine: "" for nodes that only route; by default they compute with the test engine.
        is_joined: All are members of one network from the start.
        change: Changes the settings of the node with an index.
        time_max_s: Virtual seconds after which the run has hung.

    Raises:
        ValueError: No seeds: the test would be skipped, and never fail.
    """
    if seeds < 1:
        raise ValueError(f"expected at least 1 seed, got {seeds}")
    plan = Plan(
        nodes=nodes,
        seeds=seeds,
        link=link or Link(latency_s=0.01),
        faults=faults,
        settings=NodeSettings(
            host="sim" if nodes >= SIM_HOST_NODES else "native",
            engine=engine,
            is_joined=is_joined,
            change=change,
        ),
        time_max_s=time_max_s,
        is_checked=True,
    )
    return partial(_as_test, plan)


def _as_test(plan: Plan, test: Test) -> Callable[..., None]:
    signature = inspect.signature(test)
    others = [item for name, item in signature.parameters.items() if name != "sim"]

    def run(sim_seed: int, sim_replay: str, **fixtures: Any) -> None:
        run_test(plan, partial(test, **fixtures), seed=sim_seed, replay=sim_replay)

    run.__name__, run.__qualname__ = test.__name__, test.__qualname__
    run.__doc__, run.__module__ = test.__doc__, test.__module__
    run.__wrapped__ = test  # type: ignore[attr-defined]
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [inspect.Parameter(name, keyword) for name in ("sim_seed", "sim_replay")]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*own, *(item.replace(kind=keyword) for item in others)]
    )
    setattr(run, SIMULATED, plan)
    return run


def run_test(plan: Plan, test: Test, *, seed: int, replay: str = "") -> Simulation:
    """Run one seed of a plan; an error tells how it came about and how to see it again.

    Args:
        replay: The command that runs this seed alone.
    """
    is_large = plan.settings.host == "sim"
    simulation = Simulation(seed, plan.link, tick_s=TICK_S if is_large else 0.0)
    simulation.checkers += standard_checkers() if plan.is_checked else []

    async def scenario(sim: Simulation) -> None:
        with trio.move_on_after(plan.time_max_s) as scope:
            async with sim.swarm(plan.nodes, plan.settings, faults=plan.faults):
                await test(sim)
        if scope.cancelled_caught:
            raise LivenessFailed(f"the test did not end within {plan.time_max_s:g} virtual seconds")

    try:
        run_simulation(scenario, seed=seed, simulation=simulation)
    except BaseException as error:
        cause = _only(error)
        cause.add_note(report(simulation, replay))
        if cause is error:
            raise
        raise cause from cause.__cause__
    return simulation


def report(simulation: Simulation, replay: str) -> str:
    """Return what a person needs to understand a failed run."""
    lines = [f"simulation failed with seed {simulation.seed}", "faults:"]
    lines += [f"  {line}" for line in simulation.fault_log[-FAULTS_SHOWN_MAX:]] or ["  none"]
    lines += ["last events:"]
    lines += [f"  {line.rstrip()}" for line in list(simulation.trace.tail)[-EVENTS_SHOWN_MAX:]]
    if replay:
        lines += [f"replay: {replay}"]
    return "\n".join(lines)


def _only(error: BaseException) -> BaseException:
    """Return the one error inside groups of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
