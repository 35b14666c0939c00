"""The pipeline protocol: what a coordinator and its stages say, and how a step crosses a link.

Sans-IO: messages and their bytes; `swarmpy/pipeline/` decides what follows from them. The first
message of every stream says what the stream is: `Describe`, `Offer` (a control stream), `Edge`
(steps or tokens). Spec: protocols/pipeline.md (revision 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from swarmpy.errors import BadMessage, FrameTooLarge
from swarmpy.proto import wire
from swarmpy.proto.tensor import Hidden, TensorSpec, WireSpec, bytes_of, split

PROTOCOL = "/swarmpy/pipeline/1"

STEP_FRAME_BYTES_MAX = 64 * 1024
"""Largest frame of a step stream, which several sessions share: at 20 Mbit/s it is gone in 26 ms.
Larger steps travel on the session's own bulk stream."""

HEADER_BYTES_MAX = 24 * 1024
"""Largest step header: 4,096 token ids are 16 KiB, 16 tensor specs and 64 engine times 2 KiB."""

STEP_TOKENS_MAX = 4096
"""Most tokens of one step; prompts are cut at 64, the rest is room for larger grids."""

STAGES_MAX = 64
"""Longest ring (`swarmpy.config.STAGES_MAX`)."""

LAYERS_MAX = 1024
"""Layers of a model; the deepest published ones have 126."""

SPECS_MAX = 512
"""Cuts of one `Described`: with a spec of 30 bytes each the message stays far below its bound."""

STOP_IDS_MAX = 64
"""Stop tokens of one session; models name up to five."""

TOP_LOGPROBS_MAX = 20
"""As in the OpenAI API."""

HISTORY_IDS_MAX = 8192
"""Prompt ids, the last ones, that a repetition penalty counts: 32 KiB of one `Open`."""

SESSIONS_MAX = 256
"""Sessions named in one `Beat` (`swarmpy.config.SESSIONS_MAX`)."""

SEED_MAX = (1 << 63) - 1

Id = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Peer = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
ModelId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Index = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Micros = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
PerLayer = Annotated[tuple[Bytes, ...], msgspec.Meta(max_length=LAYERS_MAX)]
Ring = Annotated[tuple[Peer, ...], msgspec.Meta(min_length=1, max_length=STAGES_MAX)]
EngineMicros = Annotated[tuple[Micros, ...], msgspec.Meta(max_length=STAGES_MAX)]
Shards = Annotated[tuple[tuple[Index, Index], ...], msgspec.Meta(max_length=STAGES_MAX)]
"""Layers [start, end) of a model that a peer has loaded. A plan that uses them costs nothing, and
the announcement that tells of them may still be on its way."""
TokenBytes = Annotated[bytes, msgspec.Meta(max_length=4 * STEP_TOKENS_MAX)]

# Control: what a model is -----------------------------------------------------


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """Coordinator to a peer: what does your engine know of this model? Answer: `Described`."""

    model_id: ModelId


class Described(msgspec.Struct, frozen=True, tag="described"):
    """`swarmpy.abc.Inspection`, field by field."""

    engine: Name
    build_id: Text
    architecture: Name
    layer_count: Annotated[int, msgspec.Meta(ge=1, le=LAYERS_MAX)]
    hidden_size: Bytes
    vocabulary_size: Bytes
    context_max: Bytes
    cuts: PerLayer
    wire_specs: Annotated[dict[Index, WireSpec], msgspec.Meta(max_length=SPECS_MAX)]
    token_layers: PerLayer
    layer_weight_bytes: PerLayer
    embedding_weight_bytes: Bytes
    head_weight_bytes: Bytes
    is_tied: bool
    kv_bytes_per_token: PerLayer
    state_bytes: PerLayer
    state_kind: Literal["kv", "rolling", "recurrent"]
    slots_max: Bytes
    head_cost_layers: Annotated[float, msgspec.Meta(ge=0, le=1e6)]


# Control: a stage's life ------------------------------------------------------


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """Coordinator to a peer: be stage `stage` of this ring. Answer: `Accepted` or `Refused`.

    Stage i holds layers [cuts[i], cuts[i + 1]). The coordinator is the peer that sends it. Nothing
    is loaded yet, but the memory is reserved.
    """

    pipeline: Id
    model_id: ModelId
    stage: Annotated[int, msgspec.Meta(ge=0, lt=STAGES_MAX)]
    ring: Ring
    cuts: Annotated[tuple[Index, ...], msgspec.Meta(min_length=2, max_length=STAGES_MAX + 1)]
    slots: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    context: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    exact: bool
    received: WireSpec
    """Tensors that reach this stage, () at the first."""
    sent: WireSpec
    """Tensors that leave it, () at the last."""
    expected_bytes: Bytes
    """Memory the coordinator planned for this stage."""


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """Stage to coordinator: the memory is reserved, or the same shard is already loaded."""

    is_loaded: bool
    shards: Shards = ()
    fetch_bytes: Bytes = 0
    """Of the model's files, which this peer fetches before it loads."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Stage to coordinator: no; the stream ends here."""

    reason: Literal["memory", "model", "engine", "offer", "busy"]
    message: Text
    memory_bytes: Bytes = 0
    """What this peer could give now, where the reason is memory."""
    shards: Shards = ()


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Coordinator to stage, once all have accepted; answered by `Loaded` or `Failed`."""


class Progressed(msgspec.Struct, frozen=True, tag="progressed"):
    """Stage to coordinator: how far the load is."""

    step: Name
    done: Bytes
    total: Bytes
    unit: Name = "bytes"


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """Stage to coordinator: ready for sessions."""

    weight_bytes: Bytes
    rss_bytes: Bytes
    slots: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    """Sessions it can hold, all coordinators together."""
    engine: Name
    exactness: Text


ErrorName = Literal[
    "StageEvicted",
    "StageLost",
    "EngineLost",
    "RowError",
    "OfferRejected",
    "DoesNotFit",
    "ModelRefused",
    "ModelNotFound",
    "DownloadFailed",
    "BadMessage",
    "FrameTooLarge",
    "PeerTimeout",
    "PipelineError",
]
"""Classes of `swarmpy.errors` that one peer may name to another."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Stage to coordinator: the stage is gone, or could not be loaded; the stream ends here."""

    error: ErrorName
    message: Text


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Coordinator to stage: forget this pipeline. The end of the stream means the same."""


# Control: sessions ------------------------------------------------------------


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is chosen; `swarmpy.pipeline.sampling` explains and checks each."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.0
    """0 is greedy."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] = 0
    """0 is off."""
    min_p: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=2)] = 1.0
    """1 is off."""
    seed: Annotated[int, msgspec.Meta(ge=0, le=SEED_MAX)] = 0
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=TOP_LOGPROBS_MAX)] = 0
    """How many alternatives to return with each token; 0: no log probabilities at all."""


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Coordinator to every stage: take a session in. Answer: `Opened` or `OpenRefused`.

    What only the last stage needs (`sampling` and below) stays empty elsewhere.
    """

    session: Id
    epoch: Index
    audience: Annotated[tuple[Peer, ...], msgspec.Meta(min_length=1, max_length=STAGES_MAX + 1)]
    """The only peers that may be sent anything of this session."""
    lease_s: Annotated[float, msgspec.Meta(gt=0, le=3600)]
    sampling: Sampling | None = None
    reply_position: Index = 0
    """Position of the first reply token: the length of the prompt."""
    max_tokens: Index = 0
    stop_ids: Annotated[tuple[Index, ...], msgspec.Meta(max_length=STOP_IDS_MAX)] = ()
    history: Annotated[bytes, msgspec.Meta(max_length=4 * HISTORY_IDS_MAX)] = b""
    """Prompt ids (int32) for a repetition penalty; whoever gets them sees the prompt."""


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """Stage to coordinator: the session has a slot."""

    session: Id
    slot: Index


class OpenRefused(msgspec.Struct, frozen=True, tag="open_refused"):
    """Stage to coordinator: no; `is_busy` says that another time may do."""

    session: Id
    is_busy: bool
    message: Text


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Coordinator to stage: these sessions live on, although no step may come for a while."""

    sessions: Annotated[tuple[Id, ...], msgspec.Meta(max_length=SESSIONS_MAX)]


class Close(msgspec.Struct, frozen=True, tag="close"):
    """Coordinator to stage: the session is over, its slot is free."""

    session: Id


class SessionFailed(msgspec.Struct, frozen=True, tag="session_failed"):
    """Stage to coordinator: this session cannot go on; its slot is free, the others go on."""

    session: Id
    epoch: Index
    error: ErrorName
    message: Text


# Streams of steps and tokens --------------------------------------------------


class Edge(msgspec.Struct, frozen=True, tag="edge"):
    """First message of a stream that carries steps or tokens to one peer of a ring.

    `step`: decode steps of all sessions, stage to next stage, as long as both live. `bulk`: one
    session's prompt chunks (and steps beyond 64 KiB). `token`: tokens from the last stage to the
    coordinator and to the first stage, once where these are one peer.
    """

    pipeline: Id
    kind: Literal["step", "bulk", "token"]
    stage: Annotated[int, msgspec.Meta(ge=0, lt=STAGES_MAX)] = 0
    """The stage these steps are for; 0 for tokens."""
    session: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    """The one session of a bulk stream, so that it can be told what went wrong there."""


class HiddenStep(msgspec.Struct, frozen=True, array_like=True, tag="hidden"):
    """Header of a step for a stage whose output depends on no token ids: it carries none."""

    session: Id
    epoch: Index
    step: Index
    position: Index
    count: Annotated[int, msgspec.Meta(ge=1, le=STEP_TOKENS_MAX)]
    want: Literal["nothing", "last_logits"]
    """What the ring's last stage is to make of it."""
    tensors: WireSpec
    """Dtype and shape of the tensors behind this header."""
    engine_us: EngineMicros = ()
    """Microseconds inside each engine so far, stage by stage."""


class TokenStep(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    """Header of a step for the first stage, and for others that depend on the ids themselves."""

    session: Id
    epoch: Index
    step: Index
    position: Index
    count: Annotated[int, msgspec.Meta(ge=1, le=STEP_TOKENS_MAX)]
    want: Literal["nothing", "last_logits"]
    tensors: WireSpec
    engine_us: EngineMicros
    token_ids: TokenBytes
    """`count` ids, int32 little-endian."""


Step = HiddenStep | TokenStep


class TokenFrame(msgspec.Struct, frozen=True, array_like=True):
    """Last stage to coordinator and first stage: the step is round, and what it gave."""

    session: Id
    epoch: Index
    step: Index
    position: Index
    """Position the token takes in the sequence; the step's end where there is no token."""
    token: Annotated[int, msgspec.Meta(ge=-1, le=1 << 31)]
    """-1 where no token was asked for (all prompt chunks but the last)."""
    finish: Literal["", "stop", "length"] = ""
    engine_us: EngineMicros = ()
    logprob: Annotated[float, msgspec.Meta(le=0)] | None = None
    top_logprobs: Annotated[
        tuple[tuple[Index, Annotated[float, msgspec.Meta(le=0)]], ...],
        msgspec.Meta(max_length=TOP_LOGPROBS_MAX),
    ] = ()


First = Describe | Offer | Edge
"""What a stream may begin with."""

Description = Described | Refused
"""Answers to `Describe`."""

Command = Load | Release | Open | Beat | Close
"""What a coordinator sends on a control stream after its `Offer`."""

Report = Accepted | Refused | Progressed | Loaded | Failed | Opened | OpenRefused | SessionFailed
"""What a stage sends on a control stream."""


def encode_step(step: Step, hidden: Hidden = ()) -> bytes:
    """Return a step's frame: the header's length (varint), the header, the tensors' bytes."""
    head = wire.encode(step)
    return b"".join((wire.encode_varint(len(head)), head, *(tensor.data for tensor in hidden)))


def decode_step(data: bytes | bytearray | memoryview) -> tuple[Step, Hidden]:
    """Take a step's frame apart. The tensors are views of `data`.

    Raises:
        FrameTooLarge: The header or a declared tensor is beyond its bound.
        BadMessage: The bytes are no step, or the declared sizes do not add up.
    """
    view = memoryview(data)
    prefix = wire.decode_varint(view)
    if prefix is None:
        raise BadMessage("step frame without a header")
    size, offset = prefix
    if size > HEADER_BYTES_MAX:
        raise FrameTooLarge(f"step header of {size} bytes exceeds {HEADER_BYTES_MAX}")
    if offset + size > len(view):
        raise BadMessage(f"step header of {size} bytes, {len(view) - offset} came")
    step: Step = wire.decode(view[offset : offset + size], Step)  # type: ignore[arg-type]
    if isinstance(step, TokenStep) and len(step.token_ids) != 4 * step.count:
        raise BadMessage(f"{len(step.token_ids)} bytes of token ids for {step.count} tokens")
    return step, split(step.tensors, view[offset + size :])


def step_frame_bytes_max(spec: Sequence[TensorSpec], *, count: int) -> int:
    """Largest frame a step of `count` tokens can have at a cut with this wire spec."""
    size = HEADER_BYTES_MAX + wire.VARINT_BYTES_MAX
    for tensor in spec:
        size += bytes_of(tensor.dtype, [count if n == -1 else n for n in tensor.shape])
    return size
