"""Simulated machines with a node on each: started, crashed, restarted with their disk or without.

The model of a disk: what a commit or `write_file` has returned from survives a crash; what was
written later, by whatever still ran while it was cancelled, does not.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import trio

from swarmpy.abc import Address, Host, ProtocolId, Sighting, Stream, StreamHandler, WallSeconds
from swarmpy.config import Config, EngineConfig, GatewayConfig, NetworkConfig, NodeConfig
from swarmpy.environment import Environment
from swarmpy.errors import NetworkError
from swarmpy.identity import Identity, PeerId
from swarmpy.net.host import NativeHost
from swarmpy.node import Node
from swarmpy.proto.membership import NetworkId, issue, own_network_id, verify_membership
from swarmpy.store import open_database
from swarmpy.testing.calendar import WALL_START_S
from swarmpy.testing.engine import EchoModel
from swarmpy.testing.host import SimHost
from swarmpy.trust import networks, revocations
from swarmpy.trust.networks import NetworkBook
from swarmpy.trust.revocations import RevocationBook

if TYPE_CHECKING:
    from swarmpy.testing.simulation import Simulation

SIM_HOST_NODES = 50
"""From so many nodes on they run on `SimHost`: real Noise and Yamux would take most of the time."""

INTRODUCTIONS = 3
"""Other members a node of a formed network is told of when it starts."""

PORT = 4001

ECHO_ENGINE = "swarmpy.testing.engine:EchoEngine"

ECHO_MODEL = EchoModel(layers=12, layer_weight_bytes=50_000_000)
"""The model every node with an engine has: 700 MB as far as plans are concerned."""

SPLIT_BYTES = 480_000_000
"""A budget under which three nodes hold `ECHO_MODEL` and two do not."""


class MachineDown(NetworkError):
    """The simulated machine does not run just now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What the nodes of a swarm have in common."""

    host: Literal["native", "sim"] = "native"
    engine: str = ECHO_ENGINE
    """Name of the engine; the instant test engine by default."""
    memory_bytes_max: int = SPLIT_BYTES
    is_joined: bool = True
    """All are members of one network from the start, and know of a few others."""
    start_within_s: float = 0.0
    """Nodes start at times drawn from this; at once by default."""
    change: Callable[[int, Config], Config] | None = None
    """Changes the settings of the node with an index."""

    def config(self, index: int, ip: str) -> Config:
        """Return the settings of one node."""
        config = Config(
            node=NodeConfig(name=f"n{index}"),
            network=NetworkConfig(listen=(f"/ip4/{ip}/tcp/{PORT}",), mdns=False),
            engine=EngineConfig(
                name=self.engine, memory_bytes_max=self.memory_bytes_max, context=512, slots=2
            ),
            gateway=GatewayConfig(enabled=False),
        )
        return self.change(index, config) if self.change else config


class SimNode:
    """One machine of a simulated swarm and the node on it."""

    def __init__(
        self,
        simulation: Simulation,
        index: int,
        folder: Path,
        settings: NodeSettings,
        nursery: trio.Nursery,
    ) -> None:
        """Make a machine that is switched off."""
        self.index = index
        self.name = f"n{index}"
        self.ip = f"10.{index // 62_500}.{index // 250 % 250}.{index % 250 + 1}"
        self.folder = folder / self.name
        self.skew_s = 0.0
        """How far the machine's wall clock is ahead of the others'."""
        self.boots = 0
        self.down_since_s: float | None = 0.0
        """When it went down, None while it runs."""
        self.networks: frozenset[NetworkId] = frozenset()
        """What the node belonged to when it was last seen running."""
        self._simulation = simulation
        self._settings = settings
        self._nursery = nursery
        self._node: Node | None = None
        self._scope: trio.CancelScope | None = None
        self._ended = trio.Event()
        self.identity = self._identity()

    def __repr__(self) -> str:
        return f"<{self.name} at {self.ip}, {'up' if self.is_up else 'down'}>"

    @property
    def is_up(self) -> bool:
        """Whether the node runs."""
        return self._node is not None

    @property
    def node(self) -> Node:
        """The running node.

        Raises:
            MachineDown: It does not run.
        """
        if self._node is None:
            raise MachineDown(f"{self.name} is down")
        return self._node

    @property
    def peer(self) -> PeerId:
        """The node's id; another after it lost its disk."""
        return self.identity.peer_id

    @property
    def address(self) -> Address:
        """Where it listens."""
        return Address(f"/ip4/{self.ip}/tcp/{PORT}")

    # Life ------------------------------------------------------------------------------

    async def start(self) -> None:
        """Switch the machine on and its node with it."""
        self.boots += 1
        self._simulation.world.restart(self.ip)
        await self._nursery.start(self._run)

    async def stop(self) -> None:
        """End the node as its owner would: goodbyes are said."""
        await self._end()
        self._simulation.log_fault(f"{self.name} stopped")

    async def crash(self) -> None:
        """Cut the power: off the network first, then the disk as it was, then the tasks."""
        self._simulation.world.crash(self.ip)
        image = self.folder.with_name(f"{self.name}.image")
        shutil.copytree(self.folder, image)
        await self._end()
        shutil.rmtree(self.folder)
        image.rename(self.folder)
        self._simulation.log_fault(f"{self.name} crashed")

    async def restart(self, *, lose_disk: bool = False) -> None:
        """Switch a machine on again.

        Args:
            lose_disk: Everything it had is gone: it comes back as another, unknown peer.
        """
        if lose_disk:
            shutil.rmtree(self.folder)
            self.networks = frozenset()
            self.identity = self._identity()
        await self.start()
        how = " without its disk" if lose_disk else ""
        self._simulation.log_fault(f"{self.name} restarted{how}")

    async def _end(self) -> None:
        self.note_networks()
        if self._scope is not None:
            self._scope.cancel()
            with trio.CancelScope(shield=True):
                await self._ended.wait()

    async def _run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._ended = trio.Event()
        environment = self.environment()
        config = self._settings.config(self.index, self.ip)
        try:
            with trio.CancelScope() as self._scope:
                host = self._host(environment)
                async with Node.open(config, environment, host=host) as node:
                    self._node, self.down_since_s = node, None
                    self.note_networks()
                    if self._settings.engine == ECHO_ENGINE:
                        await node.pull(str(ECHO_MODEL.write(self.folder.parent / "echo")))
                    self._introduce(node)
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self._node, self.down_since_s = None, trio.current_time()
            self._ended.set()

    def environment(self) -> Environment:
        """Return what the node touches in this run of its."""
        made = self._simulation.environment(self.ip, self.folder)
        chance = self._simulation.random_for(f"{self.ip} run {self.boots}")
        return replace(made, random=chance, wall_time=self.wall_time)

    def wall_time(self) -> WallSeconds:
        """Unix seconds by this machine's own clock."""
        return WallSeconds(WALL_START_S + self._simulation.clock.now_s + self.skew_s)

    # What others know ------------------------------------------------------------------

    def note_networks(self) -> None:
        """Remember which networks the node is in: the truth that a gate is held to."""
        if self._node is not None:
            self.networks = frozenset(self._node.membership.own_memberships())

    async def join(self, code: str) -> None:
        """Redeem an invite."""
        await self.node.join(code)
        self._simulation.joined_by(code, self)

    def _introduce(self, node: Node) -> None:
        """Tell a member of some others that run, as an invite would have."""
        if not self._settings.is_joined:
            return
        others = [other for other in self._simulation.up if other is not self]
        chance = self._simulation.random_for(f"{self.ip} meets {self.boots}")
        for other in chance.sample(others, min(INTRODUCTIONS, len(others))):
            node.discovery.see(
                Sighting(peer=other.peer, addresses=(other.address,), source="invite")
            )

    def _identity(self) -> Identity:
        chance = self._simulation.random_for(f"{self.ip} identity {self.boots}")
        return Identity.load_or_create(self.folder / "identity.key", chance)

    def _host(self, environment: Environment) -> Host:
        host: Host
        if self._settings.host == "sim":
            host = SimHost(self.identity, self._simulation.world.network(self.ip))
        else:
            host = NativeHost(
                self.identity,
                environment.network,
                random=environment.random,
                wall_time=environment.wall_time,
            )
        return self._watched(host)

    def _watched(self, host: Host) -> Host:
        """Let the simulation know of every stream that is served."""
        set_handler = host.set_handler

        def set_watched(
            protocol: ProtocolId, handler: StreamHandler, *, allow_limited: bool = False
        ) -> None:
            async def watched(stream: Stream) -> None:
                self._simulation.served(self, stream.peer, protocol)
                await handler(stream)

            set_handler(protocol, watched, allow_limited=allow_limited)

        host.set_handler = set_watched  # type: ignore[method-assign]
        return host


async def start_stranger(
    simulation: Simulation, name: str, number: int, nursery: trio.Nursery
) -> Host:
    """Start a host without a node, of the kind that the nodes have."""
    chance = simulation.random_for(f"stranger {name}")
    machine = simulation.world.network(f"10.255.0.{number}")
    identity = Identity.generate(chance)
    host: Host
    if isinstance(simulation.nodes[0].node.host, SimHost):
        host = SimHost(identity, machine)
    else:
        host = NativeHost(identity, machine, random=chance, wall_time=simulation.wall_time)
    await nursery.start(host.run)
    await host.listen(Address(f"/ip4/{machine.ip}/tcp/{PORT}"))
    return host


def form_network(simulation: Simulation, nodes: Sequence[SimNode]) -> None:
    """Make all nodes members of one network, the first its founder, before they start.

    The network's key signs each node's record, as its founder's would: a thousand invites are
    another test's subject.
    """
    key = Identity.generate(simulation.random_for("network key"))
    wall_s = simulation.wall_time()
    key.save(nodes[0].folder / "networks" / f"{own_network_id(key)}.key")
    for node in nodes:
        proof = issue(
            key,
            authority=None,
            network_id=own_network_id(key),
            network_name="the swarm",
            member=node.peer,
            can_invite=True,
            serial=node.index,
            wall_s=wall_s,
        )
        schema = networks.SCHEMA + revocations.SCHEMA
        database = open_database(node.folder / "membership.db", schema)
        environment = node.environment()
        book = NetworkBook(
            database,
            identity=node.identity,
            folder=node.folder / "networks",
            environment=environment,
            revocations=RevocationBook(database, environment),
        )
        book.store(verify_membership(proof, wall_s=wall_s))
        database.close()


async def reaches(near: SimNode, far: SimNode) -> bool:
    """Whether one node can dial another now."""
    try:
        await near.node.host.dial(far.peer, [far.address])
    except NetworkError:
        return False
    return True
