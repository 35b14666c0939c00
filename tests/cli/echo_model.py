"""The model that the command line's tests run: no weights, and a reply that can be foretold."""

from __future__ import annotations

from pathlib import Path

from swarmpy.testing.engine import EchoModel


def write_echo_model(folder: Path, model: EchoModel | None = None) -> Path:
    """Write an echo model and return its folder."""
    return (model or EchoModel(layers=12, vocabulary_size=256)).write(folder)
