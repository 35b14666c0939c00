"""The processes that benchmarks/bench_transport.py measures: how they are started and commanded.

workload.py describes the lines they speak. What a machine lacks is told by `Unavailable`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import trio

HERE = Path(__file__).parent
JS_PACKAGES = HERE.parent.parent / "tests" / "js" / "node_modules"
LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 120.0
END_TIMEOUT_S = 3.0
CPUCLOCK_SCHED = 2
"""Linux: which of a process's clocks is the time its threads ran, in nanoseconds."""


class Unavailable(Exception):
    """This machine lacks something; the text says what."""


class PeerFailed(Exception):
    """A peer ended, or answered a command by an error."""


@dataclass
class PeerProcess:
    """One process of some stack."""

    process: trio.Process
    lines: AsyncIterator[bytes]
    address: str = ""
    version: str = ""

    async def do(self, command: str, **arguments: object) -> Any:
        """Send one command and return its answer.

        Raises:
            PeerFailed: It ended, or answered by an error.
        """
        assert self.process.stdin is not None
        line = json.dumps({"do": command, **arguments}) + "\n"
        with trio.fail_after(COMMAND_TIMEOUT_S):
            await self.process.stdin.send_all(line.encode())
            reply = await self.read()
        if "error" in reply:
            raise PeerFailed(f"{command}: {reply['error']}")
        return reply.get("value")

    async def read(self) -> Any:
        try:
            return json.loads(await anext(self.lines))
        except StopAsyncIteration:
            raise PeerFailed(f"{self.process.args!r} ended") from None

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU, user and system, of all its threads up to now."""
        pid = self.process.pid
        if sys.platform == "linux":
            return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)

    @property
    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)


@asynccontextmanager
async def running(command: Sequence[str]) -> AsyncIterator[PeerProcess]:
    """Start a peer and wait until it listens; end it with the block."""
    process = await trio.lowlevel.open_process(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    peer = PeerProcess(process, _lines(process))
    try:
        with trio.fail_after(START_TIMEOUT_S):
            first = await peer.read()
        peer.address, peer.version = first["address"], first["version"]
        yield peer
    finally:
        with trio.CancelScope(shield=True):
            assert process.stdin is not None
            await process.stdin.aclose()
            with trio.move_on_after(END_TIMEOUT_S):
                await process.wait()
            process.kill()
            await process.wait()


async def _lines(process: trio.Process) -> AsyncIterator[bytes]:
    assert process.stdout is not None
    buffer = b""
    async for chunk in process.stdout:
        buffer += chunk
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            yield line


@dataclass(frozen=True)
class Pair:
    """Two processes of one stack; `dialing` is connected to `listening`."""

    listening: PeerProcess
    dialing: PeerProcess


@asynccontextmanager
async def pair(command: Sequence[str]) -> AsyncIterator[Pair]:
    """Two connected peers of one stack on loopback."""
    async with running(command) as listening, running(command) as dialing:
        await dialing.do("dial", address=listening.address)
        yield Pair(listening, dialing)


@asynccontextmanager
async def delayed(address: str, delay_s: float) -> AsyncIterator[str]:
    """An address from which each byte takes `delay_s` longer to the peer, and back."""
    command = [sys.executable, str(HERE / "delay.py"), address, str(delay_s)]
    async with running(command) as forwarder:
        yield forwarder.address


# How each stack's peer is started --------------------------------------------

Prepare = Callable[[Path, str], list[str]]
"""Given a folder for what is built and the address to listen on, return the command.

Raises `Unavailable`.
"""


def _python(script: str) -> Prepare:
    return lambda _, host: [sys.executable, str(HERE / script), host]


def _py_libp2p(_: Path, host: str) -> list[str]:
    python = os.environ.get("PY_LIBP2P_PYTHON", sys.executable)
    asked = subprocess.run([python, "-c", "import libp2p"], capture_output=True, text=True)
    if asked.returncode:
        raise Unavailable("pip install libp2p==0.8.1, which needs a C compiler and gmp.h")
    return [python, str(HERE / "py_libp2p_peer.py"), host]


def _js(folder: Path, host: str) -> list[str]:
    node = shutil.which("node")
    if node is None:
        raise Unavailable("Node.js is not installed")
    if not (JS_PACKAGES / "libp2p").is_dir():
        raise Unavailable("js-libp2p is not installed: npm install --prefix tests/js")
    script = folder / "js_peer.mjs"  # beside its packages: modules are looked for where it lies
    shutil.copy(HERE / "js_peer.mjs", script)
    packages = folder / "node_modules"
    if not packages.is_symlink():
        packages.symlink_to(JS_PACKAGES)
    return [node, str(script), host]


def _go(folder: Path, host: str) -> list[str]:
    go = shutil.which("go")
    if go is None:
        raise Unavailable("Go is not installed")
    binary = folder / "go_peer"
    if not binary.exists():
        command = [go, "build", "-o", str(binary), "."]
        built = subprocess.run(command, cwd=HERE / "go", capture_output=True, text=True)
        if built.returncode:
            raise Unavailable(f"go build: {built.stderr.strip().splitlines()[-1]}")
    return [str(binary), host]


STACKS: Mapping[str, Prepare] = {
    "raw": _python("raw_peer.py"),
    "aead": _python("aead_peer.py"),
    "swarmpy": _python("swarmpy_peer.py"),
    "py-libp2p": _py_libp2p,
    "js-libp2p": _js,
    "go-libp2p": _go,
}
