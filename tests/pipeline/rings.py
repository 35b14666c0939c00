"""Swarms for the pipeline's tests: real hosts, services and assemblers around the EchoEngine."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from swarmpy.abc import Address, Host, Network
from swarmpy.config import EngineConfig
from swarmpy.identity import Identity, PeerId
from swarmpy.net.host import NativeHost
from swarmpy.pipeline.assembler import Assembler
from swarmpy.pipeline.engine_host import EngineHost
from swarmpy.pipeline.engines import Engines
from swarmpy.pipeline.fit import fit
from swarmpy.pipeline.planner import Capacity
from swarmpy.pipeline.session import Generation, generate
from swarmpy.pipeline.stage import CheckFiles, ObtainFiles, StageService
from swarmpy.proto.pipeline import Sampling
from swarmpy.testing.engine import EchoModel, inspection_of
from swarmpy.testing.network import Link, SimNetwork

MODEL_ID = "ab" * 32
ECHO = "swarmpy.testing.engine:EchoEngine"
CONTEXT = 4096


@dataclass
class Node:
    """A node without membership, discovery and gateway."""

    name: str
    host: Host
    service: StageService
    assembler: Assembler
    random: random.Random
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def peer(self) -> PeerId:
        return self.host.identity.peer_id

    @property
    def used_slots(self) -> int:
        """Slots of this node's echo shards that hold state."""
        shards = [holding.shard for holding in self.service.shards]
        return sum(len(shard._shard.used_slots) for shard in shards)  # type: ignore[union-attr]

    async def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 8,
        spec: Sampling | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Generation:
        pipeline = await self.assembler.pipeline_for(MODEL_ID)
        return await generate(
            pipeline,
            prompt,
            spec or Sampling(),
            session_id=self.random.randbytes(16),
            max_tokens=max_tokens,
            stop_ids=stop_ids,
        )

    async def reply(self, prompt: Sequence[int], **options: object) -> list[int]:
        async with await self.generate(prompt, **options) as generation:  # type: ignore[arg-type]
            return [token.id async for token in generation]


def budget_for(model: EchoModel, parts: int, *, slots: int = 4, context: int = CONTEXT) -> int:
    """A memory budget that holds about one part of a model, and not more."""
    inspection = inspection_of(model)
    layers = -(-model.layers // parts)
    return max(
        fit(inspection, 0, layers, slots=slots, context=context).sum_bytes,
        fit(
            inspection, model.layers - layers, model.layers, slots=slots, context=context
        ).sum_bytes,
    )


@dataclass
class Swarm:
    """Connected nodes, the model's folder, and what each announces."""

    nodes: list[Node]
    model: EchoModel
    budgets: dict[PeerId, int]
    announced: dict[PeerId, int]
    """What others believe a node can hold."""
    speeds: dict[PeerId, float]
    engines: dict[PeerId, str] = field(default_factory=dict)
    """What others believe runs the model on a node, where that is not the EchoEngine."""

    def capacities(self, model_id: str) -> list[Capacity]:
        return [
            Capacity(
                peer=node.peer,
                name=node.name,
                memory_bytes=self.announced[node.peer],
                speed_bytes_s=self.speeds.get(node.peer, 0.0),
                engine=self.engines.get(node.peer, "echo"),
                shards=tuple(
                    (shard.start, shard.end)
                    for shard in node.service.shards
                    if shard.model_id == model_id
                ),
            )
            for node in self.nodes
        ]


@asynccontextmanager
async def open_swarm(
    folder: Path,
    *,
    count: int = 3,
    model: EchoModel | None = None,
    budgets: Sequence[int] | None = None,
    networks: Callable[[int], Network] | None = None,
    listen: str = "/ip4/10.0.0.{}/tcp/4001",
    link: Link | None = None,
    engines: Sequence[str] = (),
    host_class: type[NativeHost] = NativeHost,
    slots: int = 4,
    holds_model: Sequence[bool] | None = None,
    obtain_files: ObtainFiles | None = None,
    check_files: CheckFiles | None = None,
) -> AsyncIterator[Swarm]:
    """Start nodes that are all connected to each other; the first is the tests' coordinator."""
    model = model or EchoModel()
    model.write(folder)
    world = SimNetwork(link=link)
    networks = networks or (lambda index: world.network(f"10.0.0.{index + 1}"))
    if budgets is None:
        budgets = [budget_for(model, count, slots=slots)] * count
    swarm = Swarm([], model, {}, {}, {})
    # In PeerId order, so that equal nodes make a ring in the order of their numbers.
    identities = sorted(
        (Identity.generate(random.Random(index)) for index in range(count)),
        key=lambda identity: identity.peer_id,
    )
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        for index in range(count):
            draw = random.Random(index)
            host = host_class(identities[index], networks(index), random=draw)
            config = EngineConfig(slots=slots, context=CONTEXT)
            engine = engines[index] if engines else ECHO
            hosts = Engines([EngineHost(engine, config=config, cache_folder=folder / "cache")])
            has_model = holds_model is None or holds_model[index]
            service = StageService(
                host,
                hosts,
                memory_bytes_max=budgets[index],
                find_model=lambda _, has_model=has_model: folder if has_model else None,
                obtain_files=obtain_files,
                check_files=check_files or _nothing_to_fetch,
            )
            assembler = Assembler(service, config=config, capacities=swarm.capacities, random=draw)
            node = Node(f"node{index}", host, service, assembler, draw)
            swarm.nodes.append(node)
            swarm.budgets[node.peer] = swarm.announced[node.peer] = budgets[index]
            await nursery.start(_run, node, hosts)
            address = await host.listen(Address(listen.format(index + 1)))
            events = host.connection_events()
            for other in swarm.nodes[:-1]:
                await other.host.dial(node.peer, [address])
                await anext(events)  # This end knows of it too.
        yield swarm
        nursery.cancel_scope.cancel()


async def _nothing_to_fetch(model_id: str, start: int, end: int) -> int:
    return 0


async def _run(node: Node, engines: Engines, *, task_status: trio.TaskStatus[None]) -> None:
    with node.scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(engines.run)
            await nursery.start(node.host.run)
            await nursery.start(node.service.run)
            await nursery.start(node.assembler.run)
            task_status.started()
            await trio.sleep_forever()
