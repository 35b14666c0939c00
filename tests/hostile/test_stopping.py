"""A whole node that is stopped in the middle of everything: within two seconds, nothing left."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio
from hostile.attackers import HONEST_IP, Attacker, End, Wire, agree_on_noise, dial
from hostile.members import member, obtain_pass
from swarms import MODEL, WHOLE_BYTES, environment, join_all
from swarms import config as settings

from swarmpy.config import Config
from swarmpy.errors import SwarmError
from swarmpy.node import Node
from swarmpy.proto import announce, pipeline
from swarmpy.proto.pipeline import Sampling

STOP_S_MAX = 2.0

ENGINE = "hostile.child_engine:ChildEngine"


def config(name: str) -> Config:
    """Settings of a node whose engine computes in a child process."""
    made = settings(name, WHOLE_BYTES)
    return replace(made, engine=replace(made.engine, name=ENGINE))


async def reply_on(node: Node) -> None:
    """Ask for one reply after the other until the node is gone."""
    with suppress(SwarmError):
        while True:
            reply = await node.generate("echo", list(range(200)), Sampling(), max_tokens=200)
            async for _ in reply:
                pass


async def bother(peer: Attacker) -> None:
    """Hold streams of every kind, half-way through their messages."""
    with suppress(End):
        for protocol in (announce.PROTOCOL, pipeline.PROTOCOL, "/ipfs/ping/1.0.0"):
            for _ in range(10):
                await peer.open(protocol, b"\x80\x20" + bytes(100))
        await peer.wait_over()


class Load:
    """Everything at once, upon one node."""

    def __init__(self, node: Node, other: Node) -> None:
        self.node = node
        self.other = other
        self.strangers: list[Wire] = []

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Go on until the node is gone."""
        shown = await obtain_pass(self.node)
        for number in range(9):
            self.strangers.append(await dial(self.node.host.addresses[0], source=HONEST_IP))
            if number % 2:
                await agree_on_noise(self.strangers[-1])
        async with member(self.node, shown) as mallory, trio.open_nursery() as nursery:
            for asker in (self.node, self.node, self.other):
                nursery.start_soon(reply_on, asker)
            nursery.start_soon(bother, mallory)
            with trio.fail_after(20):
                while self.node.stages.session_count < 2:  # noqa: ASYNC110 - it has no event
                    await trio.sleep(0.01)
            task_status.started()

    def close(self) -> None:
        """Let the strangers go."""
        for wire in self.strangers:
            wire.close()


async def test_a_busy_node_stops_within_two_seconds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Load: replies, a member's half-sent messages, strangers at the door."""
    before = trio.lowlevel.current_statistics().tasks_living
    with caplog.at_level(logging.WARNING, "swarmpy"):
        async with (
            Node.open(config("other"), environment(tmp_path, "other")) as other,
            trio.open_nursery() as nursery,
        ):
            async with Node.open(config("node"), environment(tmp_path, "node")) as node:
                await join_all([node, other], MODEL.write(tmp_path / "echo"))
                load = Load(node, other)
                await nursery.start(load.run)
                ours = psutil.Process().children(recursive=True)

                stopped_s = trio.current_time()
            assert trio.current_time() - stopped_s < STOP_S_MAX
            load.close()
            nursery.cancel_scope.cancel()
    assert ours
    assert not [item for item in ours if item.is_running()]
    assert [(item.name, item.message) for item in caplog.records] == []
    with trio.fail_after(5):
        while trio.lowlevel.current_statistics().tasks_living > before:
            await trio.lowlevel.checkpoint()
