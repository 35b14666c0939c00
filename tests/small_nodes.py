"""Nodes of host, membership and discovery alone: what the trust and discovery tests run."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from swarmpy.abc import Address, DiscoverySource, Host, Network, WallSeconds
from swarmpy.config import NetworkConfig
from swarmpy.discovery.cache import PeerCache
from swarmpy.discovery.service import Discovery, PeerView
from swarmpy.environment import Environment
from swarmpy.identity import Identity, PeerId
from swarmpy.net.host import NativeHost
from swarmpy.node_members import introduce, trust_of
from swarmpy.testing.host import SimHost
from swarmpy.testing.network import SimMachine, SimNetwork
from swarmpy.trust.membership import Membership

WALL_START_S = 1_700_000_000.0


def wall_time() -> WallSeconds:
    """Unix seconds that pass with trio's clock."""
    return WallSeconds(WALL_START_S + trio.current_time())


@dataclass
class Clock:
    """A wall clock that a test may set."""

    offset_s: float = 0.0

    def __call__(self) -> WallSeconds:
        return WallSeconds(wall_time() + self.offset_s)


@dataclass
class SmallNode:
    """A node without engines, models and gateway."""

    name: str
    environment: Environment
    host: Host
    membership: Membership
    discovery: Discovery | None
    stop: Callable[[], None]

    @property
    def peer(self) -> PeerId:
        return self.host.identity.peer_id

    def view(self, peer: PeerId) -> PeerView | None:
        assert self.discovery is not None
        return next((view for view in self.discovery.peers() if view.peer == peer), None)


@asynccontextmanager
async def small_node(
    name: str,
    network: Network,
    folder: Path,
    *,
    listen: str = "/ip4/0.0.0.0/tcp/4001",
    clock: Callable[[], WallSeconds] = wall_time,
    with_discovery: bool = False,
    sources: Callable[[Host, Environment], Sequence[DiscoverySource]] = lambda *_: (),
    config: NetworkConfig | None = None,
    with_sim_host: bool = False,
    chance: random.Random | None = None,
) -> AsyncIterator[SmallNode]:
    """Run a node. Its identity comes of its name; its networks and cache are those of `folder`.

    Args:
        with_sim_host: Run on a `SimHost`, for large swarms, in place of a native host.
        chance: The node's randomness; a simulation gives a seeded one.
    """
    environment = Environment(
        network=network,
        folder=folder,
        cache_folder=folder / "models",
        random=chance or random.Random(),
        wall_time=clock,
        mdns=False,
    )
    identity = Identity.generate(random.Random(name))
    host: Host
    if with_sim_host:
        assert isinstance(network, SimMachine)
        host = SimHost(identity, network)
    else:
        host = NativeHost(identity, network, random=environment.random, wall_time=clock)
    membership = Membership(
        identity=identity, name=name, folder=folder, environment=environment, host=host
    )
    cache = PeerCache(folder / "peers.db")
    discovery: Discovery | None = None
    if with_discovery:
        discovery = Discovery(
            host=host,
            environment=environment,
            identity=identity,
            name=name,
            config=config or NetworkConfig(),
            trust=trust_of(membership),
            sources=(cache, *sources(host, environment)),
            cache=cache,
        )
        introduce(membership, discovery)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            await host.listen(Address(listen))
            await nursery.start(membership.run)
            if discovery is not None:
                await nursery.start(discovery.run)
            yield SmallNode(
                name=name,
                environment=environment,
                host=host,
                membership=membership,
                discovery=discovery,
                stop=nursery.cancel_scope.cancel,
            )
            nursery.cancel_scope.cancel()
    finally:
        membership.close()
        cache.close()


@asynccontextmanager
async def small_swarm(
    folder: Path,
    *names: str,
    world: SimNetwork | None = None,
    clock: Callable[[], WallSeconds] = wall_time,
    with_discovery: bool = False,
) -> AsyncIterator[list[SmallNode]]:
    """Run nodes of a simulated LAN, each in the folder of its name: ann on machine 1, bob on 2.

    Args:
        folder: Where their folders are.
        world: Their network, where more happens to it than this.
    """
    lan = SimNetwork() if world is None else world
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                small_node(
                    name,
                    machine(lan, ord(name[0]) - ord("a") + 1),
                    folder / name,
                    clock=clock,
                    with_discovery=with_discovery,
                )
            )
            for name in names
        ]


async def until(condition: Callable[[], bool], *, within_s: float = 5.0) -> None:
    """Wait for a condition that no event tells of; fail after `within_s` on trio's clock."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await trio.sleep(0.01)


def machine(world: SimNetwork, number: int) -> SimMachine:
    """Return the network as machine `number` of a simulated LAN sees it."""
    return world.network(f"10.0.0.{number}")


async def join(joiner: SmallNode, issuer: SmallNode) -> None:
    """Let one node join the other's network, made if there is none."""
    if not issuer.membership.networks():
        issuer.membership.create_network()
    await joiner.membership.redeem((await issuer.membership.create_invite()).code)
    await issuer.membership.wait_member(joiner.peer)


def is_member(node: SmallNode, other: SmallNode) -> bool:
    """Whether discovery lists the other as a member."""
    view = node.view(other.peer)
    return view is not None and view.state == "member"
