"""Small swarms of real nodes for tests: EchoEngine, budgets that force a split, one model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio

from swarmpy.config import Config, EngineConfig, GatewayConfig, NetworkConfig, NodeConfig
from swarmpy.environment import Environment
from swarmpy.net.tcp import TcpNetwork
from swarmpy.node import Node
from swarmpy.testing.engine import EchoModel

ECHO = "swarmpy.testing.engine:EchoEngine"
MODEL = EchoModel(layers=12, layer_weight_bytes=50_000_000)
"""700 MB with embedding and head, as far as plans are concerned."""

SPLIT_BYTES = 480_000_000
"""A budget under which three nodes hold `MODEL` and two do not."""

WHOLE_BYTES = 2_000_000_000


def config(name: str, memory_bytes: int = SPLIT_BYTES, **network: object) -> Config:
    """Settings of a test node on loopback, without mDNS and HTTP."""
    return Config(
        node=NodeConfig(name=name),
        network=NetworkConfig(
            **{"listen": ("/ip4/127.0.0.1/tcp/0",), "mdns": False, **network}  # type: ignore[arg-type]
        ),
        engine=EngineConfig(name=ECHO, memory_bytes_max=memory_bytes, context=512, slots=2),
        gateway=GatewayConfig(enabled=False),
    )


def environment(folder: Path, name: str) -> Environment:
    """The real world for the node `name`, its disk and the machine's cache in `folder`."""
    return Environment(
        network=TcpNetwork(), folder=folder / name, cache_folder=folder / "cache", mdns=False
    )


@asynccontextmanager
async def tcp_swarm(
    folder: Path, names: Sequence[str] = ("a", "b", "c"), memory_bytes: int = SPLIT_BYTES
) -> AsyncIterator[list[Node]]:
    """Nodes over real TCP that have joined the first one's network and know each other."""
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                Node.open(config(name, memory_bytes), environment(folder, name))
            )
            for name in names
        ]
        await join_all(nodes, MODEL.write(folder / "echo"))
        yield nodes


async def join_all(nodes: Sequence[Node], model: Path) -> None:
    """Give every node the model, and let all join the first; wait until all are members."""
    for node in nodes:
        await node.pull(str(model))
    for node in nodes[1:]:
        await node.join((await nodes[0].create_invite()).code)
    for node in nodes:
        await node.wait_members(len(nodes) - 1)


async def wait_no_sessions(*nodes: Node) -> None:
    """Wait until no stage holds a session any more. Nothing tells of that but the count."""
    while any(node.stages.session_count for node in nodes):  # noqa: ASYNC110
        await trio.sleep(0.01)
