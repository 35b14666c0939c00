"""The node's engine: inspects models and loads shards, each in a child process of its own.

An abort, an out-of-memory kill or a model that exits costs a shard, not the node. Engines that say
`in_process` (the test engine) run in the node behind the same interface. Spec: protocols/engine.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import trio

from swarmpy.abc import Engine, Inspection, Progress, StateKind
from swarmpy.config import EngineConfig
from swarmpy.errors import EngineLost, LocalProtocolError
from swarmpy.extensions import engine_class
from swarmpy.pipeline.engine_process import EngineProcess
from swarmpy.pipeline.engine_shards import ChildShard, HostedShard, InlineShard, StepOutcome, ask
from swarmpy.pipeline.engine_threads import threads_for
from swarmpy.proto import engine as messages

__all__ = ["EngineHost", "HostedShard", "StepOutcome"]

LOAD_TIMEOUT_S = 1800.0
"""Longest load: 100 GB of weights from a slow disk. A frozen child is noticed by its heartbeat."""

INSPECT_TIMEOUT_S = 120.0
"""Longest inspection, imports included."""

SPARE_IDLE_S = 60.0
"""How long a child that has inspected waits, imports done, for a shard to load."""

SPAWNS_QUEUED_MAX = 64
"""Children spawned and not yet watched; `run` takes them as soon as it is scheduled."""

CRASHES_MAX = 3
"""Crashes on one shard within `CRASH_WINDOW_S` after which it is withdrawn."""

CRASH_WINDOW_S = 600.0

RANGES_REMEMBERED_MAX = 256
"""Shards whose crashes are remembered."""


class EngineHost:
    """Runs one engine's shards. `run` must be running for anything else to work."""

    def __init__(
        self,
        engine_name: str,
        *,
        config: EngineConfig,
        cache_folder: Path,
        runtime_folder: Path | None = None,
    ) -> None:
        """Find the engine.

        Args:
            engine_name: Entry-point name, or "module:Class".
            cache_folder: The machine-wide cache, shared by this user's nodes.
            runtime_folder: Where this machine's engine children are counted; in the cache if None.

        Raises:
            ExtensionNotFound: No package provides the engine, or what it needs is not installed.
        """
        self.engine_class = engine_class(engine_name)
        self.engine_name = engine_name
        inline = self.engine_class.in_process
        self._inline: Engine | None = self.engine_class() if inline else None
        self._config = config
        self._lock_folder = (runtime_folder or cache_folder / "run") / "engines"
        self._started: trio.MemorySendChannel[EngineProcess] | None = None
        self._spare: EngineProcess | None = None
        self._shards: list[HostedShard] = []
        self._crashes: dict[tuple[Path, int, int], deque[tuple[float, str]]] = {}

    @property
    def shards(self) -> Sequence[HostedShard]:
        """The shards that are loaded and alive."""
        self._shards = [shard for shard in self._shards if shard.is_alive]
        return tuple(self._shards)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch over the children until cancelled; then end them all."""
        send, receive = trio.open_memory_channel[EngineProcess](SPAWNS_QUEUED_MAX)
        self._started = send
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                async for process in receive:
                    nursery.start_soon(process.watch)
        finally:
            self._started = None
            with trio.CancelScope(shield=True):
                while receive.statistics().current_buffer_used:
                    process = receive.receive_nowait()
                    process.kill("the node is closing")
                    await process.watch()

    async def inspect(self, path: Path) -> Inspection:
        """Read a model's headers, and only those; nothing is remembered.

        Raises:
            ModelRefused: The files ask for what a model must not do, or contradict themselves.
            EngineLost: The child ended before it answered.
        """
        if self._inline is not None:
            await trio.lowlevel.checkpoint()
            return self._inline.inspect(path)
        process = self._take_child()
        try:
            request = messages.Inspect(id=process.next_id(), path=str(_absolute(path)))
            reply = await ask(process, request, messages.Inspected, timeout_s=INSPECT_TIMEOUT_S)
        finally:
            self._keep_spare(process)
        return _inspection(reply)

    async def load(
        self,
        path: Path,
        *,
        start: int,
        end: int,
        slots: int,
        context: int,
        exact: bool,
        progress: Callable[[Progress], None] | None = None,
    ) -> HostedShard:
        """Load layers [start, end) of a model, in a child of their own.

        Raises:
            DoesNotFit: The weights and slots exceed the memory that is left.
            ModelRefused: As for `inspect`.
            EngineLost: The child ended while loading, or the shard was withdrawn after crashes.
        """
        if self._inline is not None:
            await trio.lowlevel.checkpoint()
            shard: HostedShard = InlineShard(
                self._inline, path, start=start, end=end, slots=slots, context=context, exact=exact
            )
            self._shards.append(shard)
            return shard
        path = _absolute(path)
        self._check_withdrawn(path, start, end)
        process = self._take_child()
        process.crashed = partial(self._note_crash, path, start, end)
        request = messages.Load(
            id=process.next_id(),
            path=str(path),
            start=start,
            end=end,
            slots=slots,
            context=context,
            exact=exact,
            threads=threads_for(self._lock_folder, configured=self._config.threads),
        )
        try:
            loaded = await ask(
                process,
                request,
                messages.Loaded,
                timeout_s=LOAD_TIMEOUT_S,
                progressed=partial(_report, progress) if progress else None,
            )
        except BaseException:
            process.close()
            raise
        child_shard = ChildShard(
            process, request, loaded, step_timeout_s=self._config.step_timeout_s
        )
        self._shards.append(child_shard)
        return child_shard

    def _take_child(self) -> EngineProcess:
        """Return the spare child, else a new one."""
        if self._started is None:
            raise LocalProtocolError("EngineHost.run is not running")
        process, self._spare = self._spare, None
        if process is not None and process.is_alive:
            process.idle_scope.deadline = float("inf")
            return process
        threads = max(1, self._config.threads)
        process = EngineProcess(self.engine_name, lock_folder=self._lock_folder, threads=threads)
        self._started.send_nowait(process)
        return process

    def _keep_spare(self, process: EngineProcess) -> None:
        if self._spare is not None and self._spare.is_alive:
            process.close()
        elif process.is_alive:
            process.idle_scope.deadline = trio.current_time() + SPARE_IDLE_S
            self._spare = process

    def _note_crash(self, path: Path, start: int, end: int, reason: str) -> None:
        crashes = self._crashes.setdefault((path, start, end), deque(maxlen=CRASHES_MAX))
        crashes.append((trio.current_time(), reason))
        while len(self._crashes) > RANGES_REMEMBERED_MAX:
            del self._crashes[next(iter(self._crashes))]

    def _check_withdrawn(self, path: Path, start: int, end: int) -> None:
        crashes = self._crashes.get((path, start, end), ())
        recent = [reason for at, reason in crashes if trio.current_time() - at < CRASH_WINDOW_S]
        if len(recent) >= CRASHES_MAX:
            raise EngineLost(
                f"layers [{start}, {end}) are withdrawn: the engine crashed {len(recent)} times in "
                f"{CRASH_WINDOW_S / 60:.0f} minutes, the last time with: {recent[-1]}",
                fix="Choose another range or engine, or wait ten minutes and try again.",
            )


def _absolute(path: Path) -> Path:
    """Return the path as a child in another folder must see it."""
    return path.absolute()


def _report(progress: Callable[[Progress], None], reply: messages.Progressed) -> None:
    progress(Progress(step=reply.step, done=reply.done, total=reply.total))


def _inspection(reply: messages.Inspected) -> Inspection:
    """Return a child's report as the contract's type, after what the message type cannot check.

    Raises:
        EngineLost: The numbers contradict each other.
    """
    fields = msgspec.structs.asdict(reply)
    del fields["id"]
    fields["state_kind"] = StateKind(reply.state_kind)
    count = reply.layer_count
    per_layer = (reply.layer_weight_bytes, reply.kv_bytes_per_token, reply.state_bytes)
    is_whole = all(len(values) == count for values in per_layer)
    if not is_whole or any(cut not in reply.wire_specs or cut >= count for cut in reply.cuts):
        raise EngineLost("the engine child's report of the model contradicts itself")
    return Inspection(**fields)
