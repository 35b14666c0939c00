"""An attacker with a membership: it redeems an invite and proves itself by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio
from hostile.attackers import HOSTILE_IP, Attacker, attacker, identity

from swarmpy.node import Node
from swarmpy.proto import invite, membership, pipeline, wire
from swarmpy.proto.membership import NetworkId, Proof


class Pass:
    """What an attacker needs to be let in by any member."""

    def __init__(self, network_id: NetworkId, proof: Proof) -> None:
        self.network_id = network_id
        self.proof = proof


async def receive_message(peer: Attacker, stream_id: int, kind: Any) -> Any:
    """Wait for one message on a stream and take it from there."""

    def frame_end() -> int:
        content = peer.content(stream_id)
        head = wire.decode_varint(content) if content else None
        return 0 if head is None or len(content) < sum(head) else sum(head)

    await peer.wait(lambda: bool(frame_end()))
    end = frame_end()
    assert end, f"the node ended the connection instead of sending {kind}"
    content = peer.content(stream_id)
    head = wire.decode_varint(content)
    assert head is not None
    taken = len(peer.received[stream_id]) - len(content)
    del peer.received[stream_id][taken : taken + end]
    return wire.decode(content[head[1] : end], kind)


async def send_message(peer: Attacker, stream_id: int, message: msgspec.Struct) -> None:
    """Send one message on a stream."""
    await peer.send(stream_id, wire.frame(wire.encode(message)))


async def redeem(peer: Attacker, code: str) -> Pass:
    """Redeem an invite at the node that issued it."""
    signed = invite.decode_invite(code)
    asked = wire.frame(wire.encode(invite.Redeem(invite=signed.envelope)))
    stream_id = await peer.open(invite.PROTOCOL, asked)
    accepted = await receive_message(peer, stream_id, invite.Accepted)
    return Pass(signed.network_id, accepted.proof)


async def obtain_pass(node: Node, name: str = "mallory") -> Pass:
    """Redeem a fresh invite of a node as the attacker of this name."""
    code = (await node.create_invite()).code
    async with attacker(node.host.addresses[0], name) as peer:
        return await redeem(peer, code)


async def show(peer: Attacker, shown: Pass) -> None:
    """Have the membership conversation, to its good end."""
    tag = membership.network_tag(
        shown.network_id, channel_binding=peer.secure.channel_binding, role="initiator"
    )
    hello = wire.frame(wire.encode(membership.Hello(tags=(tag,))))
    stream_id = await peer.open(membership.PROTOCOL, hello)
    await receive_message(peer, stream_id, membership.Proofs)
    await send_message(peer, stream_id, membership.Proofs(proofs=(shown.proof,)))
    done = await receive_message(peer, stream_id, membership.Done)
    assert not done.refusal


@asynccontextmanager
async def member(
    node: Node, shown: Pass, name: str = "mallory", *, source: str = HOSTILE_IP
) -> AsyncIterator[Attacker]:
    """Connect the attacker to a node that takes it for one of its own."""
    async with attacker(node.host.addresses[0], name, source=source) as peer:
        with trio.fail_after(10):
            await show(peer, shown)
        yield peer


async def coordinate(
    peer: Attacker, node: Node, model_id: str, pipeline_id: bytes, *, slots: int = 2
) -> int:
    """Become the coordinator of a ring of one, the node; return the control stream's id."""
    inspection = (await node.stages.choose(model_id)).inspection
    offer = pipeline.Offer(
        pipeline=pipeline_id,
        model_id=model_id,
        stage=0,
        ring=(node.peer_id,),
        cuts=(0, inspection.layer_count),
        slots=slots,
        context=256,
        exact=True,
        received=(),
        sent=(),
        expected_bytes=0,
    )
    control = await peer.open(pipeline.PROTOCOL, wire.frame(wire.encode(offer)))
    assert isinstance(await receive_message(peer, control, pipeline.Report), pipeline.Accepted)
    await send_message(peer, control, pipeline.Load())
    while not isinstance(await receive_message(peer, control, pipeline.Report), pipeline.Loaded):
        pass
    return control


async def open_session(
    peer: Attacker, control: int, node: Node, session_id: bytes, name: str = "mallory"
) -> pipeline.Opened | pipeline.OpenRefused:
    """Ask the stage for a session."""
    opened = pipeline.Open(
        session=session_id,
        epoch=1,
        audience=(identity(name).peer_id, node.peer_id),
        lease_s=60.0,
        sampling=pipeline.Sampling(),
        reply_position=4,
        max_tokens=4,
    )
    await send_message(peer, control, opened)
    kinds = pipeline.Opened | pipeline.OpenRefused
    answer: pipeline.Opened | pipeline.OpenRefused = await receive_message(peer, control, kinds)
    return answer
