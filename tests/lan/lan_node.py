"""A whole node in a process of its own, for tests on a network of namespaces.

    lan_node.py FOLDER NAME MODEL

It prints one JSON object a line: {"peer"} once it runs; {"seen", "state", "reached_at", "at_s"}
when what it has of another peer changes; an answer to each command, {"invite"} or {"joined"}.
`at_s` is of the machine's monotonic clock, the same in every process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import trio

from swarmpy.config import Config, EngineConfig, NodeConfig
from swarmpy.identity import PeerId
from swarmpy.node import Node, local_environment

LOOK_S = 0.01


async def main(folder: Path, name: str, model: str) -> None:
    config = Config(
        node=NodeConfig(name=name),
        engine=EngineConfig(name="swarmpy.testing.engine:EchoEngine", memory_bytes_max=10**9),
    )
    environment = local_environment(folder / "data", cache_folder=folder / "cache")
    async with Node.open(config, environment) as node:
        await node.pull(model)
        show({"peer": node.peer_id, "at_s": time.monotonic()})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, node)
            async for line in trio.lowlevel.FdStream(os.dup(0)):
                await obey(node, json.loads(line))
            nursery.cancel_scope.cancel()


async def watch(node: Node) -> None:
    """Tell of every change in what is known of other peers; nothing but the list tells of it."""
    before: dict[str, dict[str, object]] = {}
    while True:
        for peer in node.peers():
            connection = node.host.connection_to(PeerId(peer.peer))
            reached_at = connection.remote_address if connection else ""
            now: dict[str, object] = {"state": peer.state, "reached_at": reached_at}
            if peer.state != "self" and before.get(peer.peer) != now:
                before[peer.peer] = now
                show({"seen": peer.peer, **now, "at_s": time.monotonic()})
        await trio.sleep(LOOK_S)


async def obey(node: Node, command: dict[str, str]) -> None:
    if "join" in command:
        show({"joined": (await node.join(command["join"])).network})
    else:
        show({"invite": (await node.create_invite()).code})


def show(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2], sys.argv[3])
