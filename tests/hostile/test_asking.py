"""Peers that ask too much: what costs signatures is counted by the minute."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing
from hostile.attackers import FIN, Attacker, Simulated, Wire, attacking
from small_nodes import machine, small_node

from swarmpy.proto import invite, membership, wire
from swarmpy.testing.network import SimNetwork
from swarmpy.trust.attempts import CONVERSATIONS_MAX, WINDOW_S

HELLO = wire.frame(wire.encode(membership.Hello(tags=())))
REDEEM = wire.frame(wire.encode(invite.Redeem(invite=b"")))


async def ask(peer: Attacker, count: int) -> None:
    """Begin conversations, of either kind in turn."""
    for number in range(count):
        if number % 2:
            stream_id = await peer.open(membership.PROTOCOL, HELLO, flags=FIN)
        else:
            stream_id = await peer.open(invite.PROTOCOL, REDEEM, flags=FIN)
        await peer.wait_ended(stream_id)


@pytest.mark.parametrize("beyond", [-1, 0, 1], ids=["below", "at", "beyond"])
async def test_conversations_of_a_peer_in_a_minute(
    tmp_path: Path, autojump_clock: object, beyond: int
) -> None:
    """A stranger's, too: it may ask for what takes a dozen signatures, and again and again."""
    world = SimNetwork()
    async with small_node("node", machine(world, 1), tmp_path) as node:
        node.membership.create_network()
        byte_stream = await machine(world, 2).dial(node.host.addresses[0])
        async with attacking(Wire(Simulated(byte_stream))) as peer:
            await ask(peer, CONVERSATIONS_MAX + beyond)
            await peer.settle()
            assert peer.is_over == (beyond > 0)


async def test_a_minute_later_a_peer_may_ask_again(tmp_path: Path, autojump_clock: object) -> None:
    """Meanwhile it is a stranger for longer than strangers may stay, so it comes anew."""
    world = SimNetwork()
    async with small_node("node", machine(world, 1), tmp_path) as node:
        node.membership.create_network()
        for _ in range(2):
            byte_stream = await machine(world, 2).dial(node.host.addresses[0])
            async with attacking(Wire(Simulated(byte_stream))) as peer:
                await ask(peer, CONVERSATIONS_MAX)
                await peer.settle()
                assert not peer.is_over
            await trio.sleep(WINDOW_S)
