"""Whom a node dials, and what it sends to whom, on a simulated network."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from small_nodes import Clock, SmallNode, is_member, join, machine, small_node, until
from trio.testing import MockClock

from swarmpy.abc import Address, Sighting, Stream
from swarmpy.discovery.link import PROTOCOL
from swarmpy.discovery.neighbourhood import RECHECK_S
from swarmpy.errors import DialFailed
from swarmpy.identity import Identity
from swarmpy.net.messages import MessageStream
from swarmpy.proto.announce import Announcement, Records, seal_announcement
from swarmpy.proto.membership import issue
from swarmpy.testing.network import SimNetwork


async def announce_for(node: SmallNode, target: SmallNode, address: str) -> Identity:
    """Let a member announce somebody it signed in, who listens at an address; return who."""
    (membership,) = node.membership.own_memberships().values()
    wall_s = node.environment.wall_time()
    sybil = Identity(address.encode()[:32].rjust(32))
    proof = issue(
        node.host.identity,
        authority=membership,
        network_id=membership.network_id,
        network_name="",
        member=sybil.peer_id,
        can_invite=False,
        serial=1,
        wall_s=wall_s,
    )
    announcement = Announcement(
        peer=sybil.peer_id,
        seq=1,
        issued_wall_s=int(wall_s),
        membership=proof,
        name="sybil",
        addresses=(address,),
    )
    messages = MessageStream(await node.host.open_stream(target.peer, [PROTOCOL]))
    await messages.send(Records(announcements=(seal_announcement(sybil, announcement),)))
    return sybil


@pytest.mark.parametrize(
    ("address", "is_dialled"),
    [
        ("/ip4/203.0.113.9/tcp/4001", True),
        ("/ip4/10.77.0.9/tcp/4001", True),
        ("/ip4/192.168.1.1/tcp/80", False),
        ("/ip4/127.0.0.1/tcp/80", False),
        ("/ip4/169.254.169.254/tcp/80", False),
        ("/ip6/::1/tcp/80", False),
    ],
)
async def test_private_addresses_are_dialled_only_where_members_are_met(
    autojump_clock: MockClock, tmp_path: Path, address: str, is_dialled: bool
) -> None:
    """Method: ann and bob are in 10/8; bob signs somebody in who claims to be elsewhere."""
    dials: list[str] = []
    world = SimNetwork(
        observe=lambda kind, source, target, data: dials.append(target) if kind == "dial" else None
    )
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b") as bob,
    ):
        await join(bob, ann)
        # Where somebody listens, so that a dial is seen; loopback is ann's own machine.
        if "ip4" in address and "127" not in address:
            await world.network(address.split("/")[2]).listen(Address(address))
        elif "ip4" in address:
            await machine(world, 1).listen(Address(address))
        dials.clear()

        sybil = await announce_for(bob, ann, address)
        await trio.sleep(30)

        assert bool(dials) is is_dialled
        assert ann.discovery is not None
        if not is_dialled:
            with pytest.raises(DialFailed, match="no address"):
                await ann.discovery.connect(sybil.peer_id)


async def test_a_member_is_connected_when_it_is_wanted(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob,
    ):
        assert ann.discovery is not None
        await join(bob, ann)
        await until(lambda: ann.discovery.announcement(bob.peer) is not None)
        for connection in ann.host.connections:
            connection.close()

        connection = await ann.discovery.connect(bob.peer)

        assert connection.peer == bob.peer
        assert ann.membership.is_member(bob.peer)
        with pytest.raises(DialFailed):
            await ann.discovery.connect(Identity(b"x" * 32).peer_id)


async def test_a_peer_refused_for_its_clock_is_looked_at_again(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: bob's clock is set back to before the network began while he is not connected, and is
    set right some minutes later; nobody says a word about it."""
    world = SimNetwork()
    clock = Clock()
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node(
            "bob", machine(world, 2), tmp_path / "b", with_discovery=True, clock=clock
        ) as bob,
    ):
        await join(bob, ann)
        clock.offset_s = -3600.0
        for connection in bob.host.connections:
            connection.close()
        await trio.sleep(100)
        assert not is_member(ann, bob)

        clock.offset_s = 0.0
        await until(lambda: is_member(ann, bob), within_s=2 * RECHECK_S)


async def test_a_member_that_resets_its_streams_is_not_sent_everything_again(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: bob reads a little of each stream and resets it, for ten minutes."""
    sent = 0
    streams = 0

    def observe(kind: str, source: str, target: str, data: bytes) -> None:
        nonlocal sent
        if source.startswith("/ip4/10.0.0.1/"):
            sent += len(data)

    async def cut(stream: Stream) -> None:
        nonlocal streams
        streams += 1
        await stream.receive_some(10)
        stream.reset()

    world = SimNetwork(observe=observe)
    async with (
        small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann,
        small_node("bob", machine(world, 2), tmp_path / "b") as bob,
    ):
        bob.host.set_handler(PROTOCOL, cut)
        await join(bob, ann)
        for number in range(50):
            await announce_for(bob, ann, f"/ip4/203.0.113.{number + 1}/tcp/1")
        assert ann.discovery is not None
        await until(lambda: len(ann.discovery.announcements()) == 50)
        sent = streams = 0

        await trio.sleep(600)

        assert 1 <= streams <= 30
        assert sent < 60_000  # keepalives, and a root of 60 bytes each time


async def test_a_sighting_of_a_member_elsewhere_is_hearsay_all_the_same(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Goal: a source other than the own link cannot make a node dial into private networks."""
    dials: list[str] = []
    world = SimNetwork(
        observe=lambda kind, source, target, data: dials.append(target) if kind == "dial" else None
    )
    async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
        assert ann.discovery is not None
        ann.membership.create_network()
        victim = Address("/ip4/172.16.0.1/tcp/22")
        await world.network("172.16.0.1").listen(victim)

        eve = Identity(b"e" * 32).peer_id
        ann.discovery.see(Sighting(peer=eve, addresses=(victim,), source="exchange"))
        await trio.sleep(30)

        assert dials == []
