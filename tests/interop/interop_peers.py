"""Peers of other libp2p stacks in processes of their own, which do on command what a test asks.

A command is one line of JSON to a peer's standard input, its answer one line of its output:

    dial        address                 -> peer
    identify    peer                    -> agent, protocols, record_addresses (of the signed record)
    ping        peer                    -> rtt_s
    echo        peer, sizes             -> echoed; it compares what came back
    parallel    peer, count, size       -> count; as many echoes at once
    half-close  peer, text              -> answer, received after its own end
    reset       peer                    -> was_reset: whether it saw a reset as one

or {"error": text}. Each serves the protocols `ECHO`, `UPPER` and `RESET`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import trio

from swarmpy.abc import Address, ProtocolId
from swarmpy.identity import PeerId, parse_peer_id

ECHO = ProtocolId("/swarmpy-test/echo/1")
UPPER = ProtocolId("/swarmpy-test/upper/1")
RESET = ProtocolId("/swarmpy-test/reset/1")

STACKS = ("js-libp2p", "go-libp2p", "py-libp2p")
REQUIRED_IN_CI = ("js-libp2p", "py-libp2p")
"""What `CI=true` must have: there a stack that is missing is a failure, not a skip."""

KEYS = {
    "js-libp2p": ("Ed25519", "secp256k1", "RSA"),
    "go-libp2p": ("Ed25519", "secp256k1", "RSA", "ECDSA"),
    "py-libp2p": ("Ed25519", "secp256k1", "RSA"),
}
"""Identity keys that each stack can have itself."""

ANSWER_TIMEOUT_S = 60.0
"""For a peer to start, or to do what it was asked, on a busy machine."""

_HERE = Path(__file__).parent
_JS = _HERE.parent / "js"
_GO = _HERE / "go"


@dataclass
class PeerProcess:
    """A peer of another stack, by its standard input and output."""

    stack: str
    process: subprocess.Popen[bytes]
    peer: PeerId = field(init=False)
    address: Address = field(init=False)
    """Without the peer's id."""

    async def start(self) -> None:
        """Read who it is; what it prints first."""
        first = await self._receive()
        self.peer = parse_peer_id(str(first["peer"]))
        self.address = Address(str(first["address"]).partition("/p2p/")[0])

    async def ask(self, do: str, **arguments: object) -> dict[str, object]:
        """Let it do something and return its answer, which may hold an error."""
        assert self.process.stdin is not None
        line = json.dumps({"do": do, **arguments}).encode() + b"\n"
        self.process.stdin.write(line)
        return await self._receive()

    async def must(self, do: str, **arguments: object) -> dict[str, object]:
        """Let it do something that has to work."""
        answer = await self.ask(do, **arguments)
        assert "error" not in answer, answer
        return answer

    def kill(self) -> None:
        """End it without a goodbye."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    async def _receive(self) -> dict[str, object]:
        assert self.process.stdout is not None
        received = b""
        descriptor = os.dup(self.process.stdout.fileno())
        async with trio.lowlevel.FdStream(descriptor) as output:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                while not received.endswith(b"\n"):
                    chunk = await output.receive_some()
                    assert chunk, f"{self.stack} ended"
                    received += chunk
        answer = json.loads(received)
        assert isinstance(answer, dict)
        return answer


class Peers:
    """The peers of one test run, each started when it is first needed and used by many tests."""

    def __init__(self) -> None:
        self._started: dict[tuple[str, str], PeerProcess] = {}

    async def get(self, stack: str, key: str = "Ed25519") -> PeerProcess:
        """Return the running peer of a stack with an identity key of a type."""
        known = self._started.get((stack, key))
        if known is None:
            known = self._started[stack, key] = start_peer(stack, key)
            await known.start()
        return known

    def close(self) -> None:
        """End them all."""
        for peer in self._started.values():
            peer.kill()


@contextmanager
def lone_peer(stack: str) -> Iterator[PeerProcess]:
    """A peer for one test alone, which may end it."""
    peer = start_peer(stack, "Ed25519")
    try:
        yield peer
    finally:
        peer.kill()


def start_peer(stack: str, key: str) -> PeerProcess:
    """Start a peer in a process of its own."""
    return PeerProcess(
        stack,
        subprocess.Popen(
            [*_command(stack), key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        ),
    )


def require(stack: str) -> None:
    """Skip a test whose stack is not installed; in CI fail, if CI must have it."""
    reason = missing(stack)
    if not reason:
        return
    if os.environ.get("CI") == "true" and stack in REQUIRED_IN_CI:
        pytest.fail(reason)
    pytest.skip(reason)


@cache
def missing(stack: str) -> str:
    """Return why a stack cannot run here, "" if it can."""
    match stack:
        case "js-libp2p":
            if shutil.which("node") is None:
                return "js-libp2p: Node.js is not installed"
            if not (_JS / "node_modules" / "libp2p").is_dir():
                return "js-libp2p is not installed: npm install --prefix tests/js"
        case "go-libp2p":
            if shutil.which("go") is None:
                return "go-libp2p: Go is not installed"
            fetched = _go("mod", "download")
            if fetched.returncode:
                return f"go-libp2p cannot be fetched: {fetched.stderr.strip()[-200:]}"
        case "py-libp2p":
            if find_spec("libp2p") is None:
                return "py-libp2p is not installed: pip install '.[libp2p]' (needs cc and gmp.h)"
    return ""


def _command(stack: str) -> list[str]:
    match stack:
        case "js-libp2p":
            return ["node", str(_JS / "peer.mjs")]
        case "go-libp2p":
            binary = _GO / "build" / "peer"
            built = _go("build", "-trimpath", "-o", str(binary), ".")
            assert not built.returncode, built.stderr
            return [str(binary)]
        case _:
            return [sys.executable, str(_HERE / "py_peer.py")]


def _go(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["go", *arguments], cwd=_GO, capture_output=True, text=True, check=False, timeout=280
    )
