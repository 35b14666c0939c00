"""A reply on its way to an HTTP client: whole, or as server-sent events while it is made.

Until the first byte an error is an HTTP status; after it, one `data: {"error": ...}` event and the
end, never a `[DONE]`. A client that hangs up cancels the generation.
Page: docs/http-api.md, "Streaming" and "Errors".
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec
import trio
from starlette.responses import Response

from swarmpy.abc import Progress
from swarmpy.errors import StageLost, SwarmError
from swarmpy.plugins.gateway.errors import INTERNAL, Refusal, RequestRefused, refusal_of
from swarmpy.plugins.gateway.guard import ClientGone, Receive, Scope, Send, wait_gone
from swarmpy.plugins.gateway.text import StopTexts, TextCodec, TextStream

if TYPE_CHECKING:
    from swarmpy.pipeline.session import Generation, Token

logger = logging.getLogger(__name__)

COMMENT_INTERVAL_S = 5.0
"""Silence after which a stream says what it waits for; proxies give up after 30 to 60."""

CLOSE_TIMEOUT_S = 5.0
"""For freeing a cancelled generation's slots on every stage."""

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Start(Protocol):
    """Begins the generation: calls the node with the prompt, passing progress on."""

    async def __call__(self, on_progress: Callable[[Progress], None]) -> Generation: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyPlan:
    """What to send for one request."""

    reply_id: str
    created: int
    """Unix seconds."""
    model: str
    prompt_ids: Sequence[int]
    codec: TextCodec
    stops: Sequence[str]
    top_logprobs: int | None
    """Alternatives to show with each token; None for no log probabilities at all."""
    include_usage: bool
    has_details: bool


@dataclass(slots=True)
class _Piece:
    """What one token added to the reply."""

    text: str
    logprobs: list[dict[str, object]] = field(default_factory=list)


class _Reply:
    """One reply while it is made: text, counts, and how it ended."""

    def __init__(self, plan: ReplyPlan, generation: Generation) -> None:
        self.plan = plan
        self.generation = generation
        self.token_ids: list[int] = []
        self._text = TextStream(plan.codec)
        self._stops = StopTexts(plan.stops)

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why the reply is over; a stop text counts as the model's own end."""
        ended = self._stops.is_found or self.generation.finish_reason == "stop"
        return "stop" if ended else "length"

    async def run(self, show: Callable[[_Piece], Awaitable[None]]) -> None:
        """Show what each token adds, and at the end what was held back.

        Raises:
            StageLost: The generation was closed by somebody else before it had ended.
            SwarmError: Whatever else it fails with.
        """
        async for token in self.generation:
            self.token_ids.append(token.id)
            text = self._stops.push(self._text.push(token.id))
            await show(_Piece(text, self._logprobs(token)))
            if self._stops.is_found:
                return
        if self.generation.finish_reason is None:
            raise StageLost("the reply was cut before its end")
        await show(_Piece(self._stops.push(self._text.finish()) + self._stops.finish()))

    def usage(self) -> dict[str, object]:
        """OpenAI's counts of tokens."""
        prompt, reply = len(self.plan.prompt_ids), len(self.token_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply,
            "total_tokens": prompt + reply,
        }

    def details(self) -> dict[str, object]:
        """What `"swarmpy": {"details": true}` adds: ids, the report, and who computed what."""
        view = self.generation.pipeline
        return {
            **msgspec.to_builtins(self.generation.report),
            "pipeline": view.id,
            "model_id": view.model_id,
            "stages": msgspec.to_builtins(view.stages),
            "token_ids": self.token_ids,
            "prompt_token_ids": list(self.plan.prompt_ids),
        }

    def _logprobs(self, token: Token) -> list[dict[str, object]]:
        if self.plan.top_logprobs is None or token.logprob is None:
            return []
        top = token.top_logprobs[: self.plan.top_logprobs]
        return [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [self._token(*alternative) for alternative in top],
            }
        ]

    def _token(self, token_id: int, logprob: float) -> dict[str, object]:
        text = self.plan.codec.decode([token_id], with_special=True)
        whole = "\ufffd" not in text
        return {
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode()) if whole else None,
        }


class ReplyResponse(Response):
    """ASGI response of one chat completion."""

    def __init__(self, plan: ReplyPlan, start: Start, *, stream: bool) -> None:
        """Args: stream: Send events as the reply is made, not the whole at its end."""
        super().__init__()
        self._plan = plan
        self._start = start
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make and send the reply; a client that leaves cancels it.

        Raises:
            RequestRefused: What ended the reply before its first byte.
        """
        refusal: Refusal | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_gone, receive, nursery.cancel_scope)
            if self._stream:
                events = _EventStream(send)
                nursery.start_soon(events.keep_alive, nursery.cancel_scope)
                refusal = await self._attempt(partial(self._send_events, events), events)
            else:
                refusal = await self._attempt(partial(self._send_whole, send), None)
            nursery.cancel_scope.cancel()
        if refusal is not None:
            raise RequestRefused(refusal)

    async def _attempt(
        self, make: Callable[[], Awaitable[None]], events: _EventStream | None
    ) -> Refusal | None:
        """Make the reply; return what ended it if that can still be the response's status."""
        refusal = INTERNAL
        try:
            await make()
            return None
        except ClientGone:
            return None
        except SwarmError as error:
            refusal = refusal_of(error)
        except RequestRefused as error:
            refusal = error.refusal
        except Exception:  # the border to the node: logged, and told to the client in one object
            logger.exception("gateway.reply_failed")
        if events is None or not events.has_begun:
            return refusal
        with suppress(ClientGone):
            await events.send(refusal.body())
            await events.end()
        return None

    @asynccontextmanager
    async def _generating(self, on_progress: Callable[[Progress], None]) -> AsyncIterator[_Reply]:
        """Start the generation, and free its slots however the block ends."""
        generation = await self._start(on_progress)
        try:
            yield _Reply(self._plan, generation)
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await generation.aclose()

    async def _send_whole(self, send: Send) -> None:
        text: list[str] = []
        logprobs: list[dict[str, object]] = []

        async def show(piece: _Piece) -> None:
            text.append(piece.text)
            logprobs.extend(piece.logprobs)

        async with self._generating(lambda progress: None) as reply:
            await reply.run(show)
        body = self._head("chat.completion") | {
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "".join(text), "refusal": None},
                    "logprobs": self._shown(logprobs),
                    "finish_reason": reply.finish_reason,
                }
            ],
            "usage": reply.usage(),
        }
        if self._plan.has_details:
            body["swarmpy"] = reply.details()
        data = msgspec.json.encode(body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    async def _send_events(self, events: _EventStream) -> None:
        is_first = True

        async def show(piece: _Piece) -> None:
            nonlocal is_first
            if is_first:
                await events.send(self._chunk({"role": "assistant", "content": ""}))
                is_first = False
            if piece.text or piece.logprobs:
                await events.send(self._chunk({"content": piece.text}, piece.logprobs))

        async with self._generating(events.note) as reply:
            await reply.run(show)
        last = self._chunk({}, finish_reason=reply.finish_reason)
        if self._plan.include_usage:
            await events.send(last)
            last = self._head("chat.completion.chunk") | {"choices": [], "usage": reply.usage()}
        if self._plan.has_details:
            last["swarmpy"] = reply.details()
        await events.send(last)
        await events.send_done()
        await events.end()

    def _chunk(
        self,
        delta: dict[str, object],
        logprobs: list[dict[str, object]] | None = None,
        *,
        finish_reason: str | None = None,
    ) -> dict[str, object]:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._shown(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        if self._plan.include_usage:
            chunk["usage"] = None
        return chunk

    def _head(self, kind: str) -> dict[str, object]:
        return {
            "id": self._plan.reply_id,
            "object": kind,
            "created": self._plan.created,
            "model": self._plan.model,
        }

    def _shown(self, logprobs: list[dict[str, object]]) -> dict[str, object] | None:
        return None if self._plan.top_logprobs is None else {"content": logprobs}


class _EventStream:
    """Server-sent events; the response begins with the first of them."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._turn = trio.Lock()
        self._sent_at = trio.current_time()
        self._note = "waiting"
        self._has_ended = False
        self.has_begun = False

    def note(self, progress: Progress) -> None:
        """Keep what the reply waits for, to be told in the next comment."""
        share = f" {100 * progress.done // progress.total} %" if progress.total else ""
        self._note = f"{' '.join(progress.step.split()):.200}{share}"

    async def send(self, event: dict[str, object]) -> None:
        """Send one event."""
        await self._write(b"data: " + msgspec.json.encode(event) + b"\n\n")

    async def send_done(self) -> None:
        """Tell the client that the reply is complete."""
        await self._write(b"data: [DONE]\n\n")

    async def end(self) -> None:
        """End the response; a comment that waits its turn meanwhile is dropped."""
        async with self._turn:
            self._has_ended = True
            await self._send({"type": "http.response.body", "body": b""})

    async def keep_alive(self, scope: trio.CancelScope) -> None:
        """Send a comment after each silence; cancel `scope` when nobody reads it."""
        try:
            while True:
                await trio.sleep_until(self._sent_at + COMMENT_INTERVAL_S)
                if trio.current_time() >= self._sent_at + COMMENT_INTERVAL_S:
                    await self._write(f": {self._note}\n\n".encode())
        except ClientGone:
            scope.cancel()

    async def _write(self, data: bytes) -> None:
        async with self._turn:
            if self._has_ended:
                return
            if not self.has_begun:
                self.has_begun = True
                await self._send(
                    {"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM}
                )
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._sent_at = trio.current_time()
