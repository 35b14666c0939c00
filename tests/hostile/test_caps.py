"""Every bound of `config.py`, and where it is tested at one below, at it and one beyond.

Who adds a bound is told here that it has no test.
"""

from __future__ import annotations

import ast
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import swarms
import trio
import trio.testing
from hostile.attackers import (
    ACK,
    DATA,
    PING,
    RST,
    SYN,
    WINDOW,
    Attacker,
    Simulated,
    Wire,
    agree_on_noise,
    attacker,
    attacking,
    dial,
    frame,
    handshake_of,
    identity,
    shake,
)
from hostile.members import coordinate, member, obtain_pass, open_session, receive_message
from hostile.victim import ECHO, HOLD, echo
from small_nodes import machine, small_node

from swarmpy import config
from swarmpy.abc import Address, WallSeconds
from swarmpy.discovery.cache import PeerCache
from swarmpy.errors import DialFailed, MembershipError
from swarmpy.net.handshakes import Handshakes
from swarmpy.net.host import NativeHost
from swarmpy.node import Node
from swarmpy.pipeline.stage_session import StageSession
from swarmpy.proto import pipeline, wire
from swarmpy.proto.multistream import Dialer
from swarmpy.testing.network import Link, SimNetwork

TESTS = Path(__file__).parent.parent

TESTED = {
    "CONNECTIONS_MAX": "net/test_admission.py",
    "HANDSHAKES_MAX": "hostile/test_caps.py",
    "HANDSHAKES_PER_SUBNET_MAX": "hostile/test_caps.py",
    "HANDSHAKES_PER_SITE_MAX": "net/test_handshakes.py",
    "HANDSHAKES_PER_SECOND_MAX": "net/test_handshakes.py",
    "HANDSHAKES_BURST_MAX": "net/test_handshakes.py",
    "HANDSHAKE_TIMEOUT_S": "hostile/test_caps.py",
    "INBOUND_STREAMS_MAX": "hostile/test_caps.py",
    "STREAM_WINDOW_BYTES": "hostile/test_caps.py",
    "RESETS_PER_SECOND_MAX": "hostile/test_caps.py",
    "KEEPALIVE_INTERVAL_S": "hostile/test_caps.py",
    "KEEPALIVE_TIMEOUT_S": "hostile/test_caps.py",
    "STREAM_NEGOTIATION_TIMEOUT_S": "hostile/test_caps.py",
    "CONNECTIONS_PER_PEER_MAX": "hostile/test_caps.py",
    "CONNECTION_AGE_S_MAX": "net/test_paths.py",
    "DIALS_MAX": "net/test_dialing.py",
    "DIAL_TIMEOUT_S": "hostile/test_caps.py",
    "DIAL_STAGGER_S": "hostile/test_caps.py",
    "DIAL_ADDRESSES_MAX": "net/test_paths.py",
    "PEER_CACHE_MAX": "hostile/test_caps.py",
    "RECORDS_MAX": "discovery/test_records.py",
    "INVITE_TTL_S": "hostile/test_caps.py",
    "PREFILL_CHUNK": "hostile/test_caps.py",
    "STEPS_IN_FLIGHT_MAX": "hostile/test_caps.py",
    "SESSION_LEASE_S": "pipeline/test_stage.py",
    "SESSIONS_MAX": "hostile/test_caps.py",
    "STAGES_MAX": "hostile/test_caps.py",
}
"""Bounds of `config.py` and the file whose tests name them."""


def bounds() -> list[str]:
    """Return the numbers that `config.py` defines."""
    return [
        name
        for name, value in vars(config).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, (int, float))
    ]


def test_every_bound_has_a_test() -> None:
    assert sorted(bounds()) == sorted(TESTED)


@pytest.mark.parametrize("bound", TESTED)
def test_a_bounds_test_names_it(bound: str) -> None:
    """In the code of the file, not in a comment or a table."""
    tree = ast.parse((TESTS / TESTED[bound]).read_text("utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {
        argument.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "monkeypatch.setattr"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }
    assert bound in names


# Connections, on a real socket -------------------------------------------------------------

AROUND = pytest.mark.parametrize("beyond", [-1, 0, 1], ids=["below", "at", "beyond"])


@AROUND
async def test_streams_of_one_peer(host: NativeHost, beyond: int) -> None:
    async with attacker(host.addresses[0]) as peer:
        count = config.INBOUND_STREAMS_MAX + beyond
        for _ in range(count):
            await peer.open(HOLD)
        await peer.settle()
        refused = [stream_id for stream_id, flags in peer.flags.items() if flags & RST]
        assert len(refused) == max(0, beyond)
        assert not peer.is_over


@AROUND
async def test_streams_refused_in_a_second(host: NativeHost, beyond: int) -> None:
    async with attacker(host.addresses[0]) as peer:
        count = config.INBOUND_STREAMS_MAX + config.RESETS_PER_SECOND_MAX + beyond
        opened = b"".join(frame(WINDOW, SYN, peer.next_id(), 0) for _ in range(count))
        await peer.secure.send(opened)
        await peer.settle()
        assert peer.is_over == (beyond > 0)


@AROUND
async def test_bytes_of_a_stream_that_nobody_reads(host: NativeHost, beyond: int) -> None:
    async with attacker(host.addresses[0]) as peer:
        stream_id = await peer.open(HOLD)
        left = config.STREAM_WINDOW_BYTES - len(Dialer([HOLD]).start()) + beyond
        while left > 0:
            size = min(left, 60_000)
            await peer.secure.send(frame(DATA, 0, stream_id, size, bytes(size)))
            left -= size
        await peer.settle()
        assert peer.is_over == (beyond > 0)


@AROUND
async def test_connections_of_one_peer(host: NativeHost, beyond: int) -> None:
    async with AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(attacker(host.addresses[0]))
            for _ in range(config.CONNECTIONS_PER_PEER_MAX + beyond)
        ]
        await peers[-1].settle()
        assert [peer.is_over for peer in peers].count(True) == max(0, beyond)
        assert len(host.connections) == len(peers) - max(0, beyond)


@AROUND
async def test_handshakes_under_way_from_one_place(host: NativeHost, beyond: int) -> None:
    wires = [
        await dial(host.addresses[0]) for _ in range(config.HANDSHAKES_PER_SUBNET_MAX + beyond)
    ]
    ended = 0
    for wire_ in wires:
        with trio.move_on_after(0.02):
            await wire_.wait_end()
            ended += 1
    for wire_ in wires:
        wire_.close()
    assert ended == max(0, beyond)


@AROUND
async def test_handshakes_under_way_in_all(beyond: int) -> None:
    handshakes = Handshakes()
    dropped: list[int] = []

    async def hold(
        number: int, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with handshakes.admit(Address(f"/ip4/10.0.0.{number}/tcp/1")):
            task_status.started()
            await trio.sleep_forever()
        dropped.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(config.HANDSHAKES_MAX + beyond):
            await nursery.start(hold, number)
        await trio.testing.wait_all_tasks_blocked()
        assert dropped == [0][: max(0, beyond)]
        nursery.cancel_scope.cancel()


# Connections, in time ------------------------------------------------------------------------


class Lab:
    """A host in a simulated network, and strangers at its door."""

    def __init__(self, world: SimNetwork, host: NativeHost) -> None:
        self.world = world
        self.host = host

    async def wire(self) -> Wire:
        """Connect a stranger."""
        return Wire(Simulated(await machine(self.world, 2).dial(self.host.addresses[0])))


@pytest.fixture
async def lab(nursery: trio.Nursery) -> Lab:
    """A host that echoes."""
    world = SimNetwork()
    host = NativeHost(identity("host"), machine(world, 1), random=random.Random(1))
    host.set_handler(ECHO, echo)
    await nursery.start(host.run)
    await host.listen(Address("/ip4/0.0.0.0/tcp/4001"))
    return Lab(world, host)


AROUND_S = pytest.mark.parametrize("beyond_s", [-0.1, 0.1], ids=["within", "beyond"])


@AROUND_S
async def test_time_of_a_handshake(lab: Lab, autojump_clock: object, beyond_s: float) -> None:
    wire_ = await lab.wire()
    handshake = handshake_of("slow")
    await agree_on_noise(wire_)
    await trio.sleep(config.HANDSHAKE_TIMEOUT_S + beyond_s)
    if beyond_s > 0:
        await wire_.wait_end()
        assert trio.current_time() == pytest.approx(config.HANDSHAKE_TIMEOUT_S + beyond_s)
    else:
        await shake(wire_, handshake)
        await trio.testing.wait_all_tasks_blocked()
        assert len(lab.host.connections) == 1


@AROUND_S
async def test_time_to_propose_a_protocol(
    lab: Lab, autojump_clock: object, beyond_s: float
) -> None:
    async with attacking(await lab.wire()) as peer:
        stream_id = peer.next_id()
        await peer.secure.send(frame(WINDOW, SYN, stream_id, 0))
        await trio.sleep(config.STREAM_NEGOTIATION_TIMEOUT_S + beyond_s)
        await peer.send(stream_id, Dialer([ECHO]).start() + b"hello")
        await peer.settle()
        await trio.testing.wait_all_tasks_blocked()
        assert bool(peer.flags.get(stream_id, 0) & RST) == (beyond_s > 0)
        assert peer.content(stream_id) == (b"" if beyond_s > 0 else b"hello")


@AROUND_S
async def test_time_of_silence(lab: Lab, autojump_clock: object, beyond_s: float) -> None:
    """Any byte counts as life: here a ping's answer that nobody asked for."""
    async with attacking(await lab.wire()) as peer:
        peer.answers_pings = False
        await peer.settle()
        await trio.sleep(config.KEEPALIVE_TIMEOUT_S + beyond_s)
        assert peer.is_over == (beyond_s > 0)
        if not peer.is_over:
            await peer.secure.send(frame(PING, ACK, 0, 2**32 - 1))
            await trio.sleep(config.KEEPALIVE_TIMEOUT_S + beyond_s)
            assert not peer.is_over


async def test_time_between_pings(lab: Lab, autojump_clock: object) -> None:
    async with attacking(await lab.wire()) as peer:
        await trio.sleep(20 * config.KEEPALIVE_INTERVAL_S + 0.1)
        assert 20 <= peer.pings <= 21


@AROUND_S
async def test_time_of_a_dial(lab: Lab, autojump_clock: object, beyond_s: float) -> None:
    far = NativeHost(identity("far"), machine(lab.world, 3), random=random.Random(3))
    link = Link(latency_s=(config.DIAL_TIMEOUT_S + beyond_s) / 2)
    async with trio.open_nursery() as nursery:
        await nursery.start(far.run)
        await far.listen(Address("/ip4/0.0.0.0/tcp/4001"))
        for ends in (("10.0.0.1", "10.0.0.3"), ("10.0.0.3", "10.0.0.1")):
            lab.world.set_link(*ends, link)
        if beyond_s > 0:
            with pytest.raises(DialFailed, match="did not answer within"):
                await lab.host.dial(far.identity.peer_id, far.addresses)
        else:
            assert await lab.host.dial(far.identity.peer_id, far.addresses)
        nursery.cancel_scope.cancel()


async def test_head_start_of_an_address(lab: Lab, autojump_clock: object) -> None:
    """The second address is tried while the first one does not answer, and not before."""
    lab.world.set_link("10.0.0.1", "10.0.0.9", Link(latency_s=3600.0))
    far = NativeHost(identity("far"), machine(lab.world, 3), random=random.Random(3))
    async with trio.open_nursery() as nursery:
        await nursery.start(far.run)
        await far.listen(Address("/ip4/0.0.0.0/tcp/4001"))
        addresses = [Address("/ip4/10.0.0.9/tcp/4001"), *far.addresses]
        await lab.host.dial(far.identity.peer_id, addresses)
        assert trio.current_time() == pytest.approx(config.DIAL_STAGGER_S)
        nursery.cancel_scope.cancel()


# Discovery and membership ---------------------------------------------------------------------


@AROUND
def test_peers_in_the_cache(tmp_path: Path, beyond: int) -> None:
    cache = PeerCache(tmp_path / "peers.db")
    try:
        for number in range(config.PEER_CACHE_MAX + beyond):
            cache.put(
                identity(f"peer {number}").peer_id,
                name="",
                proven=[Address("/ip4/192.0.2.1/tcp/1")],
                claimed=[],
                wall_s=WallSeconds(1000.0 + number),
            )
        assert len(cache.peers()) == config.PEER_CACHE_MAX + min(0, beyond)
    finally:
        cache.close()


@AROUND
async def test_life_of_an_invite(tmp_path: Path, beyond: int) -> None:
    async with small_node("issuer", machine(SimNetwork(), 1), tmp_path) as node:
        node.membership.create_network()
        ttl_s = config.INVITE_TTL_S + beyond
        if beyond > 0:
            with pytest.raises(MembershipError, match="lives"):
                await node.membership.create_invite(ttl_s=ttl_s)
        else:
            assert (await node.membership.create_invite(ttl_s=ttl_s)).code


# Pipeline, against a whole node ----------------------------------------------------------------


@dataclass
class Coordinator:
    """An attacker that coordinates a ring of one."""

    node: Node
    peer: Attacker
    control: int
    pipeline_id: bytes


@pytest.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[Coordinator]:
    """A node with a loaded model, under a member's command."""
    environment = swarms.environment(tmp_path, "node")
    async with Node.open(swarms.config("node", 2**50), environment) as node:
        await node.pull(str(swarms.MODEL.write(tmp_path / "echo")))
        shown = await obtain_pass(node)
        async with member(node, shown) as peer:
            pipeline_id = b"p" * 16
            model_id = node.catalog.list()[0].model_id
            control = await coordinate(
                peer, node, model_id, pipeline_id, slots=2 * config.SESSIONS_MAX
            )
            yield Coordinator(node, peer, control, pipeline_id)


def session_id(number: int) -> bytes:
    """Return the id of a session."""
    return number.to_bytes(16, "big")


async def test_sessions_of_a_stage(coordinator: Coordinator) -> None:
    peer, control, node = coordinator.peer, coordinator.control, coordinator.node
    with trio.fail_after(20):
        answers = [
            await open_session(peer, control, node, session_id(number))
            for number in range(config.SESSIONS_MAX + 1)
        ]
    opened = [isinstance(answer, pipeline.Opened) for answer in answers]
    assert opened == [True] * config.SESSIONS_MAX + [False]
    assert answers[-1].is_busy  # type: ignore[union-attr]


@AROUND
async def test_tokens_of_a_prefill_chunk(coordinator: Coordinator, beyond: int) -> None:
    peer, control, node = coordinator.peer, coordinator.control, coordinator.node
    await open_session(peer, control, node, session_id(1))
    count = config.PREFILL_CHUNK + beyond
    step = pipeline.TokenStep(
        session=session_id(1),
        epoch=1,
        step=0,
        position=0,
        count=count,
        want="nothing",
        tensors=(),
        engine_us=(),
        token_ids=bytes(4 * count),
    )
    edge = pipeline.Edge(pipeline=coordinator.pipeline_id, kind="bulk", session=session_id(1))
    sent = wire.frame(wire.encode(edge)) + wire.frame(pipeline.encode_step(step))
    stream_id = await peer.open(pipeline.PROTOCOL, sent)
    with trio.fail_after(10):
        if beyond > 0:
            failed = await receive_message(peer, control, pipeline.SessionFailed)
            assert f"at most {config.PREFILL_CHUNK}" in failed.message
        else:
            # The step is round: the coordinator gets a token frame without a token.
            tokens = await token_stream(peer)
            assert tokens not in (stream_id, control)
            assert node.stages.session_count == 1


async def token_stream(peer: Attacker) -> int:
    """Wait until the node opens a stream to the attacker for the ring's tokens."""

    def opened() -> list[int]:
        proposal = Dialer([pipeline.PROTOCOL]).start()
        return [key for key, data in peer.received.items() if proposal in data and not key % 2]

    await peer.wait(lambda: bool(opened()))
    return opened()[0]


@AROUND
def test_steps_that_are_remembered(beyond: int) -> None:
    """A step that comes twice is answered again as long as it may have been under way."""
    session = StageSession(
        id=b"s" * 16,
        epoch=1,
        audience=None,  # type: ignore[arg-type]
        slot=0,
        cleared=None,
        lease_s=60.0,
        lease_until=60.0,
        sampling=None,
        reply_position=0,
        max_tokens=0,
        stop_ids=frozenset(),
        history=None,
    )
    for step in range(config.STEPS_IN_FLIGHT_MAX + beyond):
        session.remember(step, b"answer", False)
    assert (session.answer(0) is None) == (beyond > 0)


@AROUND
async def test_stages_of_a_ring(coordinator: Coordinator, beyond: int) -> None:
    """A ring within the bound is looked at, and refused for its cuts; a longer one is no offer."""
    assert pipeline.STAGES_MAX == config.STAGES_MAX
    peer, node = coordinator.peer, coordinator.node
    count = config.STAGES_MAX + beyond
    others = [identity(f"stage {number}").peer_id for number in range(count - 1)]
    offer = pipeline.Offer(
        pipeline=b"q" * 16,
        model_id=node.catalog.list()[0].model_id,
        stage=0,
        ring=(node.peer_id, *others),
        cuts=tuple(range(count + 1)),
        slots=1,
        context=256,
        exact=True,
        received=(),
        sent=(),
        expected_bytes=0,
    )
    stream_id = await peer.open(pipeline.PROTOCOL, wire.frame(wire.encode(offer)))
    with trio.fail_after(10):
        if beyond > 0:
            await peer.wait_reset(stream_id)
            assert not peer.content(stream_id)
        else:
            refused = await receive_message(peer, stream_id, pipeline.Refused)
            assert "do not cover" in refused.message
