"""Runs `swarmpy` in this process, on an empty data folder."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from swarmpy_cli.main import main
from tests.cli.processes import Ran


@pytest.fixture(autouse=True, scope="session")
def ctrl_c() -> None:
    """Let the processes that tests start take Ctrl-C, also where tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def swarmpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
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
