"""What a revocation reaches, and what nobody can do with one or against one."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest
import trio
from small_nodes import (
    Clock,
    SmallNode,
    join,
    machine,
    small_node,
    small_swarm,
    until,
    wall_time,
)
from trio.testing import MockClock

from swarmpy.discovery.link import PROTOCOL
from swarmpy.errors import ConfigError, MembershipRevoked, NotAMember
from swarmpy.identity import Identity
from swarmpy.net.messages import MessageStream
from swarmpy.proto.announce import Records
from swarmpy.proto.membership import (
    MEMBERSHIP_TTL_S,
    Membership,
    NetworkId,
    Proof,
    Renew,
    Renewed,
    issue,
    open_membership,
    verify_membership,
)
from swarmpy.proto.revocation import (
    REVOCATION_TTL_S,
    SignedRevocation,
    open_revocation,
    seal_revocation,
)
from swarmpy.testing.network import SimNetwork
from swarmpy.trust import revocations
from swarmpy.trust.renewing import renewal_for


def identity(name: str) -> Identity:
    """The identity of the small node of this name."""
    return Identity.generate(random.Random(name))


def own(node: SmallNode) -> tuple[NetworkId, Membership]:
    (found,) = node.membership.own_memberships().items()
    return found


def signed_in(by: SmallNode, member: Identity, *, ttl_s: float = MEMBERSHIP_TTL_S) -> Proof:
    """A record that a member signs for anybody, asked or not."""
    network_id, authority = own(by)
    return issue(
        identity(by.name),
        authority=authority,
        network_id=network_id,
        network_name="",
        member=member.peer_id,
        can_invite=True,
        serial=1,
        wall_s=wall_time(),
        ttl_s=ttl_s,
    )


def signed_out(
    signer: Identity, network_id: NetworkId, member: Identity, chain: Proof | tuple[()] = ()
) -> SignedRevocation:
    sealed = seal_revocation(
        signer, network_id=network_id, member=member.peer_id, chain=chain, wall_s=wall_time()
    )
    return open_revocation(sealed, wall_s=wall_time())


async def share_second(bob: SmallNode, cid: SmallNode) -> NetworkId:
    """Let cid join another network, of bob's own."""
    second = bob.membership.create_network("second").id
    await cid.membership.redeem((await bob.membership.create_invite(network_id=second)).code)
    return second


def renewed(by: SmallNode, member: Identity, proof: Proof) -> Membership:
    answer = renewal_for(
        member.peer_id,
        Renew(proof=proof),
        book=by.membership._book,
        is_void=by.membership.is_void,
        wall_s=wall_time(),
    )
    assert isinstance(answer, Renewed)
    return open_membership(answer.proof)


async def test_a_member_cannot_revoke_those_it_signs_in_below_itself_unasked(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: cid, whom ann let in, signs ann and bob in, and revokes them by those records."""
    async with small_swarm(tmp_path, "ann", "bob", "cid", with_discovery=True) as (ann, bob, cid):
        await join(bob, ann)
        await join(cid, ann)
        everybody = (ann, bob, cid)
        await until(lambda: all(len(node.membership.members()) == 2 for node in everybody))
        network_id, _ = own(cid)
        for victim in ("ann", "bob"):
            chain = signed_in(cid, identity(victim))
            revocation = signed_out(identity("cid"), network_id, identity(victim), chain)
            assert cid.membership.take_revocation(revocation)
            assert cid.discovery is not None
            cid.discovery.member_revoked(revocation)

        await until(lambda: all(len(n.membership.revocations()) == 2 for n in everybody))

        await trio.sleep(30)
        assert all(len(node.membership.members()) == 2 for node in everybody)
        for node in everybody:
            assert node.discovery is not None
            assert len(node.discovery.announcements()) == 2
        await ann.membership.create_invite()


async def test_a_renewal_is_no_way_out_of_a_revocation(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: bob signs a stranger in for an hour; the founder renews it, and then revokes bob."""
    async with small_swarm(tmp_path, "ann", "bob", "dan") as (ann, bob, dan):
        await join(bob, ann)
        await join(dan, ann)
        sybil = identity("sybil")
        by_founder = renewed(ann, sybil, signed_in(bob, sybil, ttl_s=3600))
        by_member = renewed(dan, sybil, signed_in(bob, sybil, ttl_s=3600))
        assert bob.peer not in (*by_founder.members, *by_member.members)

        ann.membership.revoke(bob.peer)

        assert ann.membership.is_void(by_founder)
        assert ann.membership.is_void(by_member)
        assert not ann.membership.is_void(own(dan)[1])


async def test_nobody_renews_a_member_through_whom_it_is_one_itself(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Else whom a member invited could stand above it."""
    async with small_swarm(tmp_path, "ann", "bob", "cid") as (ann, bob, cid):
        await join(bob, ann)
        await join(cid, bob)
        network_id, above = own(bob)

        with pytest.raises(NotAMember, match="through"):
            cid.membership._book.issue(network_id, bob.peer, can_invite=True, replaced=above)


async def test_who_let_a_member_in_revokes_it_after_others_renewed_it(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with small_swarm(tmp_path, "ann", "bob", "cid") as (ann, bob, cid):
        await join(bob, ann)
        await join(cid, bob)
        network_id, before = own(cid)
        proof = ann.membership._book.issue(network_id, cid.peer, can_invite=True, replaced=before)
        now = verify_membership(proof, wall_s=wall_time())
        cid.membership._book.store(now)

        assert bob.membership.revoke(cid.peer, announced=[now]) == [network_id]

        assert bob.membership.is_void(now)
        (revocation,) = bob.membership.revocations()
        assert ann.membership.take_revocation(revocation)
        assert ann.membership.is_void(now)


async def test_a_members_revocation_leaves_what_others_vouched_for(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: bob let cid in and revokes it; the founder, above bob, invites cid again.

    Neither a new code of bob's nor the one that cid had redeemed lets it in.
    """
    world = SimNetwork()
    async with small_swarm(tmp_path, "ann", "bob", world=world) as (ann, bob):
        await join(bob, ann)
        async with small_node("cid", machine(world, 3), tmp_path / "cid") as cid:
            first = (await bob.membership.create_invite()).code
            await cid.membership.redeem(first)
            again = (await bob.membership.create_invite()).code
            bob.membership.revoke(cid.peer)
            (revocation,) = bob.membership.revocations()
            ann.membership.take_revocation(revocation)
        async with small_node("cid", machine(world, 3), tmp_path / "c2") as cid:
            for code in (first, again):
                with pytest.raises(MembershipRevoked):
                    await cid.membership.redeem(code)
            assert cid.membership.revoked_names() == []  # it was never given a void one
            await join(cid, ann)
            assert cid.membership.members() == [ann.peer]


async def test_one_network_fills_no_places_of_another_and_members_none_of_the_key(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: places are made few; eve fills those of her network, ten members those of ann's."""
    monkeypatch.setattr(revocations, "BY_KEY_MAX", 20)
    monkeypatch.setattr(revocations, "BY_MEMBERS_MAX", 10)
    monkeypatch.setattr(revocations, "PER_SIGNER_MAX", 2)
    async with small_swarm(tmp_path, "ann", "bob", "eve") as (ann, bob, eve):
        await join(bob, ann)
        network_id, authority = own(bob)
        evil = eve.membership.create_network("evil").id
        await ann.membership.redeem((await eve.membership.create_invite()).code)
        key = eve.membership._book.key(evil)
        assert key is not None
        for number in range(30):
            ann.membership.take_revocation(signed_out(key, evil, identity(f"e{number}")))
        for number in range(10):
            signer = identity(f"m{number}")
            above = verify_membership(signed_in(bob, signer), wall_s=wall_time())
            for guest in "xyz":
                chain = issue(
                    signer,
                    authority=above,
                    network_id=network_id,
                    network_name="",
                    member=identity(guest).peer_id,
                    can_invite=True,
                    serial=1,
                    wall_s=wall_time(),
                )
                revocation = signed_out(signer, network_id, identity(guest), chain)
                ann.membership.take_revocation(revocation)

        assert len(ann.membership.revocations()) == 20 + 10
        assert ann.membership.revoke(bob.peer) == [network_id]
        assert ann.membership.is_void(authority)


async def test_a_clock_that_is_wrong_at_a_start_costs_no_revocation(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: the founder starts with a clock a month behind, then two ahead, then a right one."""
    world = SimNetwork()
    clock = Clock()
    folder = tmp_path / "a"
    async with small_node("bob", machine(world, 2), tmp_path / "b") as bob:
        async with small_node("ann", machine(world, 1), folder, clock=clock) as ann:
            await join(bob, ann)
            ann.membership.revoke(bob.peer)
        (before,) = bob.membership.own_memberships().values()
        for offset_s in (-MEMBERSHIP_TTL_S, 0.0, 1.9 * REVOCATION_TTL_S, 0.0):
            clock.offset_s = offset_s
            async with small_node("ann", machine(world, 1), folder, clock=clock) as ann:
                assert ann.membership.is_void(before) == (offset_s <= 0)
        async with small_node("ann", machine(world, 1), folder) as ann:
            await bob.host.dial(ann.peer, ann.host.addresses)
            with pytest.raises(NotAMember, match="revoked"):
                await bob.membership.confirm(ann.peer)


async def test_a_revocation_that_the_disk_refuses_is_no_success(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: another connection locks the database for writing."""
    async with small_swarm(tmp_path, "ann", "bob") as (ann, bob):
        await join(bob, ann)
        network_id, authority = own(bob)
        ann.membership._database.execute("PRAGMA busy_timeout=0")
        other = sqlite3.connect(tmp_path / "ann" / "membership.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(ConfigError):
            ann.membership.revoke(bob.peer)
        assert not ann.membership.is_void(authority)
        assert ann.membership.members() == [bob.peer]

        key = ann.membership._book.key(network_id)
        assert key is not None
        heard = signed_out(key, network_id, identity("bob"))
        assert ann.membership.take_revocation(heard)  # it is in force, if not for good
        assert ann.membership.members() == []
        other.execute("ROLLBACK")
        other.close()


async def test_the_key_revokes_a_member_that_its_holder_never_met(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: bob lets cid in while ann is away; cid is gone when she comes back."""
    world = SimNetwork()
    async with small_node("bob", machine(world, 2), tmp_path / "b") as bob:
        async with small_node("ann", machine(world, 1), tmp_path / "a") as ann:
            await join(bob, ann)
        async with small_node("cid", machine(world, 3), tmp_path / "c") as cid:
            await join(cid, bob)
            network_id, theirs = own(cid)
        async with small_node("ann", machine(world, 1), tmp_path / "a") as ann:
            with pytest.raises(NotAMember):
                bob.membership.revoke(identity("eve").peer_id)

            assert ann.membership.revoke(cid.peer) == [network_id]

            assert ann.membership.is_void(theirs)


async def test_who_is_revoked_in_one_network_is_a_member_of_the_other(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: cid shares two networks with bob; ann revokes cid in hers; bob and cid reconnect."""
    async with small_swarm(tmp_path, "ann", "bob", "cid", with_discovery=True) as (ann, bob, cid):
        await join(bob, ann)
        await join(cid, ann)
        second = await share_second(bob, cid)
        await until(lambda: len(bob.membership.shared_networks(cid.peer)) == 2)

        ann.membership.revoke(cid.peer)
        await until(lambda: bob.membership.shared_networks(cid.peer) == {second})
        for connection in bob.host.connections:
            if connection.peer == cid.peer:
                connection.close()

        await until(lambda: cid.peer in bob.membership.members(), within_s=120)
        assert set(cid.membership.own_memberships()) == {second}


async def test_a_void_proof_does_not_spoil_the_others(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: as before, but nobody tells cid, and bob begins the conversation."""
    async with small_swarm(tmp_path, "ann", "bob", "cid") as (ann, bob, cid):
        await join(bob, ann)
        await join(cid, ann)
        second = await share_second(bob, cid)
        ann.membership.revoke(cid.peer)
        (revocation,) = ann.membership.revocations()
        bob.membership.take_revocation(revocation)
        for connection in bob.host.connections:
            connection.close()
        await until(lambda: not bob.host.connections and not cid.host.connections)

        await bob.host.dial(cid.peer, cid.host.addresses)

        assert await bob.membership.confirm(cid.peer)
        assert bob.membership.shared_networks(cid.peer) == {second}


async def test_a_revoked_node_is_shown_its_revocation_and_is_not_run_after(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: bob is down while ann revokes him; he dials her when he is back."""
    world = SimNetwork()
    async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
        async with small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob:
            await join(bob, ann)
            assert bob.discovery is not None
            await until(lambda: ann.view(bob.peer) is not None)
            await bob.discovery.leave()
        ann.membership.revoke(bob.peer)
        view = ann.view(bob.peer)
        assert view is not None
        assert view.state == "visible"
        async with small_node("bob", machine(world, 2), tmp_path / "b", with_discovery=True) as bob:
            await until(lambda: not bob.membership.own_memberships(), within_s=60)
            assert bob.membership.revoked_names() == ["ann's network"]
            await until(lambda: not ann.host.connections, within_s=60)

            await trio.sleep(10)  # for a dial that had begun
            dials: list[str] = []
            with trio.move_on_after(1800):
                async for event in bob.host.connection_events():
                    dials.append(event.connection.direction)
            assert "inbound" not in dials


async def test_what_membership_does_not_keep_is_not_passed_on(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: there is room for one revocation by a member; bob sends two."""
    monkeypatch.setattr(revocations, "PER_SIGNER_MAX", 1)
    async with small_swarm(tmp_path, "ann", "bob", with_discovery=True) as (ann, bob):
        await join(bob, ann)
        network_id, _ = own(bob)
        sealed = [
            signed_out(identity("bob"), network_id, identity(name), signed_in(bob, identity(name)))
            for name in ("x", "y")
        ]
        stream = await bob.host.open_stream(ann.peer, [PROTOCOL])
        await MessageStream(stream).send(Records(revocations=tuple(r.envelope for r in sealed)))

        await until(lambda: bool(ann.membership.revocations()))
        await trio.sleep(1)
        assert ann.discovery is not None
        table = ann.discovery._gossip.table
        assert [item.key in {r.key for r in ann.membership.revocations()} for item in sealed] == [
            table.get(item.key) is not None for item in sealed
        ]
        assert sum(table.get(item.key) is not None for item in sealed) == 1
