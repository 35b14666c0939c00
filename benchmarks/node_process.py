"""One node in its own process, driven by JSON lines on standard input: what the benchmarks measure.

Args (one JSON object): folder, cache, memory_bytes, engine, threads, model.
Commands: {"do": "invite"} | {"do": "join", "code"} | {"do": "wait_members", "count"}
| {"do": "prepare"} | {"do": "generate", "token_ids", "max_tokens"} | {"do": "cpu"}.
The end of standard input stops the node.
Each is answered by one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import trio

from swarmpy.config import Config, EngineConfig, GatewayConfig, NetworkConfig, NodeConfig
from swarmpy.environment import Environment
from swarmpy.net.tcp import TcpNetwork
from swarmpy.node import Node
from swarmpy.proto.pipeline import Sampling


async def answer(node: Node, model: str, command: dict[str, Any]) -> object:
    match command["do"]:
        case "invite":
            return (await node.create_invite()).code
        case "join":
            return msgspec.to_builtins(await node.join(command["code"]))
        case "wait_members":
            await node.wait_members(command["count"])
            return None
        case "prepare":
            return msgspec.to_builtins(await node.prepare(model))
        case "generate":
            return await generate(node, model, command)
        case "cpu":
            return time.process_time()
    raise ValueError(command["do"])


async def generate(node: Node, model: str, command: dict[str, Any]) -> object:
    generation = await node.generate(
        model, command["token_ids"], Sampling(), max_tokens=command["max_tokens"]
    )
    tokens = [token.id async for token in generation]
    return {"token_ids": tokens, "report": msgspec.to_builtins(generation.report)}


async def main(arguments: dict[str, Any]) -> None:
    config = Config(
        node=NodeConfig(name=Path(arguments["folder"]).name),
        network=NetworkConfig(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False),
        engine=EngineConfig(
            name=arguments["engine"],
            memory_bytes_max=arguments["memory_bytes"],
            threads=arguments["threads"],
            context=1024,
            slots=2,
        ),
        gateway=GatewayConfig(enabled=False),
    )
    environment = Environment(
        network=TcpNetwork(),
        folder=Path(arguments["folder"]),
        cache_folder=Path(arguments["cache"]),
        mdns=False,
    )
    async with Node.open(config, environment) as node:
        model = (await node.pull(arguments["model"])).name
        print(json.dumps(node.peer_id), flush=True)
        async for line in trio.wrap_file(sys.stdin):
            command = json.loads(line)
            print(json.dumps(await answer(node, model, command)), flush=True)


if __name__ == "__main__":
    trio.run(main, json.loads(sys.argv[1]))
