"""Which engine runs a model on this machine, found out by a short-lived child of this command."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarmpy.config import EngineConfig
    from swarmpy.pipeline.engines import Choice
    from swarmpy_cli.context import Settings


def choose_engine(settings: Settings, path: Path, *, engine: str | None = None) -> Choice:
    """Return the engine that a node with these settings runs a model with.

    Args:
        path: The model's files, a folder or one GGUF.
        engine: Instead of what the settings name.

    Raises:
        ExtensionNotFound: The configured engine is not installed.
        ModelRefused: No engine here takes the model.
    """
    from swarmpy_cli.run import run_async

    config = settings.config({"engine": {"name": engine}} if engine else {}).engine
    return run_async(partial(_choose, config, settings.cache_folder, path))


async def _choose(config: EngineConfig, cache_folder: Path, path: Path) -> Choice:
    import trio

    from swarmpy.pipeline.engines import Engines

    engines = Engines.find(config, cache_folder=cache_folder)
    async with trio.open_nursery() as nursery:
        await nursery.start(engines.run)
        choice = await engines.choose(path)
        nursery.cancel_scope.cancel()
    return choice
