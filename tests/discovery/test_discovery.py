"""Discovery over real hosts on a simulated network: who is found, dialled, kept and forgotten."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from small_nodes import SmallNode, is_member, join, machine, small_node, small_swarm, until
from trio.testing import MockClock

from swarmpy.abc import Address, DiscoverySource, Sighting, Stream
from swarmpy.discovery import neighbourhood
from swarmpy.discovery.peers import STRANGERS_MAX
from swarmpy.identity import Identity
from swarmpy.net.host import NativeHost
from swarmpy.testing.network import SimNetwork
from swarmpy.trust.conversations import PROTOCOL as MEMBERSHIP
from swarmpy.trust.exchange import CONVERSATION_TIMEOUT_S


class Whisper(DiscoverySource):
    """A source that reports what a test tells it to."""

    name = "mdns"

    def __init__(self) -> None:
        self.see: Callable[[Sighting], None] = lambda sighting: None

    async def run(self, see: Callable[[Sighting], None]) -> None:
        self.see = see
        await trio.sleep_forever()

    def tell(self, node: SmallNode) -> None:
        """Report where a node is."""
        self.see(Sighting(peer=node.peer, addresses=tuple(node.host.addresses), source=self.name))


@asynccontextmanager
async def whispered(
    world: SimNetwork, folder: Path, *, with_discovery: bool = True
) -> AsyncIterator[tuple[Whisper, SmallNode, SmallNode]]:
    """Run ann, who is told of peers, and bob; return who tells her, and both.

    Args:
        with_discovery: Whether bob looks for peers too.
    """
    link = Whisper()
    async with (
        small_node(
            "ann",
            machine(world, 1),
            folder / "a",
            with_discovery=True,
            sources=lambda *_: [link],
        ) as ann,
        small_node("bob", machine(world, 2), folder / "b", with_discovery=with_discovery) as bob,
    ):
        yield link, ann, bob


async def test_three_nodes_joined_at_one_of_them_are_all_connected_at_once(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Goal: bob and cid find each other through ann's gossip, on three ports of one machine."""
    world = SimNetwork()
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node(
            "bob",
            machine(world, 1),
            tmp_path / "b",
            listen="/ip4/0.0.0.0/tcp/4002",
            with_discovery=True,
        ) as bob,
        small_node(
            "cid",
            machine(world, 1),
            tmp_path / "c",
            listen="/ip4/0.0.0.0/tcp/4003",
            with_discovery=True,
        ) as cid,
    ):
        await join(bob, ann)
        await join(cid, ann)

        await until(lambda: is_member(bob, cid) and is_member(cid, bob), within_s=1.0)


async def test_two_nodes_without_an_invite_see_each_other_as_visible(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with whispered(world, tmp_path) as (link, ann, bob):
        ann.membership.create_network()
        bob.membership.create_network()
        await trio.testing.wait_all_tasks_blocked()

        link.tell(bob)
        await until(lambda: bob.view(ann.peer) is not None, within_s=1.0)
        await trio.sleep(1)

        views = [ann.view(bob.peer), bob.view(ann.peer)]
        assert [view.state for view in views if view] == ["visible", "visible"]
        assert ann.host.connections == []


async def test_a_visible_stranger_is_dialled_once_however_often_it_is_seen(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    dials: list[str] = []
    world = SimNetwork(
        observe=lambda kind, source, target, data: dials.append(target) if kind == "dial" else None
    )
    async with whispered(world, tmp_path) as (link, ann, bob):
        ann.membership.create_network()
        await trio.testing.wait_all_tasks_blocked()

        for _ in range(20):
            link.tell(bob)
            await trio.sleep(10)

        assert len(dials) == 1


async def test_a_stranger_seen_before_becomes_a_member_when_this_node_joins_its_network(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Goal: joining at ann makes the visible bob, a member of long standing, usable at once."""
    world = SimNetwork()
    link = Whisper()
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a") as ann,
        small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob,
        small_node(
            "cid",
            machine(world, 3),
            tmp_path / "c",
            with_discovery=True,
            sources=lambda *_: [link],
        ) as cid,
    ):
        await join(bob, ann)
        await trio.testing.wait_all_tasks_blocked()
        link.tell(bob)
        await trio.sleep(1)
        assert not is_member(cid, bob)

        await cid.membership.redeem((await ann.membership.create_invite()).code)

        await until(lambda: is_member(cid, bob) and is_member(bob, cid), within_s=1.0)


async def test_a_restarted_node_is_reconnected_from_its_cache_within_a_second(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
        async with small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob:
            await join(bob, ann)
        await until(lambda: not ann.membership.members())

        async with small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob:
            await until(lambda: is_member(bob, ann) and is_member(ann, bob), within_s=1.0)


async def test_all_nodes_restarting_together_are_reconnected_within_a_second(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with small_swarm(tmp_path, "ann", "bob", "cid", world=world, with_discovery=True) as (
        ann,
        bob,
        cid,
    ):
        await join(bob, ann)
        await join(cid, ann)
        await until(lambda: is_member(bob, cid))

    async with small_swarm(tmp_path, "ann", "bob", "cid", world=world, with_discovery=True) as (
        ann,
        bob,
        cid,
    ):
        nodes = (ann, bob, cid)
        await until(lambda: all(len(node.membership.members()) == 2 for node in nodes), within_s=1)


async def test_a_lost_member_is_redialled_until_it_returns(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Goal: lost, not forgotten. Method: the issuer is away for ten minutes; the joiner alone
    knows where it was."""
    world = SimNetwork()
    async with small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob:
        async with small_node("ann", machine(world, 1), tmp_path / "a") as ann:
            await join(bob, ann)
        await trio.sleep(600)
        view = bob.view(ann.peer)
        assert view is not None
        assert view.state in ("lost", "connecting")

        async with small_node("ann", machine(world, 1), tmp_path / "a"):
            await until(lambda: is_member(bob, ann), within_s=61)


async def test_a_sighting_of_a_lost_member_is_followed_at_once(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: as above, at a new port, and the link tells of it."""
    world = SimNetwork()
    link = Whisper()
    async with small_node(
        "bob", machine(world, 2), tmp_path / "b", with_discovery=True, sources=lambda *_: [link]
    ) as bob:
        async with small_node("ann", machine(world, 1), tmp_path / "a") as ann:
            await join(bob, ann)
        await trio.sleep(600)

        async with small_node(
            "ann", machine(world, 1), tmp_path / "a", listen="/ip4/0.0.0.0/tcp/4444"
        ) as ann:
            link.tell(ann)
            await until(lambda: is_member(bob, ann), within_s=1.0)


async def test_a_member_that_says_nothing_for_a_while_is_not_forgotten(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Goal: silence is no refusal. Method: bob's key answers at his address, but not the question
    whether he is a member; then he is back."""
    world = SimNetwork()

    async def say_nothing(_: Stream) -> None:
        await trio.sleep_forever()

    async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
        async with small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob:
            await join(bob, ann)
            await until(lambda: ann.discovery is not None and bool(ann.discovery.announcements()))
        async with trio.open_nursery() as nursery:
            mute = NativeHost(bob.host.identity, machine(world, 2), random=random.Random(1))
            mute.set_handler(MEMBERSHIP, say_nothing)
            await nursery.start(mute.run)
            await mute.listen(Address("/ip4/0.0.0.0/tcp/4001"))
            await until(lambda: bool(mute.connections))
            await trio.sleep(CONVERSATION_TIMEOUT_S + 1)
            mute.close()

        async with small_node("bob", machine(world, 2), tmp_path / "b"):
            await until(lambda: is_member(ann, bob), within_s=61)


async def test_a_crowd_of_strangers_does_not_keep_a_node_from_its_members(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbourhood, "NEIGHBOURS_MIN", 1)
    world = SimNetwork()
    async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
        async with small_node("bob", machine(world, 2), tmp_path / "b") as bob:
            await join(ann, bob)
        async with (
            small_node("eve", machine(world, 3), tmp_path / "e") as eve,
            small_node("bob", machine(world, 2), tmp_path / "b"),
        ):
            await eve.host.dial(ann.peer, ann.host.addresses)
            await until(lambda: is_member(ann, bob))
            assert ann.host.connection_to(eve.peer) is not None


async def test_a_peer_that_is_no_member_any_more_is_forgotten(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: bob's record ends while he is away; ann finds that out when she reaches him."""
    world = SimNetwork()
    async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
        async with small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob:
            await join(bob, ann)
            await until(lambda: ann.discovery is not None and bool(ann.discovery.announcements()))

        async with small_node("bob", machine(world, 2), tmp_path / "empty") as bob:
            await until(lambda: ann.view(bob.peer) is not None)
            await trio.sleep(100)

            view = ann.view(bob.peer)
            assert view is not None
            assert view.state == "visible"


async def test_discovery_ends_with_its_host(autojump_clock: MockClock, tmp_path: Path) -> None:
    """Goal: a host that closes under a running node loses its members and is not dialled with."""
    async with small_swarm(tmp_path, "ann", "bob", with_discovery=True) as (ann, bob):
        await join(bob, ann)

        bob.host.close()
        await until(lambda: not ann.membership.members())
        await trio.sleep(10)

        assert bob.membership.members() == []


async def test_a_stranger_that_nobody_speaks_of_any_more_is_not_listed(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
        ann.membership.create_network()
        async with small_node("eve", machine(world, 2), tmp_path / "e") as eve:
            await eve.host.dial(ann.peer, ann.host.addresses)
            await until(lambda: ann.view(eve.peer) is not None)
        await trio.sleep(500)
        assert ann.view(eve.peer) is not None

        await trio.sleep(200)

        assert ann.view(eve.peer) is None


async def test_strangers_cannot_fill_the_table(autojump_clock: MockClock, tmp_path: Path) -> None:
    """Goal: a link full of forged sightings leaves room for members."""
    world = SimNetwork()
    async with whispered(world, tmp_path, with_discovery=False) as (link, ann, bob):
        assert ann.discovery is not None
        ann.membership.create_network()
        await trio.testing.wait_all_tasks_blocked()
        for number in range(STRANGERS_MAX + 10):
            forged = Identity(number.to_bytes(32, "big")).peer_id
            link.see(Sighting(peer=forged, addresses=(), source="mdns"))
        assert len(ann.discovery.peers()) == STRANGERS_MAX

        await join(bob, ann)

        assert is_member(ann, bob)
