"""A reply of the node's chat endpoint, read as it streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import msgspec

from swarmpy.status import StageView
from swarmpy_cli.client import NodeClient, NodeError, raise_event_error

DONE = b"[DONE]"


class Delta(msgspec.Struct, frozen=True):
    """What one event adds to a reply."""

    content: str | None = None


class ReplyChoice(msgspec.Struct, frozen=True):
    """The only choice of an event."""

    delta: Delta = Delta()
    finish_reason: str | None = None


class Usage(msgspec.Struct, frozen=True):
    """Token counts of prompt and reply."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Details(msgspec.Struct, frozen=True):
    """What a request with `"swarmpy": {"details": true}` is told about its reply."""

    token_ids: tuple[int, ...] = ()
    stages: tuple[StageView, ...] = ()
    ttft_s: float = 0.0
    tok_s: float = 0.0
    predicted_tok_s: float = 0.0
    loop_ms_p50: float = 0.0
    engine_ms_p50: float = 0.0
    hop_overhead_ms_p50: float = 0.0
    sees_prompt: tuple[str, ...] = ()


class ReplyEvent(msgspec.Struct, frozen=True):
    """One server-sent event of a streamed reply."""

    choices: tuple[ReplyChoice, ...] = ()
    usage: Usage | None = None
    swarmpy: Details | None = None


@dataclass(slots=True)
class Reply:
    """A reply as far as it has come."""

    text: str = ""
    finish_reason: str = ""
    usage: Usage = field(default_factory=Usage)
    details: Details = field(default_factory=Details)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What every request of one conversation has in common."""

    model: str
    sampling: dict[str, object]
    has_details: bool = False
    """Whether to ask for token ids, stages and times."""

    def body(self, messages: list[dict[str, str]]) -> dict[str, object]:
        """Return the request for a conversation."""
        return {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "swarmpy": {"details": self.has_details},
            **self.sampling,
        }


def stream_reply(
    node: NodeClient, body: object, reply: Reply, waiting: Callable[[str], None]
) -> Iterator[str]:
    """Ask, yield the reply's text as it comes, and keep it in `reply`.

    Args:
        waiting: Told what the node says while it queues, loads or recovers.

    Raises:
        NodeError: The node refused, or the reply broke off half-way.
    """
    with closing(node.stream_events("/v1/chat/completions", body)) as events:
        for event in events:
            if isinstance(event, str):
                waiting(event)
                continue
            if event == DONE:
                return
            raise_event_error(event)
            decoded = msgspec.json.decode(event, type=ReplyEvent)
            reply.usage = decoded.usage or reply.usage
            reply.details = decoded.swarmpy or reply.details
            for choice in decoded.choices:
                reply.finish_reason = choice.finish_reason or reply.finish_reason
                if choice.delta.content:
                    reply.text += choice.delta.content
                    yield choice.delta.content
    raise NodeError("the reply ended without its last event", code="stream_broken")
