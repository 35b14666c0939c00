"""Engines that take some formats and models, and say how well they suit them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from swarmpy.abc import Format, Inspection, Suitability
from swarmpy.errors import ModelRefused
from swarmpy.testing.engine import EchoEngine


class _Named(EchoEngine):
    def inspect(self, folder: Path) -> Inspection:
        return replace(super().inspect(folder), engine=self.name)


class FoldersOnly(_Named):
    name = "folders"

    @classmethod
    def suits(cls, model_format: Format) -> Suitability | None:
        return Suitability(2, "made for folders") if model_format == "safetensors" else None


class AllRounder(_Named):
    name = "all"

    @classmethod
    def suits(cls, model_format: Format) -> Suitability | None:
        return Suitability(1, "takes anything")


class Proud(_Named):
    """Comes first and takes nothing."""

    name = "proud"

    @classmethod
    def suits(cls, model_format: Format) -> Suitability | None:
        return Suitability(9, "knows best")

    def inspect(self, folder: Path) -> Inspection:
        raise ModelRefused("not good enough")
