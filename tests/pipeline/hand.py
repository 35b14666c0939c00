"""A test peer that plays coordinator and first stage of a ring of two."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import trio
from rings import CONTEXT, MODEL_ID, Node, budget_for, open_swarm

from swarmpy.abc import Address, Row, Stream, Want
from swarmpy.config import SESSION_LEASE_S
from swarmpy.identity import Identity
from swarmpy.net.host import NativeHost
from swarmpy.net.messages import MessageStream
from swarmpy.pipeline.links import PROTOCOL
from swarmpy.proto import wire
from swarmpy.proto.pipeline import (
    Accepted,
    Edge,
    First,
    HiddenStep,
    Load,
    Loaded,
    Offer,
    Open,
    Opened,
    Report,
    Sampling,
    TokenFrame,
)
from swarmpy.proto.tensor import Hidden
from swarmpy.testing.engine import EchoModel, EchoShard, inspection_of
from swarmpy.testing.network import SimNetwork

PROMPT = list(range(5, 25))
CUT = 6
PIPELINE = b"p" * 16
SESSION = b"s" * 16
MODEL = EchoModel()


@dataclass
class Hand:
    """A peer that plays coordinator and first stage."""

    host: NativeHost
    node: Node
    shard: EchoShard
    tokens: trio.MemoryReceiveChannel[TokenFrame]
    streams: list[MessageStream] = field(default_factory=list)

    async def open_stream(self, first: msgspec.Struct) -> MessageStream:
        stream = MessageStream(await self.host.open_stream(self.node.peer, [PROTOCOL]))
        await stream.send(first)
        return stream

    def offer(self, **changes: Any) -> Offer:
        inspection = inspection_of(MODEL)
        offer = Offer(
            pipeline=PIPELINE,
            model_id=MODEL_ID,
            stage=1,
            ring=(self.host.identity.peer_id, self.node.peer),
            cuts=(0, CUT, MODEL.layers),
            slots=2,
            context=CONTEXT,
            exact=True,
            received=tuple(inspection.wire_specs[CUT]),
            sent=(),
            expected_bytes=0,
        )
        return msgspec.structs.replace(offer, **changes)

    def offer_of_the_first_layers(self) -> Offer:
        """Of a ring the other way round."""
        return self.offer(
            pipeline=b"q" * 16,
            ring=(self.node.peer, self.host.identity.peer_id),
            stage=0,
            received=(),
            sent=self.offer().received,
        )

    def open(self, session: bytes = SESSION, **changes: Any) -> Open:
        peers = (self.host.identity.peer_id, self.node.peer)
        opened = Open(
            session=session,
            epoch=1,
            audience=peers,
            lease_s=SESSION_LEASE_S,
            sampling=Sampling(),
            reply_position=len(PROMPT),
            max_tokens=100,
        )
        return msgspec.structs.replace(opened, **changes)

    async def loaded(self, **changes: Any) -> MessageStream:
        """A control stream whose stage is ready."""
        control = await self.open_stream(self.offer(**changes))
        assert isinstance(await receive(control), Accepted)
        await control.send(Load())
        assert isinstance(await receive(control), Loaded)
        return control

    async def with_session(self) -> MessageStream:
        control = await self.loaded()
        await control.send(self.open())
        assert isinstance(await receive(control), Opened)
        return control

    def compute(self, ids: list[int], position: int) -> Hidden:
        """What the first stage's layers make of token ids."""
        row = Row(
            slot=0,
            position=position,
            count=len(ids),
            token_ids=np.array(ids, np.int32),
            hidden=None,
            want=Want.HIDDEN,
        )
        hidden = self.shard.step([row])[0].hidden
        assert hidden is not None
        return hidden


def step(hidden: Hidden, **changes: Any) -> HiddenStep:
    header = HiddenStep(
        session=SESSION,
        epoch=1,
        step=0,
        position=0,
        count=hidden[0].shape[0],
        want="last_logits",
        tensors=tuple(tensor.spec for tensor in hidden),
        engine_us=(1,),
    )
    return msgspec.structs.replace(header, **changes)


async def receive(control: MessageStream) -> Report:
    with trio.fail_after(1000):
        return await control.receive(Report)  # type: ignore[arg-type]


EDGE = Edge(pipeline=PIPELINE, kind="step", stage=1)


@asynccontextmanager
async def open_hand(
    folder: Path, *, budget: int = budget_for(MODEL, 1), **files: Any
) -> AsyncIterator[Hand]:
    """Args:
    files: How the stage checks and obtains files, as of `open_swarm`.
    """
    world = SimNetwork()
    send, received = trio.open_memory_channel[TokenFrame](1000)
    async with (
        open_swarm(
            folder,
            count=1,
            model=MODEL,
            budgets=[budget],
            networks=lambda _: world.network("10.0.0.1"),
            **files,
        ) as swarm,
        trio.open_nursery() as nursery,
    ):
        draw = random.Random(99)
        host = NativeHost(Identity.generate(draw), world.network("10.0.9.9"), random=draw)
        await nursery.start(host.run)

        async def take_tokens(stream: Stream) -> None:
            messages = MessageStream(stream)
            await messages.receive(First)  # type: ignore[arg-type]
            while (frame := await messages.receive_frame(4096)) is not None:
                send.send_nowait(wire.decode(frame, TokenFrame))

        host.set_handler(PROTOCOL, take_tokens)
        await host.dial(swarm.nodes[0].peer, [Address("/ip4/10.0.0.1/tcp/4001")])
        shard = EchoShard(MODEL, start=0, end=CUT, slots=1, context=CONTEXT)
        yield Hand(host, swarm.nodes[0], shard, received)
        nursery.cancel_scope.cancel()
