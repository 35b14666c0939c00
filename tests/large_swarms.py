"""Hundreds of nodes of host, membership and discovery in one simulated world, on virtual time.

All are members of one network and each was told of a few others, as after an invite. Signatures are
checked once for each distinct one.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import trio
from small_nodes import SmallNode, small_node, wall_time

from swarmpy.abc import Address, DiscoverySource, Sighting
from swarmpy.config import KEEPALIVE_INTERVAL_S
from swarmpy.discovery.service import Discovery
from swarmpy.identity import Identity, PeerId
from swarmpy.proto.membership import verify_membership
from swarmpy.testing.calendar import SimClock
from swarmpy.testing.determinism import deterministic
from swarmpy.testing.network import PING_BYTES, Link, SimNetwork

T = TypeVar("T")

LATENCY_S = 0.03
TICK_S = 0.005
"""Deliveries of five milliseconds cost one step of the clock."""

CAN_INVITE = 3
"""Nodes beside the founder that may sign others in."""


@dataclass
class Member:
    """One node of a large swarm, and how to stop and start it."""

    number: int
    folder: Path
    node: SmallNode | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def ip(self) -> str:
        return address_of(self.number)

    @property
    def address(self) -> Address:
        return Address(f"/ip4/{self.ip}/tcp/4001")

    @property
    def name(self) -> str:
        return f"n{self.number}"

    @cached_property
    def peer(self) -> PeerId:
        return Identity.generate(random.Random(self.name)).peer_id

    @property
    def running(self) -> SmallNode:
        assert self.node is not None
        return self.node

    @property
    def discovery(self) -> Discovery:
        found = self.running.discovery
        assert found is not None
        return found

    def sees(self) -> set[str]:
        """Whom it has in view."""
        return {item.peer for item in self.discovery.announcements()}


class _Told(DiscoverySource):
    """Somebody told the node of these, as an invite does."""

    name = "invite"

    def __init__(self, sightings: Sequence[Sighting]) -> None:
        self._sightings = sightings

    async def run(self, see: Callable[[Sighting], None]) -> None:
        for sighting in self._sightings:
            see(sighting)
        await trio.sleep_forever()


class LargeSwarm:
    """A world of members."""

    def __init__(self, folder: Path, nursery: trio.Nursery, *, count: int, link: Link) -> None:
        self.world = SimNetwork(link=link, tick_s=TICK_S)
        self.members = [Member(number, folder / str(number)) for number in range(count)]
        self.random = random.Random(count)
        self._nursery = nursery

    @property
    def running(self) -> list[Member]:
        return [member for member in self.members if member.node is not None]

    async def start(self, member: Member) -> None:
        """Start a member, for the first time or again with the disk it had."""
        member.scope = trio.CancelScope()
        await self._nursery.start(self._run, member)

    async def _run(self, member: Member, task_status: trio.TaskStatus[None]) -> None:
        others = self.random.sample(self.members[: member.number], min(3, member.number))
        told = [
            Sighting(peer=other.peer, addresses=(other.address,), source="invite")
            for other in others
        ]
        with member.scope:
            async with small_node(
                member.name,
                self.world.network(member.ip),
                member.folder,
                with_discovery=True,
                with_sim_host=True,
                chance=random.Random(f"chance {member.name} {trio.current_time()}"),
                sources=lambda *_: [_Told(told)],
            ) as node:
                member.node = node
                self._admit(member)
                task_status.started()
                await trio.sleep_forever()
        member.node = None

    def _admit(self, member: Member) -> None:
        """Sign a node into the network; what redeeming an invite leaves behind."""
        node = member.running
        if node.membership.networks():
            return
        if not member.number:
            node.membership.create_network()
            return
        founder = self.members[0].running
        (network_id,) = founder.membership.own_memberships()
        can_invite = member.number <= CAN_INVITE
        proof = founder.membership._book.issue(network_id, node.peer, can_invite=can_invite)
        node.membership._book.store(verify_membership(proof, wall_s=wall_time()))
        assert node.discovery is not None
        node.discovery.networks_changed(network_id)

    def crash(self, member: Member) -> None:
        """End a member's process without a word; its machine answers nobody any more."""
        self.world.crash(member.ip)
        member.scope.cancel()

    def seeing(self, peer: PeerId, among: Iterable[Member] | None = None) -> list[Member]:
        """The members that have a peer in view."""
        members = self.running if among is None else list(among)
        return [
            item
            for item in members
            if item.peer != peer and item.discovery.announcement(peer) is not None
        ]

    def bytes_sent(self) -> float:
        """Payload bytes all nodes have sent so far, keepalives of open connections included."""
        now_s = trio.current_time()
        pings = 0.0
        for member in self.running:
            for connection in member.running.host.connections:
                age_s = now_s - connection._opened_s  # type: ignore[attr-defined]
                pings += 2 * PING_BYTES * (age_s // KEEPALIVE_INTERVAL_S)
        return self.world.traffic().bytes + pings

    async def bytes_per_node_minute(self, minutes: float) -> float:
        """Watch the swarm for some minutes; return what each node sends in one."""
        before = self.bytes_sent()
        await trio.sleep(60 * minutes)
        return (self.bytes_sent() - before) / len(self.running) / minutes

    async def until(self, condition: Callable[[], bool], *, within_s: float) -> float:
        """Wait for a condition; return how many seconds it took."""
        started_s = trio.current_time()
        while not condition():
            if trio.current_time() - started_s > within_s:
                raise AssertionError(f"not within {within_s} s")
            await trio.sleep(0.1)
        return trio.current_time() - started_s


def address_of(number: int) -> str:
    """The machine of a node."""
    return f"10.{1 + number // 200}.{number % 200}.7"


def run_swarm(
    folder: Path,
    scenario: Callable[[LargeSwarm], Awaitable[T]],
    *,
    count: int,
    link: Link | None = None,
    settle_s: float = 60.0,
) -> T:
    """Start a swarm, let it settle, and run a scenario in it."""

    async def run() -> T:
        async with trio.open_nursery() as nursery:
            swarm = LargeSwarm(folder, nursery, count=count, link=link or Link(latency_s=LATENCY_S))
            await swarm.start(swarm.members[0])
            for member in swarm.members[1:]:
                nursery.start_soon(swarm.start, member)
            await trio.sleep(settle_s)
            result = await scenario(swarm)
            nursery.cancel_scope.cancel()
        return result

    with deterministic(count):
        return trio.run(run, clock=SimClock())
