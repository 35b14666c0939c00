"""The programs in examples/ do what they say; the one for py-libp2p is in tests/plugins."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

OWN_PROTOCOL = Path(__file__).parent.parent / "examples" / "own_protocol.py"


async def test_members_send_each_other_notes_by_a_protocol_of_their_own(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_config(tmp_path / name)
    async with program(tmp_path / "first") as first:
        invite = await line(first)
        assert invite.startswith("swarm://")
        async with program(tmp_path / "second", invite, "hello") as second:
            assert (await line(second)).endswith(" took 5 characters")
        assert (await line(first)).endswith(" says 'hello'")


def write_config(folder: Path) -> None:
    """Make a node's folder: no engine that takes long to start, no mDNS, loopback alone."""
    folder.mkdir()
    (folder / "config.toml").write_text(
        '[engine]\nname = "swarmpy.testing.engine:EchoEngine"\n'
        '[network]\nmdns = false\nlisten = ["/ip4/127.0.0.1/tcp/0"]\n'
    )


@asynccontextmanager
async def program(folder: Path, *arguments: str) -> AsyncIterator[trio.Process]:
    """Run the example on a node's folder."""
    process = await trio.lowlevel.open_process(
        [sys.executable, str(OWN_PROTOCOL), str(folder), *arguments], stdout=subprocess.PIPE
    )
    try:
        with trio.fail_after(60):
            yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def line(process: trio.Process) -> str:
    """Return the next line of a program's output."""
    assert process.stdout is not None
    received = b""
    while not received.endswith(b"\n"):
        byte = await process.stdout.receive_some(1)
        assert byte, "the program ended"
        received += byte
    return received.decode().strip()
