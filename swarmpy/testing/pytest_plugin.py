"""The pytest plugin: runs tests made by `@simulate` once for each seed.

`--sim-runs 200` tries 200 seeds of every such test, `--sim-seed 17` that one alone. Installed with
swarmpy (entry point `pytest11`); it imports nothing of it until there is a simulated test.
"""

from __future__ import annotations

import argparse
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
        type=_count,
        default=None,
        metavar="COUNT",
        help="run simulated tests with so many seeds each, from 0 on; at least 1",
    )


def _count(text: str) -> int:
    """Read a number of seeds: with none every simulated test would be skipped, and none fail."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 seed, got {count}")
    return count


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
    seed = request.node.callspec.params["sim_seed"]
    return f"pytest {shlex.quote(request.node.nodeid)} --sim-seed {seed}"
