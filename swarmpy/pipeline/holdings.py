"""Holdings: the shards this node has loaded or promised, and the memory they take.

Memory is reserved when an offer is accepted and freed when the last pipeline that uses the shard
is gone; a shard without sessions makes room for another.
Spec: protocols/pipeline.md, section "Offers".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from swarmpy.abc import Progress
from swarmpy.errors import (
    DoesNotFit,
    EngineLost,
    PipelineError,
    RowError,
    StageBusy,
    StageEvicted,
)
from swarmpy.pipeline.engine_host import EngineHost, HostedShard
from swarmpy.pipeline.fit import FitTerms, format_bytes
from swarmpy.pipeline.links import Spawn

IDLE_S = 2.0
"""A shard without sessions for this long may be unloaded for another."""

SPEED_WEIGHT = 0.1
"""Share of the newest step in the running mean of an engine's speed."""


@dataclass(eq=False)
class Holding:
    """One shard, from the accepted offer to its end; shared by pipelines that need just this."""

    model_id: str
    start: int
    end: int
    slots: int
    context: int
    exact: bool
    terms: FitTerms
    engine: EngineHost
    shard: HostedShard | None = None
    users: set[bytes] = field(default_factory=set)
    """Pipelines that use it."""
    free_slots: list[int] = field(default_factory=list)
    clearing: dict[int, trio.Event] = field(default_factory=dict)
    """Slots whose old state is being forgotten."""
    sessions: int = 0
    idle_since: float = 0.0
    lock: trio.Lock = field(default_factory=trio.Lock)
    is_closing: bool = False

    def matches(
        self, model_id: str, start: int, end: int, *, slots: int, context: int, exact: bool
    ) -> bool:
        """Whether this shard serves what is asked for as it is."""
        return (
            not self.is_closing
            and (model_id, start, end, exact) == (self.model_id, self.start, self.end, self.exact)
            and context <= self.context
            and slots <= self.slots
        )


class Holdings:
    """All shards of a node, and its memory budget."""

    def __init__(
        self,
        *,
        memory_bytes_max: int,
        spawn: Spawn,
        on_lost: Callable[[Holding, PipelineError], None],
        on_change: Callable[[], None],
    ) -> None:
        """Args:
        on_lost: Called when a loaded shard's engine is gone, or the shard is being unloaded to
            make room; its pipelines cannot go on.
        on_change: Called when what is loaded or the free memory has changed.
        """
        self.memory_bytes_max = memory_bytes_max
        self.speeds_bytes_s: dict[str, float] = {}
        """Weight bytes an engine passes over a second in decode, by its name, once it has run."""
        self._spawn = spawn
        self._on_lost = on_lost
        self._on_change = on_change
        self._holdings: list[Holding] = []

    @property
    def all(self) -> tuple[Holding, ...]:
        return tuple(self._holdings)

    @property
    def memory_bytes_free(self) -> int:
        return self.memory_bytes_max - sum(item.terms.sum_bytes for item in self._holdings)

    @property
    def memory_bytes_available(self) -> int:
        """What a new shard could get, idle ones unloaded."""
        return self.memory_bytes_free + sum(item.terms.sum_bytes for item in self._idle())

    async def reserve(self, wanted: Holding, pipeline: bytes) -> Holding:
        """Promise a shard to a pipeline: one that is there already, or memory for a new one.

        Raises:
            StageBusy: The memory is promised to a pipeline that is being assembled.
            DoesNotFit: The terms exceed what is free and what idle shards would free.
        """
        for holding in self._holdings:
            if holding.matches(
                wanted.model_id,
                wanted.start,
                wanted.end,
                slots=wanted.slots,
                context=wanted.context,
                exact=wanted.exact,
            ):
                holding.users.add(pipeline)
                return holding
        need = wanted.terms.sum_bytes
        promised = sum(item.terms.sum_bytes for item in self._holdings if item.shard is None)
        if self.memory_bytes_available < need <= self.memory_bytes_available + promised:
            raise StageBusy("the memory is promised to a pipeline that is being assembled")
        if need > self.memory_bytes_available:
            raise DoesNotFit(
                f"layers [{wanted.start}, {wanted.end}) need {wanted.terms}; "
                f"{format_bytes(max(0, self.memory_bytes_available))} of "
                f"{format_bytes(self.memory_bytes_max)} are free"
            )
        # Count it before anything is awaited: two offers must not be promised the same bytes.
        idle = self._idle()
        self._holdings.append(wanted)
        wanted.users.add(pipeline)
        for holding in idle:
            if self.memory_bytes_free >= 0:
                break
            self._on_lost(holding, StageEvicted("the idle shard made room for another model"))
            await self._close(holding)
        self._on_change()
        return wanted

    def _idle(self) -> list[Holding]:
        now = trio.current_time()
        idle = [
            item
            for item in self._holdings
            if item.shard is not None
            and not item.is_closing
            and not item.sessions
            and now - item.idle_since >= IDLE_S
        ]
        return sorted(idle, key=lambda item: item.idle_since)

    async def load(
        self, holding: Holding, path: Path, progress: Callable[[Progress], None]
    ) -> HostedShard:
        """Load a promised shard, once: a second pipeline waits for the first one's load.

        Raises:
            DoesNotFit, ModelRefused, EngineLost: As `EngineHost.load`.
        """
        async with holding.lock:
            if holding.shard is None:
                shard = await holding.engine.load(
                    path,
                    start=holding.start,
                    end=holding.end,
                    slots=holding.slots,
                    context=holding.context,
                    exact=holding.exact,
                    progress=progress,
                )
                if holding.is_closing:  # Released while it was loading.
                    await shard.close()
                    raise EngineLost("the shard was released while it was loading")
                holding.shard = shard
                holding.free_slots = list(range(holding.slots))
                holding.idle_since = trio.current_time()
                self._spawn(lambda: self._watch(holding, shard))
                self._on_change()
            return holding.shard

    async def release(self, holding: Holding, pipeline: bytes) -> None:
        """A pipeline no longer uses a shard; unload it if it was the last one."""
        holding.users.discard(pipeline)
        if not holding.users:
            await self._close(holding)

    async def _close(self, holding: Holding) -> None:
        """Unload a shard; its memory counts as taken until the process is gone."""
        if holding.is_closing:
            return
        holding.is_closing = True
        shard, holding.shard = holding.shard, None
        try:
            if shard is not None:
                with trio.CancelScope(shield=True):
                    await shard.close()
        finally:
            if holding in self._holdings:
                self._holdings.remove(holding)
                self._on_change()

    async def _watch(self, holding: Holding, shard: HostedShard) -> None:
        reason = await shard.wait_lost()
        if holding.shard is shard:
            self._on_lost(holding, EngineLost(reason))
            await self._close(holding)

    def take_slot(self, holding: Holding) -> tuple[int, trio.Event | None] | None:
        """Give a session a slot, and what it must wait for before its first step; None if all are
        taken."""
        if not holding.free_slots:
            return None
        holding.sessions += 1
        slot = holding.free_slots.pop(0)
        return slot, holding.clearing.get(slot)

    def touch(self, holding: Holding) -> None:
        """Count a shard as in use now: its pipeline is still being assembled."""
        holding.idle_since = trio.current_time()

    def return_slot(self, holding: Holding, slot: int) -> None:
        """Take a slot back; its state is forgotten before anybody's next step in it."""
        holding.sessions -= 1
        holding.idle_since = trio.current_time()
        holding.free_slots.append(slot)
        shard = holding.shard
        if shard is None:
            return
        cleared = holding.clearing[slot] = trio.Event()

        async def clear() -> None:
            try:
                await shard.free(slot)
            except RowError as error:
                if holding.shard is shard:
                    self._on_lost(holding, EngineLost(f"slot {slot} is stuck: {error}"))
                    await self._close(holding)
            except EngineLost:
                pass  # `_watch` tells.
            finally:
                if holding.clearing.get(slot) is cleared:
                    del holding.clearing[slot]
                cleared.set()

        self._spawn(clear)

    def note_speed(self, engine: str, bytes_s: float) -> None:
        """Take a decode step's speed into the engine's mean."""
        before = self.speeds_bytes_s.get(engine, bytes_s)
        self.speeds_bytes_s[engine] = before + SPEED_WEIGHT * (bytes_s - before)
