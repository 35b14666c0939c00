"""The tree along which records travel: whom a node pushes to, tells, prunes and grafts."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from small_nodes import SmallNode, join, machine, small_node
from trio.testing import MockClock

from swarmpy.abc import Connection, Stream
from swarmpy.agenda import Agenda
from swarmpy.discovery.link import PROTOCOL, Link
from swarmpy.discovery.spreading import (
    EDGES_MIN,
    MEND_S,
    MEND_S_MAX,
    STORM_MEMBERS,
    STORM_S,
    Spreading,
)
from swarmpy.identity import PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto.announce import Listing, Message, Part, Prune, Want
from swarmpy.proto.membership import NetworkId
from swarmpy.testing.network import SimNetwork

HOME = NetworkId("home")
WORK = NetworkId("work")
SEEDS = 50

CALLS_MAX = 1000
"""Of a step that a task takes once or twice for each thing it does: more is a task that spins."""


# A node and its neighbours, without any network between them -------------------------------


@dataclass(frozen=True)
class News:
    """A record, as far as spreading looks at it."""

    peer: PeerId
    version: int = 2
    network_id: NetworkId = HOME

    @property
    def key(self) -> bytes:
        return self.peer.encode()[:8].ljust(8, b".")


class Table(dict[bytes, News]):
    """The records a node has."""

    def version(self, key: bytes) -> int:
        """Return the version of a key's record, -1 without one."""
        record = self.get(key)
        return -1 if record is None else record.version


class Neighbour:
    """A link that keeps what would be sent."""

    def __init__(self, name: str, network_id: NetworkId = HOME) -> None:
        self.peer = PeerId(name)
        self.is_eager = False
        self.is_drained = True
        self.answers: tuple[bytes, ...] = ()
        self.pushed: list[bytes] = []
        self.told: list[bytes] = []
        self.prunes = 0
        self.grafts = 0
        self._network_id = network_id

    def shares(self, network_id: NetworkId, now_s: float) -> bool:
        return network_id == self._network_id

    def push(self, key: bytes, *, is_urgent: bool = False) -> None:
        self.pushed.append(key)

    def tell(self, key: bytes, version: int) -> None:
        self.told.append(key)

    def heard(self, key: bytes) -> None:
        return

    def want(self, keys: list[bytes], *, is_graft: bool = False) -> None:
        self.grafts += is_graft

    def say(self, message: object) -> None:
        self.prunes += isinstance(message, Prune)


class Tree:
    """What a node knows of the tree. Its agenda runs in the test's nursery."""

    def __init__(
        self, nursery: trio.Nursery, neighbours: Iterable[Neighbour], *, seed: int = 0
    ) -> None:
        self.links: dict[PeerId, Neighbour] = {item.peer: item for item in neighbours}
        self._table = Table()
        agenda = Agenda()
        # All that spreading uses of a link, a table and an environment is here.
        parts: Any = (self._table, self.links, agenda, SimpleNamespace(random=random.Random(seed)))
        self.spreading = Spreading(*parts, networks=lambda: (HOME, WORK))
        nursery.start_soon(agenda.run)

    @property
    def eager(self) -> list[Neighbour]:
        """The neighbours that records are pushed to."""
        return [link for link in self.links.values() if link.is_eager]

    def learns(self, news: News, *, source: Neighbour | None = None) -> None:
        """Take news into the table and pass it on."""
        self._table[news.key] = news
        record: Any = news
        self.spreading.spread(record, source=None if source is None else source.peer)

    def is_pushed(self, news: News, source: Neighbour, *, is_known: bool = False) -> None:
        """A neighbour pushes a record that is news, or that is known already."""
        record: Any = news
        if is_known:
            self.spreading.pushed(source.peer, [], [record])
        else:
            self.learns(news, source=source)
            self.spreading.pushed(source.peer, [record], [])


def crowd(count: int) -> list[Neighbour]:
    """Return so many neighbours in one network."""
    return [Neighbour(f"peer{index:02}") for index in range(count)]


def of_two_networks(seed: int) -> tuple[Neighbour, list[Neighbour]]:
    """Return the one neighbour at home, and all sixteen in some order: the others are at work."""
    home = Neighbour("home")
    neighbours = [home, *(Neighbour(f"work{index:02}", WORK) for index in range(15))]
    random.Random(seed).shuffle(neighbours)
    return home, neighbours


# Several networks -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_the_only_neighbour_in_a_network_is_told_of_its_news(
    seed: int, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Goal: whom a node tells is drawn from those that may hear it. Method: none of them is eager,
    and 15 others share another network."""
    home, neighbours = of_two_networks(seed)
    tree = Tree(nursery, neighbours, seed=seed)
    news = News(PeerId("ann"))

    tree.learns(news)
    await trio.sleep(2)

    assert home.told == [news.key]
    assert all(not link.told for link in neighbours if link is not home)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_a_node_holds_on_to_the_tree_of_each_of_its_networks(
    seed: int, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    home, neighbours = of_two_networks(seed)
    tree = Tree(nursery, neighbours, seed=seed)

    tree.spreading.hold_on()
    tree.learns(News(PeerId("ann")))

    assert home.is_eager
    assert len(tree.eager) == 2
    assert [link for link in neighbours if link.pushed] == [home]


async def test_a_network_that_no_neighbour_shares_costs_no_edge(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    tree = Tree(nursery, crowd(4))

    tree.spreading.hold_on()

    assert len(tree.eager) == 1


# Cycles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_in_the_place_of_its_only_edge_that_it_cut_a_node_takes_another(
    seed: int, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    only, *others = crowd(3)
    tree = Tree(nursery, [only, *others], seed=seed)
    only.is_eager = True
    tree.is_pushed(News(PeerId("ann")), only)

    tree.is_pushed(News(PeerId("ann")), only, is_known=True)

    assert only.prunes == 1
    assert not only.is_eager
    assert sum(link.is_eager for link in others) == 1
    assert sum(link.grafts for link in others) == 1


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_in_the_place_of_its_only_edge_that_was_cut_over_there_a_node_takes_another(
    seed: int, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    only, *others = crowd(3)
    tree = Tree(nursery, [only, *others], seed=seed)
    only.is_eager = True

    tree.spreading.pruned(only.peer)

    assert (only.is_eager, only.grafts) == (False, 0)
    assert sum(link.is_eager for link in others) == 1


async def test_an_edge_that_was_cut_and_is_the_only_one_is_taken_again_later(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Else a member that prunes again and again would be answered each time."""
    (only,) = crowd(1)
    tree = Tree(nursery, [only])
    only.is_eager = True
    for _ in range(10):
        tree.spreading.pruned(only.peer)
    assert (only.is_eager, only.grafts) == (False, 0)

    await trio.sleep(MEND_S + 0.1)

    assert (only.is_eager, only.grafts) == (True, 1)


async def test_a_lazy_neighbour_that_pushes_news_becomes_eager(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Over there this node is one of those that news is pushed to: an edge has two ends."""
    lazy, other = crowd(2)
    tree = Tree(nursery, [lazy, other])

    tree.is_pushed(News(PeerId("ann")), lazy)
    tree.learns(News(PeerId("bob")))

    assert tree.eager == [lazy]
    assert lazy.pushed == [News(PeerId("bob")).key]


async def test_a_lazy_neighbour_that_pushes_what_is_known_stays_lazy(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    eager, lazy = crowd(2)
    tree = Tree(nursery, [eager, lazy])
    tree.is_pushed(News(PeerId("ann")), eager)

    tree.is_pushed(News(PeerId("ann")), lazy, is_known=True)

    assert tree.eager == [eager]


# Storms ---------------------------------------------------------------------------------------


async def test_one_member_that_announces_twice_a_second_makes_no_storm(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Else one member could keep the cycles of everybody's tree as they are."""
    near, far = crowd(2)
    tree = Tree(nursery, [near, far])
    for version in range(2, 2 + 2 * STORM_MEMBERS):
        tree.is_pushed(News(PeerId("ann"), version), near)
        await trio.sleep(0.5)
    assert far.prunes == 0

    tree.is_pushed(News(PeerId("ann"), version), far, is_known=True)

    assert far.prunes == 1


@pytest.mark.parametrize(("members", "prunes"), [(STORM_MEMBERS - 1, 1), (STORM_MEMBERS, 0)])
async def test_no_cycle_is_cut_in_a_storm_of_several_members_news(
    members: int, prunes: int, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    near, far = crowd(2)
    tree = Tree(nursery, [near, far])
    for index in range(members):
        tree.is_pushed(News(PeerId(f"member{index}")), near)
        await trio.sleep(0.9 * STORM_S / members)

    tree.is_pushed(News(PeerId("member0")), far, is_known=True)

    assert far.prunes == prunes


async def test_a_storm_is_over_five_seconds_after_its_first_news(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    near, far = crowd(2)
    tree = Tree(nursery, [near, far])
    for index in range(STORM_MEMBERS):
        tree.is_pushed(News(PeerId(f"member{index}")), near)
    await trio.sleep(STORM_S)

    tree.is_pushed(News(PeerId("member0")), far, is_known=True)

    assert far.prunes == 1


async def test_a_storm_puts_mending_off_for_a_minute_and_no_longer(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Method: ten members announce in turn, two a second, for as long as the test lasts."""
    tree = Tree(nursery, crowd(6))

    async def announce_forever() -> None:
        version = 2
        while True:
            tree.learns(News(PeerId(f"m{version % 10}"), version))
            version += 1
            await trio.sleep(0.5)

    nursery.start_soon(announce_forever)
    await trio.sleep(STORM_S)
    tree.spreading.met()
    await trio.sleep(MEND_S_MAX - 1)
    assert len(tree.eager) == 1

    await trio.sleep(1 + STORM_S + 0.1)

    assert len(tree.eager) == EDGES_MIN


# Members that misbehave, over hosts ------------------------------------------------------------


async def dial_again(node: SmallNode, target: SmallNode) -> Connection:
    """Open one more connection, whoever already has one."""
    address = next(item for item in target.host.addresses if "127.0" not in item)
    byte_stream = await node.environment.network.dial(address)
    return await node.host.adopt(  # type: ignore[attr-defined,no-any-return]
        byte_stream, role="initiator", expected_peer=target.peer
    )


@pytest.mark.parametrize("is_blocked", [False, True])
async def test_a_member_that_reads_nothing_and_opens_a_second_connection_stops_nobody(
    is_blocked: bool, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Goal: a link whose connection was superseded for a while goes on when that one is over.

    Method: bob lets ann's announcements wait, opens a second connection and closes it. Each turn of
    ann's task is counted: one that never lets go would hang the test before a deadline came.
    """
    turns = 0
    is_wanted = Link._is_wanted

    def count(link: Link, connection: Connection) -> bool:
        nonlocal turns
        turns += 1
        if turns > CALLS_MAX:
            raise AssertionError(f"the task of a link takes more than {CALLS_MAX} turns")
        return is_wanted(link, connection)

    async def show_nothing(peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()

    world, go_on, read = SimNetwork(), trio.Event(), 0
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b") as bob,
    ):

        async def sink(stream: Stream) -> None:
            nonlocal read
            if is_blocked:
                await go_on.wait()
            while data := await stream.receive_some():
                read += len(data)

        bob.host.set_handler(PROTOCOL, sink)
        await join(bob, ann)
        await trio.sleep(2)
        assert ann.discovery is not None
        link = ann.discovery._gossip.links[bob.peer]
        if is_blocked:
            for _ in range(12):  # More than the stream's window.
                part = Part(prefix="0", entries=bytes(32_000))
                link.say(Listing(network=bytes(20), parts=(part,)))
        await trio.sleep(1)
        monkeypatch.setattr(bob.membership._conversations, "attempt", show_nothing)
        monkeypatch.setattr(Link, "_is_wanted", count)

        second = await dial_again(bob, ann)
        await trio.sleep(0.5)
        second.close()
        await trio.sleep(0.5)
        go_on.set()
        await trio.sleep(1)
        read = 0
        link.say(Prune())
        await trio.sleep(1)

        assert ann.discovery._gossip.links[bob.peer] is link
        assert read > 0


@pytest.mark.parametrize("prunes", [0, 1], ids=["silent", "pruning"])
async def test_a_member_that_opens_many_streams_is_asked_to_push_once(
    prunes: int, autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Goal: one graft a link, however many streams. Method: bob opens thirty, and prunes on each or
    says nothing."""
    world, grafts = SimNetwork(), 0
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b") as bob,
    ):

        async def read(stream: Stream) -> None:
            nonlocal grafts
            messages = MessageStream(stream)
            kinds = cast("type[Message]", Message)
            while (message := await messages.receive_or_end(kinds)) is not None:
                grafts += isinstance(message, Want) and message.is_graft

        bob.host.set_handler(PROTOCOL, read)
        await join(bob, ann)
        await trio.sleep(2 * MEND_S)
        grafts = 0

        for _ in range(30):
            messages = MessageStream(await bob.host.open_stream(ann.peer, [PROTOCOL]))
            for _ in range(prunes):
                await messages.send(Prune())
            await messages.close_write()
            await trio.sleep(0.01)
        await trio.sleep(2)

        assert grafts <= 1
