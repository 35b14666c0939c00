"""The MLX engine: any mlx-lm architecture by layer range, on Apple Silicon, NVIDIA and plain CPUs.

Importing this package or its class costs nothing: MLX itself is imported by the child process that
computes.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarmpy.plugins.mlx.engine import MlxEngine

__all__ = ["MlxEngine"]


def __getattr__(name: str) -> object:
    if name != "MlxEngine":
        raise AttributeError(name)
    for package in ("mlx", "mlx_lm"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"package {package} is not installed", name=package)
    from swarmpy.plugins.mlx.engine import MlxEngine

    return MlxEngine
