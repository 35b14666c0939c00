"""No bytes on any protocol end a node, and none reach a handler as anything but a breach.

Goal: whatever a stranger or a member sends on a stream costs the stream or the connection. Method:
a whole node on a real socket, and a peer that sends garbage with and without structure on each
protocol the node serves.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import swarms
import trio
from hostile.attackers import (
    DATA,
    FIN,
    RST,
    SYN,
    WINDOW,
    Attacker,
    End,
    Wire,
    agree_on_noise,
    attacker,
    dial,
    frame,
    identity,
    listener,
    secure,
)
from hostile.garbage import message, mutated, structured, unstructured
from hostile.keys import identity_keys
from hostile.members import Pass, coordinate, member, obtain_pass, open_session

from swarmpy.node import Node
from swarmpy.proto import (
    announce,
    envelope,
    identify,
    invite,
    membership,
    noise,
    ping,
    pipeline,
    revocation,
    swim,
    wire,
)
from swarmpy.proto.identify import IdentifyInfo
from swarmpy.proto.multistream import HEADER, encode_line

OPEN = ("/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0")
UNPROPOSED = "no protocol"
"""Stands for the bytes in which one would be proposed."""
MESSAGES: Mapping[str, Any] = {
    membership.PROTOCOL: membership.MembershipMessage,
    invite.PROTOCOL: invite.InviteMessage,
    announce.PROTOCOL: announce.Message,
    pipeline.PROTOCOL: pipeline.First | pipeline.Command,
}
"""What each protocol of ours says."""

PAYLOADS = 30
"""Random payloads of each kind and protocol, beside the fixed ones."""


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    """A whole node with an engine, a model and a network of its own."""
    monkeypatch.setattr("swarmpy.trust.membership.CONVERSATIONS_MAX", 100_000)
    environment = swarms.environment(tmp_path, "node")
    async with Node.open(swarms.config("node", swarms.WHOLE_BYTES), environment) as made:
        await made.pull(str(swarms.MODEL.write(tmp_path / "echo")))
        yield made


@pytest.fixture(autouse=True)
def no_surprises(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A handler that fails with anything but a protocol error is a fault, although contained."""
    with caplog.at_level(logging.WARNING, "swarmpy"):
        yield
    failed = [item for item in caplog.get_records("call") if item.levelno >= logging.ERROR]
    assert [(item.message, item.exc_info) for item in failed] == []


def payloads(protocol: str, shown: Pass, generator: random.Random) -> Iterator[bytes]:
    """Yield what is sent on the streams of a protocol."""
    yield from unstructured(generator, PAYLOADS)
    if protocol in MESSAGES:
        yield from structured(MESSAGES[protocol], generator, 2 * PAYLOADS)
    if protocol == "/ipfs/id/push/1.0.0":
        yield from identities(generator)
    if protocol == UNPROPOSED:
        yield from proposals(generator)
    if protocol == announce.PROTOCOL:
        yield from records(shown, generator)


def proposals(generator: random.Random) -> Iterator[bytes]:
    """Yield multistream's own lines, changed, doubled, endless and in the wrong order."""
    lines = [
        encode_line(text) for text in (HEADER, "ls", "na", "", OPEN[2], "/nobody/1", "a" * 999)
    ]
    for _ in range(2 * PAYLOADS):
        said = b"".join(generator.choices(lines, k=generator.randint(1, 40)))
        yield generator.choice([said, mutated(said, generator), lines[0] + said])


def records(shown: Pass, generator: random.Random) -> Iterator[bytes]:
    """Yield records with sound signatures of a member, which say what makes no sense, or half."""
    network = membership.key_hash_of(shown.network_id)
    true = {"network": network, "version": 1, "membership": shown.proof, "chain": shown.proof}
    true |= dict.fromkeys(("peer", "accused", "member"), identity("mallory").peer_id)
    for index in range(3 * PAYLOADS):
        kind = (announce.Announcement, swim.Statement, revocation.RevocationRecord)[index % 3]
        module = (announce, swim, revocation)[index % 3]
        said = message(kind, generator)
        half = {name: value for name, value in true.items() if generator.random() < 0.8}
        half["issued_wall_s"] = int(time.time()) - generator.choice([0, 10, 4000])
        said = msgspec.structs.replace(
            said, **{name: half[name] for name in half if name in kind.__struct_fields__}
        )
        sealed = envelope.seal(
            identity("mallory"),
            domain=module.DOMAIN,
            payload_type=module.PAYLOAD_TYPE,
            payload=wire.encode(said),
        )
        field = ("announcements", "statements", "revocations")[index % 3]
        yield wire.frame(wire.encode(announce.Records(**{field: (sealed,)})))


def identities(generator: random.Random) -> Iterator[bytes]:
    """Yield identify messages with any of their bytes changed."""
    own = identity("mallory")
    record = identify.seal_peer_record(own, ["/ip4/192.0.2.1/tcp/1"], seq=1)
    info = IdentifyInfo(
        agent="a\n\x1b[31m" * 20,
        protocols=("/a", "\u202e"),
        addresses=("/ip4/192.0.2.1/tcp/1",),
        observed_address="/ip4/192.0.2.2/tcp/2",
    )
    encoded = identify.encode(info, public_key=own.public_key, signed_record=record)
    for _ in range(PAYLOADS):
        yield wire.frame(mutated(encoded, generator))


async def still_serves(node: Node) -> None:
    """Check that the node answers an honest stranger."""
    async with attacker(node.host.addresses[0], "honest", source="127.0.0.3") as honest:
        ball = bytes(range(ping.PAYLOAD_BYTES))
        stream_id = await honest.open("/ipfs/ping/1.0.0", ball)
        with trio.fail_after(5):
            await honest.wait(lambda: honest.content(stream_id) == ball)
        assert honest.content(stream_id) == ball


async def pelt(peer: Attacker, protocol: str, data: bytes, generator: random.Random) -> None:
    """Send bytes on a stream of a protocol, and end it in one of several ways."""
    ending = generator.randrange(3)
    flags = FIN if ending == 0 else 0
    if protocol == UNPROPOSED:
        stream_id = peer.next_id()
        await peer.secure.send(frame(DATA, SYN | flags, stream_id, len(data), data))
    else:
        stream_id = await peer.open(protocol, data, flags=flags)
    if ending == 1:
        await peer.secure.send(frame(WINDOW, FIN, stream_id, 0))
    elif ending == 2:
        await peer.reset(stream_id)
    with trio.move_on_after(0.02):
        await peer.wait_ended(stream_id)


async def test_every_protocol_is_pelted(node: Node) -> None:
    """A protocol that is added later must be added here."""
    assert sorted([*OPEN, *MESSAGES]) == sorted(node.host._router.protocols)  # type: ignore[attr-defined]


@pytest.mark.parametrize("protocol", [UNPROPOSED, *OPEN, *MESSAGES])
async def test_no_bytes_on_a_protocol_end_the_node(node: Node, protocol: str) -> None:
    shown = await obtain_pass(node)
    generator = random.Random(protocol)
    waiting = list(payloads(protocol, shown, generator))
    with trio.fail_after(60):
        while waiting:
            with suppress(End):
                async with member(node, shown) as peer:
                    while waiting and not peer.is_over:
                        await pelt(peer, protocol, waiting.pop(), generator)
    await still_serves(node)


# Below and beside the streams -----------------------------------------------------------------


def headers(generator: random.Random) -> bytes:
    """Return Yamux frames with any kind, flags, stream and length."""
    return b"".join(
        frame(
            generator.choice([0, 1, 2, 3, 4, 255]),
            generator.choice([0, SYN, FIN, 4, 8, SYN | FIN, 15, 16, 0xFFFF]),
            generator.choice([0, 1, 1, 2, 3, 3, 5, 2**31, 2**32 - 1]),
            generator.choice([0, 0, 1, 12, 2**18, 2**18 + 1, 2**31, 2**32 - 1]),
            generator.randbytes(generator.choice([0, 0, 1, 12])),
        )
        for _ in range(generator.randint(1, 6))
    )


async def test_no_bytes_below_the_streams_end_the_node(node: Node) -> None:
    generator = random.Random("yamux")
    with trio.fail_after(60):
        for index in range(150):
            with suppress(End):
                async with attacker(node.host.addresses[0]) as peer:
                    for _ in range(4):
                        data = generator.randbytes(30) if index % 5 == 0 else headers(generator)
                        await peer.secure.send(data)
                        await trio.lowlevel.checkpoint()
    await still_serves(node)


async def shake_with(node: Node, payload: bytes, *, source: str) -> None:
    """Run a handshake whose last message carries any payload, and wait for the node's verdict."""
    connected = await dial(node.host.addresses[0], source=source)
    try:
        await agree_on_noise(connected)
        xx = noise.XX(is_initiator=True, static=b"\x11" * 32, ephemeral=b"\x22" * 32)
        await connected.send_message(xx.write(b""))
        xx.read(await connected.receive_message())
        await connected.send_message(xx.write(payload))
        with trio.fail_after(5):
            await connected.wait_end()
    finally:
        connected.close()


def handshake_payloads(generator: random.Random) -> Iterator[bytes]:
    """Yield what nobody can prove an identity with."""
    for key in identity_keys(generator):
        signature = generator.randbytes(generator.choice([0, 1, 63, 64, 70, 256, 1024]))
        yield noise.encode_payload(noise.Payload(key, signature, ("/yamux/1.0.0",)))
        yield mutated(noise.encode_payload(noise.Payload(key, signature)), generator)
    for _ in range(PAYLOADS):
        yield generator.randbytes(generator.choice([0, 1, 2, 40, 104, 3000]))


async def test_no_identity_that_is_shown_ends_the_node(node: Node) -> None:
    """Keys of all kinds libp2p knows, sound, unsound and cut, with signatures that do not fit."""
    for index, payload in enumerate(handshake_payloads(random.Random("keys"))):
        # From many addresses: one alone may not come so often.
        await shake_with(node, payload, source=f"127.0.1.{index % 100}")
    assert not node.host.connections
    await still_serves(node)


# Behind what the node itself asks ---------------------------------------------------------------


async def answer_with(connected: Wire, answers: Iterator[bytes]) -> None:
    """Be a dialled peer that answers the node's first two streams with the next of some bytes."""
    peer = Attacker(await secure(connected, "mallory", is_initiator=False), is_initiator=False)
    answered: set[int] = set()

    def on_stream(stream_id: int, _: bytes) -> bytes | None:
        lines = bytes(peer.received[stream_id])
        header = 1 + lines[0] if lines else 0
        if stream_id in answered or len(lines) <= header:
            return None
        answered.add(stream_id)
        agreement = lines[: header + 1 + lines[header]]
        body = agreement + next(answers, b"")
        return frame(DATA, FIN, stream_id, len(body), body)

    def is_heard() -> bool:
        over = [stream_id for stream_id in answered if peer.flags[stream_id] & (FIN | RST)]
        return len(over) >= ANSWERED

    peer.on_stream = on_stream
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.run)
        await peer.wait(is_heard)
        nursery.cancel_scope.cancel()


ANSWERED = 2
"""Streams a node opens to whom it has dialled: who are you, and are you in a network of mine?"""


async def test_no_answer_to_what_the_node_asks_ends_it(node: Node) -> None:
    """Method: the node dials the attacker, as after any sighting, and is answered with garbage."""
    generator = random.Random("answers")
    waiting = [
        *unstructured(generator, PAYLOADS),
        *structured(membership.MembershipMessage, generator, PAYLOADS),
        *identities(generator),
    ]
    generator.shuffle(waiting)
    count = len(waiting)
    answers = iter(waiting)
    node.found_network()
    async with listener(lambda connected: answer_with(connected, answers)) as address:
        with trio.fail_after(60):
            for _ in range(count // ANSWERED):
                events = node.host.connection_events()
                await node.host.dial(identity("mallory").peer_id, [address])
                while (await anext(events)).kind != "closed":
                    pass
    assert next(answers, None) is None or count % ANSWERED
    await still_serves(node)


# Inside a session -------------------------------------------------------------------------------


SESSION = b"s" * 16


def steps(generator: random.Random) -> Iterator[bytes]:
    """Yield steps of the session that are almost right, and such as make no sense."""
    for _ in range(40):
        count = generator.choice([1, 4, 64])
        good = pipeline.TokenStep(
            session=SESSION,
            epoch=1,
            step=generator.choice([0, 0, 1, 2**31]),
            position=generator.choice([0, 0, 4, 255, 256, 2**31]),
            count=count,
            want=generator.choice(["nothing", "last_logits"]),
            tensors=(),
            engine_us=(),
            token_ids=b"".join(
                generator.choice([b"\1\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x7f"])
                for _ in range(count)
            ),
        )
        encoded = pipeline.encode_step(good)
        other = pipeline.encode_step(message(pipeline.Step, generator))  # type: ignore[arg-type]
        yield wire.frame(generator.choice([encoded, mutated(encoded, generator), other]))


async def test_no_bytes_in_a_session_end_the_node(node: Node) -> None:
    shown: Pass = await obtain_pass(node)
    generator = random.Random("session")
    model_id = node.catalog.list()[0].model_id
    with trio.fail_after(60):
        for index, data in enumerate(steps(generator)):
            pipeline_id = index.to_bytes(16, "big")
            with suppress(End):
                async with member(node, shown) as peer:
                    control = await coordinate(peer, node, model_id, pipeline_id)
                    await open_session(peer, control, node, SESSION)
                    edge = pipeline.Edge(
                        pipeline=pipeline_id,
                        kind=generator.choice(["step", "bulk", "token"]),
                        session=SESSION,
                    )
                    stream_id = await peer.open(
                        pipeline.PROTOCOL, wire.frame(wire.encode(edge)) + data
                    )
                    for command in structured(pipeline.Command, generator, 3):
                        await peer.send(control, command)
                    with trio.move_on_after(0.02):
                        await peer.wait_ended(stream_id)
    await still_serves(node)
