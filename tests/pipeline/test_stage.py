"""One stage, spoken to by hand: a test peer plays coordinator and first stage of a ring of two."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from hand import (
    CUT,
    EDGE,
    MODEL,
    PROMPT,
    SESSION,
    Hand,
    open_hand,
    receive,
    step,
)
from rings import MODEL_ID, budget_for
from trio.testing import MockClock, wait_all_tasks_blocked

from swarmpy.config import SESSION_LEASE_S
from swarmpy.errors import (
    ConnectionLost,
    NetworkError,
    SwarmError,
)
from swarmpy.identity import Identity
from swarmpy.net.messages import MessageStream
from swarmpy.pipeline.links import PROTOCOL
from swarmpy.pipeline.stage import LOAD_WAIT_S
from swarmpy.proto.pipeline import (
    Accepted,
    Close,
    Describe,
    Described,
    Description,
    Edge,
    Opened,
    OpenRefused,
    Refused,
    Report,
    SessionFailed,
    TokenStep,
    encode_step,
)
from swarmpy.proto.tensor import Tensor
from swarmpy.testing.engine import reply

# Steps -------------------------------------------------------------------------------


async def test_steps_by_hand_give_the_reply(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_hand(tmp_path) as hand:
        await hand.with_session()
        edge = await hand.open_stream(EDGE)
        ids, position, tokens = PROMPT, 0, []
        for index in range(10):
            hidden = hand.compute(ids, position)
            await edge.send_frame(encode_step(step(hidden, step=index, position=position), hidden))
            token = await hand.tokens.receive()
            position += len(ids)
            ids = [token.token]
            tokens.append(token.token)

    assert tokens == reply(MODEL, PROMPT, 10)


async def test_a_step_that_comes_twice_is_answered_twice_and_computed_once(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        await hand.with_session()
        edge = await hand.open_stream(EDGE)
        hidden = hand.compute(PROMPT, 0)
        frame = encode_step(step(hidden), hidden)
        await edge.send_frame(frame)
        await edge.send_frame(frame)
        first, again = await hand.tokens.receive(), await hand.tokens.receive()
        hidden = hand.compute([first.token], len(PROMPT))
        await edge.send_frame(encode_step(step(hidden, step=1, position=len(PROMPT)), hidden))
        second = await hand.tokens.receive()

    assert first == again
    assert [first.token, second.token] == reply(MODEL, PROMPT, 2)


async def test_a_step_of_an_old_epoch_is_dropped(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_hand(tmp_path) as hand:
        await hand.with_session()
        edge = await hand.open_stream(EDGE)
        hidden = hand.compute(PROMPT, 0)
        await edge.send_frame(encode_step(step(hidden, epoch=0), hidden))
        await edge.send_frame(encode_step(step(hidden), hidden))

        assert (await hand.tokens.receive()).epoch == 1
        await wait_all_tasks_blocked()
        assert hand.tokens.statistics().current_buffer_used == 0


async def test_a_position_before_the_end_cuts_the_slot_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        await hand.with_session()
        edge = await hand.open_stream(EDGE)
        other = [*PROMPT[:10], 77, 78]
        for index, (ids, position) in enumerate([(PROMPT, 0), (other[10:], 10)]):
            hidden = hand.compute(ids, position)
            await edge.send_frame(encode_step(step(hidden, step=index, position=position), hidden))
            token = await hand.tokens.receive()

    assert token.token == reply(MODEL, other, 1)[0]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"step": 1}, "step 1 came, step 0 is next"),
        ({"position": 5}, "step at position 5, the slot ends at 0"),
    ],
)
async def test_a_gap_ends_the_session(
    tmp_path: Path, changes: dict[str, int], match: str, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        control = await hand.with_session()
        edge = await hand.open_stream(EDGE)
        hidden = hand.compute(PROMPT, 0)
        await edge.send_frame(encode_step(step(hidden, **changes), hidden))
        failed = await receive(control)

        assert isinstance(failed, SessionFailed)
        assert failed.error == "RowError"
        assert match in failed.message
        assert hand.node.service.session_count == 0


def _spoiled(hand: Hand, kind: str) -> bytes:
    hidden = hand.compute(PROMPT, 0)
    data = np.frombuffer(hidden[0].data, np.float32).copy()
    match kind:
        case "NaN":
            data[100] = np.nan
            bad = (Tensor("float32", hidden[0].shape, data.tobytes()),)
            return encode_step(step(bad), bad)
        case "infinity":
            data[100] = -np.inf
            bad = (Tensor("float32", hidden[0].shape, data.tobytes()),)
            return encode_step(step(bad), bad)
        case "dtype":
            bad = (Tensor("int32", hidden[0].shape, hidden[0].data),)
            return encode_step(step(bad), bad)
        case "shape":
            bad = (Tensor("float32", (10, 128), hidden[0].data),)
            return encode_step(step(bad, count=20), bad)
        case "missing":
            return encode_step(step(hidden, tensors=()), ())
        case "too many":
            return encode_step(step((hidden[0],), tensors=(hidden[0].spec,) * 2), hidden * 2)
        case "short":
            return encode_step(step(hidden), hidden)[:-1]
        case "count":
            return encode_step(step(hidden, count=21), hidden)
        case "times":
            return encode_step(step(hidden, engine_us=()), hidden)
        case "token ids":
            header = step(hidden)
            fields = {name: getattr(header, name) for name in header.__struct_fields__}
            ids = np.array(PROMPT, "<i4").tobytes()
            return encode_step(TokenStep(**fields, token_ids=ids), hidden)
        case "garbage":
            return b"\x05hello, world"
        case _:
            return bytes(70_000)


@pytest.mark.parametrize(
    "kind",
    [
        "NaN",
        "infinity",
        "dtype",
        "shape",
        "missing",
        "too many",
        "short",
        "count",
        "times",
        "token ids",
        "garbage",
        "too large",
    ],
)
async def test_a_bad_step_closes_its_stream_and_names_the_error(
    tmp_path: Path, kind: str, autojump_clock: MockClock
) -> None:
    """The engine never sees it, the slot is free, and the stage goes on."""
    async with open_hand(tmp_path) as hand:
        control = await hand.with_session()
        edge = await hand.open_stream(EDGE)
        await edge.send_frame(_spoiled(hand, kind))
        failed = await receive(control)

        assert isinstance(failed, SessionFailed)
        assert failed.error in ("BadMessage", "FrameTooLarge")
        assert hand.node.used_slots == 0
        with pytest.raises(NetworkError), trio.fail_after(60):
            await edge.receive_frame(1)
        await control.send(hand.open(b"t" * 16))
        assert isinstance(await receive(control), Opened)


async def test_only_the_stage_before_may_send_steps(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The test peer is stage 0 by id; here it claims that somebody else is."""
    async with open_hand(tmp_path) as hand:
        other = Identity.generate(random.Random(5)).peer_id
        control = await hand.open_stream(hand.offer(ring=(other, hand.node.peer)))
        assert isinstance(await receive(control), Accepted)
        edge = await hand.open_stream(EDGE)
        hidden = hand.compute(PROMPT, 0)
        await edge.send_frame(encode_step(step(hidden), hidden))

        with pytest.raises(NetworkError), trio.fail_after(60):
            await edge.receive_frame(1)


# Sessions ------------------------------------------------------------------------------


async def test_a_session_without_beats_loses_its_slot_when_its_lease_ends(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        control = await hand.with_session()
        began = trio.current_time()
        failed = await receive(control)

        assert isinstance(failed, SessionFailed)
        assert SESSION_LEASE_S <= trio.current_time() - began <= 1.2 * SESSION_LEASE_S + 1
        assert hand.node.service.session_count == 0


async def test_a_third_session_finds_both_slots_taken_until_one_is_closed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        control = await hand.with_session()
        await control.send(hand.open(b"t" * 16))
        assert isinstance(await receive(control), Opened)
        await control.send(hand.open(b"u" * 16))
        refused = await receive(control)
        await control.send(Close(session=SESSION))
        await control.send(hand.open(b"u" * 16))

        assert isinstance(refused, OpenRefused)
        assert refused.is_busy
        assert isinstance(await receive(control), Opened)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sampling": None}, "how to sample"),
        ({"audience": ("12D3KooWStranger",)}, "outside the ring"),
        ({"history": b"abc"}, "int32"),
    ],
)
async def test_an_open_that_contradicts_the_ring_is_refused(
    tmp_path: Path, changes: dict[str, Any], match: str, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        control = await hand.loaded()
        await control.send(hand.open(**changes))
        refused = await receive(control)

        assert isinstance(refused, OpenRefused)
        assert not refused.is_busy
        assert match in refused.message


async def test_a_token_goes_to_nobody_outside_the_audience(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The coordinator left itself out: the token is made and stays where it is."""
    async with open_hand(tmp_path) as hand:
        control = await hand.loaded()
        await control.send(hand.open(audience=(hand.node.peer,)))
        assert isinstance(await receive(control), Opened)
        edge = await hand.open_stream(EDGE)
        hidden = hand.compute(PROMPT, 0)
        await edge.send_frame(encode_step(step(hidden), hidden))
        failed = await receive(control)

        assert isinstance(failed, SessionFailed)
        assert "audience" in failed.message
        assert hand.tokens.statistics().current_buffer_used == 0


# Offers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"cuts": (0, CUT)}, "no ring"),
        ({"cuts": (0, CUT, 11)}, "do not cover"),
        ({"cuts": (0, 13, 12)}, "do not cover"),
        ({"cuts": (1, CUT, 12)}, "do not cover"),
        ({"stage": 0}, "not this node"),
        ({"stage": 5}, "not this node"),
        ({"received": ()}, "tensors between layers differ"),
        ({"slots": 4096, "context": 1}, "context 1"),
        ({"context": 100_000}, "context 100000"),
        ({"slots": 4000}, "need"),
    ],
)
async def test_an_offer_that_contradicts_itself_or_the_engine_is_refused(
    tmp_path: Path, changes: dict[str, Any], match: str, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        control = await hand.open_stream(hand.offer(**changes))
        refused = await receive(control)

        assert isinstance(refused, Refused)
        assert match in refused.message
        assert await control.receive_frame(1000) is None


async def test_a_second_offer_of_one_pipeline_is_refused(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        await hand.loaded()
        second = await hand.open_stream(hand.offer())

        assert isinstance(await receive(second), Refused)


async def test_an_offer_reserves_its_memory_until_the_stream_ends(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        service = hand.node.service
        control = await hand.open_stream(hand.offer())
        assert isinstance(await receive(control), Accepted)
        reserved = service.memory_bytes_free
        control.reset()
        await wait_all_tasks_blocked()

        assert reserved < budget_for(MODEL, 1)
        assert service.memory_bytes_free == service.memory_bytes_max > reserved


async def test_an_offer_that_is_never_loaded_gives_its_memory_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        control = await hand.open_stream(hand.offer())
        assert isinstance(await receive(control), Accepted)
        await trio.sleep(LOAD_WAIT_S + 1)

        assert hand.node.service.memory_bytes_free == hand.node.service.memory_bytes_max


async def test_a_session_cannot_be_opened_before_the_shard_is_loaded(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        control = await hand.open_stream(hand.offer())
        assert isinstance(await receive(control), Accepted)
        await control.send(hand.open())

        assert isinstance(await receive(control), OpenRefused)


# Streams -----------------------------------------------------------------------------------


async def test_a_stage_describes_the_model_as_its_engine_sees_it(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        stream = await hand.open_stream(Describe(model_id=MODEL_ID))
        answer = await stream.receive(Description)  # type: ignore[arg-type]

        assert isinstance(answer, Described)
        assert answer.layer_count == MODEL.layers
        assert len(answer.wire_specs) == MODEL.layers - 1


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1", b"\xff" * 100, bytes(70_000)])
async def test_any_other_first_message_closes_the_stream_and_nothing_else(
    tmp_path: Path, first: bytes, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        stream = MessageStream(await hand.host.open_stream(hand.node.peer, [PROTOCOL]))
        await stream.send_frame(first)
        with pytest.raises(SwarmError):
            await stream.receive(Report)  # type: ignore[arg-type]

        await hand.with_session()


async def test_steps_of_an_unknown_pipeline_are_not_read(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_hand(tmp_path) as hand:
        stream = await hand.open_stream(Edge(pipeline=b"?" * 16, kind="token"))
        with pytest.raises((NetworkError, ConnectionLost)), trio.fail_after(60):
            await stream.receive_frame(1)
