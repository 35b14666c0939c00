"""Engines: those of a node, and which of them runs a model.

A model's format and the machine decide which engine is asked first; the first that takes the model
runs it. Spec: protocols/engine.md, section 8.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from swarmpy.abc import Format, Inspection, Suitability
from swarmpy.config import EngineConfig
from swarmpy.errors import EngineLost, ExtensionNotFound, ModelRefused, SwarmError
from swarmpy.extensions import engine_names
from swarmpy.pipeline.engine_host import EngineHost

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine that runs a model on this machine."""

    host: EngineHost
    inspection: Inspection
    why: str
    """In words, with what others said that were asked before."""
    is_certain: bool = True
    """False where an engine that would come first was lost while it was asked."""


class Engines:
    """The engines of one node. `run` must be running for `choose` to work."""

    def __init__(self, hosts: Sequence[EngineHost], *, is_configured: bool = False) -> None:
        """Args:
        hosts: May be empty, on a node that only routes.
        is_configured: Whether the settings name the engine, so that there is nothing to choose.
        """
        self.hosts = tuple(hosts)
        self._is_configured = is_configured

    @classmethod
    def find(cls, config: EngineConfig, *, cache_folder: Path) -> Engines:
        """Return the configured engine alone, else all that are installed.

        Raises:
            ExtensionNotFound: The configured one is not installed, or lacks what it needs.
        """
        if config.name:
            host = EngineHost(config.name, config=config, cache_folder=cache_folder)
            return cls([host], is_configured=True)
        hosts = []
        for name in engine_names():
            try:
                hosts.append(EngineHost(name, config=config, cache_folder=cache_folder))
            except ExtensionNotFound as error:
                logger.info("engine.not_installed", extra={"engine": name, "error": str(error)})
        return cls(hosts)

    def __bool__(self) -> bool:
        return bool(self.hosts)

    @property
    def names(self) -> tuple[str, ...]:
        """The engines' names in alphabetical order."""
        return tuple(sorted(host.engine_name for host in self.hosts))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch over all engines' children until cancelled; then end them."""
        async with trio.open_nursery() as nursery:
            for host in self.hosts:
                await nursery.start(host.run)
            task_status.started()

    async def choose(self, path: Path) -> Choice:
        """Return the engine that runs a model here, with what it knows of it; reads headers only.

        Args:
            path: The model's source files, a folder or one GGUF.

        Raises:
            ModelRefused: No engine takes the model; the message has each one's reason.
            EngineLost: The only engine's child ended before it answered.
        """
        refusals: list[tuple[str, SwarmError]] = []
        for suitability, host in self._ranked(path):
            try:
                inspection = await host.inspect(path)
            except SwarmError as error:
                refusals.append((host.engine_name, error))
                continue
            why = "; ".join([suitability.why, *(f"{name}: {error}" for name, error in refusals)])
            lost = any(isinstance(error, EngineLost) for _, error in refusals)
            return Choice(host, inspection, why, is_certain=not lost)
        if len(refusals) == 1:
            raise refusals[0][1]
        reasons = "; ".join(f"{name}: {error}" for name, error in refusals)
        installed = ", ".join(self.names) or "none"
        raise ModelRefused(
            f"no engine here runs {path.name} ({reasons or f'installed: {installed}'})",
            fix="Install swarmpy with the extra 'mlx' (folders and GGUFs) or 'llama' (GGUFs).",
        )

    def _ranked(self, path: Path) -> list[tuple[Suitability, EngineHost]]:
        """The engines in the order in which they are asked."""
        if self._is_configured:
            configured = Suitability(1, "the settings name it (engine.name)")
            return [(configured, host) for host in self.hosts]
        model_format: Format = "safetensors" if path.is_dir() else "gguf"
        suiting = [(host.engine_class.suits(model_format), host) for host in self.hosts]
        found = [(suitability, host) for suitability, host in suiting if suitability is not None]
        return sorted(found, key=lambda item: (-item[0].rank, item[1].engine_name))
