"""Nodes in processes of their own, as a user starts them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from swarmpy_cli.main import main

ROOT = Path(__file__).parents[2]
ECHO = "swarmpy.testing.engine:EchoEngine"
SLOW = "tests.cli.slow_engine:SlowEngine"

NODE_OPTIONS = ("--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0")

END_S_MAX = 2.0
"""How long a node may take to end, by the issue that asked for it."""


@dataclass
class Process:
    """A running `swarmpy` command."""

    popen: subprocess.Popen[bytes]

    def ready(self) -> dict[str, object]:
        """Read the JSON document that ends a node's start-up."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, self.errors()
        document = json.loads(line)
        assert isinstance(document, dict)
        return document

    def errors(self) -> str:
        """Read standard error to its end."""
        assert self.popen.stderr is not None
        return self.popen.stderr.read().decode()

    def signal_and_wait(self, *numbers: signal.Signals) -> tuple[int, float]:
        """Send signals, wait for the end, and return exit code and seconds."""
        started = time.perf_counter()
        for number in numbers:
            self.popen.send_signal(number)
        code = self.popen.wait(timeout=30)
        return code, time.perf_counter() - started


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
"""Runs a command line in this process."""


def command(folder: Path, *words: str) -> list[str]:
    """Return the command line of `swarmpy WORDS` in a data folder, its cache beside it."""
    places = ["--data-dir", str(folder), "--cache-dir", str(folder.parent / "cache")]
    return [sys.executable, "-m", "swarmpy_cli", *places, *words]


def environ() -> dict[str, str]:
    """Return an environment in which the test engines can be imported."""
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextlib.contextmanager
def started(folder: Path, *words: str) -> Iterator[Process]:
    """Run `swarmpy WORDS` for the length of the block."""
    popen = subprocess.Popen(
        command(folder, *words),
        env=environ(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with popen:
        try:
            yield Process(popen)
        finally:
            popen.kill()


def ran(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run `swarmpy WORDS` to its end."""
    return subprocess.run(
        command(folder, *words), env=environ(), capture_output=True, stdin=subprocess.DEVNULL
    )


def asked(folder: Path, *words: str) -> Ran:
    """Run `swarmpy WORDS` in this process: quicker, for commands that only talk to a node."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(["--data-dir", str(folder), *words])
    return Ran(code, output.getvalue(), errors.getvalue())


def document(folder: Path, *words: str) -> dict[str, object]:
    """Run `swarmpy WORDS --json` in this process and return its one document."""
    done = asked(folder, *words, "--json")
    assert done.code == 0, done.output
    return done.document
