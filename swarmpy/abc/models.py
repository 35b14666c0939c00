"""Where models come from, and how far bringing or loading one is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a long task is: `done` of `total` in `unit` (total 0: not known yet)."""

    step: str
    done: int
    total: int
    unit: str = "bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLabel:
    """What a source calls one of its models."""

    name: str
    """As used in requests; made unique on this machine by whoever lists it."""
    display_name: str
    origin: str
    """Where it comes from, in words."""


class ModelSource(ABC):
    """One place models come from: a folder, a package index, later a hub or a peer."""

    name: str

    @abstractmethod
    def matches(self, model: str) -> bool:
        """Whether a model name as the user wrote it is this source's to resolve."""

    @abstractmethod
    def label(self, model: str) -> ModelLabel:
        """Return what a model that `matches` is called."""

    @abstractmethod
    async def fetch(self, model: str, into: Path, progress: Callable[[Progress], None]) -> Path:
        """Bring the model's files into the machine-wide cache (or leave them where they are).

        Args:
            into: The machine-wide cache folder.

        Returns:
            The folder or GGUF file with the complete, verified source files.

        Raises:
            ModelNotFound: The source has no such model.
            DownloadFailed: The files could not be fetched or did not verify.
        """
