"""The bounds people notice, over real sockets on loopback."""

from __future__ import annotations

from pathlib import Path

import trio
from small_nodes import Clock, SmallNode, small_node, until

from swarmpy.net.tcp import TcpNetwork

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


async def join(joiner: SmallNode, issuer: SmallNode) -> float:
    """Join and return the seconds it took."""
    code = (await issuer.membership.create_invite()).code
    start_s = trio.current_time()
    await joiner.membership.redeem(code)
    return trio.current_time() - start_s


async def test_three_nodes_join_and_find_each_other_in_less_than_two_seconds(
    tmp_path: Path,
) -> None:
    clock = Clock()
    async with (
        small_node(
            "ann", TcpNetwork(), tmp_path / "a", listen=LOOPBACK, clock=clock, with_discovery=True
        ) as ann,
        small_node(
            "bob", TcpNetwork(), tmp_path / "b", listen=LOOPBACK, clock=clock, with_discovery=True
        ) as bob,
        small_node(
            "cid", TcpNetwork(), tmp_path / "c", listen=LOOPBACK, clock=clock, with_discovery=True
        ) as cid,
    ):
        ann.membership.create_network()

        assert await join(bob, ann) < 2.0
        assert await join(cid, ann) < 2.0
        nodes = (ann, bob, cid)
        await until(lambda: all(len(node.membership.members()) == 2 for node in nodes), within_s=2)


async def test_a_restarted_node_is_reconnected_from_its_cache_within_a_second(
    tmp_path: Path,
) -> None:
    """The restarted node listens elsewhere: it is its own cache that brings it back."""
    clock = Clock()
    async with small_node(
        "ann", TcpNetwork(), tmp_path / "a", listen=LOOPBACK, clock=clock, with_discovery=True
    ) as ann:
        ann.membership.create_network()
        async with small_node(
            "bob", TcpNetwork(), tmp_path / "b", listen=LOOPBACK, clock=clock, with_discovery=True
        ) as bob:
            await join(bob, ann)
        await until(lambda: not ann.membership.members())

        async with small_node(
            "bob", TcpNetwork(), tmp_path / "b", listen=LOOPBACK, clock=clock, with_discovery=True
        ) as bob:
            await until(lambda: ann.membership.is_member(bob.peer), within_s=1.0)
            await until(lambda: bob.membership.is_member(ann.peer), within_s=1.0)
