"""Members that lie, ask without end or tell of what there is not: what they cannot bring about."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from small_nodes import Clock, SmallNode, join, machine, small_node, until, wall_time
from trio.testing import MockClock

from swarmpy.discovery.gossip import (
    REFUTE_BURST,
    REFUTE_SPACING_S,
    WORK_MAX,
    WORK_PER_S,
    Gossip,
)
from swarmpy.discovery.limits import Budgets
from swarmpy.discovery.link import PROTOCOL
from swarmpy.discovery.liveness import REPROBE_S
from swarmpy.discovery.spreading import GRAFT_URGENT_S
from swarmpy.identity import Identity, PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto.announce import (
    Alive,
    Branch,
    Branches,
    Have,
    Listing,
    Message,
    Part,
    Probe,
    Records,
    Root,
    Want,
)
from swarmpy.proto.membership import NetworkId, key_hash_of
from swarmpy.proto.summary import (
    gone_version,
    pack_entries,
    record_key,
    unpack_entries,
    unpack_keys,
)
from swarmpy.proto.swim import ACCUSATIONS_MAX, seal_statement
from swarmpy.testing.network import SimNetwork


def stranger(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


def identity_of(node: SmallNode) -> Identity:
    return Identity.generate(random.Random(node.name))


def gossip_of(node: SmallNode) -> Gossip:
    assert node.discovery is not None
    return node.discovery._gossip


def sees(node: SmallNode, peer: PeerId) -> bool:
    return peer in gossip_of(node).announced_peers()


def seq_of(node: SmallNode, peer: PeerId) -> int:
    announcement = gossip_of(node).announcement(peer)
    assert announcement is not None
    return announcement.seq


@dataclass
class Town:
    """A few members on machines 1, 2, ... of one LAN; the first made the network."""

    folder: Path
    stack: AsyncExitStack
    nursery: trio.Nursery
    world: SimNetwork = field(default_factory=SimNetwork)
    scopes: dict[str, trio.CancelScope] = field(default_factory=dict)
    nodes: list[SmallNode] = field(default_factory=list)

    @property
    def network_id(self) -> NetworkId:
        return next(iter(self.nodes[0].membership.own_memberships()))

    async def add(self, name: str, number: int, *, clock: Clock | None = None) -> SmallNode:
        node = await self.start(name, number, clock=clock)
        if self.nodes:
            await join(node, self.nodes[0])
        self.nodes.append(node)
        return node

    async def start(self, name: str, number: int, *, clock: Clock | None = None) -> SmallNode:
        found: list[SmallNode] = []

        async def run(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            with self.scopes[name]:
                async with small_node(
                    name,
                    machine(self.world, number),
                    self.folder / name,
                    with_discovery=True,
                    clock=clock or wall_time,
                ) as node:
                    found.append(node)
                    task_status.started()
                    await trio.sleep_forever()

        self.scopes[name] = trio.CancelScope()
        await self.nursery.start(run)
        return found[0]

    def statement(self, signer: Identity, accused: PeerId, seq: int) -> bytes:
        return seal_statement(
            signer, network_id=self.network_id, accused=accused, seq=seq, wall_s=wall_time()
        )


@asynccontextmanager
async def town(folder: Path, *names: str) -> AsyncIterator[Town]:
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        made = Town(folder, stack, nursery)
        for number, name in enumerate(names, 1):
            await made.add(name, number)
        await trio.sleep(10)
        yield made
        nursery.cancel_scope.cancel()


async def say(liar: SmallNode, target: SmallNode, *messages: Message) -> None:
    """Send messages on a stream of their own."""
    stream = MessageStream(await liar.host.open_stream(target.peer, [PROTOCOL]))
    for message in messages:
        await stream.send(message)
    await stream.close_write()


def overhear(node: SmallNode, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Message, PeerId]]:
    """Note what a node is sent, and by whom."""
    heard: list[tuple[Message, PeerId]] = []
    gossip = gossip_of(node)
    handle = gossip._handle

    def listen(message: Message, peer: PeerId) -> None:
        heard.append((message, peer))
        handle(message, peer)

    monkeypatch.setattr(gossip, "_handle", listen)
    return heard


async def test_farewells_of_strangers_take_no_room_and_a_revocation_gets_through(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with town(tmp_path, "ann", "bob", "cid") as there:
        ann, bob, cid = there.nodes
        keys = [stranger(number) for number in range(1, 201)]
        lies = tuple(there.statement(key, key.peer_id, 1) for key in keys)
        for target in (ann, bob):
            await say(cid, target, Records(statements=lies))
        await trio.sleep(10)
        assert [len(gossip_of(node).table) for node in (ann, bob)] == [3, 3]

        assert ann.membership.revoke(cid.peer)
        await until(lambda: not bob.membership.is_member(cid.peer), within_s=10)


async def test_who_lags_behind_the_others_clocks_can_still_refute(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: bob's clock is a minute late, within the bounds; cid names a number that all others
    believe in. Bob and ann do not hear each other, eve hears both."""
    async with town(tmp_path, "ann", "cid", "eve") as there:
        ann, cid, _ = there.nodes
        bob = await there.add("bob", 4, clock=Clock(-60))
        await trio.sleep(5)
        there.world.partition("10.0.0.1", "10.0.0.4")
        await trio.sleep(30)
        out = 0
        for _ in range(3):
            seq = int((wall_time() + 295) * 1000)
            lie = Records(statements=(there.statement(identity_of(cid), bob.peer, seq),))
            for node in there.nodes:
                if node is not cid:
                    await say(cid, node, lie)
            for _ in range(20):
                await trio.sleep(1)
                out += not sees(ann, bob.peer)

        assert out == 0


@pytest.mark.parametrize("is_neighbour", [True, False])
async def test_who_died_while_a_node_was_alone_is_found_dead(
    autojump_clock: MockClock, tmp_path: Path, is_neighbour: bool
) -> None:
    """Method: cid loses ann and bob at once; only bob comes back."""
    async with town(tmp_path, "bob", "cid") as there:
        _, cid = there.nodes
        if not is_neighbour:
            there.world.partition("10.0.0.2", "10.0.0.3")
        ann = await there.add("ann", 3)
        await until(lambda: sees(cid, ann.peer))
        await trio.sleep(30)
        assert (ann.peer in gossip_of(cid).links) == is_neighbour
        there.scopes["ann"].cancel()
        there.scopes["bob"].cancel()
        await trio.sleep(120)
        assert gossip_of(cid).announced_peers() == []

        bob = await there.start("bob", 1)
        await until(lambda: sees(cid, bob.peer), within_s=60)
        await until(lambda: not sees(cid, ann.peer) and not sees(bob, ann.peer), within_s=60)


async def test_one_member_that_vouches_for_a_dead_one_delays_the_news_and_no_more(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with town(tmp_path, "ann", "bob", "cid", "dan") as there:
        ann, bob, cid, dan = there.nodes
        handle = gossip_of(cid)._handle

        def lie(message: Message, peer: PeerId) -> None:
            if isinstance(message, Probe):
                gossip_of(cid).links[peer].say(Alive(peer=message.peer))
            else:
                handle(message, peer)

        monkeypatch.setattr(gossip_of(cid), "_handle", lie)
        monkeypatch.setattr(gossip_of(cid).liveness, "probe", lambda peer: None)
        there.world.crash("10.0.0.4")
        there.scopes["dan"].cancel()

        within_s = 20 + 2 * REPROBE_S
        await until(lambda: not sees(ann, dan.peer) and not sees(bob, dan.peer), within_s=within_s)


async def test_suspicions_that_are_not_acted_upon_shield_nobody(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: cid has accused too often, and accuses dan, who dies, of ever later numbers."""
    async with town(tmp_path, "ann", "bob", "cid", "dan") as there:
        ann, bob, cid, dan = there.nodes
        key = identity_of(cid)
        monkeypatch.setattr(gossip_of(cid).liveness, "probe", lambda peer: None)
        seq = seq_of(ann, dan.peer)
        lies = [there.statement(key, dan.peer, seq + step) for step in range(ACCUSATIONS_MAX + 2)]
        for node in (ann, bob):
            await say(cid, node, Records(statements=tuple(lies)))
        await trio.sleep(5)
        there.world.crash("10.0.0.4")
        there.scopes["dan"].cancel()
        seq = seq_of(ann, dan.peer)
        for step in range(20):
            lie = Records(statements=(there.statement(key, dan.peer, seq + step),))
            for node in (ann, bob):
                await say(cid, node, lie)
            await trio.sleep(1)

        assert not sees(ann, dan.peer)
        assert not sees(bob, dan.peer)


async def test_what_a_neighbour_tells_of_and_never_sends_is_forgotten(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with town(tmp_path, "ann", "bob") as there:
        ann, bob = there.nodes
        for first in range(0, 6000, 2000):
            keys = [number.to_bytes(8, "big") for number in range(first, first + 2000)]
            await say(bob, ann, Have(entries=pack_entries((key, 2) for key in keys)))
        await trio.sleep(0.05)
        told = len(gossip_of(ann).spreading._missing)
        await trio.sleep(30)

        assert 0 < told <= 2000 + 20
        assert gossip_of(ann).spreading._missing == {}


async def test_a_crowd_of_news_does_not_delay_the_word_that_somebody_is_suspected(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with town(tmp_path, "ann", "bob", "cid") as there:
        ann, bob, cid = there.nodes
        key = record_key(there.network_id, cid.peer)
        others = [number.to_bytes(8, "big") for number in range(100)]
        heard = overhear(bob, monkeypatch)
        entries = [*((item, 2) for item in others), (key, gone_version(seq_of(ann, cid.peer)))]
        await say(bob, ann, Have(entries=pack_entries(entries)))
        await trio.sleep(GRAFT_URGENT_S + 0.1)

        wants = [message for message, _ in heard if isinstance(message, Want)]
        assert [item for want in wants for item in unpack_keys(want.keys)] == [key]


async def test_members_of_one_network_hear_nothing_of_another(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: ann is in two networks, bob in one of them; bob asks and listens."""
    async with town(tmp_path, "ann", "bob") as there:
        ann, bob = there.nodes
        second = ann.membership.create_network("second")
        cid, dan = [
            await there.start(name, number) for number, name in enumerate(("cid", "dan"), 3)
        ]
        for node in (cid, dan):
            invite = await ann.membership.create_invite(network_id=second.id)
            await node.membership.redeem(invite.code)
        await trio.sleep(10)
        heard = overhear(bob, monkeypatch)

        await say(bob, ann, Probe(peer=cid.peer))
        await trio.sleep(5)
        assert [item for item, _ in heard if isinstance(item, Alive)] == []
        there.world.crash("10.0.0.4")
        await trio.sleep(20)
        assert not sees(ann, dan.peer)
        assert [item for item, _ in heard if isinstance(item, Probe)] == []
        gossip_of(ann).links[bob.peer].is_eager = False
        gossip_of(cid).announce(engine="new")
        await trio.sleep(10)
        shared = {record_key(there.network_id, node.peer) for node in (ann, bob)}
        told = [item for item, _ in heard if isinstance(item, Have)]
        assert {key for have in told for key, _ in unpack_entries(have.entries)} <= shared


async def test_one_accuser_makes_its_victim_speak_seldom(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with town(tmp_path, "ann", "bob", "cid") as there:
        ann, bob, cid = there.nodes
        assert ann.discovery is not None
        heard: list[str] = []
        ann.discovery.on_announcement(lambda item: heard.append(item.peer))
        for _ in range(120):
            seq = seq_of(cid, bob.peer)
            lie = there.statement(identity_of(cid), bob.peer, seq)
            await say(cid, bob, Records(statements=(lie,)))
            await trio.sleep(0.5)

        assert 0 < heard.count(bob.peer) <= REFUTE_BURST + 60 / REFUTE_SPACING_S + 1
        assert sees(ann, bob.peer)


async def test_who_compares_without_end_keeps_nobody_else_from_it(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with town(tmp_path, "ann", "bob", "cid", "dan", "eve") as there:
        ann, bob, cid, dan, eve = there.nodes
        network = key_hash_of(there.network_id)

        async def flood(node: SmallNode) -> None:
            stream = MessageStream(await node.host.open_stream(ann.peer, [PROTOCOL]))
            while True:
                await stream.send(Root(network=network, root=b"\1" * 32))
                await trio.sleep(0.1)

        for node in (bob, cid, eve):
            there.nursery.start_soon(flood, node)
        await trio.sleep(1)
        heard = overhear(dan, monkeypatch)
        for _ in range(5):
            await say(dan, ann, Root(network=network, root=b"\2" * 32))
            await trio.sleep(10)

        answers = [item for item, peer in heard if peer == ann.peer]
        assert sum(isinstance(item, (Branches, Root)) for item in answers) >= 5


@pytest.mark.parametrize("is_listing", [False, True])
async def test_a_prefix_that_is_there_twice_costs_the_connection(
    autojump_clock: MockClock, tmp_path: Path, is_listing: bool
) -> None:
    async with town(tmp_path, "ann", "bob") as there:
        ann, bob = there.nodes
        network = key_hash_of(there.network_id)
        connection = ann.host.connection_to(bob.peer)
        assert connection is not None
        branch = Branch(prefix="0", hashes=bytes(128))
        part = Part(prefix="0", entries=b"")
        message: Message = Branches(network=network, branches=(branch, branch))
        if is_listing:
            message = Listing(network=network, parts=(part, part))

        await say(bob, ann, message)

        await until(lambda: not connection.is_open, within_s=2)


async def test_a_node_that_is_asked_dials_a_member_seldom_whoever_asks(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with town(tmp_path, "ann", "bob", "cid") as there:
        ann, bob, cid = there.nodes
        there.world.partition("10.0.0.3", "10.0.0.4")
        dan = await there.add("dan", 4)
        await until(lambda: sees(cid, dan.peer))
        dialled: list[PeerId] = []
        monkeypatch.setattr(gossip_of(cid).liveness, "_reach", dialled.append)
        for _ in range(8):
            for asker in (ann, bob):
                await say(asker, cid, Probe(peer=dan.peer))
            await trio.sleep(1)

        assert dialled == [dan.peer]


async def test_the_work_a_peer_makes_is_bounded_however_many_streams_it_has(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: no more statements of one peer are looked at in a second than on a single stream."""
    async with town(tmp_path, "ann", "bob") as there:
        ann, bob = there.nodes
        keys = [stranger(number) for number in range(1, 101)]
        lies = tuple(there.statement(key, key.peer_id, 1) for key in keys)
        heard = overhear(ann, monkeypatch)

        async def flood() -> None:
            await say(bob, ann, *(Records(statements=lies) for _ in range(10)))

        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + 2
            for _ in range(5):
                nursery.start_soon(flood)
            await trio.sleep(2)

        count = sum(item.count for item, _ in heard if isinstance(item, Records))
        assert WORK_MAX < count <= WORK_MAX + 2 * WORK_PER_S + 5 * len(lies)


def test_spending_beyond_a_budget_is_waited_for() -> None:
    budgets = Budgets(count_max=10, per_s=5)
    ann, bob = stranger(1).peer_id, stranger(2).peer_id

    assert budgets.spend(ann, 10, now_s=0.0) == 0.0
    assert budgets.spend(ann, 5, now_s=0.0) == 1.0
    assert budgets.spend(bob, 5, now_s=0.0) == 0.0
    assert budgets.spend(ann, 0, now_s=1.0) == 0.0
