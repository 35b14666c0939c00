"""Announcements and liveness among hundreds of members, on virtual time: the goals in numbers.

One swarm serves several checks, in turn; each ends with everybody in everybody's view again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio
from large_swarms import LATENCY_S, LargeSwarm, Member, run_swarm
from small_nodes import wall_time

from swarmpy.discovery.liveness import CHECK_INTERVAL_S
from swarmpy.discovery.neighbourhood import NEIGHBOURS_MAX, NEIGHBOURS_MIN
from swarmpy.identity import PeerId
from swarmpy.proto.announce import ANNOUNCE_INTERVAL_S, ANNOUNCE_JITTER_S, Records
from swarmpy.proto.membership import verify_membership
from swarmpy.proto.swim import ACCUSATIONS_MAX, seal_statement
from swarmpy.testing.network import Link

SMALL, MIDDLE, LARGE = 10, 40, 500

REST_BYTES_MAX = 20 * 1024
"""Payload a node and minute at rest among ten; 1.5 times that among five hundred."""

CHANGE_S_MAX = 5.0
DEATH_S_MAX = 20.0


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a thousand databases are not what is tested."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


def everybody_sees_everybody(swarm: LargeSwarm) -> bool:
    count = len(swarm.running) - 1
    return all(len(member.sees()) == count for member in swarm.running)


def others(swarm: LargeSwarm, *excluded: Member) -> list[Member]:
    return [member for member in swarm.running if member not in excluded]


async def rest(swarm: LargeSwarm, *, minutes: float) -> float:
    """Return what a node sends in a minute at rest, repeated announcements included."""
    sent = await swarm.bytes_per_node_minute(minutes)
    sizes = [len(item.envelope) for item in swarm.members[0].discovery._gossip.table.announced()]
    # Each goes once to each node in its time; the window is too short to see that.
    return sent + sum(sizes) / (ANNOUNCE_INTERVAL_S / 60)


async def change(swarm: LargeSwarm, number: int, *, share: float) -> float:
    """Let a member announce something new; return when that had reached a share of all."""
    member = swarm.members[number]
    text = f"at {trio.current_time()}"
    member.discovery.announce(engine=text)

    def has_arrived() -> bool:
        told = (item.discovery.announcement(member.peer) for item in others(swarm, member))
        return sum(item is not None and item.engine == text for item in told) >= share * (
            len(swarm.running) - 1
        )

    return await swarm.until(has_arrived, within_s=30)


async def death(swarm: LargeSwarm, victims: Sequence[Member]) -> float:
    """Return when no other member has any of some members in view."""
    left = others(swarm, *victims)
    return await swarm.until(
        lambda: not any(swarm.seeing(victim.peer, left) for victim in victims), within_s=60
    )


async def revocation(swarm: LargeSwarm, *, revoked: int, away: int) -> tuple[float, float]:
    """Let the founder revoke a member while another is down.

    Returns:
        When the member was out at everybody else, and, counted from its start, at the one that was
        away.
    """
    founder, outcast, absent = (swarm.members[number] for number in (0, revoked, away))
    absent.scope.cancel()
    await swarm.until(lambda: absent.node is None, within_s=1)
    announced = founder.discovery.memberships(outcast.peer)
    assert founder.running.membership.revoke(outcast.peer, announced=announced)

    def is_out_at(members: Sequence[Member]) -> bool:
        return not swarm.seeing(outcast.peer, members) and not any(
            member.running.membership.is_member(outcast.peer) for member in members
        )

    out_s = await swarm.until(lambda: is_out_at(others(swarm, outcast)), within_s=60)
    await swarm.start(absent)
    back_s = await swarm.until(
        lambda: (
            len(absent.sees()) >= len(swarm.running) // 2
            and bool(absent.running.membership.revocations())
            and is_out_at(others(swarm, outcast))
        ),
        within_s=60,
    )
    return out_s, back_s


def test_at_rest_ten_nodes_and_five_hundred_send_little_and_news_reaches_all_of_them(
    memory_folder: Path,
) -> None:
    """Goal: the budget at rest, news within 5 s, the dead and the revoked out within 20 s.

    Method: ten nodes, then five hundred; in these one member announces, one crashes, one freezes,
    one is cut off and returns, and one is revoked while another is away.
    """

    async def small(swarm: LargeSwarm) -> float:
        assert everybody_sees_everybody(swarm)
        return await rest(swarm, minutes=5)

    async def large(swarm: LargeSwarm) -> dict[str, float]:
        assert everybody_sees_everybody(swarm)
        crashed, frozen, cut = (swarm.members[number] for number in (150, 250, 350))
        told = {"rest": await rest(swarm, minutes=1)}
        told["change"] = await change(swarm, 400, share=0.99)

        swarm.crash(crashed)
        await swarm.until(lambda: crashed.node is None, within_s=1)
        told["crash"] = await death(swarm, [crashed])
        swarm.world.freeze(frozen.ip)
        told["freeze"] = await death(swarm, [frozen])
        swarm.world.thaw(frozen.ip)
        swarm.world.partition(cut.ip, [member.ip for member in others(swarm, cut)])
        told["partition"] = await death(swarm, [cut])
        await swarm.until(lambda: not cut.sees(), within_s=30)
        swarm.world.heal()
        await swarm.until(lambda: everybody_sees_everybody(swarm), within_s=120)
        told["revoked"], told["away"] = await revocation(swarm, revoked=450, away=200)
        return told

    ten = run_swarm(memory_folder / "small", small, count=SMALL)
    told = run_swarm(memory_folder / "large", large, count=LARGE, settle_s=30)

    assert ten <= REST_BYTES_MAX
    assert told["rest"] <= 1.5 * REST_BYTES_MAX
    assert told["change"] <= CHANGE_S_MAX
    assert max(told["crash"], told["freeze"], told["partition"]) <= DEATH_S_MAX
    assert max(told["revoked"], told["away"]) <= DEATH_S_MAX


def test_news_arrives_also_where_one_segment_in_ten_is_lost(memory_folder: Path) -> None:
    """Method: three members announce, one after the other."""

    async def scenario(swarm: LargeSwarm) -> list[float]:
        return [await change(swarm, number, share=0.99) for number in range(5, 35, 10)]

    link = Link(latency_s=LATENCY_S, loss=0.1)
    took = run_swarm(memory_folder, scenario, count=MIDDLE, link=link)

    assert max(took) <= CHANGE_S_MAX


def test_no_ghost_survives_a_cut_through_the_middle_and_its_healing(memory_folder: Path) -> None:
    """Goal: each side forgets the other, and whoever died meanwhile stays dead.

    Method: two halves for five minutes; a member of one crashes in that time.
    """

    async def scenario(swarm: LargeSwarm) -> None:
        one, two = swarm.members[::2], swarm.members[1::2]
        ghost = two[7]
        swarm.world.partition([member.ip for member in one], [member.ip for member in two])
        cut_s = await swarm.until(
            lambda: (
                not any(swarm.seeing(member.peer, one) for member in two)
                and not any(swarm.seeing(member.peer, two) for member in one)
            ),
            within_s=60,
        )
        assert cut_s <= DEATH_S_MAX
        swarm.crash(ghost)
        await trio.sleep(300)

        swarm.world.heal()
        await swarm.until(lambda: everybody_sees_everybody(swarm), within_s=120)
        await trio.sleep(120)

        assert everybody_sees_everybody(swarm)
        assert not swarm.seeing(ghost.peer)

    run_swarm(memory_folder, scenario, count=MIDDLE)


def test_a_liar_cannot_evict_anybody(memory_folder: Path) -> None:
    """Goal: whoever is accused and lives stays in every view.

    Method: a member accuses everybody else, again and again, of the numbers it sees and of later
    ones; each member looks at the views of all.
    """

    async def scenario(swarm: LargeSwarm) -> tuple[int, int]:
        liar = swarm.members[5]
        gossip = liar.discovery._gossip
        (network_id,) = liar.running.membership.own_memberships()
        missing = accused = 0
        for _ in range(4):
            for record in list(gossip.table.announced()):
                if record.peer == liar.peer:
                    continue
                sealed = seal_statement(
                    liar.running.host.identity,
                    network_id=network_id,
                    accused=record.peer,
                    seq=record.announcement.seq + accused % 2 * 1000,
                    wall_s=wall_time(),
                )
                for link in gossip.links.values():
                    link.say(Records(statements=(sealed,)))
                accused += 1
            for _ in range(100):
                await trio.sleep(0.1)
                missing += sum(len(member.sees()) < MIDDLE - 1 for member in others(swarm, liar))
        return missing, accused

    missing, accused = run_swarm(memory_folder, scenario, count=MIDDLE)

    assert accused > 4 * ACCUSATIONS_MAX
    assert missing == 0


def test_a_node_keeps_few_connections_and_reaches_every_member(memory_folder: Path) -> None:
    """Method: of forty, one connects to each that is no neighbour of it, and lets go again."""

    async def scenario(swarm: LargeSwarm) -> tuple[list[int], int]:
        counts = [len(member.discovery._gossip.links) for member in swarm.running]
        asking = swarm.members[30]
        for member in others(swarm, asking):
            await asking.discovery.connect(member.peer)
            assert asking.running.membership.is_member(member.peer)
        await trio.sleep(60)
        return counts, len(asking.discovery._gossip.links)

    counts, after = run_swarm(memory_folder, scenario, count=MIDDLE)

    assert min(counts) >= NEIGHBOURS_MIN
    assert max(counts) <= NEIGHBOURS_MAX
    assert after <= NEIGHBOURS_MAX


def test_who_leaves_is_gone_at_once(memory_folder: Path) -> None:
    async def scenario(swarm: LargeSwarm) -> float:
        leaver = swarm.members[11]
        await leaver.discovery.leave()
        leaver.scope.cancel()
        return await death(swarm, [leaver])

    assert run_swarm(memory_folder, scenario, count=MIDDLE) <= 2 * CHECK_INTERVAL_S


def test_a_revoked_member_and_whom_it_invited_are_out_everywhere(memory_folder: Path) -> None:
    """Goal: within 20 s, also at nodes that were away, and nobody admits them again.

    Method: member 1, which invited member 33, is revoked while member 20 is down; after that 20 is
    back, and the two try to return for a minute.
    """

    async def scenario(swarm: LargeSwarm) -> tuple[float, float]:
        founder, revoked, guest, away = (swarm.members[number] for number in (0, 1, 33, 20))
        (network_id,) = founder.running.membership.own_memberships()
        proof = revoked.running.membership._book.issue(network_id, guest.peer, can_invite=False)
        membership = verify_membership(proof, wall_s=wall_time())
        assert membership.issuer == revoked.peer
        guest.running.membership._book.store(membership)
        guest.scope.cancel()
        await swarm.until(lambda: guest.node is None, within_s=1)
        await swarm.start(guest)
        await swarm.until(lambda: everybody_sees_everybody(swarm), within_s=30)
        away.scope.cancel()
        await swarm.until(lambda: away.node is None, within_s=1)
        await trio.sleep(DEATH_S_MAX)

        announced = founder.discovery.memberships(revoked.peer)
        assert founder.running.membership.revoke(revoked.peer, announced=announced)
        outcasts = [revoked, guest]

        def is_out() -> bool:
            return not any(
                swarm.seeing(outcast.peer, others(swarm, *outcasts))
                or any(
                    member.running.membership.is_member(outcast.peer)
                    for member in others(swarm, *outcasts)
                )
                for outcast in outcasts
            )

        out_s = await swarm.until(is_out, within_s=60)
        await swarm.start(away)
        back_s = await swarm.until(
            lambda: (
                len(away.sees()) >= MIDDLE - 4
                and not swarm.seeing(revoked.peer, [away])
                and away.running.membership.revocations() != []
            ),
            within_s=60,
        )
        for _ in range(60):
            await trio.sleep(1)
            assert is_out()
        return out_s, back_s

    out_s, back_s = run_swarm(memory_folder, scenario, count=MIDDLE)

    assert max(out_s, back_s) <= DEATH_S_MAX


def test_announcements_are_repeated_before_they_end() -> None:
    assert ANNOUNCE_INTERVAL_S + ANNOUNCE_JITTER_S < 3600 - 240


def parts_of_the_tree(swarm: LargeSwarm) -> list[set[PeerId]]:
    """Return the members by the parts that news gets round in without the lazy way."""
    links = {member.peer: member.discovery._gossip.links for member in swarm.running}
    left, parts = set(links), []
    while left:
        part, found = set[PeerId](), {min(left)}
        while found:
            peer = found.pop()
            part.add(peer)
            found |= {other for other, link in links[peer].items() if link.is_eager} - part
        left -= part
        parts.append(part)
    return parts


def test_who_starts_at_once_makes_one_tree_and_mends_it_where_members_die(
    memory_folder: Path,
) -> None:
    """Goal: news goes round along the tree alone, which is not much more than a tree."""

    async def scenario(swarm: LargeSwarm) -> tuple[list[int], list[int], float]:
        begun = [len(part) for part in parts_of_the_tree(swarm)]
        for number in range(10, 30, 4):
            swarm.crash(swarm.members[number])
        await trio.sleep(60)
        left = [len(part) for part in parts_of_the_tree(swarm)]
        for number in (5, 6, 7):
            await change(swarm, number, share=1.0)
        links = [link for item in swarm.running for link in item.discovery._gossip.links.values()]
        return begun, left, sum(link.is_eager for link in links) / len(swarm.running)

    begun, left, degree = run_swarm(memory_folder, scenario, count=MIDDLE, settle_s=30)
    assert begun == [MIDDLE]
    assert left == [MIDDLE - 5]
    assert degree < 4  # 2 is a tree
