"""Scenarios that several tests of the simulator run: a swarm under faults that must heal."""

from __future__ import annotations

import trio

from swarmpy.abc import ProtocolId, Stream
from swarmpy.errors import MembershipError, NetworkError, SwarmError
from swarmpy.testing import Faults, SimNode, Simulation, views_agree
from swarmpy.testing.nodes import NodeSettings
from swarmpy.testing.paths import Link
from swarmpy.testing.runner import Plan

PIPELINE = ProtocolId("/swarmpy/pipeline/1")
SLOW = ProtocolId("/swarmpy-test/slow/1")
PROMPT = list(range(100))
LINK = Link(latency_s=0.01)


def plan(
    nodes: int,
    *,
    faults: Faults | None = None,
    host: str = "native",
    is_joined: bool = True,
    engine: str | None = None,
) -> Plan:
    """Return a plan to run by hand, seed by seed."""
    settings = NodeSettings(host="sim" if host == "sim" else "native", is_joined=is_joined)
    if engine is not None:
        settings = NodeSettings(host=settings.host, is_joined=is_joined, engine=engine)
    return Plan(
        nodes=nodes,
        seeds=1,
        link=LINK,
        faults=faults,
        settings=settings,
        time_max_s=900.0,
        is_checked=True,
    )


async def all_agree(sim: Simulation) -> None:
    """Wait until every node knows of all others, and that they have the model."""
    await sim.until(lambda: views_agree(sim), within_s=90, what="all nodes agree on who is there")
    await sim.until(
        lambda: all(map(knows_models, sim.up)), within_s=10, what="models are announced"
    )


def knows_models(node: SimNode) -> bool:
    """Whether a node knows that everybody it is connected to has a model."""
    return all(item.models for item in node.node.discovery.reachable())


async def ask_throughout_and_heal(sim: Simulation) -> None:
    """Ask for replies while faults happen; heal; ask once more, and get every token."""
    for _ in range(3):
        for node in sim.nodes:
            try:
                with trio.move_on_after(20):
                    await sim.reply(node, PROMPT, 10)
            except SwarmError:
                pass  # the reply, or its machine, was lost to a fault: tokens before it were right
        await trio.sleep(1)
    await sim.heal()
    await all_agree(sim)
    with sim.within(120, "a reply once healed"):
        assert len(await sim.reply(sim.nodes[0], PROMPT, 10)) == 10


async def race_for_an_invite(sim: Simulation) -> None:
    """All nodes but the first redeem one code for one machine, again and again."""
    code = (await sim.nodes[0].node.create_invite(uses=1)).code

    async def join(node: SimNode) -> None:
        for _ in range(5):
            try:
                await node.join(code)
                return
            except (MembershipError, NetworkError):
                await trio.sleep(sim.random.random())

    async with trio.open_nursery() as nursery:
        for node in sim.nodes[1:]:
            nursery.start_soon(join, node)


async def knock_as_a_stranger(sim: Simulation) -> None:
    """Every node asks every other for what members alone may ask; none of them is one."""
    for near in sim.nodes:
        for far in sim.nodes:
            if near is not far:
                await near.node.host.dial(far.peer, [far.address])
                stream = await near.node.host.open_stream(far.peer, [PIPELINE])
                await stream.send_all(b"anything")
                await trio.sleep(1)
                stream.reset()


async def push_to_a_slow_reader(sim: Simulation) -> None:
    """One member sends 8 MiB to another that does not read for a minute."""
    near, far = sim.nodes[0], sim.nodes[1]
    await sim.until(lambda: views_agree(sim), within_s=90)
    far.node.host.set_handler(SLOW, read_after_a_minute)
    stream = await near.node.host.open_stream(far.peer, [SLOW])
    with sim.within(120, "all bytes are taken in the end"):
        await stream.send_all(bytes(8 * 1024 * 1024))
        await stream.close_write()
        assert await stream.receive_some() == b"done"


async def read_after_a_minute(stream: Stream) -> None:
    await trio.sleep(60)
    while await stream.receive_some():
        pass
    await stream.send_all(b"done")


async def announce_all_the_time(sim: Simulation) -> None:
    """Every node has something new to say each second, over paths that delay and break."""
    for second in range(30):
        for node in sim.up:
            node.node.discovery.announce(speed_bytes_s=float(second + 1))
        await trio.sleep(1)
    await sim.heal()
    await sim.until(lambda: views_agree(sim), within_s=90, what="all nodes agree on what is newest")
