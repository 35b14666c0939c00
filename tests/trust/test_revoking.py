"""Revocation over real hosts on a simulated network: who is out, who stays, who can do it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
from small_nodes import Clock, SmallNode, join, machine, small_node, small_swarm, until
from trio.testing import MockClock

from swarmpy.abc import WallSeconds
from swarmpy.errors import MembershipError, MembershipRevoked, NotAMember
from swarmpy.identity import Identity
from swarmpy.proto.membership import MEMBERSHIP_TTL_S, RENEW_BELOW_S, NotRenewed, Renew
from swarmpy.proto.revocation import REVOCATION_TTL_S
from swarmpy.testing.network import SimNetwork
from swarmpy.trust import revocations
from swarmpy.trust.renewing import renewal_for


def peers(node: SmallNode) -> set[str]:
    return set(node.membership.members())


async def test_the_founder_revokes_a_member_and_whom_it_invited(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: ann let bob and dan in, bob cid; cid and dan have never met ann's word but gossip."""
    async with small_swarm(tmp_path, "ann", "bob", "cid", "dan", with_discovery=True) as (
        ann,
        bob,
        cid,
        dan,
    ):
        await join(bob, ann)
        await join(cid, bob)
        await join(dan, ann)
        everybody = (ann, bob, cid, dan)
        await until(lambda: all(len(peers(node)) == 3 for node in everybody))

        (network_id,) = ann.membership.revoke(bob.peer)

        await until(lambda: peers(ann) == {dan.peer} and peers(dan) == {ann.peer}, within_s=2)
        for node in (ann, dan):
            assert node.discovery is not None
            assert {item.peer for item in node.discovery.announcements()} <= {ann.peer, dan.peer}
        await trio.sleep(120)
        assert peers(ann) == {dan.peer}
        assert network_id in dan.membership.own_memberships()


async def test_who_let_a_member_in_revokes_it_and_nobody_below_can(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with small_swarm(tmp_path, "ann", "bob", "cid", with_discovery=True) as (ann, bob, cid):
        await join(bob, ann)
        await join(cid, bob)
        await until(lambda: all(len(peers(node)) == 2 for node in (ann, bob, cid)))

        for target in (ann, bob, cid):
            with pytest.raises(NotAMember):
                cid.membership.revoke(target.peer)
        with pytest.raises(NotAMember):
            bob.membership.revoke(ann.peer)
        bob.membership.revoke(cid.peer)

        await until(lambda: peers(ann) == {bob.peer} and peers(bob) == {ann.peer}, within_s=2)


async def test_a_revoked_member_is_refused_by_name_and_cannot_join_again(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: bob does not hear of it (he runs no discovery), and tries all he can."""
    world = SimNetwork()
    async with small_swarm(tmp_path, "ann", "bob", world=world) as (ann, bob):
        await join(bob, ann)
        (membership,) = bob.membership.own_memberships().values()
        fresh = (await ann.membership.create_invite()).code
        ann.membership.revoke(bob.peer)
        await until(lambda: not peers(ann) and not bob.host.connections)

        await bob.host.dial(ann.peer, ann.host.addresses)
        with pytest.raises(NotAMember, match="revoked"):
            await bob.membership.confirm(ann.peer)
        assert not bob.membership.own_memberships()  # ann showed him why
        answer = renewal_for(
            bob.peer,
            Renew(proof=membership.proof),
            book=ann.membership._book,
            is_void=ann.membership.is_void,
            wall_s=WallSeconds(membership.not_after_wall_s - 1),
        )
        assert answer == NotRenewed()
    async with (
        small_node("ann", machine(world, 1), tmp_path / "ann") as ann,
        small_node("bob", machine(world, 2), tmp_path / "empty") as bob,
    ):
        with pytest.raises(MembershipRevoked, match=r"ann says .* was revoked") as refused:
            await bob.membership.redeem(fresh)
        assert "new identity" in refused.value.fix
        assert peers(ann) == set()
        (open_invite,) = ann.membership.invites()
        assert open_invite.uses_left == 1


async def test_a_node_that_was_away_learns_of_it_and_remembers(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Method: dan is down while ann revokes bob; then ann is down and only dan can know."""
    world = SimNetwork()
    async with small_node("bob", machine(world, 2), tmp_path / "b") as bob:
        async with small_node("ann", machine(world, 1), tmp_path / "a", with_discovery=True) as ann:
            async with small_node(
                "dan", machine(world, 4), tmp_path / "d", with_discovery=True
            ) as dan:
                await join(bob, ann)
                await join(dan, ann)
            ann.membership.revoke(bob.peer)
            async with small_node(
                "dan", machine(world, 4), tmp_path / "d", with_discovery=True
            ) as dan:
                await until(lambda: bool(dan.membership.revocations()), within_s=5)
        async with small_node("dan", machine(world, 4), tmp_path / "d", with_discovery=True) as dan:
            await bob.host.dial(dan.peer, dan.host.addresses)
            with pytest.raises(NotAMember, match="revoked"):
                await bob.membership.confirm(dan.peer)


async def test_a_revoked_node_that_hears_of_it_leaves_the_network(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    async with small_swarm(tmp_path, "ann", "bob", world=world, with_discovery=True) as (ann, bob):
        await join(bob, ann)
        ann.membership.revoke(bob.peer)
        (revocation,) = ann.membership.revocations()

        bob.membership.take_revocation(revocation)

        assert not bob.membership.own_memberships()
    async with small_node("bob", machine(world, 2), tmp_path / "bob") as bob:
        assert not bob.membership.own_memberships()


async def test_a_revocation_is_forgotten_when_nothing_older_can_be_valid(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = SimNetwork()
    clock = Clock()
    assert REVOCATION_TTL_S > MEMBERSHIP_TTL_S > RENEW_BELOW_S
    async with small_swarm(tmp_path, "ann", "bob", world=world, clock=clock) as (ann, bob):
        await join(bob, ann)
        ann.membership.revoke(bob.peer)
        assert len(ann.membership.revocations()) == 1
    clock.offset_s = REVOCATION_TTL_S + 60
    async with small_node("ann", machine(world, 1), tmp_path / "ann", clock=clock) as ann:
        assert ann.membership.revocations() == []


async def test_one_member_cannot_fill_the_book(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations, "PER_SIGNER_MAX", 1)
    world = SimNetwork()
    async with small_swarm(tmp_path, "ann", "bob", world=world) as (ann, bob):
        await join(bob, ann)
        for name in "cdef":
            async with small_node(name, machine(world, 3), tmp_path / name) as guest:
                await join(guest, bob if name < "e" else ann)
        c, d, e, f = (Identity.generate(random.Random(name)).peer_id for name in "cdef")
        bob.membership.revoke(c)
        ann.membership.revoke(e)

        ann.membership.revoke(f)  # the network's key may
        with pytest.raises(MembershipError, match="as many"):
            bob.membership.revoke(d)
