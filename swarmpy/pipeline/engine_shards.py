"""A loaded shard as the pipeline uses it: in a child process, or in the node for the test engine.

What a child answers is checked like a peer's message: shape, dtype, and finite numbers.
Spec: protocols/engine.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import trio

from swarmpy.abc import Engine, Output, Row, Shard, Want
from swarmpy.errors import (
    BadMessage,
    ConfigError,
    DoesNotFit,
    EngineLost,
    FrameTooLarge,
    ModelNotFound,
    ModelRefused,
    RowError,
    SwarmError,
)
from swarmpy.pipeline.engine_process import EngineProcess
from swarmpy.pipeline.finite import is_finite
from swarmpy.proto import engine as messages
from swarmpy.proto.tensor import Tensor, TensorSpec, check_hidden, split

R = TypeVar("R", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step gave, and the seconds spent inside the engine's own step."""

    outputs: Sequence[Output]
    engine_s: float


class HostedShard(Protocol):
    """Layers [start, end) in memory, wherever the engine runs.

    Requests are served in order of arrival. A cancelled step may or may not have run: free or
    truncate its slots. All methods raise `EngineLost` once the child is gone, and `RowError` where
    a slot cannot do what is asked.
    """

    start: int
    end: int
    slots: int
    context: int
    threads: int
    weight_bytes: int
    exactness: str
    pid: int

    @property
    def is_alive(self) -> bool:
        """Whether the shard can still be used."""

    async def step(self, rows: Sequence[Row]) -> StepOutcome:
        """Run one batch of rows; errors of single rows, and non-finite ones, are in the outputs."""

    async def free(self, slot: int) -> None:
        """Forget everything the slot holds."""

    async def truncate(self, slot: int, position: int) -> None:
        """Forget the slot's state from `position` on."""

    async def snapshot(self, slot: int) -> int:
        """Keep the slot's present state and return a number for it."""

    async def restore(self, slot: int, snapshot: int) -> None:
        """Return the slot to a snapshot, and forget the snapshot."""

    async def export_state(self, slot: int, start: int, end: int) -> Mapping[str, Tensor]:
        """Return the slot's state of positions [start, end) as named tensors."""

    async def import_state(
        self, slot: int, start: int, end: int, state: Mapping[str, Tensor]
    ) -> None:
        """Put an exported state into a slot that ends at `start`."""

    async def close(self) -> None:
        """Release the shard and its process; repeated calls do nothing."""

    async def wait_lost(self) -> str:
        """Wait until the shard is gone, and return why."""

    def rss_bytes(self) -> int:
        """Resident memory of the shard's process; 0 where it is gone or is the node itself."""


class ChildShard:
    """A shard in a child process."""

    def __init__(
        self,
        process: EngineProcess,
        request: messages.Load,
        loaded: messages.Loaded,
        *,
        step_timeout_s: float,
    ) -> None:
        self.start = request.start
        self.end = request.end
        self.slots = request.slots
        self.context = request.context
        self.threads = request.threads
        self.weight_bytes = loaded.weight_bytes
        self.exactness = loaded.exactness
        self.pid = process.pid
        self._process = process
        self._received = loaded.received
        self._sent = loaded.sent
        self._vocabulary_size = loaded.vocabulary_size
        self._step_timeout_s = step_timeout_s

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive

    async def step(self, rows: Sequence[Row]) -> StepOutcome:
        try:
            headers, tensors = _row_headers(rows, self._received)
            request = messages.Step(
                id=self._process.next_id(),
                rows=headers,
                tensors=tuple(tensor.spec for tensor in tensors),
            )
            reply, payload = await self._ask(request, messages.Stepped, tensors)
        except BadMessage as error:
            raise RowError(str(error)) from error
        try:
            outputs = self._outputs(rows, reply, payload)
        except (BadMessage, FrameTooLarge) as error:
            raise await _breach(self._process, str(error)) from error
        return StepOutcome(outputs, reply.engine_s)

    def _outputs(
        self, rows: Sequence[Row], reply: messages.Stepped, payload: memoryview
    ) -> list[Output]:
        if len(reply.outputs) != len(rows):
            raise BadMessage(f"{len(reply.outputs)} outputs for {len(rows)} rows")
        tensors = iter(split(reply.tensors, payload))
        return [
            self._output(row, header, tensors)
            for row, header in zip(rows, reply.outputs, strict=True)
        ]

    def _output(self, row: Row, header: messages.OutputHeader, tensors: Iterator[Tensor]) -> Output:
        """Check one row's output against what was asked for.

        Raises:
            BadMessage: The child sent another slot, shape or dtype than the row asked for.
        """
        hidden = tuple(_take(tensors) for _ in range(header.hidden_count))
        logits = _take(tensors) if header.has_logits else None
        if header.slot != row.slot:
            raise BadMessage(f"output of slot {header.slot} for a row of slot {row.slot}")
        if header.error:
            return Output(slot=row.slot, error=header.error)
        check_hidden(hidden, self._sent if row.want is Want.HIDDEN else (), count=row.count)
        width = self._vocabulary_size
        expected = {Want.LAST_LOGITS: (width,), Want.ALL_LOGITS: (row.count, width)}.get(row.want)
        if (logits.shape if logits else None) != expected:
            raise BadMessage(f"logits {logits and logits.shape}, expected {expected}")
        if not all(is_finite(tensor) for tensor in (*hidden, *((logits,) if logits else ()))):
            return Output(slot=row.slot, error="engine output not finite")
        return Output(slot=row.slot, hidden=hidden or None, logits=logits)

    async def free(self, slot: int) -> None:
        await self._ask(messages.Free(id=self._process.next_id(), slot=slot), messages.Done)

    async def truncate(self, slot: int, position: int) -> None:
        request = messages.Truncate(id=self._process.next_id(), slot=slot, position=position)
        await self._ask(request, messages.Done)

    async def snapshot(self, slot: int) -> int:
        request = messages.Snapshot(id=self._process.next_id(), slot=slot)
        reply, _ = await self._ask(request, messages.Snapshotted)
        return reply.snapshot

    async def restore(self, slot: int, snapshot: int) -> None:
        request = messages.Restore(id=self._process.next_id(), slot=slot, snapshot=snapshot)
        await self._ask(request, messages.Done)

    async def export_state(self, slot: int, start: int, end: int) -> Mapping[str, Tensor]:
        request = messages.Export(id=self._process.next_id(), slot=slot, start=start, end=end)
        reply, payload = await self._ask(request, messages.Exported)
        try:
            tensors = split(reply.tensors, payload)
            return dict(zip(reply.names, tensors, strict=True))
        except (BadMessage, FrameTooLarge, ValueError) as error:
            raise await _breach(self._process, str(error)) from error

    async def import_state(
        self, slot: int, start: int, end: int, state: Mapping[str, Tensor]
    ) -> None:
        request = messages.Import(
            id=self._process.next_id(),
            slot=slot,
            start=start,
            end=end,
            names=tuple(state),
            tensors=tuple(tensor.spec for tensor in state.values()),
        )
        await self._ask(request, messages.Done, tuple(state.values()))

    async def close(self) -> None:
        if self._process.is_alive:
            self._process.close()
        await self._process.wait_ended()

    async def wait_lost(self) -> str:
        return await self._process.wait_ended()

    def rss_bytes(self) -> int:
        return self._process.rss_bytes()

    async def _ask(
        self, request: messages.Request, kind: type[R], tensors: Sequence[Tensor] = ()
    ) -> tuple[R, memoryview]:
        return await ask_tensors(
            self._process, request, kind, tensors, timeout_s=self._step_timeout_s
        )


class InlineShard:
    """A shard in the node itself: for engines that cannot crash, hang or use real memory."""

    def __init__(
        self,
        engine: Engine,
        path: Path,
        *,
        start: int,
        end: int,
        slots: int,
        context: int,
        exact: bool,
    ) -> None:
        self.start = start
        self.end = end
        self.slots = slots
        self.context = context
        self.threads = 1
        self._shard = engine.load(
            path, start=start, end=end, slots=slots, context=context, exact=exact
        )
        self.weight_bytes = self._shard.weight_bytes
        self.exactness = self._shard.exactness
        self.pid = os.getpid()
        self._closed = trio.Event()

    @property
    def is_alive(self) -> bool:
        return not self._closed.is_set()

    async def step(self, rows: Sequence[Row]) -> StepOutcome:
        shard = await self._open_shard()
        # trio's clock: on a virtual one a step takes no time, and one seed gives one trace.
        began_s = trio.current_time()
        outputs = shard.step(rows)
        return StepOutcome(outputs, trio.current_time() - began_s)

    async def free(self, slot: int) -> None:
        (await self._open_shard()).free(slot)

    async def truncate(self, slot: int, position: int) -> None:
        (await self._open_shard()).truncate(slot, position)

    async def snapshot(self, slot: int) -> int:
        return (await self._open_shard()).snapshot(slot)

    async def restore(self, slot: int, snapshot: int) -> None:
        (await self._open_shard()).restore(slot, snapshot)

    async def export_state(self, slot: int, start: int, end: int) -> Mapping[str, Tensor]:
        return (await self._open_shard()).export_state(slot, start, end)

    async def import_state(
        self, slot: int, start: int, end: int, state: Mapping[str, Tensor]
    ) -> None:
        (await self._open_shard()).import_state(slot, start, end, state)

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_alive:
            self._closed.set()
            self._shard.close()

    async def wait_lost(self) -> str:
        await self._closed.wait()
        return "closed"

    def rss_bytes(self) -> int:
        return 0

    async def _open_shard(self) -> Shard:
        """Return the shard. Waits for nothing, yet gives every other task its turn."""
        await trio.lowlevel.checkpoint()
        if self._closed.is_set():
            raise EngineLost("the shard was closed")
        return self._shard


async def ask(
    process: EngineProcess,
    request: messages.Request,
    kind: type[R],
    *,
    timeout_s: float,
    progressed: Callable[[messages.Progressed], None] | None = None,
) -> R:
    """Send a request without tensors and return its reply of `kind`.

    Raises:
        EngineLost: The child ended, or broke the protocol.
        SwarmError: What the engine raised.
    """
    reply, _ = await ask_tensors(process, request, kind, timeout_s=timeout_s, progressed=progressed)
    return reply


async def ask_tensors(
    process: EngineProcess,
    request: messages.Request,
    kind: type[R],
    tensors: Sequence[Tensor] = (),
    *,
    timeout_s: float,
    progressed: Callable[[messages.Progressed], None] | None = None,
) -> tuple[R, memoryview]:
    """Send a request and return its reply of `kind` with the bytes of its tensors.

    Raises:
        EngineLost: The child ended, or broke the protocol.
        RowError: The request is beyond the pipe's bounds; nothing was sent.
        SwarmError: What the engine raised.
    """
    try:
        reply, payload = await process.exchange(
            request, tensors, timeout_s=timeout_s, progressed=progressed
        )
    except FrameTooLarge as error:
        raise RowError(str(error)) from error
    if isinstance(reply, messages.Failed):
        raise _ENGINE_ERRORS[reply.error](reply.message)
    if not isinstance(reply, kind):
        raise await _breach(process, f"{type(reply).__name__} for {type(request).__name__}")
    return reply, payload


async def _breach(process: EngineProcess, what: str) -> EngineLost:
    """End a child that broke the protocol and return the error to raise."""
    process.kill(f"the engine child broke the protocol: {what}")
    return EngineLost(await process.wait_ended())


_ENGINE_ERRORS: dict[str, type[SwarmError]] = {
    kind.__name__: kind
    for kind in (ModelRefused, ModelNotFound, DoesNotFit, RowError, EngineLost, ConfigError)
}
"""What a child may raise here, by name."""


def _row_headers(
    rows: Sequence[Row], received: tuple[TensorSpec, ...]
) -> tuple[tuple[messages.RowHeader, ...], list[Tensor]]:
    """Return rows as they go over the pipe, and their tensors in order.

    Raises:
        BadMessage: A row's hidden state is not what the shard takes.
    """
    headers: list[messages.RowHeader] = []
    tensors: list[Tensor] = []
    for row in rows:
        hidden = row.hidden or ()
        check_hidden(hidden, received, count=row.count)
        if row.token_ids is not None:
            ids = row.token_ids
            tensors.append(Tensor("int32", ids.shape, ids.astype("<i4").tobytes()))
        tensors += hidden
        header = messages.RowHeader(
            slot=row.slot,
            position=row.position,
            count=row.count,
            has_token_ids=row.token_ids is not None,
            hidden_count=len(hidden),
            want=row.want.value,
        )
        headers.append(header)
    return tuple(headers), tensors


def _take(tensors: Iterator[Tensor]) -> Tensor:
    """Return the next tensor of a frame whose outputs may claim more than it has."""
    tensor = next(tensors, None)
    if tensor is None:
        raise BadMessage("outputs claim more tensors than came")
    return tensor
