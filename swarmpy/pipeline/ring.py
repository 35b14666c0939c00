"""One stage's place in a ring: its sessions, and what becomes of every step it receives.

The hot path of a reply. A step is handled in the task that received it: check, compute, send on;
the last stage samples, and its token goes straight to the first stage and to the coordinator.
Whatever is wrong with one session ends that session alone. Spec: protocols/pipeline.md, "Steps".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import trio

from swarmpy.abc import Host, Inspection, Output, Row, Want
from swarmpy.config import PREFILL_CHUNK, SESSIONS_MAX
from swarmpy.errors import (
    BadMessage,
    EngineLost,
    NetworkError,
    PipelineError,
    ProtocolError,
    RemoteProtocolError,
    RowError,
    StageLost,
    SwarmError,
)
from swarmpy.identity import PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.pipeline import sampling
from swarmpy.pipeline.audience import Audience
from swarmpy.pipeline.finite import is_finite
from swarmpy.pipeline.fit import passed_bytes
from swarmpy.pipeline.holdings import Holding, Holdings
from swarmpy.pipeline.links import OutEdge, Spawn, StageControl, error_name
from swarmpy.pipeline.stage_session import StageSession
from swarmpy.proto import wire
from swarmpy.proto.pipeline import (
    STEP_FRAME_BYTES_MAX,
    Edge,
    Failed,
    HiddenStep,
    Offer,
    Open,
    Opened,
    OpenRefused,
    SessionFailed,
    Step,
    TokenFrame,
    TokenStep,
    decode_step,
    encode_step,
    step_frame_bytes_max,
)
from swarmpy.proto.tensor import Hidden, Tensor, check_hidden

TokenSink = Callable[[TokenFrame], None]
"""Takes a token at its coordinator."""


class Stage:
    """This node as one stage of one ring."""

    def __init__(
        self,
        offer: Offer,
        *,
        coordinator: PeerId,
        inspection: Inspection,
        holding: Holding,
        holdings: Holdings,
        host: Host,
        control: StageControl,
        spawn: Spawn,
        deliver: Callable[[bytes, TokenFrame], None],
    ) -> None:
        """Args:
        deliver: Hands a token of a pipeline (by id) to its coordinator in this node.
        """
        self.offer = offer
        self.coordinator = coordinator
        self.holding = holding
        self.is_ready = False
        """Whether the shard is loaded and sessions may be opened."""
        self.sessions: dict[bytes, StageSession] = {}
        self._me = host.identity.peer_id
        self._host = host
        self._holdings = holdings
        self._control = control
        self._spawn = spawn
        self._deliver = deliver
        self._inspection = inspection
        ring = offer.ring
        self.is_first = offer.stage == 0
        self.is_last = offer.stage == len(ring) - 1
        self.first = PeerId(ring[0])
        self.last = PeerId(ring[-1])
        start, end = offer.cuts[offer.stage], offer.cuts[offer.stage + 1]
        self._passed_bytes = passed_bytes(inspection, start, end)
        self._needs_ids = inspection.needs_token_ids(start, end)
        self._takes_ids = self.is_first or inspection.needs_token_ids(start, offer.cuts[-1])
        self._sends_ids = not self.is_last and inspection.needs_token_ids(end, offer.cuts[-1])
        self._next = PeerId(ring[(offer.stage + 1) % len(ring)])
        self._step_edge: OutEdge | None = None
        self._token_edges: tuple[OutEdge, ...] = ()
        if self.is_last:
            receivers = dict.fromkeys((self.first, coordinator))
            self._token_edges = tuple(
                self._edge(peer, Edge(pipeline=offer.pipeline, kind="token"))
                for peer in receivers
                if peer != self._me
            )
        else:
            step = Edge(pipeline=offer.pipeline, kind="step", stage=offer.stage + 1)
            self._step_edge = self._edge(self._next, step)
        self._is_closed = False

    def _edge(self, peer: PeerId, first: Edge) -> OutEdge:
        return OutEdge(self._host, peer, first, spawn=self._spawn, on_lost=self._edge_lost)

    # Sessions -------------------------------------------------------------------

    def open(self, message: Open) -> None:
        """Take a session in, and answer."""
        reason, is_busy = self._refusal(message)
        taken = None if reason else self._holdings.take_slot(self.holding)
        if taken is None:
            self._control.send_nowait(
                OpenRefused(
                    session=message.session,
                    is_busy=is_busy,
                    message=reason or f"all {self.holding.slots} slots are taken",
                )
            )
            return
        history = None
        if message.sampling is not None and sampling.needs_history(message.sampling):
            history = np.frombuffer(message.history, "<i4").tolist()
        slot, cleared = taken
        self.sessions[message.session] = StageSession(
            id=message.session,
            epoch=message.epoch,
            audience=Audience(PeerId(peer) for peer in message.audience),
            slot=slot,
            cleared=cleared,
            lease_s=message.lease_s,
            lease_until=trio.current_time() + message.lease_s,
            sampling=message.sampling,
            reply_position=message.reply_position,
            max_tokens=message.max_tokens,
            stop_ids=frozenset(message.stop_ids),
            history=history,
        )
        self._control.send_nowait(Opened(session=message.session, slot=slot))

    def _refusal(self, message: Open) -> tuple[str, bool]:
        """Why a session cannot be taken in ("" if it can), and whether another time may do."""
        allowed = {*self.offer.ring, self.coordinator}
        if not self.is_ready:
            return "the stage is not loaded", False
        if message.session in self.sessions:
            return "the session is open already", False
        if len(self.sessions) >= SESSIONS_MAX:
            return f"{SESSIONS_MAX} sessions are open", True
        if not set(message.audience) <= allowed:
            return "the audience names peers outside the ring", False
        if self.is_last and message.sampling is None:
            return "the last stage needs to know how to sample", False
        if not self.is_last and (message.sampling or message.history or message.stop_ids):
            return "only the last stage samples", False
        if len(message.history) % 4:
            return "the history is no list of int32", False
        return "", True

    def beat(self, session_ids: Sequence[bytes]) -> None:
        """Renew sessions' leases; the shard is in use, were it only to be part of a ring soon."""
        self._holdings.touch(self.holding)
        for session_id in session_ids:
            session = self.sessions.get(session_id)
            if session is not None:
                session.lease_until = trio.current_time() + session.lease_s

    def close_session(self, session_id: bytes) -> None:
        """Forget a session and free its slot; unknown ones are over already."""
        session = self.sessions.pop(session_id, None)
        if session is None:
            return
        if session.bulk is not None:
            session.bulk.close()
        self._holdings.return_slot(self.holding, session.slot)

    def fail(self, session: StageSession, error: SwarmError) -> None:
        """End one session and tell its coordinator why."""
        if self.sessions.get(session.id) is not session:
            return
        self.close_session(session.id)
        self._control.send_nowait(
            SessionFailed(
                session=session.id,
                epoch=session.epoch,
                error=error_name(error),
                message=str(error)[:4096],
            )
        )

    def fail_all(self, error: SwarmError) -> None:
        """End every session of this stage."""
        for session in list(self.sessions.values()):
            self.fail(session, error)

    def expire(self, now: float) -> None:
        """End sessions whose lease ran out."""
        for session in list(self.sessions.values()):
            if session.lease_until < now:
                self.fail(session, PipelineError(f"no step or beat for {session.lease_s:.0f} s"))

    def close(self) -> None:
        """Give everything up: sessions, edges and the control channel."""
        self._is_closed = True
        for session_id in list(self.sessions):
            self.close_session(session_id)
        for edge in (self._step_edge, *self._token_edges):
            if edge is not None:
                edge.close()
        self._control.close()

    @property
    def receivers(self) -> tuple[PeerId, ...]:
        """The other peers this stage sends steps or tokens to."""
        if self.is_last:
            return tuple(edge.peer for edge in self._token_edges)
        return (self._next,)

    def lost(self, error: PipelineError) -> None:
        """The shard is gone, and this stage with it: tell the coordinator, then give all up."""
        self.fail_all(error)
        self._control.send_nowait(Failed(error=error_name(error), message=str(error)[:4096]))
        self.close()

    def _edge_lost(self, reason: str) -> None:
        if not self._is_closed:
            self.fail_all(StageLost(reason))

    # Steps ----------------------------------------------------------------------

    async def serve_steps(self, stream: MessageStream, edge: Edge) -> None:
        """Receive steps from the stage before, or prompt chunks from the coordinator.

        Raises:
            RemoteProtocolError: The peer is not who comes before this stage, or sent no valid step;
                the sessions concerned were told.
        """
        before = self.coordinator if self.is_first else self.offer.ring[self.offer.stage - 1]
        if stream.peer != before or edge.stage != self.offer.stage:
            raise RemoteProtocolError("not the stage before this one", peer=stream.peer)
        is_bulk = edge.kind == "bulk"
        if is_bulk:
            limit = step_frame_bytes_max(self.offer.received, count=PREFILL_CHUNK)
        else:
            limit = STEP_FRAME_BYTES_MAX
        try:
            while (frame := await stream.receive_frame(limit)) is not None:
                await self._step_received(frame, edge)
        except ProtocolError as error:
            self._stream_spoiled(edge, error)
            raise

    def _stream_spoiled(self, edge: Edge, error: ProtocolError) -> None:
        """A stream brought what is no valid step: its frames are lost, and its sessions with it."""
        if edge.kind == "bulk":
            session = self.sessions.get(edge.session)
            if session is not None:
                self.fail(session, error)
        else:
            self.fail_all(error)

    async def _step_received(self, frame: memoryview, edge: Edge) -> None:
        step, hidden = decode_step(frame)
        is_bulk = edge.kind == "bulk"
        if is_bulk and step.session != edge.session:
            raise BadMessage("a step of another session on a bulk stream")
        session = self.sessions.get(step.session)
        if session is None or step.epoch < session.epoch:
            return  # Closed while the step was under way.
        try:
            self._check(step, hidden)
        except ProtocolError as error:
            self.fail(session, error)
            raise
        await self.run(session, step, hidden, is_bulk=is_bulk)

    def _check(self, step: Step, hidden: Hidden) -> None:
        """Check a received step before the engine sees it.

        Raises:
            BadMessage: Wrong dtype, shape, length or count, token ids where none belong or none
                where they do, or a number that is not finite.
        """
        if isinstance(step, TokenStep) != self._takes_ids:
            expected = "takes" if self._takes_ids else "must not see"
            raise BadMessage(f"stage {self.offer.stage} {expected} token ids")
        if step.count > PREFILL_CHUNK:
            raise BadMessage(f"{step.count} tokens in one step, at most {PREFILL_CHUNK}")
        if len(step.engine_us) != self.offer.stage:
            raise BadMessage(f"{len(step.engine_us)} engine times before stage {self.offer.stage}")
        check_hidden(hidden, self.offer.received, count=step.count)
        for tensor in hidden:
            if not is_finite(tensor):
                raise BadMessage("the hidden state holds a NaN or infinity")
        if isinstance(step, TokenStep):
            ids = np.frombuffer(step.token_ids, "<i4")
            if ids.min() < 0 or ids.max() >= self._inspection.vocabulary_size:
                raise BadMessage(f"token ids beyond {self._inspection.vocabulary_size}")

    async def run(
        self, session: StageSession, step: Step, hidden: Hidden, *, is_bulk: bool
    ) -> None:
        """Compute a step and send on what it gives; errors end the session and are not raised.

        In a ring of one the token becomes the next step here, until the reply is over.
        """
        following: TokenFrame | None = None
        try:
            while True:
                following = await self._run_once(session, step, hidden, is_bulk=is_bulk)
                if following is None:
                    return
                step, hidden, is_bulk = self._next_step(session, following), (), False
        except NetworkError as error:
            self.fail(session, StageLost(f"the link to {self._next} broke: {error}"))
        except SwarmError as error:
            self.fail(session, error)

    async def _run_once(
        self, session: StageSession, step: Step, hidden: Hidden, *, is_bulk: bool
    ) -> TokenFrame | None:
        """Compute one step; return its token where this stage must begin the next step itself.

        Raises:
            RowError: The step does not follow the last one, or the engine refused it.
            EngineLost: The engine is gone.
            NetworkError: The next stage cannot be reached.
        """
        if step.step != session.next_step:
            await self._repeat(session, step)
            return None
        if session.cleared is not None:
            await session.cleared.wait()
            session.cleared = None
            if self.sessions.get(session.id) is not session:
                return None
        self._advance(session, step)
        ids = None
        if self._needs_ids and isinstance(step, TokenStep):
            ids = np.frombuffer(step.token_ids, "<i4")
        row = Row(
            slot=session.slot,
            position=step.position,
            count=step.count,
            token_ids=ids,
            hidden=hidden or None,
            want=Want(step.want) if self.is_last else Want.HIDDEN,
        )
        shard = self.holding.shard
        if shard is None:
            raise EngineLost("the shard was unloaded")
        outcome = await shard.step((row,))
        if self.sessions.get(session.id) is not session:
            return None  # Closed meanwhile.
        output = outcome.outputs[0]
        if output.error:
            raise RowError(output.error)
        if step.count == 1 and outcome.engine_s > 0:
            self._holdings.note_speed(
                self._inspection.engine, self._passed_bytes / outcome.engine_s
            )
        engine_us = (*step.engine_us, int(outcome.engine_s * 1e6))
        if self.is_last:
            return await self._send_token(session, self._finish(session, step, output, engine_us))
        await self._send_on(session, step, output, engine_us, is_bulk=is_bulk)
        return None

    def _advance(self, session: StageSession, step: Step) -> None:
        """Check that a step follows what is in the slot, and count it.

        Raises:
            RowError: It leaves a gap, or exceeds the context.
        """
        if step.position > session.end:
            raise RowError(f"step at position {step.position}, the slot ends at {session.end}")
        if step.position + step.count > self.offer.context:
            raise RowError(f"position {step.position + step.count} exceeds {self.offer.context}")
        session.next_step += 1
        session.end = step.position + step.count
        session.lease_until = trio.current_time() + session.lease_s

    async def _repeat(self, session: StageSession, step: Step) -> None:
        """Answer a step that was answered before from the cache; the state is not touched.

        Raises:
            RowError: The step lies ahead of the next one, or is no longer in the cache.
        """
        if step.step > session.next_step:
            raise RowError(f"step {step.step} came, step {session.next_step} is next")
        answer = session.answer(step.step)
        if answer is None:
            raise RowError(f"step {step.step} came again and is no longer cached")
        frame, is_bulk = answer
        await self._send_frame(session, frame, is_bulk=is_bulk)

    async def _send_on(
        self,
        session: StageSession,
        step: Step,
        output: Output,
        engine_us: tuple[int, ...],
        *,
        is_bulk: bool,
    ) -> None:
        """Send a step's hidden state straight to the next stage."""
        hidden = output.hidden or ()
        following = _header(
            step,
            tensors=tuple(tensor.spec for tensor in hidden),
            engine_us=engine_us,
            with_ids=self._sends_ids,
        )
        frame = encode_step(following, hidden)
        is_bulk = is_bulk or len(frame) > STEP_FRAME_BYTES_MAX
        session.remember(step.step, frame, is_bulk)
        await self._send_frame(session, frame, is_bulk=is_bulk)
        if is_bulk and step.want == "last_logits" and session.bulk is not None:
            bulk, session.bulk = session.bulk, None
            await bulk.finish()

    async def _send_frame(self, session: StageSession, frame: bytes, *, is_bulk: bool) -> None:
        if self._step_edge is None:
            for edge in self._token_edges:
                await edge.send(session.audience, frame)
        elif is_bulk:
            if session.bulk is None:
                session.bulk = OutEdge(self._host, self._next, self._bulk_edge(session))
            await session.bulk.send(session.audience, frame)
        else:
            await self._step_edge.send(session.audience, frame)

    def _bulk_edge(self, session: StageSession) -> Edge:
        return Edge(
            pipeline=self.offer.pipeline,
            kind="bulk",
            stage=self.offer.stage + 1,
            session=session.id,
        )

    # Tokens ---------------------------------------------------------------------

    def _finish(
        self, session: StageSession, step: Step, output: Output, engine_us: tuple[int, ...]
    ) -> TokenFrame:
        """Sample what the step asked for, and say whether the reply is over."""
        position = step.position + step.count
        if step.want == "nothing" or output.logits is None or session.sampling is None:
            return TokenFrame(
                session=session.id,
                epoch=session.epoch,
                step=step.step,
                position=position,
                token=-1,
                engine_us=engine_us,
            )
        choice = sampling.sample(
            _row(output.logits),
            session.sampling,
            position=position,
            history=session.history or (),
        )
        if session.history is not None:
            session.history.append(choice.token)
        finish = ""
        if choice.token in session.stop_ids:
            finish = "stop"
        elif position + 1 - session.reply_position >= session.max_tokens:
            finish = "length"
        return TokenFrame(
            session=session.id,
            epoch=session.epoch,
            step=step.step,
            position=position,
            token=choice.token,
            finish=finish,  # type: ignore[arg-type]
            engine_us=engine_us,
            logprob=choice.logprob,
            top_logprobs=choice.top_logprobs,
        )

    async def _send_token(self, session: StageSession, token: TokenFrame) -> TokenFrame | None:
        """Send a token to the first stage and the coordinator; return it if this is the first."""
        frame = wire.encode(token)
        session.remember(token.step, frame, False)
        await self._send_frame(session, frame, is_bulk=False)
        if self.coordinator == self._me:
            self._deliver(self.offer.pipeline, token)
        goes_on = self.is_first and token.token >= 0 and not token.finish
        return token if goes_on and self.sessions.get(session.id) is session else None

    async def token_received(self, token: TokenFrame) -> None:
        """At the first stage: begin the next step with a token the last stage sampled.

        Raises:
            BadMessage: The token lies beyond the vocabulary; the session was told.
        """
        session = self.sessions.get(token.session)
        if session is None or token.epoch < session.epoch or token.token < 0 or token.finish:
            return
        if token.step < session.next_step - 1:
            return  # Repeated: the next step has begun.
        try:
            if token.step != session.next_step - 1 or token.position != session.end:
                raise BadMessage(f"token of step {token.step} at position {token.position}")
            if token.token >= self._inspection.vocabulary_size:
                raise BadMessage(f"token {token.token} beyond {self._inspection.vocabulary_size}")
        except BadMessage as error:
            self.fail(session, error)
            raise
        await self.run(session, self._next_step(session, token), (), is_bulk=False)

    def _next_step(self, session: StageSession, token: TokenFrame) -> TokenStep:
        return TokenStep(
            session=session.id,
            epoch=session.epoch,
            step=session.next_step,
            position=token.position,
            count=1,
            want="last_logits",
            tensors=(),
            engine_us=(),
            token_ids=token.token.to_bytes(4, "little"),
        )


def _header(
    step: Step, *, tensors: tuple[object, ...], engine_us: tuple[int, ...], with_ids: bool
) -> Step:
    """The header of a step for the next stage, token ids only if somebody there needs them."""
    if with_ids and isinstance(step, TokenStep):
        return TokenStep(
            session=step.session,
            epoch=step.epoch,
            step=step.step,
            position=step.position,
            count=step.count,
            want=step.want,
            tensors=tensors,  # type: ignore[arg-type]
            engine_us=engine_us,
            token_ids=step.token_ids,
        )
    return HiddenStep(
        session=step.session,
        epoch=step.epoch,
        step=step.step,
        position=step.position,
        count=step.count,
        want=step.want,
        tensors=tensors,  # type: ignore[arg-type]
        engine_us=engine_us,
    )


def _row(logits: Tensor) -> sampling.Floats:
    return np.frombuffer(logits.data, np.float32)
