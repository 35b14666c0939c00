"""The pipeline protocol's messages, and the step frame with its tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, FrameTooLarge, RemoteProtocolError
from swarmpy.proto import pipeline, wire
from swarmpy.proto.pipeline import (
    HEADER_BYTES_MAX,
    Command,
    Described,
    First,
    HiddenStep,
    Open,
    Report,
    Sampling,
    Step,
    TokenFrame,
    TokenStep,
    decode_step,
    encode_step,
    step_frame_bytes_max,
)
from swarmpy.proto.tensor import Tensor, TensorSpec

VECTORS = json.loads(
    (Path(__file__).parents[2] / "protocols" / "vectors" / "pipeline.json").read_text()
)
SESSION = bytes(range(16))

DTYPES = st.sampled_from(["float32", "float16", "bfloat16", "int32", "uint8", "bool"])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(DTYPES)
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    size = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}.get(dtype, 1) * math.prod(shape)
    return Tensor(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


INDICES = st.integers(0, 1 << 31)
HIDDENS = st.lists(tensors(), max_size=4).map(tuple)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Step, tuple[Tensor, ...]]:
    hidden = draw(HIDDENS)
    count = draw(st.integers(1, 80))
    fields: dict[str, Any] = {
        "session": draw(st.binary(min_size=16, max_size=16)),
        "epoch": draw(INDICES),
        "step": draw(INDICES),
        "position": draw(INDICES),
        "count": count,
        "want": draw(st.sampled_from(["nothing", "last_logits"])),
        "tensors": tuple(tensor.spec for tensor in hidden),
        "engine_us": tuple(draw(st.lists(st.integers(0, 1 << 40), max_size=8))),
    }
    if draw(st.booleans()):
        ids = draw(st.binary(min_size=4 * count, max_size=4 * count))
        return TokenStep(**fields, token_ids=ids), hidden
    return HiddenStep(**fields), hidden


@given(steps())
def test_any_step_comes_back_as_it_was_sent(step: tuple[Step, tuple[Tensor, ...]]) -> None:
    header, hidden = decode_step(encode_step(*step))

    assert header == step[0]
    assert hidden == step[1]


@given(st.binary(max_size=300))
def test_any_bytes_are_a_step_or_a_remote_protocol_error(data: bytes) -> None:
    try:
        decode_step(data)
    except RemoteProtocolError:
        pass


@given(steps(), st.data())
def test_any_changed_step_decodes_or_raises_remote_protocol_error(
    step: tuple[Step, tuple[Tensor, ...]], data: st.DataObject
) -> None:
    frame = bytearray(encode_step(*step))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decode_step(frame)
    except RemoteProtocolError:
        pass


def hidden_step(**changes: Any) -> HiddenStep:
    step = HiddenStep(
        session=SESSION,
        epoch=0,
        step=3,
        position=130,
        count=1,
        want="last_logits",
        tensors=(TensorSpec("float32", (1, 4)),),
        engine_us=(1500,),
    )
    return msgspec.structs.replace(step, **changes)


def test_the_tensors_are_views_of_the_frame() -> None:
    tensor = Tensor("float32", (1, 4), bytes(16))
    frame = encode_step(hidden_step(), (tensor,))

    _, (received,) = decode_step(frame)

    assert isinstance(received.data, memoryview)
    assert received.data.obj is frame


def test_a_header_without_token_ids_has_no_such_field() -> None:
    assert "token_ids" not in HiddenStep.__struct_fields__


@pytest.mark.parametrize(
    ("frame", "error", "match"),
    [
        (b"", BadMessage, "without a header"),
        (b"\x80", BadMessage, "without a header"),
        (b"\x05abc", BadMessage, "header of 5 bytes, 3 came"),
        (wire.encode_varint(HEADER_BYTES_MAX + 1), FrameTooLarge, str(HEADER_BYTES_MAX)),
        (encode_step(hidden_step()), BadMessage, "16 bytes declared, 0 came"),
        (encode_step(hidden_step(tensors=())) + b"x", BadMessage, "0 bytes declared, 1 came"),
        (
            encode_step(hidden_step(tensors=(TensorSpec("float32", (1 << 20, 1 << 20)),))),
            FrameTooLarge,
            "exceeds",
        ),
        (
            encode_step(hidden_step(tensors=(TensorSpec("float32", (-1, 4)),))),
            BadMessage,
            "negative",
        ),
    ],
)
def test_a_frame_that_contradicts_itself_is_refused(
    frame: bytes, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        decode_step(frame)


def test_token_ids_must_be_as_many_as_the_tokens() -> None:
    fields = {name: getattr(hidden_step(), name) for name in HiddenStep.__struct_fields__}
    step = TokenStep(**{**fields, "tensors": (), "count": 2}, token_ids=bytes(4))

    with pytest.raises(BadMessage, match="4 bytes of token ids for 2 tokens"):
        decode_step(encode_step(step))


@pytest.mark.parametrize(
    "changes",
    [
        {"session": bytes(15)},
        {"session": bytes(17)},
        {"count": 0},
        {"count": 4097},
        {"epoch": -1},
        {"position": (1 << 31) + 1},
        {"want": "all_logits"},
        {"tensors": (TensorSpec("float32", (0,)),) * 17},
        {"tensors": (TensorSpec("float32", (0,) * 7),)},
        {"engine_us": (0,) * 65},
        {"engine_us": (-1,)},
    ],
)
def test_a_step_beyond_a_bound_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        decode_step(encode_step(hidden_step(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 2.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"logprobs": 21},
    ],
)
def test_a_peer_cannot_ask_for_sampling_outside_the_ranges(changes: dict[str, Any]) -> None:
    message = Open(
        session=SESSION, epoch=0, audience=("a",), lease_s=60.0, sampling=Sampling(**changes)
    )

    with pytest.raises(BadMessage):
        wire.decode(wire.encode(message), Command)  # type: ignore[arg-type]


@given(st.binary(max_size=200))
@pytest.mark.parametrize("kind", [First, Command, Report, TokenFrame, Described])
def test_any_bytes_are_a_message_or_a_remote_protocol_error(kind: Any, data: bytes) -> None:
    try:
        wire.decode(data, kind)
    except RemoteProtocolError:
        pass


def test_a_frame_fits_into_what_its_wire_spec_allows() -> None:
    spec = (TensorSpec("float32", (-1, 576)), TensorSpec("float16", (-1, 8)))
    hidden = (
        Tensor("float32", (64, 576), bytes(64 * 576 * 4)),
        Tensor("float16", (64, 8), bytes(64 * 8 * 2)),
    )
    step = hidden_step(count=64, tensors=tuple(tensor.spec for tensor in hidden))

    size = len(encode_step(step, hidden))

    assert size <= step_frame_bytes_max(spec, count=64) <= size + HEADER_BYTES_MAX


@pytest.mark.parametrize("case", VECTORS["messages"], ids=lambda case: case["type"])
def test_the_vectors_are_what_is_sent_and_understood(case: dict[str, Any]) -> None:
    kind = getattr(pipeline, case["type"])
    data = bytes.fromhex(case["bytes"])

    message = wire.decode(data, kind)

    assert json.loads(msgspec.json.encode(message)) == case["fields"]
    assert wire.encode(message) == data


@pytest.mark.parametrize("case", VECTORS["steps"], ids=lambda case: case["what"])
def test_the_step_vectors_are_what_is_sent_and_understood(case: dict[str, Any]) -> None:
    frame = bytes.fromhex(case["frame"])

    step, hidden = decode_step(frame)

    assert json.loads(msgspec.json.encode(step)) == case["header"]
    assert [bytes(tensor.data).hex() for tensor in hidden] == case["tensors"]
    assert encode_step(step, hidden) == frame
