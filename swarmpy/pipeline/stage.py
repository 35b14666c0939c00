"""Stage service: serves `/swarmpy/pipeline/1` on this node, as a stage and as a coordinator's ear.

Checks offers, reserves memory, loads, and rolls all of it back when the coordinator releases the
stage or is gone; steps go to `ring.Stage`, tokens to the sessions this node coordinates.
Spec: protocols/pipeline.md (revision 1).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import trio

from swarmpy.abc import Host, Progress, Stream
from swarmpy.config import SESSION_LEASE_S, STAGES_MAX
from swarmpy.errors import (
    ConnectionLost,
    DoesNotFit,
    LocalProtocolError,
    ModelNotFound,
    ModelRefused,
    NetworkError,
    OfferRejected,
    PipelineError,
    ProtocolError,
    RemoteProtocolError,
    StageBusy,
    SwarmError,
)
from swarmpy.identity import PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.pipeline.engine_host import HostedShard
from swarmpy.pipeline.engines import Choice, Engines
from swarmpy.pipeline.fit import fit
from swarmpy.pipeline.holdings import Holding, Holdings
from swarmpy.pipeline.links import (
    PROTOCOL,
    CoordinatorControl,
    StageControl,
    carry,
    control_pair,
    error_name,
)
from swarmpy.pipeline.offers import check_offer, described
from swarmpy.pipeline.ring import Stage, TokenSink
from swarmpy.proto import wire
from swarmpy.proto.pipeline import (
    Accepted,
    Beat,
    Close,
    Command,
    Describe,
    Described,
    Edge,
    Failed,
    First,
    Load,
    Loaded,
    Offer,
    Open,
    Progressed,
    Refused,
    Release,
    TokenFrame,
)

logger = logging.getLogger(__name__)

STAGES_HELD_MAX = 64
"""Pipelines this node is a stage of at a time; each costs a few tasks and kilobytes."""

TASKS_MAX = 4096
"""Background tasks that may wait to be started: one a slot freed and an edge opened."""

TOKEN_FRAME_BYTES_MAX = 4096
"""A token with 20 alternatives and 64 engine times has 800 bytes."""

CHOICES_MAX = 64
"""Models of which it is remembered which engine runs them."""

LOAD_WAIT_S = 300.0
"""From an accepted offer to `Load`: the slowest peer's answer. Bounds what a coordinator that asks
and then says nothing can keep reserved."""

LOADS_MAX = 2
"""Tries to load a shard whose files are moved meanwhile: a model becomes whole but once."""

PROGRESS_S = 0.25
"""Between two reports of a load to its coordinator."""

FIRST_TIMEOUT_S = 10.0
"""From an opened stream to its first message, which its opener sends at once."""

LEASE_CHECK_S = SESSION_LEASE_S / 6
"""How often leases are looked at."""


ObtainFiles = Callable[[str, int, int, Callable[[Progress], None]], Awaitable[Path]]
"""Given a model id and layers [start, end), returns what an engine loads them from."""

CheckFiles = Callable[[str, int, int], Awaitable[int]]
"""Given the same, returns the bytes that `ObtainFiles` would fetch first."""


async def _no_bytes(model_id: str, start: int, end: int) -> int:
    """Of a node whose models are all whole."""
    return 0


class StageService:
    """A node's end of the pipeline protocol. `run` must be running for anything else to work."""

    def __init__(
        self,
        host: Host,
        engines: Engines,
        *,
        memory_bytes_max: int,
        find_model: Callable[[str], Path | None],
        obtain_files: ObtainFiles | None = None,
        check_files: CheckFiles = _no_bytes,
        connect: Callable[[PeerId], Awaitable[object]] | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        engines: None at all on a node that only coordinates: every offer is refused.
        memory_bytes_max: The budget of all shards of this node together.
        find_model: Where a model's files are, by model id; None if this node may not serve it.
        obtain_files: Checks, or fetches, the files of layers before each load.
        check_files: Says what that would fetch; refuses layers that are not here to stay.
        connect: Connects to a member of a ring that this node is not connected to.
        on_change: Called when loaded shards or free memory have changed.
        """
        self._host = host
        self._engines = engines
        self._find_model = find_model
        self._obtain_files = obtain_files
        self._check_files = check_files
        self._file_locks: dict[str, trio.Lock] = {}
        self._connect = connect
        self._holdings = Holdings(
            memory_bytes_max=memory_bytes_max,
            spawn=self.spawn,
            on_lost=self._shard_lost,
            on_change=on_change,
        )
        self._stages: dict[bytes, Stage] = {}
        self._has_stage = trio.Event()
        self._coordinated: dict[bytes, tuple[PeerId, TokenSink]] = {}
        self._inbound: dict[bytes, dict[trio.CancelScope, None]] = {}
        self._choices: dict[str, Choice] = {}
        self._choosing = trio.Lock()
        self._tasks: trio.MemorySendChannel[Callable[[], Awaitable[None]]] | None = None
        host.set_handler(PROTOCOL, self._serve)

    async def reach(self, peer: PeerId) -> None:
        """Make sure that this node is connected to a member, who need not be a neighbour of it.

        Raises:
            NetworkError, ProtocolError: It cannot be reached, or is no member.
        """
        if self._connect is not None:
            await self._connect(peer)
        elif self._host.connection_to(peer) is None:
            raise ConnectionLost(f"{peer} is not connected")

    # For the node ---------------------------------------------------------------

    @property
    def peer(self) -> PeerId:
        """This node's own id."""
        return self._host.identity.peer_id

    @property
    def host(self) -> Host:
        """The host whose streams this service speaks over."""
        return self._host

    @property
    def memory_bytes_max(self) -> int:
        return self._holdings.memory_bytes_max

    @property
    def memory_bytes_free(self) -> int:
        """What a new shard could get now, shards without sessions unloaded."""
        return max(0, self._holdings.memory_bytes_available)

    @property
    def speeds_bytes_s(self) -> Mapping[str, float]:
        """Weight bytes an engine passes over a second in decode, by its name, once it has run."""
        return self._holdings.speeds_bytes_s

    @property
    def shards(self) -> tuple[Holding, ...]:
        """The shards that are loaded (`model_id`, `start`, `end`, ...)."""
        return tuple(holding for holding in self._holdings.all if holding.shard is not None)

    @property
    def session_count(self) -> int:
        """Sessions open here, of all coordinators."""
        return sum(len(stage.sessions) for stage in self._stages.values())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch over leases, links and shards until cancelled; then give everything up."""
        send, receive = trio.open_memory_channel[Callable[[], Awaitable[None]]](TASKS_MAX)
        self._tasks = send
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._expire_sessions)
                task_status.started()
                async for task in receive:
                    nursery.start_soon(task)
        finally:
            self._tasks = None
            for stage in list(self._stages.values()):
                stage.close()

    def spawn(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task in the background until this service ends."""
        if self._tasks is None:
            return  # Closing: nothing may start any more.
        try:
            self._tasks.send_nowait(task)
        except trio.WouldBlock:
            raise LocalProtocolError(f"{TASKS_MAX} tasks wait to be started") from None

    async def choose(self, model_id: str) -> Choice:
        """The engine that runs a model on this node and what it knows of it, remembered.

        Raises:
            ModelNotFound: This node does not have the model, or no engine.
            ModelRefused, EngineLost: As `Engines.choose`.
        """
        path = self._find_model(model_id)
        if path is None or not self._engines:
            raise ModelNotFound(f"this node does not serve model {model_id}")
        async with self._choosing:
            choice = self._choices.get(model_id)
            if choice is None:
                choice = await self._engines.choose(path)
            if choice.is_certain:
                while len(self._choices) >= CHOICES_MAX and model_id not in self._choices:
                    del self._choices[next(iter(self._choices))]
                self._choices[model_id] = choice
            return choice

    def chosen(self, model_id: str) -> Choice | None:
        """What `choose` gave before, None where nobody asked."""
        return self._choices.get(model_id)

    # For the coordinator in this node -------------------------------------------

    def offer_local(self, offer: Offer) -> CoordinatorControl:
        """Offer a stage to this node itself; the channel is as one over a stream."""
        coordinator_end, stage_end = control_pair(coordinator=self.peer, stage=self.peer)

        async def serve() -> None:
            await self._serve_stage(stage_end, offer)

        self.spawn(serve)
        return coordinator_end

    def stage_of(self, pipeline: bytes) -> Stage | None:
        """This node's stage of a pipeline."""
        return self._stages.get(pipeline)

    def listen(self, pipeline: bytes, last: PeerId, sink: TokenSink) -> None:
        """Hand a coordinated pipeline's tokens to `sink`; only `last` may send them."""
        self._coordinated[pipeline] = (last, sink)

    def unlisten(self, pipeline: bytes) -> None:
        """Take no more tokens of a pipeline."""
        self._coordinated.pop(pipeline, None)
        self._end_inbound(pipeline)

    # Streams --------------------------------------------------------------------

    async def _serve(self, stream: Stream) -> None:
        """Serve one inbound stream by its first message."""
        messages = MessageStream(stream)
        try:
            with trio.fail_after(FIRST_TIMEOUT_S):
                first: First = await messages.receive(First)  # type: ignore[arg-type]
        except trio.TooSlowError:
            raise RemoteProtocolError("no first message in time", peer=stream.peer) from None
        match first:
            case Describe():
                await messages.send(await self._describe(first))
            case Offer():
                await self._serve_control(messages, first)
            case Edge():
                await self._serve_edge(messages, first)

    async def _describe(self, message: Describe) -> Described | Refused:
        try:
            return described((await self.choose(message.model_id)).inspection)
        except (ModelNotFound, ModelRefused) as error:
            return Refused(reason="model", message=str(error))
        except SwarmError as error:
            return Refused(reason="engine", message=str(error))

    async def _serve_control(self, messages: MessageStream, offer: Offer) -> None:
        coordinator_end, stage_end = control_pair(coordinator=messages.peer, stage=self.peer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve_stage, stage_end, offer)
            broken = await carry(messages, coordinator_end, Command)
        if isinstance(broken, ProtocolError):
            raise broken

    async def _serve_edge(self, messages: MessageStream, edge: Edge) -> None:
        with self._inbound_scope(edge.pipeline):
            stage = self._stages.get(edge.pipeline)
            if edge.kind == "token":
                await self._serve_tokens(messages, edge, stage)
            elif stage is not None:
                await stage.serve_steps(messages, edge)
            else:
                messages.reset()  # Released while the stream was under way.

    async def _serve_tokens(self, messages: MessageStream, edge: Edge, stage: Stage | None) -> None:
        """Hand tokens to the session's coordinator, the first stage, or both in one node."""
        last, sink = self._coordinated.get(edge.pipeline, (None, None))
        if stage is not None and stage.is_first:
            last = stage.last
        else:
            stage = None
        if last is None:
            messages.reset()
            return
        if messages.peer != last:
            raise RemoteProtocolError("tokens from a peer that is not the last stage")
        while (frame := await messages.receive_frame(TOKEN_FRAME_BYTES_MAX)) is not None:
            token = wire.decode(frame, TokenFrame)
            if sink is not None:
                sink(token)
            if stage is not None:
                await stage.token_received(token)

    @contextmanager
    def _inbound_scope(self, pipeline: bytes) -> Iterator[None]:
        """A scope that ends when this node leaves the pipeline."""
        with trio.CancelScope() as scope:
            scopes = self._inbound.setdefault(pipeline, {})
            scopes[scope] = None
            try:
                yield
            finally:
                del scopes[scope]
                if not scopes and self._inbound.get(pipeline) is scopes:
                    del self._inbound[pipeline]

    def _end_inbound(self, pipeline: bytes) -> None:
        if pipeline not in self._coordinated and pipeline not in self._stages:
            for scope in self._inbound.get(pipeline, ()):
                scope.cancel()

    # A stage's life -------------------------------------------------------------

    async def _serve_stage(self, control: StageControl, offer: Offer) -> None:
        """Answer an offer, and keep the stage until its coordinator or its shard is gone."""
        try:
            stage, accepted = await self._accept(control, offer)
        except SwarmError as error:
            control.send_nowait(self._refused(error, offer.model_id))
            control.close()
            return
        try:
            control.send_nowait(accepted)
            async with trio.open_nursery() as nursery:
                nursery.cancel_scope.deadline = trio.current_time() + LOAD_WAIT_S
                while (command := await control.receive()) is not None:
                    if isinstance(command, Release):
                        break
                    if isinstance(command, Load):
                        nursery.cancel_scope.deadline = math.inf
                        nursery.start_soon(self._load, stage, control)
                    else:
                        _obey(stage, command)
                nursery.cancel_scope.cancel()
        finally:
            stage.close()
            del self._stages[offer.pipeline]
            self._end_inbound(offer.pipeline)
            await self._holdings.release(stage.holding, offer.pipeline)

    def _ranges(self, model_id: str) -> tuple[tuple[int, int], ...]:
        """The loaded layers of a model."""
        ranges = [(shard.start, shard.end) for shard in self.shards if shard.model_id == model_id]
        return tuple(ranges[:STAGES_MAX])

    def _refused(self, error: SwarmError, model_id: str) -> Refused:
        match error:
            case DoesNotFit():
                return Refused(
                    reason="memory",
                    message=str(error)[:4096],
                    memory_bytes=self.memory_bytes_free,
                    shards=self._ranges(model_id),
                )
            case StageBusy():
                return Refused(reason="busy", message=str(error)[:4096])
            case ModelNotFound() | ModelRefused():
                return Refused(reason="model", message=str(error)[:4096])
            case OfferRejected():
                return Refused(reason="offer", message=str(error)[:4096])
            case _:
                return Refused(reason="engine", message=str(error)[:4096])

    async def _accept(self, control: StageControl, offer: Offer) -> tuple[Stage, Accepted]:
        """Check an offer and reserve its memory.

        Raises:
            ModelNotFound: This node may not serve the model, or these layers of it.
            OfferRejected: The offer contradicts itself or this node's engine.
            DoesNotFit: The budget is too small; the message lists the terms.
        """
        choice = await self.choose(offer.model_id)
        inspection = choice.inspection
        start, end = check_offer(offer, inspection, me=self.peer)
        fetch_bytes = await self._check_files(offer.model_id, start, end)
        wanted = Holding(
            model_id=offer.model_id,
            start=start,
            end=end,
            slots=offer.slots,
            context=offer.context,
            exact=offer.exact,
            terms=fit(inspection, start, end, slots=offer.slots, context=offer.context),
            engine=choice.host,
        )
        if offer.pipeline in self._stages:
            raise OfferRejected("a pipeline of this id exists already")
        if len(self._stages) >= STAGES_HELD_MAX:
            raise OfferRejected(f"this node is a stage of {STAGES_HELD_MAX} pipelines already")
        holding = await self._holdings.reserve(wanted, offer.pipeline)
        if offer.pipeline in self._stages:
            await self._holdings.release(holding, offer.pipeline)
            raise OfferRejected("a pipeline of this id exists already")
        self._has_stage.set()
        stage = self._stages[offer.pipeline] = Stage(
            offer,
            coordinator=control.peer,
            inspection=inspection,
            holding=holding,
            holdings=self._holdings,
            host=self._host,
            control=control,
            spawn=self.spawn,
            deliver=self._deliver_local,
        )
        logger.info("stage.accepted", extra={"model": offer.model_id, "start": start, "end": end})
        is_loaded = holding.shard is not None
        return stage, Accepted(
            is_loaded=is_loaded,
            shards=self._ranges(offer.model_id),
            fetch_bytes=0 if is_loaded else fetch_bytes,
        )

    def _deliver_local(self, pipeline: bytes, token: TokenFrame) -> None:
        _, sink = self._coordinated.get(pipeline, (None, None))
        if sink is not None:
            sink(token)

    async def _load(self, stage: Stage, control: StageControl) -> None:
        """Load the stage's shard and make sure that the ring can be closed."""
        holding, told_at = stage.holding, -math.inf

        def report(progress: Progress) -> None:
            nonlocal told_at
            is_last = progress.done >= progress.total > 0
            if trio.current_time() - told_at < PROGRESS_S and not is_last:
                return  # A download reports each piece: more than a slow link carries.
            told_at = trio.current_time()
            control.send_nowait(
                Progressed(
                    step=progress.step[:256],
                    done=progress.done,
                    total=progress.total,
                    unit=progress.unit,
                )
            )

        try:
            shard = await self._load_files(holding, report)
            await self._connect_ring(stage)
        except SwarmError as error:
            control.send_nowait(Failed(error=error_name(error), message=str(error)[:4096]))
            control.close()
            return
        stage.is_ready = True
        control.send_nowait(
            Loaded(
                weight_bytes=shard.weight_bytes,
                rss_bytes=shard.rss_bytes(),
                slots=holding.slots,
                engine=holding.engine.engine_name,
                exactness=shard.exactness,
            )
        )

    async def _load_files(
        self, holding: Holding, report: Callable[[Progress], None]
    ) -> HostedShard:
        """Load a shard from files that are checked, and fetched where they are not here.

        One stage of a model at a time: what another fetches may make the model whole, and move it.
        """
        if holding.shard is not None:
            return holding.shard
        model_id = holding.model_id
        async with self._file_locks.setdefault(model_id, trio.Lock()):
            path = self._find_model(model_id)
            for attempt in range(LOADS_MAX):
                if self._obtain_files is not None and holding.shard is None:
                    path = await self._obtain_files(model_id, holding.start, holding.end, report)
                if path is None:
                    break
                try:
                    return await self._holdings.load(holding, path, report)
                except ModelRefused:
                    # Another process, which shares the cache, may have moved it.
                    if attempt == LOADS_MAX - 1 or await trio.to_thread.run_sync(path.exists):
                        raise
        raise ModelNotFound(f"this node no longer has model {model_id}")

    async def _connect_ring(self, stage: Stage) -> None:
        """Make sure that this node is connected to every peer the stage sends to.

        Raises:
            OfferRejected: One of them cannot be reached.
        """
        for peer in stage.receivers:
            try:
                await self.reach(peer)
            except (NetworkError, ProtocolError) as error:
                raise OfferRejected(
                    f"cannot reach {peer}, the next in the ring: {error}"
                ) from error

    def _shard_lost(self, holding: Holding, error: PipelineError) -> None:
        """Tell every coordinator whose pipeline used a shard that it is gone."""
        for stage in list(self._stages.values()):
            if stage.holding is holding:
                stage.lost(error)

    async def _expire_sessions(self) -> None:
        while True:
            if not self._stages:
                self._has_stage = trio.Event()
                await self._has_stage.wait()
            await trio.sleep(LEASE_CHECK_S)
            for stage in list(self._stages.values()):
                stage.expire(trio.current_time())


def _obey(stage: Stage, command: Open | Beat | Close) -> None:
    """Carry out a session's command."""
    match command:
        case Open():
            stage.open(command)
        case Beat():
            stage.beat(command.sessions)
        case Close():
            stage.close_session(command.session)
