"""Programs of these tests in processes of their own, spoken to line by line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

TESTS = Path(__file__).parent.parent


class Child:
    """A program as its test sees it."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.expects_end = False
        """Whether the test ended the program itself."""
        self._lines = b""

    async def line(self) -> str:
        """Return the next line it prints."""
        assert self.process.stdout is not None
        while b"\n" not in self._lines:
            data = await self.process.stdout.receive_some()
            assert data, "the program died"
            self._lines += data
        line, _, self._lines = self._lines.partition(b"\n")
        return line.decode()

    async def ask(self, command: str) -> Any:
        """Say one line and return what is answered, as JSON."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(command.encode() + b"\n")
        return json.loads(await self.line())


@asynccontextmanager
async def child(module: str, *arguments: str) -> AsyncIterator[Child]:
    """Run a module of the tests as a program until the block ends."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        yield Child(process)
    finally:
        process.kill()
        assert process.stdin is not None
        assert process.stdout is not None
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
            await process.stdout.aclose()
            await process.wait()
