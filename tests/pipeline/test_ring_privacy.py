"""Who is sent what: the bytes a stage receives are recorded where they leave the encryption."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from rings import budget_for, open_swarm
from trio.testing import MockClock

from swarmpy.abc import ProtocolId, Stream, StreamHandler
from swarmpy.errors import LocalProtocolError
from swarmpy.net.host import NativeHost
from swarmpy.pipeline.audience import Audience
from swarmpy.pipeline.links import PROTOCOL
from swarmpy.proto import wire
from swarmpy.proto.pipeline import Edge, First, Sampling, decode_step
from swarmpy.testing.engine import EchoModel, reply

MODEL = EchoModel(vocabulary_size=50_000)
PROMPT = [(7919 * index) % 50_000 for index in range(150)]


class RecordingHost(NativeHost):
    """Keeps what every inbound pipeline stream brought."""

    received: list[bytearray]

    def set_handler(
        self, protocol: ProtocolId, handler: StreamHandler, *, allow_limited: bool = False
    ) -> None:
        self.received = getattr(self, "received", [])

        async def record(stream: Stream) -> None:
            kept = bytearray()
            self.received.append(kept)
            receive = stream.receive_some

            async def receive_some(bytes_max: int | None = None) -> bytes:
                data = await receive(bytes_max)
                kept.extend(data)
                return data

            stream.receive_some = receive_some  # type: ignore[method-assign]
            await handler(stream)

        super().set_handler(
            protocol, record if protocol == PROTOCOL else handler, allow_limited=allow_limited
        )


def frames(data: bytes | bytearray) -> list[bytes]:
    """Cut a stream's bytes into frames; what is left of an unfinished one is dropped."""
    found, offset = [], 0
    while (head := wire.decode_varint(data, offset)) is not None:
        size, offset = head
        if offset + size > len(data):
            break
        found.append(bytes(data[offset : offset + size]))
        offset += size
    return found


def encodings(ids: list[int]) -> list[bytes]:
    """Six token ids as u16, i32 and varint."""
    return [
        struct.pack(f"<{len(ids)}H", *ids),
        struct.pack(f"<{len(ids)}i", *ids),
        b"".join(map(wire.encode_varint, ids)),
    ]


def shows(data: bytes, ids: list[int]) -> bool:
    """Whether any six consecutive ids occur in the bytes."""
    windows = [ids[index : index + 6] for index in range(len(ids) - 5)]
    return any(code in data for window in windows for code in encodings(window))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_middle_stage_receives_no_token_ids_and_the_first_one_does(
    tmp_path: Path, temperature: float, autojump_clock: MockClock
) -> None:
    """The coordinator cannot hold layers, so that all three stages are peers."""
    async with open_swarm(
        tmp_path,
        count=4,
        model=MODEL,
        budgets=[0, *[budget_for(MODEL, 3)] * 3],
        host_class=RecordingHost,
    ) as swarm:
        spec = Sampling(temperature=temperature, seed=3)
        tokens = await swarm.nodes[0].reply(PROMPT, max_tokens=20, spec=spec)
        stages = swarm.nodes[0].assembler.pipelines()[0].stages
        by_name = {node.name: node.host for node in swarm.nodes}
        first, middle, _ = (by_name[stage.name] for stage in stages)

    assert isinstance(first, RecordingHost)
    assert isinstance(middle, RecordingHost)
    assert shows(b"".join(map(bytes, first.received)), PROMPT)
    middle_bytes = b"".join(map(bytes, middle.received))
    assert not shows(middle_bytes, PROMPT)
    assert not shows(middle_bytes, tokens)
    steps = 0
    for data in middle.received:
        opening, *following = frames(data)
        if isinstance(wire.decode(opening, First), Edge):  # type: ignore[arg-type]
            for frame in following:
                step, _ = decode_step(frame)
                assert not hasattr(step, "token_ids")
                steps += 1
    assert steps == 3 + 19
    if not temperature:
        assert tokens == reply(MODEL, PROMPT, 20)


def test_an_audience_refuses_everybody_else() -> None:
    audience = Audience(["b", "a"])  # type: ignore[list-item]

    audience.require("a")  # type: ignore[arg-type]
    with pytest.raises(LocalProtocolError, match="c is not in the session's audience"):
        audience.require("c")  # type: ignore[arg-type]


def test_an_audience_never_changes() -> None:
    audience = Audience(["a"])  # type: ignore[list-item]

    with pytest.raises(AttributeError):
        audience._peers = frozenset("b")  # type: ignore[assignment]
