"""A local network of network namespaces: machines on one switch, and programs that run on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

_HERE = Path(__file__).parent
_SWITCH = "switch"


def missing() -> str:
    """Return why there can be no such network here, "" if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the program `ip`"
    trial = subprocess.run(
        ["ip", "netns", "add", name := f"swarmpy-{os.getpid()}-trial"],
        capture_output=True,
        text=True,
        check=False,
    )
    if trial.returncode:
        return f"network namespaces are not allowed here: {trial.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


class Lan:
    """Machines on one switch; each has `eth0` with an address of 10.77.0.0/24."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._namespaces: list[str] = []

    def make_switch(self) -> None:
        """Make the switch that all machines hang on."""
        self._make_namespace(_SWITCH)
        self.ip(_SWITCH, "link", "add", "bridge", "type", "bridge")
        self.ip(_SWITCH, "link", "set", "bridge", "up")

    def add_machine(self, name: str, address: str) -> None:
        """Add a machine with one interface on the switch."""
        self._make_namespace(name)
        pair = ("type", "veth", "peer", "name", "eth0", "netns", self.namespace(name))
        self.ip(_SWITCH, "link", "add", name, *pair)
        self.ip(_SWITCH, "link", "set", name, "master", "bridge", "up")
        self.ip(name, "link", "set", "lo", "up")
        self.ip(name, "link", "set", "eth0", "up")
        self.ip(name, "address", "add", f"{address}/24", "dev", "eth0")

    def namespace(self, name: str) -> str:
        """Return the name of a machine's namespace, unlike all others of this computer."""
        return f"{self._prefix}-{name}"

    def cut(self, name: str) -> None:
        """Pull the plug of a machine at the switch."""
        self.ip(_SWITCH, "link", "set", name, "down")

    def mend(self, name: str) -> None:
        """Put the plug back."""
        self.ip(_SWITCH, "link", "set", name, "up")

    def change_address(self, name: str, before: str, after: str) -> None:
        """Give a machine another address, as DHCP may."""
        self.ip(name, "address", "delete", f"{before}/24", "dev", "eth0")
        self.ip(name, "address", "add", f"{after}/24", "dev", "eth0")

    def ip(self, name: str, *arguments: str) -> None:
        """Run `ip` on a machine."""
        subprocess.run(["ip", "-n", self.namespace(name), *arguments], check=True)

    def command(self, name: str, *command: str) -> list[str]:
        """Return a command line that runs a command on a machine."""
        return ["ip", "netns", "exec", self.namespace(name), *command]

    def close(self) -> None:
        """Delete every namespace, and with them all that was made in them."""
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], check=True)

    def _make_namespace(self, name: str) -> None:
        subprocess.run(["ip", "netns", "add", self.namespace(name)], check=True)
        self._namespaces.append(self.namespace(name))


@contextmanager
def local_network() -> Iterator[Lan]:
    """A network for one test, gone afterwards."""
    if reason := missing():
        pytest.skip(reason)
    lan = Lan(f"swarmpy-{os.getpid()}")
    try:
        lan.make_switch()
        yield lan
    finally:
        lan.close()


@dataclass
class Program:
    """A program on a machine, by its lines of JSON."""

    process: trio.Process
    peer: str = ""
    ready_s: float = 0.0
    views: list[dict[str, object]] = field(default_factory=list)
    """What it said of other peers, in order."""

    async def ask(self, **command: str) -> dict[str, object]:
        """Give it a command and return the answer; views that come before it are kept."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps(command).encode())
        while "seen" in (answer := await self.receive()):
            self.views.append(answer)
        return answer

    async def wait_view(self, matches: Callable[[dict[str, object]], bool]) -> dict[str, object]:
        """Return the next thing it says of a peer that matches, which it may have said before."""
        while True:
            while self.views:
                if matches(view := self.views.pop(0)):
                    return view
            self.views.append(await self.receive())

    async def receive(self) -> dict[str, object]:
        """Return the next object it prints."""
        answer = json.loads(await self.line())
        assert isinstance(answer, dict)
        return answer

    async def line(self) -> str:
        """Return the next line it prints."""
        assert self.process.stdout is not None
        received = b""
        while not received.endswith(b"\n"):
            byte = await self.process.stdout.receive_some(1)
            assert byte, "the program ended"
            received += byte
        return received.decode()


@asynccontextmanager
async def program(lan: Lan, machine: str, script: str, *arguments: str) -> AsyncIterator[Program]:
    """Run one of this folder's programs on a machine for the block."""
    command = lan.command(machine, sys.executable, str(_HERE / script), *arguments)
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield Program(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
