"""Runs `swarmpy` in this process, and nodes in processes of their own."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from swarmpy_cli.main import main


@dataclass(frozen=True)
class Ran:
    """What one command line gave."""

    code: int
    output: str
    errors: str

    @property
    def document(self) -> dict[str, object]:
        """The only JSON document on standard output."""
        document = json.loads(self.output)
        assert isinstance(document, dict)
        return document


Swarmpy = Callable[..., Ran]


@pytest.fixture(autouse=True, scope="session")
def ctrl_c() -> None:
    """Let the processes that tests start take Ctrl-C, also where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def swarmpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Swarmpy:
    """Runs a command line on an empty data folder, with nothing on standard input."""
    monkeypatch.setenv("SWARMPY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SWARMPY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def run(*words: str) -> Ran:
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(words)
        return Ran(code, output.getvalue(), errors.getvalue())

    return run
