"""Slow peers: every read has a deadline, whatever the protocol and wherever the peer stops.

On virtual time, over the same bytes as on a socket. `tests/net/test_bad_input.py` covers a stranger
that stops in the handshake; here is the other role, and everything behind it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from hostile.attackers import (
    SYN,
    WINDOW,
    Attacker,
    End,
    Simulated,
    Wire,
    agree_on_noise,
    attacking,
    frame,
    handshake_of,
    identity,
)
from hostile.members import redeem, show
from small_nodes import SmallNode, machine, small_node

from swarmpy import config
from swarmpy.abc import Address
from swarmpy.errors import DialFailed
from swarmpy.net.messages import FRAME_BYTES_PER_S_MIN, FRAME_TIMEOUT_S
from swarmpy.net.peer_info import PING_IDLE_S, TIMEOUT_S
from swarmpy.net.stream import LINGER_S
from swarmpy.pipeline.engines import Engines
from swarmpy.pipeline.stage import FIRST_TIMEOUT_S, StageService
from swarmpy.proto import announce, invite, membership, pipeline, wire
from swarmpy.proto.multistream import HEADER, encode_line
from swarmpy.proto.yamux import INITIAL_WINDOW_BYTES
from swarmpy.testing.network import SimNetwork
from swarmpy.trust.exchange import CONVERSATION_TIMEOUT_S

PUSH = "/ipfs/id/push/1.0.0"
PING = "/ipfs/ping/1.0.0"
BEGUN_S = FRAME_TIMEOUT_S + 4096 / FRAME_BYTES_PER_S_MIN

SILENT = {
    "": config.STREAM_NEGOTIATION_TIMEOUT_S,
    "/ipfs/id/1.0.0": LINGER_S,
    PUSH: TIMEOUT_S + LINGER_S,
    PING: PING_IDLE_S + LINGER_S,
    membership.PROTOCOL: CONVERSATION_TIMEOUT_S,
    invite.PROTOCOL: CONVERSATION_TIMEOUT_S,
    pipeline.PROTOCOL: FIRST_TIMEOUT_S,
}
"""Seconds after which the node gives up a stream on which nothing comes, by protocol; "" before one
was proposed. Announcements may be hours apart."""

BEGUN = {
    PUSH: TIMEOUT_S + LINGER_S,
    membership.PROTOCOL: CONVERSATION_TIMEOUT_S,
    invite.PROTOCOL: CONVERSATION_TIMEOUT_S,
    announce.PROTOCOL: BEGUN_S,
    pipeline.PROTOCOL: FIRST_TIMEOUT_S,
}
"""Seconds after which it gives up a stream on which a frame has begun and drips in."""


@dataclass
class Scene:
    """A node, and an attacker that it takes for a member."""

    world: SimNetwork
    node: SmallNode
    mallory: Attacker

    async def given_up_s(self, stream_id: int) -> float:
        """Return how long it takes the node to give a stream up."""
        start_s = trio.current_time()
        with trio.fail_after(200):
            await self.mallory.wait_reset(stream_id)  # or the connection's end
        return trio.current_time() - start_s


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    """A node that serves every protocol, in a simulated network."""
    world = SimNetwork()
    async with small_node("node", machine(world, 1), tmp_path, with_discovery=True) as node:
        StageService(node.host, Engines([]), memory_bytes_max=0, find_model=lambda _: None)
        node.membership.create_network()
        code = (await node.membership.create_invite()).code
        byte_stream = await machine(world, 2).dial(node.host.addresses[0])
        async with attacking(Wire(Simulated(byte_stream))) as mallory:
            await show(mallory, await redeem(mallory, code))
            yield Scene(world, node, mallory)


async def test_every_protocol_has_a_deadline(scene: Scene, autojump_clock: object) -> None:
    """A protocol that is added later must be added here."""
    served = set(scene.node.host._router.protocols)
    assert served == {*SILENT, *BEGUN} - {""}


async def test_streams_on_which_nothing_comes_are_given_up(
    scene: Scene, autojump_clock: object
) -> None:
    """One of each protocol, all at once; the connection lives on."""
    given_up_s: dict[str, float] = {}

    async def open_and_wait(protocol: str) -> None:
        if protocol:
            stream_id = await scene.mallory.open(protocol)
        else:
            stream_id = scene.mallory.next_id()
            await scene.mallory.secure.send(frame(WINDOW, SYN, stream_id, 0))
        given_up_s[protocol] = await scene.given_up_s(stream_id)

    async with trio.open_nursery() as nursery:
        for protocol in SILENT:
            nursery.start_soon(open_and_wait, protocol)
    assert not scene.mallory.is_over
    late = {key: value for key, value in given_up_s.items() if value > SILENT[key] + 0.1}
    assert late == {}


@pytest.mark.parametrize("protocol", BEGUN)
async def test_a_frame_that_drips_in_is_given_up(
    scene: Scene, autojump_clock: object, protocol: str
) -> None:
    """A byte every three seconds keeps no deadline off."""
    stream_id = await scene.mallory.open(protocol, wire.encode_varint(4000))

    async def drip() -> None:
        with suppress(End):
            while True:
                await trio.sleep(3)
                await scene.mallory.send(stream_id, b"\x00")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        assert await scene.given_up_s(stream_id) <= BEGUN[protocol] + 0.1
        nursery.cancel_scope.cancel()


async def test_a_proposal_that_drips_in_is_given_up(scene: Scene, autojump_clock: object) -> None:
    """Multistream has ten seconds for all of it, not for each byte."""
    stream_id = scene.mallory.next_id()
    await scene.mallory.secure.send(frame(WINDOW, SYN, stream_id, 0))

    async def drip() -> None:
        for byte in encode_line(HEADER):
            await trio.sleep(3)
            await scene.mallory.send(stream_id, bytes([byte]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        given_up_s = await scene.given_up_s(stream_id)
        nursery.cancel_scope.cancel()
    assert given_up_s <= config.STREAM_NEGOTIATION_TIMEOUT_S + 0.1


async def test_pongs_nobody_reads_are_given_up(scene: Scene, autojump_clock: object) -> None:
    """Who asks and asks on a stream and grants no window holds it no longer than a silent one."""
    stream_id = await scene.mallory.open(PING)
    for _ in range(3):  # more than the node may send back
        await scene.mallory.send(stream_id, bytes(INITIAL_WINDOW_BYTES // 2 - 64))
        await scene.mallory.settle()
    assert await scene.given_up_s(stream_id) <= PING_IDLE_S + LINGER_S + 0.1


# Whom the node dials ---------------------------------------------------------------------------


async def stops_at_once(wire: Wire) -> None:
    """Accept, and say nothing."""


async def stops_after_multistream(wire: Wire) -> None:
    """Agree on Noise, and say nothing more."""
    await agree_on_noise(wire, is_initiator=False)


async def stops_inside_its_message(wire: Wire) -> None:
    """Send half of the second handshake message."""
    await agree_on_noise(wire, is_initiator=False)
    answer = handshake_of("mallory", is_initiator=False).receive(await wire.receive_message())
    assert answer is not None
    await wire.send(len(answer).to_bytes(2, "big") + answer[:50])


@pytest.mark.parametrize("stop", [stops_at_once, stops_after_multistream, stops_inside_its_message])
async def test_a_dialled_peer_that_stops_is_a_failed_dial(
    scene: Scene, autojump_clock: object, stop: Callable[[Wire], Awaitable[None]]
) -> None:
    listener = await machine(scene.world, 3).listen(Address("/ip4/0.0.0.0/tcp/4001"))

    async def serve() -> None:
        wire = Wire(Simulated(await listener.accept()))
        await stop(wire)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        start_s = trio.current_time()
        with pytest.raises(DialFailed, match="no handshake"):
            await scene.node.host.dial(
                identity("mallory 2").peer_id, [Address("/ip4/10.0.0.3/tcp/4001")]
            )
        assert trio.current_time() - start_s <= config.HANDSHAKE_TIMEOUT_S + 0.1
