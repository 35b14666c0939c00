"""The demo's machines: `swarmpy run` in processes of their own, each with its own data folder.

They end with the demo however it ends: each is told by the end of its standard input, which this
process holds open, and on a normal end by a signal, then by force.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from swarmpy.errors import SwarmError
from swarmpy_cli.client import ErrorBody, NodeClient, connect
from swarmpy_cli.context import Settings

START_TIMEOUT_S = 60.0
"""From the start of a process to its first line; imports on a busy machine take most of it."""

END_TIMEOUT_S = 1.5
"""For the nodes to end by themselves, all together; then they are ended."""

LOG_LINES_SHOWN = 12
"""Of a failed node's log, from its end."""

NODE_FLAGS = ("--listen", "/ip4/127.0.0.1/tcp/0", "--no-mdns", "--no-model", "--port", "0")
"""A demo node can be reached from this machine alone, and waits to be told what to load."""


class NodeFailed(SwarmError):
    """A node of the demo ended or did not start; the message ends with its last log lines."""

    advice = (
        "Run the demo again with --log-level debug: the message then ends with more of the log."
    )


class ReadyLine(msgspec.Struct, frozen=True):
    """The part of `swarmpy run --json` that the demo needs."""

    pid: int
    peer: str
    name: str
    base_url: str


class DemoNode:
    """One node's process. Made by `demo_nodes`; `client` is there once it was awaited."""

    def __init__(self, name: str, settings: Settings, arguments: Sequence[str]) -> None:
        """Start it with the data folder, cache and log level of `settings`."""
        self.name = name
        self.folder = settings.folder
        self.ready: ReadyLine | None = None
        self._log = settings.folder.with_suffix(".log")
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        command = [sys.executable, "-m", "swarmpy_cli", "--data-dir", str(settings.folder)]
        command += ["--cache-dir", str(settings.cache_folder)]
        if settings.log_level:
            command += ["--log-level", settings.log_level]
        command += arguments
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # Its own group: Ctrl-C reaches the demo alone, which then ends the nodes in order.
                start_new_session=True,
            )
        threading.Thread(target=self._read_lines, daemon=True).start()

    def wait_ready(self) -> ReadyLine:
        """Wait until the node serves, and return what it said then; at once the second time.

        Raises:
            NodeFailed: It ended, or did not start in time.
        """
        if self.ready is not None:
            return self.ready
        try:
            line = self._lines.get(timeout=START_TIMEOUT_S)
        except queue.Empty:
            line = b""
        try:
            self.ready = msgspec.json.decode(line, type=ReadyLine)
        except msgspec.DecodeError:
            raise self._not_started(line) from None
        return self.ready

    def read_api_key(self) -> str:
        """Return the key of the node's HTTP endpoint."""
        from swarmpy.plugins.gateway.keys import key_path, read_key

        return read_key(key_path(self.folder, "api"))

    def last_lines(self) -> str:
        """Return the end of the node's log for an error message, each line indented."""
        text = self._log.read_text("utf-8", "replace").strip()
        lines = text.splitlines()[-LOG_LINES_SHOWN:]
        return "".join(f"\n    {self.name}: {line}" for line in lines)

    def end(self, deadline: float) -> None:
        """Wait for the process to end by itself until `deadline` (perf_counter), then end it."""
        try:
            self.process.wait(max(0.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._kill()

    def ask_to_end(self) -> None:
        """Ask the process to stop, without waiting."""
        self.process.terminate()

    def _not_started(self, line: bytes) -> NodeFailed:
        """Return the error for a node that said `line` where it should have said that it serves."""
        try:
            told = msgspec.json.decode(line, type=dict[str, ErrorBody])["error"]
        except (msgspec.DecodeError, KeyError):
            return NodeFailed(f"{self.name} did not start{self.last_lines()}")
        return NodeFailed(
            f"{self.name} did not start: {told.message}{self.last_lines()}", fix=told.fix
        )

    def _kill(self) -> None:
        """End whatever is left of the node, its engine children included."""
        if os.name == "posix":
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def _read_lines(self) -> None:
        if self.process.stdout is not None:
            for line in self.process.stdout:
                self._lines.put(line)
        self._lines.put(b"")


class DemoNodes:
    """The nodes of one demo, and how to talk to them."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.nodes: list[DemoNode] = []
        self._folder = folder
        self._settings = settings
        self._clients: dict[str, NodeClient] = {}
        self._stack = ExitStack()

    def start(self, name: str, arguments: Sequence[str]) -> DemoNode:
        """Start one node without waiting for it."""
        flags = ["run", "--json", "--end-with-parent", "--name", name, *NODE_FLAGS, *arguments]
        node = DemoNode(name, self._settings.at(self._folder / name), flags)
        self.nodes.append(node)
        return node

    def client(self, node: DemoNode) -> NodeClient:
        """Return the client of a node that serves."""
        if node.name not in self._clients:
            self._clients[node.name] = self._stack.enter_context(connect(node.folder))
        return self._clients[node.name]

    def check(self) -> None:
        """Raise if a node has ended.

        Raises:
            NodeFailed: Names it, with its last log lines.
        """
        for node in self.nodes:
            code = node.process.poll()
            if code is not None:
                raise NodeFailed(f"{node.name} ended with exit code {code}{node.last_lines()}")

    def end(self) -> None:
        """End all nodes: asked first, and by force after `END_TIMEOUT_S`."""
        self._stack.close()
        self._clients.clear()
        deadline = time.perf_counter() + END_TIMEOUT_S
        nodes, self.nodes = self.nodes, []
        with ExitStack() as stack:
            # On the stack first: a second Ctrl-C while asking must not keep a node from its end.
            for node in nodes:
                stack.callback(node.end, deadline)
            for node in nodes:
                node.ask_to_end()


@contextmanager
def demo_nodes(folder: Path, settings: Settings) -> Iterator[DemoNodes]:
    """Have nodes in `folder`, with the cache and log level of `settings`, while the block runs."""
    nodes = DemoNodes(folder, settings)
    try:
        yield nodes
    finally:
        nodes.end()
