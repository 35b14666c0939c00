"""Announcements over real hosts on a simulated network: what spreads, and what is not believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from small_nodes import Clock, SmallNode, join, machine, small_node, until, wall_time
from trio.testing import MockClock

from swarmpy.abc import Address, Gate, ProtocolId
from swarmpy.discovery.link import PROTOCOL
from swarmpy.errors import SwarmError
from swarmpy.identity import Identity, PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto.announce import (
    ANNOUNCE_INTERVAL_S,
    AnnouncedModel,
    Announcement,
    Records,
    seal_announcement,
)
from swarmpy.proto.membership import issue, own_network_id
from swarmpy.testing.network import SimNetwork


async def test_what_a_member_announces_reaches_members_it_is_not_connected_to(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    model = AnnouncedModel(
        model_id="m1", name="tiny", display_name="Tiny", size_bytes=93_000_000, layer_count=30
    )
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob,
        small_node("cid", machine(world, 3), tmp_path / "c", with_discovery=True) as cid,
    ):
        assert cid.discovery is not None
        assert bob.discovery is not None
        heard: list[Announcement] = []
        cid.discovery.on_announcement(heard.append)
        await join(bob, ann)
        await join(cid, ann)

        bob.discovery.announce(models=(model,), memory_bytes_max=2**30)
        await until(lambda: any(item.models for item in heard), within_s=1.0)

        announced = cid.discovery.announcement(bob.peer)
        assert announced is not None
        assert announced.models == (model,)
        assert announced.name == "bob"
        assert [item.peer for item in cid.discovery.announcements()] == sorted([ann.peer, bob.peer])


async def test_announcing_nothing_new_sends_nothing(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
        assert ann.discovery is not None
        ann.membership.create_network()
        ann.discovery.announce(engine="echo")
        before = ann.discovery.announcement(ann.peer)

        ann.discovery.announce(engine="echo")

        assert ann.discovery.announcement(ann.peer) == before


async def test_an_announcement_is_forgotten_an_hour_after_its_member_fell_silent(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
        assert ann.discovery is not None
        async with small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob:
            await join(bob, ann)
            await until(lambda: ann.discovery.announcement(bob.peer) is not None)
        await trio.sleep(3500)
        assert ann.discovery.announcement(bob.peer) is not None

        await trio.sleep(200)

        assert ann.discovery.announcement(bob.peer) is None


async def test_a_member_that_lives_is_announced_for_longer_than_an_hour(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob,
    ):
        assert ann.discovery is not None
        await join(bob, ann)

        await trio.sleep(7300)

        assert ann.discovery.announcement(bob.peer) is not None


async def test_a_node_whose_clock_was_set_back_speaks_louder_than_its_own_past(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: bob announces with a clock 200 s ahead, restarts with the right one, and is heard."""
    world = SimNetwork()
    ahead = Clock(200)
    async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
        assert ann.discovery is not None
        async with small_node(
            "bob", machine(world, 2), tmp_path / "b", with_discovery=True, clock=ahead
        ) as bob:
            await join(bob, ann)
            await until(lambda: ann.discovery.announcement(bob.peer) is not None)
        async with small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob:
            assert bob.discovery is not None
            bob.discovery.announce(engine="new")

            def engine() -> str:
                heard = ann.discovery.announcement(bob.peer)
                return heard.engine if heard else ""

            await until(lambda: engine() == "new", within_s=2.0)


async def test_a_clock_set_back_to_before_the_membership_silences_a_node_and_no_more(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: ann's clock is an hour back for a while, as of a machine before its first NTP."""
    world = SimNetwork()
    clock = Clock()
    async with (
        small_node(
            "ann", machine(world, 1), tmp_path / "a", with_discovery=True, clock=clock
        ) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob,
    ):
        assert ann.discovery is not None
        assert bob.discovery is not None
        await join(bob, ann)

        await trio.sleep(10)
        clock.offset_s = -3600
        ann.discovery.announce(engine="unheard")
        await trio.sleep(ANNOUNCE_INTERVAL_S + 20)
        clock.offset_s = 0
        ann.discovery.announce(engine="heard")

        def engine() -> str:
            heard = bob.discovery.announcement(ann.peer)
            return heard.engine if heard else ""

        await until(lambda: engine() == "heard")


class LateGate(Gate):
    """Takes nobody for a member before its time, as a node whose part of a conversation lags."""

    def __init__(self, gate: Gate, *, opens_at_s: float) -> None:
        self._gate = gate
        self._opens_at_s = opens_at_s

    def allow_stream(self, peer: PeerId, protocol: ProtocolId) -> bool:
        is_early = protocol == PROTOCOL and trio.current_time() < self._opens_at_s
        return not is_early and self._gate.allow_stream(peer, protocol)


async def test_two_members_know_of_each_other_though_the_first_comparison_was_refused(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Goal: both have the other's announcement within 2 s, not after a minute's wait.

    Method: bob, back after a while, dials ann, who does not take it for a member yet when its root
    comes: the stream is reset, which bob finds out when it sends on it again.
    """
    world = SimNetwork()
    async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
        assert ann.discovery is not None
        async with small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob:
            await join(bob, ann)
        ann.discovery.announce(engine="new")
        ann.host.gate = LateGate(ann.membership.gate, opens_at_s=trio.current_time() + 0.3)
        async with small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob:
            bob_there = bob.discovery
            assert bob_there is not None
            bob_there.announce(engine="newer")
            await bob.host.dial(ann.peer, ann.host.addresses)

            def both_know() -> bool:
                known = (ann.discovery.announcement(bob.peer), bob_there.announcement(ann.peer))
                return [item and item.engine for item in known] == ["newer", "new"]

            await until(both_know, within_s=2)


async def push(node: SmallNode, target: SmallNode, sealed: bytes) -> MessageStream:
    messages = MessageStream(await node.host.open_stream(target.peer, [PROTOCOL]))
    await messages.send(Records(announcements=(sealed,)))
    return messages


async def test_a_forged_announcement_costs_the_connection(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b") as bob,
    ):
        await join(bob, ann)
        (membership,) = bob.membership.own_memberships().values()
        sealed = seal_announcement(
            bob.host.identity,
            Announcement(
                peer=bob.peer,
                seq=1,
                issued_wall_s=int(wall_time()),
                membership=membership.proof,
                name="bob",
                addresses=(),
            ),
        )
        connection = ann.host.connection_to(bob.peer)
        assert connection is not None

        await push(bob, ann, sealed[:-1] + bytes([sealed[-1] ^ 1]))
        await until(lambda: not connection.is_open, within_s=1.0)


async def test_an_outdated_announcement_is_ordinary_gossip(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b") as bob,
    ):
        assert ann.discovery is not None
        await join(bob, ann)
        (membership,) = bob.membership.own_memberships().values()
        outdated = Announcement(
            peer=bob.peer,
            seq=1,
            issued_wall_s=int(wall_time() - 7200),
            membership=membership.proof,
            name="bob",
            addresses=(),
        )

        await push(bob, ann, seal_announcement(bob.host.identity, outdated))
        await trio.sleep(1)

        assert ann.discovery.announcement(bob.peer) is None
        assert ann.membership.is_member(bob.peer)


async def test_an_announcement_of_a_stranger_is_ignored(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Sound in itself, but of a network that deliverer and receiver do not share."""
    world = SimNetwork()
    key, eve = Identity(b"k" * 32), Identity(b"e" * 32)
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b") as bob,
    ):
        assert ann.discovery is not None
        await join(bob, ann)
        proof = issue(
            key,
            authority=None,
            network_id=own_network_id(key),
            network_name="eve's",
            member=eve.peer_id,
            can_invite=True,
            serial=1,
            wall_s=wall_time(),
        )
        sealed = seal_announcement(
            eve,
            Announcement(
                peer=eve.peer_id,
                seq=1,
                issued_wall_s=int(wall_time()),
                membership=proof,
                name="eve",
                addresses=("/ip4/10.0.0.9/tcp/1",),
            ),
        )

        await push(bob, ann, sealed)
        await trio.sleep(1)

        assert ann.discovery.announcement(eve.peer_id) is None
        assert ann.view(eve.peer_id) is None
        assert ann.host.connection_to(bob.peer) is not None


async def test_a_stranger_cannot_announce(autojump_clock: MockClock, tmp_path: Path) -> None:
    world = SimNetwork()
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("eve", machine(world, 2), tmp_path / "e") as eve,
    ):
        ann.membership.create_network()
        await eve.host.dial(ann.peer, ann.host.addresses)

        with pytest.raises(SwarmError):
            await (await push(eve, ann, b"anything")).receive(Records)


async def test_third_party_records_cannot_aim_dials_at_one_victim(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Goal: at most one dial a minute to one IP, on one member's word.

    Method: bob signs twenty members in, each "listening" on another port of 192.0.2.7, where
    somebody accepts connections and says nothing.
    """
    dials: list[str] = []
    world = SimNetwork(
        observe=lambda kind, source, target, data: dials.append(target) if kind == "dial" else None
    )
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b") as bob,
    ):
        await join(bob, ann)
        (membership,) = bob.membership.own_memberships().values()
        victim = world.network("192.0.2.7")
        doors = [
            await victim.listen(Address(f"/ip4/192.0.2.7/tcp/{1000 + number}"))
            for number in range(20)
        ]
        dials.clear()
        for number in range(20):
            sybil = Identity(bytes([number]) * 32)
            proof = issue(
                bob.host.identity,
                authority=membership,
                network_id=membership.network_id,
                network_name="",
                member=sybil.peer_id,
                can_invite=False,
                serial=number,
                wall_s=wall_time(),
            )
            announcement = Announcement(
                peer=sybil.peer_id,
                seq=1,
                issued_wall_s=int(wall_time()),
                membership=proof,
                name="sybil",
                addresses=(f"/ip4/192.0.2.7/tcp/{1000 + number}",),
            )
            await push(bob, ann, seal_announcement(sybil, announcement))

        await trio.sleep(50)
        first_minute = len(dials)
        await trio.sleep(300)

        assert first_minute == 1
        assert 2 <= len(dials) <= 6
        for door in doors:
            door.close()
