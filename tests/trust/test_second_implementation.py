"""An implementation written from protocols/*.md alone passes the vectors and joins a running node.

It is JavaScript (tests/js/second) and knows ping, invite and membership; js-libp2p carries it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from swarmpy.identity import parse_peer_id
from swarmpy.node import Node
from swarmpy.proto.invite import words_of
from swarmpy.proto.membership import NetworkId
from tests.swarms import config, environment

ROOT = Path(__file__).parents[2]
SECOND = ROOT / "tests" / "js" / "second"
VECTORS = ROOT / "protocols" / "vectors"
NAMES = ("ping", "envelope", "invite", "membership")
WITHIN_S = 60

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed"),
]

needs_js_libp2p = pytest.mark.skipif(
    not (SECOND.parent / "node_modules" / "libp2p").is_dir(),
    reason="js-libp2p is not installed: npm install --prefix tests/js",
)


def case_count() -> int:
    """How many cases its vectors hold; of revocations it knows nothing."""
    files = [json.loads((VECTORS / f"{name}.json").read_text("utf-8")) for name in NAMES]
    lists = [
        cases
        for file in files
        for name, cases in file.items()
        if isinstance(cases, list) and "revocations" not in name and name != "reaches"
    ]
    return sum(map(len, lists)) + len([file for file in files if "tag" in file])


def test_it_passes_the_vectors_valid_and_invalid() -> None:
    done = subprocess.run(
        ["node", str(SECOND / "vectors.mjs")],
        capture_output=True,
        check=True,
        timeout=WITHIN_S,
    )

    assert json.loads(done.stdout) == {"passed": case_count(), "failed": []}


@asynccontextmanager
async def joining(code: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """Run it with an invite code; yields what it prints."""
    process = await trio.lowlevel.open_process(
        ["node", str(SECOND / "join.mjs"), code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        async with aclosing(printed(process)) as lines:
            yield lines
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def printed(process: trio.Process) -> AsyncGenerator[dict[str, Any], None]:
    assert process.stdout is not None
    buffer = b""
    async for chunk in process.stdout:
        buffer += chunk
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            yield json.loads(line)


@needs_js_libp2p
async def test_it_joins_a_running_node_with_an_invite_code(tmp_path: Path) -> None:
    """Goal: the pages suffice. Method: both sides say that the other is a member."""
    async with Node.open(config("ann"), environment(tmp_path, "ann")) as node:
        invite = await node.create_invite()
        network = node.membership.networks()[0]
        with trio.fail_after(WITHIN_S):
            async with joining(invite.code) as lines:
                shown, joined = await anext(lines), await anext(lines)
                assert "error" not in joined, joined
                await node.membership.wait_member(parse_peer_id(joined["peer"]))
                members = node.membership.members()

    assert shown == {"words": list(words_of(NetworkId(network.id))), "network": network.name}
    assert joined["network"] == network.id
    assert members == [parse_peer_id(joined["peer"])]
    assert 0 < joined["ping_ms"] < 1000 * WITHIN_S


@needs_js_libp2p
async def test_it_is_refused_with_a_code_that_is_used_up(tmp_path: Path) -> None:
    async with Node.open(config("ann"), environment(tmp_path, "ann")) as node:
        invite = await node.create_invite()
        with trio.fail_after(WITHIN_S):
            async with joining(invite.code) as lines:
                assert [list(await anext(lines)) for _ in range(2)][1][0] == "peer"
            async with joining(invite.code) as lines:
                await anext(lines)
                assert (await anext(lines))["error"] == "Error: refused: used"
        assert len(node.membership.members()) <= 1
