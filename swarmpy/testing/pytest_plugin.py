"""The pytest plugin: runs tests made by `@simulate` once for each seed.

`--sim-runs 200` tries 200 seeds of every such test, `--sim-seed 17` that one alone. Installed with
swarmpy (entry point `pytest11`); it imports nothing of it until there is a simulated test.
"""

from __future__ import annotations

import shlex

import pytest

SIMULATED = "swarmpy_simulated"
"""As in `swarmpy.testing.runner`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options for seeds."""
    group = parser.getgroup("swarmpy", "simulated swarms")
    group.addoption(
        "--sim-seed",
        type=int,
        default=None,
        metavar="SEED",
        help="run simulated tests with this seed alone",
    )
    group.addoption(
        "--sim-runs",
        type=int,
        default=None,
        metavar="COUNT",
        help="run simulated tests with so many seeds each, from 0 on",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a simulated test its seeds."""
    plan = getattr(metafunc.function, SIMULATED, None)
    if plan is None:
        return
    seed, runs = (metafunc.config.getoption(name) for name in ("--sim-seed", "--sim-runs"))
    seeds = range(plan.seeds if runs is None else runs) if seed is None else [seed]
    metafunc.parametrize("sim_seed", seeds, ids=[f"seed{item}" for item in seeds])


@pytest.fixture
def sim_replay(request: pytest.FixtureRequest) -> str:
    """The command that runs the present seed of a simulated test alone."""
    callspec = request.node.callspec
    seed = callspec.params["sim_seed"]
    name, _, rest = request.node.nodeid.partition("[")
    others = [item for item in rest.rstrip("]").split("-") if item and item != f"seed{seed}"]
    chosen = f" -k {shlex.quote(' and '.join(others))}" if others else ""
    return f"pytest {shlex.quote(name)}{chosen} --sim-seed {seed}"
