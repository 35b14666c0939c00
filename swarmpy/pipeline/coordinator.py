"""The coordinator's side of a ready ring: its stages, its slots, and the sessions in them.

A `Pipeline` lives until a stage, its engine or its connection is lost; then every session in it
ends with that error, the other stages are released, and the next request is planned anew.
Spec: protocols/pipeline.md (revision 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from swarmpy.abc import Progress
from swarmpy.config import SESSION_LEASE_S, SESSIONS_MAX
from swarmpy.errors import (
    NetworkError,
    OfferRejected,
    PipelineError,
    StageLost,
    SwarmError,
)
from swarmpy.identity import PeerId
from swarmpy.pipeline.audience import Audience
from swarmpy.pipeline.links import CoordinatorControl, OutEdge, error_of
from swarmpy.pipeline.planner import Plan, StagePlan
from swarmpy.pipeline.stage import StageService
from swarmpy.proto.membership import check_printable
from swarmpy.proto.pipeline import (
    Accepted,
    Beat,
    Close,
    Edge,
    Failed,
    Load,
    Loaded,
    Open,
    Opened,
    OpenRefused,
    Progressed,
    Refused,
    Release,
    SessionFailed,
    TokenFrame,
    TokenStep,
    encode_step,
)
from swarmpy.status import PipelineView, StageView

BEAT_S = SESSION_LEASE_S / 3
"""How often open sessions are renewed, whether or not steps reach a stage: two may be lost."""

SLOT_RETRY_S = 0.25
"""Pause before a stage that another coordinator keeps busy is asked again."""

SLOT_WAIT_S = 120.0
"""Longest wait for a slot that another coordinator holds."""


class OfferRefused(OfferRejected):
    """A peer refused the layers it was offered, and said what it could take instead.

    Attributes:
        peer: Who refused.
        memory_bytes: What it could give now; None where memory was not the reason.
        shards: Layers of the model it has loaded, where memory was the reason.
        is_busy: It waits for another coordinator's assembly: another time may do.
    """

    def __init__(
        self,
        message: str,
        *,
        peer: PeerId,
        memory_bytes: int | None = None,
        shards: tuple[tuple[int, int], ...] = (),
        is_busy: bool = False,
    ) -> None:
        super().__init__(message)
        self.peer = peer
        self.memory_bytes = memory_bytes
        self.shards = shards
        self.is_busy = is_busy


class Listener(Protocol):
    """What a pipeline needs of a session."""

    id: bytes

    def token_received(self, token: TokenFrame) -> None:
        """Take what a step gave."""

    def fail(self, error: SwarmError) -> None:
        """End with an error."""


class StageClient:
    """What a coordinator says to one stage, and hears from it."""

    def __init__(self, control: CoordinatorControl, plan: StagePlan) -> None:
        self.plan = plan
        self.loaded: Loaded | None = None
        self.fetch_bytes = 0
        self.broken: SwarmError | None = None
        """What broke the stream below, where that is known."""
        self._control = control
        self._answers: dict[bytes, tuple[trio.Event, list[Opened | OpenRefused]]] = {}

    def __repr__(self) -> str:
        return f"layers {self.plan.start}-{self.plan.end - 1} on {self.plan.name}"

    async def wait_accepted(self) -> Accepted:
        """Wait for the answer to the offer.

        Raises:
            OfferRefused: No; the message is the peer's own.
            StageLost: The peer went away instead.
        """
        match await self._control.receive():
            case Accepted() as accepted:
                self.fetch_bytes = accepted.fetch_bytes
                return accepted
            case Refused() as refused:
                raise OfferRefused(
                    f"{self.plan.name} refused {self!r}: {refused.message}",
                    peer=self.plan.peer,
                    memory_bytes=refused.memory_bytes if refused.reason == "memory" else None,
                    shards=refused.shards,
                    is_busy=refused.reason == "busy",
                )
            case _:
                raise self._lost()

    async def load(self, progress: Callable[[Progress], None]) -> Loaded:
        """Have the stage load its shard.

        Raises:
            PipelineError, ModelError: What the stage said went wrong.
            StageLost: It went away instead.
        """
        self._control.send_nowait(Load())
        while True:
            match await self._control.receive():
                case Progressed() as report:
                    progress(
                        Progress(
                            step=f"loading {self!r}",
                            done=report.done,
                            total=report.total,
                            unit=report.unit,
                        )
                    )
                case Loaded() as loaded:
                    check_printable(loaded.engine, "report")
                    check_printable(loaded.exactness, "report")
                    self.loaded = loaded
                    return loaded
                case Failed() as failed:
                    raise error_of(failed.error, f"{self!r}: {failed.message}")
                case _:
                    raise self._lost()

    async def run(self, session_failed: Callable[[SessionFailed, StageClient], None]) -> SwarmError:
        """Hear what the stage reports, once it is loaded; return why it ended."""
        error: SwarmError | None = None
        while error is None:
            match await self._control.receive():
                case (Opened() | OpenRefused()) as answer:
                    event, answers = self._answers.get(answer.session, (trio.Event(), []))
                    answers.append(answer)
                    event.set()
                case SessionFailed() as failed:
                    session_failed(failed, self)
                case Failed() as failed:
                    error = error_of(failed.error, f"{self!r}: {failed.message}")
                case _:
                    error = self._lost()
        for event, _ in self._answers.values():
            event.set()
        return error

    def _lost(self) -> StageLost:
        reason = f": {self.broken}" if self.broken is not None else ""
        return StageLost(f"{self!r} went away{reason}")

    def send_open(self, message: Open, audience: Audience) -> None:
        """Ask for a slot; `wait_opened` gives the answer.

        Raises:
            LocalProtocolError: The stage is not in the session's audience; nothing was sent.
        """
        audience.require(self.plan.peer)
        self._answers[message.session] = (trio.Event(), [])
        self._control.send_nowait(message)

    async def wait_opened(self, session: bytes) -> Opened | OpenRefused:
        """Wait for the answer to `send_open`.

        Raises:
            StageLost: The stage went away instead.
        """
        event, answers = self._answers[session]
        await event.wait()
        if not answers:
            raise self._lost()
        return answers[0]

    def forget(self, session: bytes) -> None:
        """Wait no more for the answer to `send_open`."""
        self._answers.pop(session, None)

    def close_session(self, session: bytes) -> None:
        """Free the session's slot there."""
        self._control.send_nowait(Close(session=session))

    def beat(self, sessions: tuple[bytes, ...]) -> None:
        """Renew the leases of sessions."""
        self._control.send_nowait(Beat(sessions=sessions))

    def release(self) -> None:
        """Give the stage up."""
        self._control.send_nowait(Release())
        self._control.close()


class Pipeline:
    """A ready ring and the sessions this node runs in it."""

    def __init__(
        self,
        *,
        pipeline_id: bytes,
        model_id: str,
        model: str,
        plan: Plan,
        clients: tuple[StageClient, ...],
        service: StageService,
    ) -> None:
        self.id = pipeline_id
        self.model_id = model_id
        self.model = model
        self.inspection = plan.inspection
        self.plan = plan
        self.context = plan.context
        self.clients = clients
        self.error: SwarmError | None = None
        """Why the pipeline is gone."""
        self._service = service
        self._sessions: dict[bytes, Listener] = {}
        self._slot_count = min(item.loaded.slots for item in clients if item.loaded is not None)
        self._slots = trio.Semaphore(self._slot_count)
        self._closed = trio.Event()
        self._idle = trio.Event()
        """Set when the last session is over, and when the pipeline is closed."""
        self.is_draining = False
        """Whether it is given up as soon as its sessions are over; it takes no new ones."""
        self.audience = Audience((service.peer, *plan.ring))
        """All that may be sent anything of a session here."""
        service.listen(pipeline_id, plan.ring[-1], self._token_received)

    @property
    def is_open(self) -> bool:
        return not self._closed.is_set()

    async def wait_closed(self) -> None:
        """Wait until the pipeline is lost or given up."""
        await self._closed.wait()

    async def drain(self, error: SwarmError) -> None:
        """Let the sessions that run or wait for a slot finish, then close with `error`.

        Cancelled, the pipeline goes on as before.
        """
        self.is_draining = True
        try:
            # Who got the pipeline before it was draining may begin just when it falls idle.
            while self.is_open and not self._is_idle():
                self._idle = trio.Event()
                await self._idle.wait()
        except trio.Cancelled:
            self.is_draining = False
            raise
        self.close(error)

    def _is_idle(self) -> bool:
        """Whether all slots are free: one that is given on to who waits for it is not."""
        return self._slots.value == self._slot_count

    @property
    def service(self) -> StageService:
        """This node's end of the protocol."""
        return self._service

    def view(self) -> PipelineView:
        """The pipeline as the CLI and the admin API show it."""
        return PipelineView(
            id=self.id.hex(),
            model_id=self.model_id,
            model=self.model,
            layer_count=self.inspection.layer_count,
            context=self.context,
            stages=tuple(self._stage_view(client) for client in self.clients),
            predicted_tok_s=self.plan.tok_s,
            sessions=len(self._sessions),
        )

    def _stage_view(self, client: StageClient) -> StageView:
        plan, loaded = client.plan, client.loaded
        return StageView(
            peer=plan.peer,
            name=plan.name,
            start=plan.start,
            end=plan.end,
            weight_bytes=loaded.weight_bytes if loaded else 0,
            planned_weight_bytes=plan.terms.weights,
            rss_bytes=loaded.rss_bytes if loaded else 0,
            engine=loaded.engine if loaded else "",
            exactness=loaded.exactness if loaded else "",
            sees_prompt=self.sees_prompt(plan.start),
            path=self._path(plan.peer),
            fetch_bytes=client.fetch_bytes,
        )

    def _path(self, peer: PeerId) -> str:
        if peer == self._service.peer:
            return "local"
        connection = self._service.host.connection_to(peer)
        return connection.path if connection is not None else "lost"

    def sees_prompt(self, start: int) -> bool:
        """Whether the stage that begins at layer `start` is sent token ids.

        A stage passes them on where any stage behind it needs them.
        """
        return start == 0 or self.inspection.needs_token_ids(start, self.inspection.layer_count)

    async def run(self) -> None:
        """Hear all stages and renew sessions until the pipeline is lost or closed."""
        async with trio.open_nursery() as nursery:
            for client in self.clients:
                nursery.start_soon(self._hear, client)
            nursery.start_soon(self._beat)
            await self._closed.wait()
            nursery.cancel_scope.cancel()

    async def _hear(self, client: StageClient) -> None:
        self.close(await client.run(self._session_failed))

    async def _beat(self) -> None:
        while True:
            await trio.sleep(BEAT_S)
            sessions = tuple(self._sessions)[:SESSIONS_MAX]
            if sessions:
                for client in self.clients:
                    client.beat(sessions)

    def close(self, error: SwarmError) -> None:
        """Release every stage and end every session with an error."""
        if not self.is_open:
            return
        self.error = error
        self._closed.set()
        self._idle.set()
        for session in list(self._sessions.values()):
            session.fail(error)
        for _ in range(self._slots.statistics().tasks_waiting):
            self._slots.release()  # Who waits for a slot finds the pipeline lost.
        for client in self.clients:
            client.release()
        self._service.unlisten(self.id)

    def _session_failed(self, failed: SessionFailed, client: StageClient) -> None:
        session = self._sessions.get(failed.session)
        if session is not None:
            session.fail(error_of(failed.error, f"{client!r}: {failed.message}"))

    def _token_received(self, token: TokenFrame) -> None:
        session = self._sessions.get(token.session)
        if session is not None:
            session.token_received(token)

    # Sessions -------------------------------------------------------------------

    async def open_session(
        self,
        session: Listener,
        messages: tuple[Open, ...],
        audience: Audience,
        progress: Callable[[Progress], None],
    ) -> None:
        """Take a slot of every stage for a session, waiting in line for them.

        Args:
            messages: The `Open` of each stage, in order.

        Raises:
            PipelineError: Too many sessions wait, a stage refused, or another coordinator kept the
                slots for `SLOT_WAIT_S`.
            StageLost, EngineLost: The pipeline was lost meanwhile.
        """
        await self._wait_slot(progress)
        self._sessions[session.id] = session  # From here on `close_session` gives the slot back.
        try:
            self._raise_if_lost()
            deadline = trio.current_time() + SLOT_WAIT_S
            while not await self._try_open(messages, audience):
                if trio.current_time() >= deadline:
                    raise PipelineError(f"no slot came free for {SLOT_WAIT_S:.0f} s")
                progress(Progress(step="queued", done=0, total=0, unit="sessions"))
                await trio.sleep(SLOT_RETRY_S)
                self._raise_if_lost()
        except BaseException:
            self.close_session(session)
            raise

    async def _wait_slot(self, progress: Callable[[Progress], None]) -> None:
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            waiting = self._slots.statistics().tasks_waiting
            if waiting >= SESSIONS_MAX:
                raise PipelineError(f"{waiting} requests wait for a slot already") from None
            progress(Progress(step="queued", done=waiting + 1, total=0, unit="sessions"))
            await self._slots.acquire()

    async def _try_open(self, messages: tuple[Open, ...], audience: Audience) -> bool:
        """Ask all stages at once; False, with nothing taken, if one is busy."""
        for client, message in zip(self.clients, messages, strict=True):
            client.send_open(message, audience)
        refused: list[tuple[StageClient, OpenRefused]] = []
        try:
            for client, message in zip(self.clients, messages, strict=True):
                answer = await client.wait_opened(message.session)
                if isinstance(answer, OpenRefused):
                    refused.append((client, answer))
        except StageLost:
            self._raise_if_lost()  # With the reason.
            raise
        finally:
            for client, message in zip(self.clients, messages, strict=True):
                client.forget(message.session)
        if not refused:
            return True
        for client, message in zip(self.clients, messages, strict=True):
            client.close_session(message.session)
        for client, answer in refused:
            if not answer.is_busy:
                raise PipelineError(f"{client!r} refused the session: {answer.message}")
        return False

    def _raise_if_lost(self) -> None:
        if self.error is not None:
            raise self.error

    def close_session(self, session: Listener) -> None:
        """Free a session's slots everywhere; repeated calls do nothing."""
        if self._sessions.pop(session.id, None) is None:
            return
        for client in self.clients:
            client.close_session(session.id)
        self._slots.release()
        if self._is_idle():
            self._idle.set()

    def prompt_edge(self, session: bytes) -> OutEdge | None:
        """A stream for a session's prompt to the first stage; None where that is this node."""
        first = self.plan.ring[0]
        if first == self._service.peer:
            return None
        edge = Edge(pipeline=self.id, kind="bulk", stage=0, session=session)
        return OutEdge(self._service.host, first, edge)

    async def send_chunk(self, edge: OutEdge | None, step: TokenStep, audience: Audience) -> None:
        """Give a prompt chunk to the first stage.

        Raises:
            StageLost: The link to it broke.
        """
        if edge is not None:
            try:
                await edge.send(audience, encode_step(step))
            except NetworkError as error:
                raise StageLost(f"{self.clients[0]!r} went away: {error}") from error
            return
        stage = self._service.stage_of(self.id)
        session = stage.sessions.get(step.session) if stage is not None else None
        if stage is not None and session is not None:
            await stage.run(session, step, (), is_bulk=True)
