"""What a client may ask for: the body of a chat completion, checked and translated.

Unknown fields are ignored, as OpenAI's clients expect; known ones that would change the reply and
are not supported are refused by name. Page: docs/http-api.md, "Chat completions".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from swarmpy.identity import RandomBytes
from swarmpy.pipeline import sampling
from swarmpy.plugins.gateway.chat import Message
from swarmpy.plugins.gateway.errors import RequestRefused, refuse
from swarmpy.proto.pipeline import SEED_MAX, TOP_LOGPROBS_MAX, Sampling

MESSAGES_MAX = 2048
"""Turns of one conversation."""

PARTS_MAX = 256
"""Parts of one message's content."""

STOPS_MAX = 16
STOP_CHARS_MAX = 256
"""Stop texts and their length. OpenAI takes four; each is looked for in every piece of text."""

MODEL_NAME_MAX = 256

_SEEDS = 1 << 63
"""OpenAI's seeds are signed 64-bit integers."""

Layer = Annotated[int, Field(ge=0, le=1 << 16)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=False)


class Part(_Body):
    """One part of a message's content."""

    type: str = Field(max_length=64)
    text: str | None = None


class Turn(_Body):
    """One message as the client sends it."""

    role: str = Field(max_length=64)
    content: str | Annotated[list[Part], Field(max_length=PARTS_MAX)] | None = None
    tool_calls: list[object] | None = None


class StreamOptions(_Body):
    """How a streamed reply is told."""

    include_usage: bool = False


class Extras(_Body):
    """What swarmpy adds to OpenAI's request."""

    details: bool = False
    """Add token ids, the report and the stages to the reply."""


class ResponseFormat(_Body):
    """The form of the reply; only text is."""

    type: str = Field("text", max_length=64)


class ChatRequest(_Body):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MESSAGES_MAX)]
    model: str | None = Field(None, max_length=MODEL_NAME_MAX)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=1 << 31)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 31)
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = Field(None, le=1 << 31)
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS_MAX)
    n: int | None = None
    swarmpy: Extras | None = None
    # Known and refused unless they ask for nothing:
    tools: list[object] | None = None
    functions: list[object] | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    modalities: list[str] | None = None
    audio: dict[str, object] | None = None

    def check_supported(self) -> None:
        """Refuse what would change the reply and is not supported.

        Raises:
            RequestRefused: Names the first such field.
        """
        if self.n not in (None, 1):
            raise refuse(400, "unsupported_value", "n must be 1: one reply a request", param="n")
        for name in (
            "tools",
            "functions",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
            "audio",
        ):
            if getattr(self, name):
                raise _unsupported(name)
        if self.response_format is not None and self.response_format.type != "text":
            raise _unsupported("response_format")
        if self.modalities not in (None, [], ["text"]):
            raise _unsupported("modalities")

    def conversation(self) -> Sequence[Message]:
        """Return the messages as a template is given them.

        Raises:
            RequestRefused: A role or a kind of content is not supported.
        """
        return [_message(turn, index) for index, turn in enumerate(self.messages)]

    def stops(self) -> Sequence[str]:
        """Return the stop texts.

        Raises:
            RequestRefused: Too many, too long, or empty.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > STOPS_MAX or not all(0 < len(stop) <= STOP_CHARS_MAX for stop in stops):
            raise refuse(
                400,
                "invalid_value",
                f"stop must be at most {STOPS_MAX} texts of 1 to {STOP_CHARS_MAX} characters",
                param="stop",
            )
        return stops

    def sampling(self, random: RandomBytes) -> Sampling:
        """Return how to sample; a seed is drawn where the client gives none.

        Raises:
            SamplingError: A parameter is out of range.
            RequestRefused: `top_logprobs` without `logprobs`.
        """
        if self.top_logprobs and not self.logprobs:
            raise refuse(
                400, "invalid_value", "top_logprobs needs logprobs: true", param="top_logprobs"
            )
        seed = int.from_bytes(random.randbytes(8), "big") if self.seed is None else self.seed
        spec = Sampling(
            temperature=_given(self.temperature, 1.0),
            top_p=_given(self.top_p, 1.0),
            top_k=int(_given(self.top_k, 0)),
            min_p=_given(self.min_p, 0.0),
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            seed=seed & SEED_MAX,
            logprobs=max(1, self.top_logprobs or 0) if self.logprobs else 0,
        )
        sampling.check(spec)
        return spec


class ModelRequest(_Body):
    """The body of `POST /admin/prepare`."""

    model: str = Field(min_length=1, max_length=4096)


class PullRequest(ModelRequest):
    """The body of `POST /admin/models/pull`."""

    layers: tuple[Layer, Layer] | None = None


class RenameRequest(ModelRequest):
    """The body of `POST /admin/models/rename`."""

    name: str = Field(min_length=1, max_length=100)


class InviteRequest(_Body):
    """The body of `POST /admin/invites`."""

    ttl_s: Number | None = Field(None, gt=0)
    uses: int = Field(1, ge=1, le=1000)
    can_invite: bool = True


class CodeRequest(_Body):
    """The body of `POST /admin/invites/inspect` and `/admin/join`."""

    code: str = Field(min_length=1, max_length=8192)


class RevokeRequest(_Body):
    """The body of `POST /admin/revoke`."""

    peer: str = Field(min_length=1, max_length=256)
    network: str = Field("", max_length=64)
    is_rehearsal: bool = False


class ProofRequest(_Body):
    """The body of `POST /proof`."""

    nonce: str = Field(pattern=r"^(?:[0-9a-fA-F]{2}){16,64}$")
    """16 to 64 random bytes in hex."""


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _unsupported(name: str) -> RequestRefused:
    return refuse(400, "unsupported_parameter", f"{name} is not supported", param=name)


_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
"""OpenAI's "developer" is what templates call "system"."""


def _message(turn: Turn, index: int) -> Message:
    where = f"messages[{index}]"
    if turn.role not in _ROLES:
        raise refuse(
            400,
            "invalid_value",
            f"{where}.role must be one of {', '.join(_ROLES)}, got {turn.role!r}",
            param=f"{where}.role",
        )
    if turn.tool_calls:
        raise _unsupported(f"{where}.tool_calls")
    if turn.content is None and turn.role != "assistant":
        raise refuse(400, "invalid_value", f"{where}.content is missing", param=f"{where}.content")
    return Message(_ROLES[turn.role], _text(turn.content, f"{where}.content"))


def _text(content: str | list[Part] | None, where: str) -> str:
    """A message's text; several parts stand on a line of their own each."""
    if isinstance(content, list):
        content = "\n".join(
            _part(part, f"{where}[{number}]") for number, part in enumerate(content)
        )
    text = content or ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refuse(
            400, "invalid_value", f"{where} has half a surrogate pair: no character", param=where
        ) from error
    return text


def _part(part: Part, where: str) -> str:
    if part.type != "text" or part.text is None:
        raise refuse(
            400,
            "unsupported_content",
            f"{where} is {part.type!r}: only text parts are supported",
            param=f"{where}.type",
        )
    return part.text
