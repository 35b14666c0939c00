"""A session at its coordinator: the prompt goes out in chunks, tokens come back as they are made.

The coordinator only listens and stops: the first stage begins each step by itself, with the token
it has straight from the last one. Spec: protocols/pipeline.md, section "Sessions".
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt
import trio

from swarmpy.abc import Progress
from swarmpy.config import PREFILL_CHUNK, SESSION_LEASE_S, STEPS_IN_FLIGHT_MAX
from swarmpy.errors import (
    BadMessage,
    ContextExceeded,
    PeerTimeout,
    PipelineError,
    SamplingError,
    SwarmError,
)
from swarmpy.pipeline import sampling
from swarmpy.pipeline.audience import Audience
from swarmpy.pipeline.coordinator import Pipeline
from swarmpy.proto.pipeline import (
    HISTORY_IDS_MAX,
    STOP_IDS_MAX,
    Open,
    Sampling,
    TokenFrame,
    TokenStep,
)
from swarmpy.status import PipelineView

SILENCE_MARGIN_S = 10.0
"""Added to the longest engine step before a silent ring counts as lost: links and queues."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a reply."""

    id: int
    index: int
    """In the reply, from 0."""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a reply went; times are the coordinator's. Medians are over the reply's loops."""

    prompt_tokens: int
    reply_tokens: int
    ttft_s: float
    """From the request to its first token, waiting for a slot included."""
    tok_s: float
    """Tokens a second after the first; 0 for a single token."""
    loop_ms_p50: float
    """From token to token."""
    engine_ms_p50: float
    """Inside the engines, summed over the stages."""
    hop_overhead_ms_p50: float
    """(loop - engine) / hops: what network, node and engine pipes cost a hop."""
    hops: int
    predicted_tok_s: float
    sees_prompt: tuple[str, ...]
    """Names of the peers that were sent the prompt's token ids."""


def _ignore(progress: Progress) -> None:
    pass


async def generate(
    pipeline: Pipeline,
    token_ids: Sequence[int],
    spec: Sampling,
    *,
    session_id: bytes,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    step_timeout_s: float = 120.0,
    on_progress: Callable[[Progress], None] = _ignore,
    on_close: Callable[[Generation], None] | None = None,
) -> Generation:
    """Open a session on every stage and begin the reply.

    Args:
        session_id: 16 random bytes.
        max_tokens: Reply tokens at most; less where the context ends before.
        step_timeout_s: Longest engine step; a ring silent for longer is given up.
        on_close: Called once, when the reply is closed.

    Returns:
        The reply, to be iterated and closed (`async with`, or `aclose`).

    Raises:
        SamplingError: A parameter is outside its range.
        ContextExceeded: The prompt leaves no room for a reply.
        PipelineError: The prompt is empty or holds unknown ids, or no slot came free.
        StageLost, EngineLost: The pipeline was lost before the session was open.
    """
    generation = Generation(
        pipeline,
        _checked(token_ids, pipeline),
        spec,
        session_id=session_id,
        max_tokens=_checked_limits(max_tokens, stop_ids),
        silence_s=step_timeout_s + SILENCE_MARGIN_S,
    )
    generation.on_close = on_close
    sampling.check(spec)
    await generation.start(tuple(stop_ids), on_progress)
    return generation


def _checked(token_ids: Sequence[int], pipeline: Pipeline) -> npt.NDArray[np.int32]:
    ids = np.array(token_ids, np.int64)
    if not ids.size:
        raise PipelineError("the prompt is empty")
    if ids.min() < 0 or ids.max() >= pipeline.inspection.vocabulary_size:
        raise PipelineError(
            f"the prompt holds token ids beyond {pipeline.inspection.vocabulary_size}"
        )
    if ids.size >= pipeline.context:
        raise ContextExceeded(
            f"the prompt has {ids.size} tokens, the context {pipeline.context}, "
            "and the reply needs room for at least one"
        )
    return ids.astype("<i4")


def _checked_limits(max_tokens: int, stop_ids: Sequence[int]) -> int:
    if max_tokens < 1:
        raise SamplingError(f"max_tokens must be at least 1, got {max_tokens}")
    if len(stop_ids) > STOP_IDS_MAX:
        raise SamplingError(f"at most {STOP_IDS_MAX} stop tokens, got {len(stop_ids)}")
    return max_tokens


class Generation:
    """A reply under way: iterate its tokens, then read `finish_reason` and `report`.

    Always close it: its slots are taken until its end.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompt: npt.NDArray[np.int32],
        spec: Sampling,
        *,
        session_id: bytes,
        max_tokens: int,
        silence_s: float,
    ) -> None:
        self.id = session_id
        self.finish_reason: str | None = None
        """"stop" (a stop token was sampled; it is not part of the reply) or "length"; None before
        the end, and for a reply that was cut."""
        self.on_close: Callable[[Generation], None] | None = None
        self._pipeline = pipeline
        self._prompt = prompt
        self._spec = spec
        self._max_tokens = min(max_tokens, pipeline.context - len(prompt))
        self._silence_s = silence_s
        self._audience: Audience = pipeline.audience
        self._tokens: deque[Token] = deque()
        self._count = 0  # sampled, a stop token included
        self._next_step = 0
        self._error: SwarmError | None = None
        self._is_closed = False
        self._changed = trio.lowlevel.ParkingLot()  # wakes the reader and the feeder
        self._began_at = trio.current_time()
        self._first_at = 0.0
        self._last_at = 0.0
        self._loops_s: list[float] = []
        self._engines_s: list[float] = []

    @property
    def pipeline(self) -> PipelineView:
        """The ring that makes the reply."""
        return self._pipeline.view()

    @property
    def prompt_tokens(self) -> int:
        return len(self._prompt)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Token:
        """Return the next token.

        Raises:
            StageLost, EngineLost, RowError, PeerTimeout, ProtocolError: The reply cannot go on; its
                slots are free.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._tokens:
            if self._error is not None:
                self.close()
                raise self._error
            if self.finish_reason is not None or self._is_closed:
                self.close()
                raise StopAsyncIteration
            await self._wait_changed()
        return self._tokens.popleft()

    async def _wait_changed(self) -> None:
        """Wait for a token or an end; a ring silent for too long is an end."""
        with trio.move_on_after(self._silence_s) as silence:
            await self._changed.park()
        if silence.cancelled_caught:
            names = ", ".join(repr(client) for client in self._pipeline.clients)
            self.fail(PeerTimeout(f"no step came round for {self._silence_s:.0f} s by {names}"))

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def aclose(self) -> None:
        """End the reply, if it has not ended, and free its slots on every stage."""
        self.close()
        await trio.lowlevel.checkpoint_if_cancelled()

    def close(self) -> None:
        """As `aclose`; sending the goodbye waits for nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._pipeline.close_session(self)
            self._changed.unpark_all()
            if self.on_close is not None:
                self.on_close(self)

    # For the pipeline -------------------------------------------------------------

    async def start(self, stop_ids: tuple[int, ...], progress: Callable[[Progress], None]) -> None:
        """Open the session on all stages and begin to send the prompt."""
        messages = self._open_messages(stop_ids)
        await self._pipeline.open_session(self, messages, self._audience, progress)
        self._pipeline.service.spawn(self._feed)

    def _open_messages(self, stop_ids: tuple[int, ...]) -> tuple[Open, ...]:
        """The message for each stage; only the last one learns how to sample and when to stop."""
        plain = Open(
            session=self.id, epoch=0, audience=self._audience.peers, lease_s=SESSION_LEASE_S
        )
        needs_history = sampling.needs_history(self._spec)
        last = Open(
            session=self.id,
            epoch=0,
            audience=self._audience.peers,
            lease_s=SESSION_LEASE_S,
            sampling=self._spec,
            reply_position=len(self._prompt),
            max_tokens=self._max_tokens,
            stop_ids=stop_ids,
            history=self._prompt[-HISTORY_IDS_MAX:].tobytes() if needs_history else b"",
        )
        return (*[plain] * (len(self._pipeline.clients) - 1), last)

    async def _feed(self) -> None:
        """Send the prompt in chunks on the grid, as many under way as stages + 1."""
        window = min(len(self._pipeline.clients) + 1, STEPS_IN_FLIGHT_MAX)
        edge = self._pipeline.prompt_edge(self.id)
        starts = range(0, len(self._prompt), PREFILL_CHUNK)
        try:
            for index, start in enumerate(starts):
                while index - self._next_step >= window and not self._is_over:
                    await self._changed.park()
                if self._is_over:
                    return
                chunk = self._prompt[start : start + PREFILL_CHUNK]
                step = TokenStep(
                    session=self.id,
                    epoch=0,
                    step=index,
                    position=start,
                    count=len(chunk),
                    want="last_logits" if index == len(starts) - 1 else "nothing",
                    tensors=(),
                    engine_us=(),
                    token_ids=chunk.tobytes(),
                )
                await self._pipeline.send_chunk(edge, step, self._audience)
            if edge is not None:
                await edge.finish()
        except SwarmError as error:
            self.fail(error)
        finally:
            if edge is not None:
                edge.close()

    @property
    def _is_over(self) -> bool:
        return self._is_closed or self._error is not None or self.finish_reason is not None

    def fail(self, error: SwarmError) -> None:
        """End the reply with an error; tokens that came before it can still be read."""
        if not self._is_over:
            self._error = error
            self._pipeline.close_session(self)
            self._changed.unpark_all()

    def token_received(self, token: TokenFrame) -> None:
        """Take what a step gave: a token, or word that a prompt chunk is through."""
        if self._is_over or token.step < self._next_step:
            return
        expected = min(self._chunk_end(token.step), len(self._prompt)) + max(
            0, token.step - self._last_chunk
        )
        if token.step != self._next_step or token.position != expected:
            self.fail(
                BadMessage(f"token of step {token.step} at {token.position}, expected {expected}")
            )
            return
        if (token.token >= 0) != (token.step >= self._last_chunk):
            self.fail(BadMessage(f"step {token.step} came back as token {token.token}"))
            return
        self._next_step += 1
        if token.token >= 0:
            self._take(token)
        self._changed.unpark_all()

    def _chunk_end(self, step: int) -> int:
        return (step + 1) * PREFILL_CHUNK

    @property
    def _last_chunk(self) -> int:
        """The step whose chunk ends the prompt, and gives the first token."""
        return (len(self._prompt) - 1) // PREFILL_CHUNK

    def _take(self, token: TokenFrame) -> None:
        now = trio.current_time()
        if self._count:
            self._loops_s.append(now - self._last_at)
            self._engines_s.append(sum(token.engine_us) / 1e6)
        else:
            self._first_at = now
        self._last_at = now
        if token.finish != "stop":
            self._tokens.append(Token(token.token, self._count, token.logprob, token.top_logprobs))
        self._count += 1
        if token.finish:
            # The slots are free for others, however slowly the rest of the reply is read.
            self.finish_reason = token.finish
            self._pipeline.close_session(self)

    @property
    def report(self) -> Report:
        """How the reply went so far; complete once it has ended."""
        views = self._pipeline.view().stages
        names = [view.name for view in views if view.sees_prompt]
        if sampling.needs_history(self._spec) and not views[-1].sees_prompt:
            names.append(views[-1].name)
        hops = len(views) if len(views) > 1 else 0
        overheads = [
            (loop - engine) / max(1, hops)
            for loop, engine in zip(self._loops_s, self._engines_s, strict=True)
        ]
        elapsed_s = self._last_at - self._first_at
        return Report(
            prompt_tokens=len(self._prompt),
            reply_tokens=self._count - (self.finish_reason == "stop"),
            ttft_s=self._first_at - self._began_at if self._count else 0.0,
            tok_s=(self._count - 1) / elapsed_s if elapsed_s > 0 else 0.0,
            loop_ms_p50=_median_ms(self._loops_s),
            engine_ms_p50=_median_ms(self._engines_s),
            hop_overhead_ms_p50=_median_ms(overheads),
            hops=hops,
            predicted_tok_s=self._pipeline.plan.tok_s,
            sees_prompt=tuple(names),
        )


def _median_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1000 if seconds else 0.0
