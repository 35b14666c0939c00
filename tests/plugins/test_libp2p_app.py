"""A py-libp2p program becomes a swarmpy peer, as examples/py_libp2p_app.py does."""

from __future__ import annotations

import random
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import trio
from net_hosts import receive_all
from py_libp2p_apps import Application, attached, needs_py_libp2p  # noqa: F401
from swarms import MODEL, config, environment, join_all

from swarmpy.abc import ProtocolId
from swarmpy.identity import Identity, parse_peer_id
from swarmpy.node import Node
from swarmpy.pipeline.session import Token
from swarmpy.proto.pipeline import Sampling

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "py_libp2p_app.py"


async def test_the_example_joins_a_native_node_and_keeps_its_own_protocol(tmp_path: Path) -> None:
    """It shows up as a member, sees the member, and serves what it served before."""
    folder = tmp_path / "application"
    folder.mkdir()
    (folder / "config.toml").write_text(
        '[node]\nname = "application"\n[network]\nmdns = false\n'
        '[engine]\nname = "swarmpy.testing.engine:EchoEngine"\n'
    )
    async with Node.open(config("native"), environment(tmp_path, "native")) as native:
        invite = await native.create_invite()
        process = await trio.lowlevel.open_process(
            [sys.executable, str(EXAMPLE), str(folder), invite.code], stdout=subprocess.PIPE
        )
        try:
            with trio.fail_after(60):
                await native.wait_members(1)
                seen = await lines(process, 2)
            (member,) = [peer for peer in native.peers() if peer.state == "member"]
            assert member.name == "application"
            assert sorted(line.split()[1:] for line in seen) == [
                ["application", "self"],
                ["native", "member"],
            ]
            stream = await native.host.open_stream(
                parse_peer_id(member.peer), [ProtocolId("/example/greeting/1")]
            )
            assert await receive_all(stream) == b"hello from the application\n"
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def test_a_node_on_a_py_libp2p_host_computes_a_stage_of_a_reply(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    """Two native nodes and one on an application's host hold a model that no two of them hold."""
    application = Application.of(Identity(random.Random(7).randbytes(32)))
    await nursery.start(application.run)
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                Node.open(
                    config(name),
                    environment(tmp_path, name),
                    host=attached(application.host) if name == "b" else None,
                )
            )
            for name in ("a", "b", "c")
        ]
        with trio.fail_after(60):
            await join_all(nodes, MODEL.write(tmp_path / "echo"))
            async with await nodes[0].generate(
                nodes[0].models()[0].name, [1, 2, 3], Sampling(temperature=0.0), max_tokens=20
            ) as reply:
                tokens = [token async for token in reply]
            stages = {stage.name for stage in reply.pipeline.stages}
    await application.end()
    assert stages == {"a", "b", "c"}
    assert [type(token) for token in tokens] == [Token] * 20


async def lines(process: trio.Process, count: int) -> list[str]:
    """Return the next lines of a process's output."""
    assert process.stdout is not None
    received = b""
    while received.count(b"\n") < count:
        chunk = await process.stdout.receive_some()
        assert chunk, "the program ended"
        received += chunk
    return received.decode().splitlines()[:count]


def test_everything_swarmpy_has_and_py_libp2p_fit_into_one_environment() -> None:
    """Both pin what the other uses too; this environment holds both."""
    checked = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
