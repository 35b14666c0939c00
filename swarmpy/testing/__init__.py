"""Tools to test programs built on swarmpy: a simulated network, a virtual clock, an instant engine.

Shipped and documented like the rest. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib

_EXPORTS = {
    "Checker": "swarmpy.testing.checkers",
    "EchoEngine": "swarmpy.testing.engine",
    "Faults": "swarmpy.testing.faults",
    "InvariantBroken": "swarmpy.testing.simulation",
    "LivenessFailed": "swarmpy.testing.simulation",
    "MachineDown": "swarmpy.testing.nodes",
    "Link": "swarmpy.testing.paths",
    "SimHost": "swarmpy.testing.host",
    "SimMachine": "swarmpy.testing.network",
    "SimNetwork": "swarmpy.testing.network",
    "SimNode": "swarmpy.testing.nodes",
    "Traffic": "swarmpy.testing.network",
    "Simulation": "swarmpy.testing.simulation",
    "run_simulation": "swarmpy.testing.simulation",
    "simulate": "swarmpy.testing.runner",
    "views_agree": "swarmpy.testing.checkers",
}


def __getattr__(name: str) -> object:
    """Import what is asked for, and only that."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
