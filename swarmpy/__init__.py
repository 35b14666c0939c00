"""swarmpy: pool machines to run language models that none of them could run alone.

    async with swarmpy.Node.open(config, environment) as node:
        ...

Names are loaded when first used, so that `import swarmpy` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarmpy.config import Config, load_config
    from swarmpy.environment import Environment
    from swarmpy.errors import SwarmError
    from swarmpy.identity import Identity, PeerId
    from swarmpy.node import Node, local_environment
    from swarmpy.pipeline.session import Generation, Report, Token
    from swarmpy.proto.pipeline import Sampling

_HOMES = {
    "Config": "swarmpy.config",
    "load_config": "swarmpy.config",
    "Environment": "swarmpy.environment",
    "local_environment": "swarmpy.node",
    "SwarmError": "swarmpy.errors",
    "Identity": "swarmpy.identity",
    "PeerId": "swarmpy.identity",
    "Node": "swarmpy.node",
    "Generation": "swarmpy.pipeline.session",
    "Report": "swarmpy.pipeline.session",
    "Token": "swarmpy.pipeline.session",
    "Sampling": "swarmpy.proto.pipeline",
}

__all__ = [
    "Config",
    "Environment",
    "Generation",
    "Identity",
    "Node",
    "PeerId",
    "Report",
    "Sampling",
    "SwarmError",
    "Token",
    "load_config",
    "local_environment",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'swarmpy' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
