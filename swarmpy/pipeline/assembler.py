"""Assembler: a ready pipeline for a model, or plan, offer, load, and roll back on a refusal.

All stages accept before any loads, and all load at once. What a peer refused is planned around
once. Ready pipelines are kept until a stage is lost.
Spec: protocols/pipeline.md, section "Assembly".
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass, field, replace

import trio

from swarmpy.abc import Inspection, Priority, Progress
from swarmpy.config import EngineConfig
from swarmpy.errors import (
    ModelError,
    ModelNotFound,
    NetworkError,
    NoPipeline,
    PeerTimeout,
    PipelineError,
    ProtocolError,
    RemoteProtocolError,
    StageEvicted,
    StageLost,
    SwarmError,
)
from swarmpy.identity import PeerId, RandomBytes
from swarmpy.net.messages import MessageStream
from swarmpy.pipeline.coordinator import OfferRefused, Pipeline, StageClient
from swarmpy.pipeline.fit import format_bytes
from swarmpy.pipeline.links import PROTOCOL, carry, control_pair
from swarmpy.pipeline.offers import inspection_of
from swarmpy.pipeline.planner import ENGINES_MAX, Capacity, Plan, plan
from swarmpy.pipeline.stage import StageService
from swarmpy.proto.pipeline import Describe, Described, Description, Offer, Report
from swarmpy.status import PipelineView

logger = logging.getLogger(__name__)

OFFER_TIMEOUT_S = 150.0
"""From an offer to its answer: the peer may have to start an engine to inspect the model."""

DESCRIBE_WAIT_S = 3.0
"""For peers' descriptions of a model, once one is there: who does not answer is done without."""

ASKED_MAX = 3
"""Peers that are asked of one engine: the first to answer will do."""

UNKNOWN_MAX = 16
"""Peers that are asked for their engine, which they announce a second after they started."""

PLANS_MAX = 3
"""Plans tried for one request: what was announced may be out of date."""

BUSY_WAIT_S = 1800.0
"""Longest wait for other coordinators' assemblies: a large model loads from a slow disk."""

ASSEMBLY_BEAT_S = 1.0
"""Between two beats to the stages of a ring that is being loaded."""

BUSY_PAUSE_S = 0.3
"""Between two tries at a ring that another coordinator is assembling: many offers' round trips."""

Capacities = Callable[[str], Sequence[Capacity]]
"""What this node and each connected member offer for a model, by model id."""


def _ignore(progress: Progress) -> None:
    pass


class Assembler:
    """Keeps this node's ready pipelines. `run` must be running for anything else to work."""

    def __init__(
        self,
        service: StageService,
        *,
        config: EngineConfig,
        capacities: Capacities,
        random: RandomBytes,
        model_name: Callable[[str], str] = str,
        is_single: bool = False,
    ) -> None:
        """Args:
        random: Draws pipeline ids (`environment.random`).
        model_name: A model's name for people, by model id.
        is_single: Whether one model is held at a time: others are given up, once their replies
            are over, before one is assembled.
        """
        self._service = service
        self._host = service.host
        self._config = config
        self._capacities = capacities
        self._random = random
        self._model_name = model_name
        self._is_single = is_single
        self._pipelines: dict[str, Pipeline] = {}
        self._assembling: dict[str, tuple[trio.Lock, int]] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then release every stage."""
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            for pipeline in list(self._pipelines.values()):
                pipeline.close(StageLost("the node is stopping"))

    def pipelines(self) -> list[PipelineView]:
        """The ready pipelines, by model id."""
        return [self._pipelines[model_id].view() for model_id in sorted(self._pipelines)]

    def ready(self, model_id: str) -> Pipeline | None:
        """The ready pipeline of a model, None where there is none or it has just been lost."""
        pipeline = self._pipelines.get(model_id)
        is_usable = pipeline is not None and pipeline.is_open and not pipeline.is_draining
        return pipeline if is_usable else None

    async def pipeline_for(
        self, model_id: str, *, on_progress: Callable[[Progress], None] = _ignore
    ) -> Pipeline:
        """Return a ready pipeline for a model, assembled now if there is none.

        Requests for one model wait for one assembly; if its requester is cancelled, the next one
        takes over.

        Raises:
            NoPipeline: Nobody can hold the model; says what is missing and who was asked.
            ModelNotFound: Nobody here has the model.
            PipelineError, ModelError: The stages' own errors, where planning anew did not help.
        """
        pipeline = self.ready(model_id)
        if pipeline is not None:
            return pipeline
        key = "" if self._is_single else model_id
        lock, count = self._assembling.get(key, (trio.Lock(), 0))
        self._assembling[key] = (lock, count + 1)
        try:
            async with lock:
                pipeline = self.ready(model_id)
                if pipeline is None:
                    if self._is_single:
                        await self._give_up_others(on_progress)
                    pipeline = await self._assemble(model_id, on_progress)
                return pipeline
        finally:
            lock, count = self._assembling.pop(key)
            if count > 1:
                self._assembling[key] = (lock, count - 1)

    async def _give_up_others(self, progress: Callable[[Progress], None]) -> None:
        """Give up every pipeline there is, once its replies are over."""
        for pipeline in list(self._pipelines.values()):
            step = f"waiting for replies of {pipeline.model}"
            progress(Progress(step=step, done=0, total=0, unit=""))
            await pipeline.drain(StageEvicted("it made room for another model (models.single)"))

    async def plan_for(self, model_id: str) -> Plan:
        """Return the plan that an assembly would begin with; nobody is asked to load anything.

        Raises:
            NoPipeline, ModelNotFound: As `pipeline_for`.
        """
        pipeline = self.ready(model_id)
        if pipeline is not None:
            return pipeline.plan
        told = await self._inspect(model_id)
        return self._plan(told, self._capacities(model_id), None)

    async def _assemble(self, model_id: str, progress: Callable[[Progress], None]) -> Pipeline:
        progress(Progress(step="inspecting the model", done=0, total=0, unit=""))
        told = await self._inspect(model_id)
        capacities = self._capacities(model_id)
        before: SwarmError | None = None
        lost: set[PeerId] = set()
        gives_up_at = trio.current_time() + BUSY_WAIT_S
        attempt = 1
        while True:
            layout = self._plan(told, capacities, before)
            progress(Progress(step=_describe(layout), done=0, total=0, unit=""))
            attempted = _Attempt(self._service, layout, self._random)
            try:
                clients = await attempted.run(self._offers(model_id, layout), progress)
            except BaseException:
                attempted.roll_back()
                raise
            if clients is not None:
                return self._commit(model_id, layout, attempted.id, clients)
            attempted.roll_back()
            if attempted.is_busy and trio.current_time() < gives_up_at:
                progress(Progress(step="waiting for another assembly", done=0, total=0, unit=""))
                await self._pause()
                capacities = self._capacities_without(lost, model_id)
                continue
            before = attempted.failure()
            if attempt == PLANS_MAX:
                raise before
            attempt += 1
            asked = self._capacities_without(lost, model_id)
            capacities = _after(attempted, asked)
            lost |= {item.peer for item in asked} - {item.peer for item in capacities}

    def _capacities_without(self, lost: Set[PeerId], model_id: str) -> list[Capacity]:
        """What is offered now by all but those that a plan before this one has failed on."""
        return [item for item in self._capacities(model_id) if item.peer not in lost]

    async def _pause(self) -> None:
        """Wait for a random while, or coordinators that refused each other would meet again."""
        share = int.from_bytes(self._random.randbytes(2), "big") / 0xFFFF
        await trio.sleep(BUSY_PAUSE_S * (0.5 + share))

    def _plan(self, told: _Told, capacities: Sequence[Capacity], before: SwarmError | None) -> Plan:
        try:
            return plan(
                list(told.inspections.values()),
                told.filled(capacities),
                slots=self._config.slots,
                context=self._config.context,
                coordinator=self._service.peer,
            )
        except NoPipeline as error:
            if before is None:
                raise
            raise NoPipeline(f"{before}; and without that: {error}") from before

    async def _inspect(self, model_id: str) -> _Told:
        """What each engine that could take part knows of a model, this node's first.

        Peers are asked for engines that this node does not have, and those that have just started
        and not announced theirs, all at once.

        Raises:
            SwarmError: Nobody said anything; this node's own reason.
        """
        told = _Told()
        missing: SwarmError = ModelNotFound(f"nobody says anything of model {model_id}")
        try:
            own = (await self._service.choose(model_id)).inspection
            told.inspections[own.engine] = own
        except SwarmError as error:
            missing = error
        asked = self._to_ask(model_id, told)
        with trio.CancelScope() as scope:
            if told.inspections:
                scope.deadline = trio.current_time() + DESCRIBE_WAIT_S
            async with trio.open_nursery() as nursery:
                for capacity in asked:
                    nursery.start_soon(self._hear, capacity, model_id, told, scope)
        if not told.inspections:
            raise missing
        return told

    def _to_ask(self, model_id: str, told: _Told) -> list[Capacity]:
        """Some peers of each engine that is not known yet, and those whose engine is not."""
        asked: dict[str, list[Capacity]] = {}
        for capacity in self._capacities(model_id):
            is_other = capacity.holds_model and capacity.peer != self._service.peer
            if is_other and capacity.engine not in told.inspections:
                asked.setdefault(capacity.engine, []).append(capacity)
        # "", those that have not told, comes first; then what many have: one liar displaces nobody.
        order = sorted(asked, key=lambda engine: (engine != "", -len(asked[engine]), engine))
        engines = order[: ENGINES_MAX + 1]
        return [
            capacity
            for engine in engines
            for capacity in asked[engine][: ASKED_MAX if engine else UNKNOWN_MAX]
        ]

    async def _hear(
        self, capacity: Capacity, model_id: str, told: _Told, scope: trio.CancelScope
    ) -> None:
        """Ask a peer; one with no answer, or of another engine than announced, is left out."""
        try:
            inspection = await self._ask(capacity.peer, model_id)
        except (NetworkError, ProtocolError, ModelError):
            return
        if capacity.engine in ("", inspection.engine):
            told.inspections.setdefault(inspection.engine, inspection)
            told.engines[capacity.peer] = inspection.engine
            scope.deadline = min(scope.deadline, trio.current_time() + DESCRIBE_WAIT_S)

    async def _ask(self, peer: PeerId, model_id: str) -> Inspection:
        await self._service.reach(peer)
        stream = MessageStream(await self._host.open_stream(peer, [PROTOCOL]))
        try:
            with trio.fail_after(OFFER_TIMEOUT_S):
                await stream.send(Describe(model_id=model_id))
                answer: Description = await stream.receive(Description)  # type: ignore[arg-type]
        except trio.TooSlowError as error:
            raise PeerTimeout(f"{peer} did not describe the model") from error
        finally:
            stream.reset()
        if not isinstance(answer, Described):
            raise ModelNotFound(answer.message)
        return inspection_of(answer)

    def _offers(self, model_id: str, layout: Plan) -> Callable[[bytes], list[Offer]]:
        """The offers of a plan, for a pipeline id."""

        def offers(pipeline: bytes) -> list[Offer]:
            return [
                Offer(
                    pipeline=pipeline,
                    model_id=model_id,
                    stage=index,
                    ring=layout.ring,
                    cuts=layout.cuts,
                    slots=layout.slots,
                    context=layout.context,
                    exact=self._config.exact,
                    received=stage.received,
                    sent=stage.sent,
                    expected_bytes=stage.terms.sum_bytes,
                )
                for index, stage in enumerate(layout.stages)
            ]

        return offers

    def _commit(
        self,
        model_id: str,
        layout: Plan,
        pipeline_id: bytes,
        clients: tuple[StageClient, ...],
    ) -> Pipeline:
        pipeline = Pipeline(
            pipeline_id=pipeline_id,
            model_id=model_id,
            model=self._model_name(model_id),
            plan=layout,
            clients=clients,
            service=self._service,
        )
        self._pipelines[model_id] = pipeline

        async def serve() -> None:
            try:
                await pipeline.run()
            finally:
                pipeline.close(StageLost("the node is stopping"))
                if self._pipelines.get(model_id) is pipeline:
                    del self._pipelines[model_id]
                logger.info("pipeline.closed", extra={"model": model_id})

        self._service.spawn(serve)
        logger.info("pipeline.ready", extra={"model": model_id, "stages": len(clients)})
        return pipeline


@dataclass
class _Told:
    """What was said of a model by engine, and the engines of peers that had not announced any."""

    inspections: dict[str, Inspection] = field(default_factory=dict)
    engines: dict[PeerId, str] = field(default_factory=dict)

    def filled(self, capacities: Sequence[Capacity]) -> list[Capacity]:
        """Return capacities with the engines that are known by now."""
        return [
            replace(item, engine=item.engine or self.engines.get(item.peer, ""))
            for item in capacities
        ]


class _Attempt:
    """One plan being offered and loaded."""

    def __init__(self, service: StageService, layout: Plan, random: RandomBytes) -> None:
        self.id = random.randbytes(16)
        self.errors: list[tuple[PeerId, SwarmError]] = []
        """Who could not take part, and why."""
        self.shards: dict[PeerId, tuple[tuple[int, int], ...]] = {}
        """Layers of the model that those who answered have loaded."""
        self._service = service
        self._layout = layout
        self._clients: list[StageClient] = []

    async def run(
        self,
        offers: Callable[[bytes], list[Offer]],
        progress: Callable[[Progress], None],
    ) -> tuple[StageClient, ...] | None:
        """Offer all stages, and load them once all have accepted; None if any did not."""
        for offer, stage in zip(offers(self.id), self._layout.stages, strict=True):
            if stage.peer == self._service.peer:
                control = self._service.offer_local(offer)
                self._clients.append(StageClient(control, stage))
            else:
                self._offer_remote(offer, stage.peer)
        if not await self._all(self._wait_accepted):
            return None
        fetching = [client for client in self._clients if client.fetch_bytes]
        if fetching:
            sizes = (f"{format_bytes(item.fetch_bytes)} on {item.plan.name}" for item in fetching)
            progress(Progress(step=f"to fetch: {', '.join(sizes)}", done=0, total=0, unit=""))

        async def load(client: StageClient) -> None:
            await client.load(progress)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            is_loaded = await self._all(load, stop_early=True)
            nursery.cancel_scope.cancel()
        return tuple(self._clients) if is_loaded else None

    async def _beat(self) -> None:
        """Keep shards that are loaded already from making room while others still fetch or load."""
        while True:
            for client in self._clients:
                client.beat(())
            await trio.sleep(ASSEMBLY_BEAT_S)

    def _offer_remote(self, offer: Offer, peer: PeerId) -> None:
        control, far_end = control_pair(coordinator=self._service.peer, stage=peer)
        client = StageClient(control, self._layout.stages[offer.stage])
        self._clients.append(client)

        async def run() -> None:
            try:
                await self._service.reach(peer)
                stream = MessageStream(
                    await self._service.host.open_stream(
                        peer, [PROTOCOL], priority=Priority.CONTROL
                    )
                )
                await stream.send(offer)
                client.broken = await carry(stream, far_end, Report)
            except (NetworkError, ProtocolError) as error:
                client.broken = error
            finally:
                far_end.close()

        self._service.spawn(run)

    async def _wait_accepted(self, client: StageClient) -> None:
        try:
            with trio.fail_after(OFFER_TIMEOUT_S):
                accepted = await client.wait_accepted()
                self.shards[client.plan.peer] = accepted.shards
        except OfferRefused as refused:
            self.shards[refused.peer] = refused.shards
            raise
        except trio.TooSlowError as error:
            raise PeerTimeout(f"{client!r}: no answer to the offer") from error

    async def _all(
        self, act: Callable[[StageClient], Awaitable[None]], *, stop_early: bool = False
    ) -> bool:
        """Do something with every stage at once; note who failed."""
        async with trio.open_nursery() as nursery:

            async def one(client: StageClient) -> None:
                try:
                    await act(client)
                except SwarmError as error:
                    self.errors.append((client.plan.peer, error))
                    if stop_early:
                        nursery.cancel_scope.cancel()

            for client in self._clients:
                nursery.start_soon(one, client)
        return not self.errors

    def roll_back(self) -> None:
        """Release every stage that accepted."""
        for client in self._clients:
            client.release()

    @property
    def is_busy(self) -> bool:
        """Whether somebody else's assembly is in the way: what it loads may serve this one too."""
        return any(isinstance(error, OfferRefused) and error.is_busy for _, error in self.errors)

    def failure(self) -> SwarmError:
        """The error to raise when planning anew does not help."""
        errors = sorted(self.errors, key=lambda entry: entry[0])
        if len(errors) == 1:
            return errors[0][1]
        message = "; ".join(str(error) for _, error in errors)
        if all(isinstance(error, OfferRefused) for _, error in errors):
            return NoPipeline(message)
        return PipelineError(message)


def _after(attempted: _Attempt, capacities: Sequence[Capacity]) -> list[Capacity]:
    """What is left to plan with: answers say what a peer has, other errors take it out."""
    changed = {
        capacity.peer: replace(
            capacity, shards=attempted.shards.get(capacity.peer, capacity.shards)
        )
        for capacity in capacities
    }
    for peer, error in attempted.errors:
        if peer not in changed:
            continue
        if isinstance(error, OfferRefused) and error.memory_bytes is not None:
            changed[peer] = replace(changed[peer], memory_bytes=error.memory_bytes)
        elif isinstance(error, ModelError | PipelineError | NetworkError | RemoteProtocolError):
            del changed[peer]
        else:
            raise error
    return list(changed.values())


def _describe(layout: Plan) -> str:
    """A plan in one line, for people."""
    stages = ", ".join(
        f"layers {stage.start}-{stage.end - 1} on {stage.name}" for stage in layout.stages
    )
    return f"planned {stages}"
