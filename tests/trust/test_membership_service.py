"""Who is a member, what a stranger may do, and how membership ends and goes on."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import trio
from small_nodes import Clock, SmallNode, join, machine, small_node, small_swarm, until
from trio.testing import MockClock

from swarmpy.abc import Address, ProtocolId, Stream
from swarmpy.errors import MembershipError, NotAMember, RemoteProtocolError, StreamReset
from swarmpy.identity import PeerId
from swarmpy.net.connection import NativeConnection
from swarmpy.net.host import NativeHost
from swarmpy.net.messages import MessageStream
from swarmpy.proto.membership import NETWORKS_MAX, Done, Hello, Proofs, network_tag
from swarmpy.testing.network import Link, SimNetwork
from swarmpy.trust.conversations import PROTOCOL
from swarmpy.trust.exchange import channel_binding
from swarmpy.trust.membership import STRANGER_TIMEOUT_S, SWEEP_INTERVAL_S

WORK = ProtocolId("/swarmpy/work/1")
DAY_S = 86400.0


def serve_work(node: SmallNode) -> list[PeerId]:
    """Serve a protocol that only members may use; return who used it."""
    served: list[PeerId] = []

    async def handle(stream: Stream) -> None:
        served.append(stream.peer)
        await stream.send_all(b"done")

    node.host.set_handler(WORK, handle)
    return served


async def ask_work(node: SmallNode, peer: PeerId) -> bytes:
    stream = await node.host.open_stream(peer, [WORK])
    await stream.send_all(b"work")
    return await stream.receive_some()


async def test_a_stranger_is_served_nothing_but_identify_ping_and_membership(
    autojump_clock: MockClock,
    tmp_path: Path,
) -> None:
    async with small_swarm(tmp_path, "ann", "eve") as (ann, eve):
        served = serve_work(ann)
        ann.membership.create_network()
        eve.membership.create_network()
        await eve.host.dial(ann.peer, ann.host.addresses)

        assert not await eve.membership.confirm(ann.peer)
        with pytest.raises(RemoteProtocolError):
            await ask_work(eve, ann.peer)
        await eve.host.ping(ann.peer)
        await until(lambda: eve.host.identified(ann.peer) is not None)
        identified = eve.host.identified(ann.peer)

        assert served == []
        assert identified is not None
        assert WORK not in identified.protocols


async def test_a_member_is_served(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with small_swarm(tmp_path, "ann", "bob") as (ann, bob):
        serve_work(ann)
        await join(bob, ann)

        assert await ask_work(bob, ann.peer) == b"done"


async def test_no_stream_opened_on_hearing_of_a_member_is_refused(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Goal: neither side calls the other a member before that one serves it and knows its networks.

    Method: 100 ms of latency, and both open a stream in the very call-back.
    """
    world = SimNetwork(link=Link(latency_s=0.1))
    answers: list[bytes] = []
    async with (
        small_swarm(tmp_path, "ann", "bob", world=world) as (ann, bob),
        trio.open_nursery() as nursery,
    ):

        async def ask(node: SmallNode, peer: PeerId) -> None:
            answers.append(await ask_work(node, peer))

        def serve(node: SmallNode) -> None:
            async def handle(stream: Stream) -> None:
                shared = node.membership.shared_networks(stream.peer)
                await stream.send_all(b"done" if shared else b"stranger")

            node.host.set_handler(WORK, handle)

        for node in (ann, bob):
            serve(node)
            node.membership.on_member(lambda peer, node=node: nursery.start_soon(ask, node, peer))
        await join(bob, ann)
        await until(lambda: len(answers) == 2)

        assert answers == [b"done", b"done"]


async def test_a_stranger_learns_nothing_of_this_nodes_networks(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Tags that name no network of ours get an empty answer, whatever we are in."""
    async with small_swarm(tmp_path, "ann", "eve") as (ann, eve):
        ann.membership.create_network()
        await eve.host.dial(ann.peer, ann.host.addresses)
        messages = MessageStream(await eve.host.open_stream(ann.peer, [PROTOCOL]))

        await messages.send(Hello(tags=(bytes(32), b"t" * 32)))

        assert await messages.receive(Proofs) == Proofs(proofs=())


async def test_another_members_proof_admits_nobody(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Goal: a proof copied from a member is worthless. Method: eve knows the id and shows bob's."""
    async with small_swarm(tmp_path, "ann", "bob", "eve") as (ann, bob, eve):
        await join(bob, ann)
        ((network_id, stolen),) = bob.membership.own_memberships().items()
        await eve.host.dial(ann.peer, ann.host.addresses)
        stream = await eve.host.open_stream(ann.peer, [PROTOCOL])
        binding = channel_binding(stream)
        messages = MessageStream(stream)

        tag = network_tag(network_id, channel_binding=binding, role="initiator")
        await messages.send(Hello(tags=(tag,)))
        shown = await messages.receive(Proofs)
        await messages.send(Proofs(proofs=(stolen.proof,)))
        with pytest.raises(StreamReset):
            await messages.receive(Done)

        assert len(shown.proofs) == 1
        assert not ann.membership.is_member(eve.peer)


async def test_a_stranger_that_stays_one_is_sent_away(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with small_swarm(tmp_path, "ann", "eve") as (ann, eve):
        await eve.host.dial(ann.peer, ann.host.addresses)
        await trio.sleep(20)
        assert ann.host.connection_to(eve.peer) is not None

        await trio.sleep(20)

        assert ann.host.connection_to(eve.peer) is None


async def test_a_member_that_said_go_away_and_stays_connected_is_sent_away_as_a_stranger(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Goal: a connection that serves nobody any more keeps nobody a member, nor itself a place."""
    async with small_swarm(tmp_path, "ann", "bob") as (ann, bob):
        await join(bob, ann)
        (connection,) = bob.host.connections
        assert isinstance(connection, NativeConnection)

        connection._yamux.go_away()
        connection.flush()
        await until(lambda: not ann.membership.is_member(bob.peer), within_s=SWEEP_INTERVAL_S + 1)
        assert len(ann.host.connections) == 1
        await trio.sleep(STRANGER_TIMEOUT_S + SWEEP_INTERVAL_S)

        assert ann.host.connections == []


async def test_a_member_that_leaves_is_lost_and_one_that_returns_is_told_again(
    autojump_clock: MockClock,
    tmp_path: Path,
) -> None:
    world = SimNetwork()
    told: list[str] = []
    async with small_node("ann", machine(world, 1), tmp_path / "ann") as ann:
        ann.membership.on_member(lambda peer: told.append("member"))
        ann.membership.on_lost(lambda peer: told.append("lost"))
        async with small_node("bob", machine(world, 2), tmp_path / "bob") as bob:
            await join(bob, ann)
        await until(lambda: not ann.membership.members())
        async with small_node("bob", machine(world, 2), tmp_path / "bob") as bob:
            await bob.host.dial(ann.peer, ann.host.addresses)
            await ann.membership.wait_member(bob.peer)
            assert told == ["member", "lost", "member"]


async def test_networks_made_and_joined_survive_a_restart(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with small_swarm(tmp_path, "ann", "bob", world=world) as (ann, bob):
        await join(bob, ann)
        before = [*ann.membership.networks(), *bob.membership.networks()]

    async with small_swarm(tmp_path, "ann", "bob", world=world) as (ann, bob):
        assert [*ann.membership.networks(), *bob.membership.networks()] == before
        assert [view.is_founder for view in before] == [True, False]


async def test_a_record_that_ends_soon_is_renewed_by_a_connected_member(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    clock = Clock()
    async with small_swarm(tmp_path, "ann", "bob", clock=clock) as (ann, bob):
        await join(bob, ann)
        before = bob.membership.networks()[0].not_after_wall_s
        clock.offset_s += 25 * DAY_S

        await trio.sleep(1300)

        assert bob.membership.networks()[0].not_after_wall_s - before > 24 * DAY_S
        assert ann.membership.is_member(bob.peer)
        clock.offset_s += 10 * DAY_S
        assert ann.membership.is_member(bob.peer)


async def test_a_record_that_nobody_renewed_ends_membership(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    clock = Clock()
    async with small_swarm(tmp_path, "ann", "bob", clock=clock) as (ann, bob):
        serve_work(ann)
        await join(bob, ann)
        clock.offset_s += 31 * DAY_S

        assert not ann.membership.is_member(bob.peer)
        with pytest.raises(RemoteProtocolError):
            await ask_work(bob, ann.peer)


async def test_a_network_whose_membership_ended_is_left_and_its_invites_with_it(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    clock = Clock()
    async with small_node("bob", machine(world, 2), tmp_path / "bob", clock=clock) as bob:
        async with small_node("ann", machine(world, 1), tmp_path / "ann", clock=clock) as ann:
            await join(bob, ann)
        clock.offset_s += 31 * DAY_S
        await trio.sleep(700)
        assert bob.membership.networks() == []
        with pytest.raises(NotAMember):
            await bob.membership.create_invite()

    async with small_node("bob", machine(world, 2), tmp_path / "bob", clock=clock) as bob:
        assert bob.membership.networks() == []


async def test_a_damaged_record_on_disk_does_not_keep_the_node_from_starting(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with small_node("ann", machine(world, 1), tmp_path / "ann") as ann:
        ann.membership.create_network("kitchen")
        ann.membership.create_network("garage")
    with sqlite3.connect(tmp_path / "ann" / "membership.db") as database:
        first = "SELECT network_id FROM networks ORDER BY joined_wall_s LIMIT 1"
        database.execute(f"UPDATE networks SET proof = x'00' WHERE network_id = ({first})")
    database.close()

    async with small_node("ann", machine(world, 1), tmp_path / "ann") as ann:
        assert len(ann.membership.networks()) == 1


async def test_a_node_may_be_in_just_so_many_networks(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with small_node("ann", machine(world, 1), tmp_path / "ann") as ann:
        for _ in range(NETWORKS_MAX):
            ann.membership.create_network()

        with pytest.raises(MembershipError, match="in 8 networks"):
            ann.membership.create_network()


async def test_a_node_with_no_room_for_a_network_uses_up_no_code(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with small_swarm(tmp_path, "ann", "bob") as (ann, bob):
        ann.membership.create_network()
        code = (await ann.membership.create_invite()).code
        for _ in range(NETWORKS_MAX):
            bob.membership.create_network()

        with pytest.raises(MembershipError, match="in 8 networks"):
            await bob.membership.redeem(code)

        assert len(ann.membership.invites()) == 1


async def test_a_disk_that_takes_no_renewal_costs_a_warning(
    autojump_clock: MockClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = SimNetwork()
    clock = Clock()
    async with small_node("ann", machine(world, 1), tmp_path / "ann", clock=clock) as ann:
        ann.membership.create_network()
        ann.membership._database.execute("PRAGMA query_only = ON")
        clock.offset_s += 25 * DAY_S

        await trio.sleep(700)

        assert len(ann.membership.networks()) == 1
    assert {item.getMessage() for item in caplog.records} == {"membership.unwritable"}


async def test_a_founder_away_for_months_signs_itself_anew(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    clock = Clock()
    async with small_node("ann", machine(world, 1), tmp_path / "ann", clock=clock) as ann:
        network = ann.membership.create_network("kitchen")
    clock.offset_s += 90 * DAY_S

    async with small_node("ann", machine(world, 1), tmp_path / "ann", clock=clock) as ann:
        (view,) = ann.membership.networks()

    assert (view.id, view.name) == (network.id, "kitchen")
    assert view.not_after_wall_s > clock.offset_s


async def test_a_wrong_clock_is_named_on_both_sides(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: the founder restarts with a clock a month ahead and signs itself anew."""
    world = SimNetwork()
    async with small_swarm(tmp_path, "ann", "bob", world=world) as (ann, bob):
        await join(bob, ann)

    async with (
        small_node("ann", machine(world, 1), tmp_path / "ann", clock=Clock(31 * DAY_S)) as ann,
        small_node("bob", machine(world, 2), tmp_path / "bob") as bob,
    ):
        await bob.host.dial(ann.peer, ann.host.addresses)
        with pytest.raises(NotAMember, match=r"begins in \d+ s by this clock"):
            await bob.membership.confirm(ann.peer)
        with pytest.raises(NotAMember, match=r"ended \d+ s ago by this clock"):
            await ann.membership.confirm(bob.peer)


async def test_a_member_whose_record_is_over_elsewhere_is_told_why(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: both records are 25 days old, the founder signs its own anew, then bob's clock stops
    for 5 days and his record ends by the founder's clock alone."""
    world = SimNetwork()
    async with small_swarm(tmp_path, "ann", "bob", world=world) as (ann, bob):
        await join(bob, ann)
    async with small_node("ann", machine(world, 1), tmp_path / "ann", clock=Clock(25 * DAY_S)):
        pass

    async with (
        small_node("ann", machine(world, 1), tmp_path / "ann", clock=Clock(31 * DAY_S)) as ann,
        small_node("bob", machine(world, 2), tmp_path / "bob", clock=Clock(26 * DAY_S)) as bob,
    ):
        await bob.host.dial(ann.peer, ann.host.addresses)
        with pytest.raises(NotAMember, match=r"refused .* ended \d+ s ago by this clock"):
            await bob.membership.confirm(ann.peer)


async def test_a_refusal_cannot_command_a_terminal(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: a founder refuses with an escape sequence, after it showed its own membership."""
    world = SimNetwork()

    async def refuse(stream: Stream) -> None:
        messages = MessageStream(stream)
        await messages.receive(Hello)
        await messages.send(Proofs(proofs=(proof,)))
        await messages.receive(Proofs)
        await messages.send(Done(refusal="go\x1b[2J away"))

    async with small_node("ann", machine(world, 1), tmp_path / "ann") as ann:
        ann.membership.create_network()
        (own,) = ann.membership.own_memberships().values()
        proof = own.proof
        async with small_node("bob", machine(world, 2), tmp_path / "bob") as bob:
            await join(bob, ann)
    async with (
        small_node("bob", machine(world, 2), tmp_path / "bob") as bob,
        trio.open_nursery() as nursery,
    ):
        founder = NativeHost(ann.host.identity, machine(world, 1), random=bob.environment.random)
        founder.set_handler(PROTOCOL, refuse)
        await nursery.start(founder.run)
        await bob.host.dial(ann.peer, [await founder.listen(Address("/ip4/10.0.0.1/tcp/4001"))])

        with pytest.raises(NotAMember, match=r"refused .*: go\[2J away"):
            await bob.membership.confirm(ann.peer)
        founder.close()


async def test_a_peer_that_ends_the_conversation_early_stays_a_stranger(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with small_swarm(tmp_path, "ann", "eve") as (ann, eve):
        ann.membership.create_network()
        await eve.host.dial(ann.peer, ann.host.addresses)
        messages = MessageStream(await eve.host.open_stream(ann.peer, [PROTOCOL]))

        await messages.send(Done())
        with pytest.raises(StreamReset):
            await messages.receive(Proofs)

        assert not ann.membership.is_member(eve.peer)
        assert ann.host.connection_to(eve.peer) is not None


async def test_the_network_key_and_database_are_private_files(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with small_node("ann", machine(world, 1), tmp_path / "ann") as ann:
        network = ann.membership.create_network()

    key = tmp_path / "ann" / "networks" / f"{network.id}.key"
    database = tmp_path / "ann" / "membership.db"
    assert key.stat().st_mode & 0o777 == 0o600
    assert database.stat().st_mode & 0o777 == 0o600
