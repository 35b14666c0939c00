"""The engine's child process: `python -m swarmpy.pipeline.engine_child ENGINE FD BEAT_FD PARENT`.

One thread reads requests and runs the engine (MLX streams belong to a thread); a second one answers
heartbeats and ends the process when its parent is gone. It has no identity, no sockets but these
two, and a folder of its own. Spec: protocols/engine.md.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from swarmpy.abc import Engine, Inspection, Output, Progress, Row, Shard, Want
from swarmpy.errors import (
    BadMessage,
    ConfigError,
    DoesNotFit,
    EngineLost,
    FrameTooLarge,
    ModelError,
    ModelRefused,
    RowError,
)
from swarmpy.extensions import engine_class
from swarmpy.pipeline.finite import is_finite
from swarmpy.proto import engine as messages
from swarmpy.proto.tensor import Tensor, TensorSpec, check_hidden, split

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

EXIT_GRACE_S = 1.0
"""From the end of the pipe to a hard exit, if a computation is still running."""

_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Serve one parent until its end of the pipe is closed; return the exit code."""
    engine_name, descriptor, beat_descriptor, parent_pid = arguments
    die_with_parent(int(parent_pid))
    forbid_core_dumps()
    pipe = Pipe(socket.socket(fileno=int(descriptor)))
    is_done = threading.Event()
    beat = socket.socket(fileno=int(beat_descriptor))
    threading.Thread(target=answer_beats, args=(beat, is_done), name="beat", daemon=True).start()
    try:
        Worker(engine_class(engine_name)(), pipe).serve()
    except (BadMessage, FrameTooLarge) as error:
        print(f"the node broke the protocol: {error}", file=sys.stderr)
    finally:
        is_done.set()
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
    return 0


def forbid_core_dumps() -> None:
    """Let a crash leave no file: it would hold prompts. Windows writes none unasked."""
    if sys.platform != "win32":
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; elsewhere the pipe's end must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)  # It ended before we asked.


def answer_beats(beat: socket.socket, is_done: threading.Event) -> None:
    """Answer each byte with itself, also while the engine computes; end with the parent.

    Args:
        is_done: Set by the engine's thread when it will return by itself.
    """
    beat.setblocking(True)
    try:
        while data := beat.recv(64):
            beat.send(data)
    except OSError:
        pass
    if not is_done.wait(EXIT_GRACE_S):
        # Computing: nobody is left to want the result.
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
        os._exit(0)


class Pipe:
    """This process's end of the socket pair."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(True)
        self._reader = messages.FrameReader()
        self._frames: deque[messages.Frame] = deque()

    def next_request(self) -> tuple[messages.Request, memoryview] | None:
        """Wait for the next request; None once the pipe has ended.

        Raises:
            BadMessage, FrameTooLarge: The node broke the protocol.
        """
        while not self._frames:
            try:
                count = self._socket.recv_into(self._reader.wanted)
            except OSError:
                return None
            if not count:
                return None
            self._frames.extend(self._reader.received(count))
        head, payload = self._frames.popleft()
        return messages.decode_request(head), payload

    def send(self, reply: messages.Reply, tensors: Sequence[Tensor] = ()) -> None:
        """Send one frame. A closed pipe is no error here: the next read finds it closed."""
        buffers = [
            memoryview(buffer).cast("B")
            for buffer in messages.encode_frame(reply, tensors)
            if len(buffer)
        ]
        try:
            while buffers:
                sent = self._socket.sendmsg(buffers[:16])
                while buffers and sent >= len(buffers[0]):
                    sent -= len(buffers.pop(0))
                if buffers:
                    buffers[0] = buffers[0][sent:]
        except OSError:
            return


class Worker:
    """The engine's thread: one request after the other."""

    def __init__(self, engine: Engine, pipe: Pipe) -> None:
        self._engine = engine
        self._pipe = pipe
        self._shard: Shard | None = None
        self._received: tuple[TensorSpec, ...] = ()
        self._vocabulary_size = 0

    def serve(self) -> None:
        """Answer requests until the pipe ends.

        Our own errors are answered; anything else ends the process, and with it a shard whose state
        nobody can vouch for.
        """
        while (item := self._pipe.next_request()) is not None:
            request, payload = item
            try:
                self._answer(request, payload)
            except (ModelError, RowError, ConfigError) as error:
                self._fail(request, error)
        if self._shard is not None:
            self._shard.close()

    def _fail(self, request: messages.Request, error: Exception) -> None:
        known = (ModelRefused, DoesNotFit, RowError, ConfigError)
        name = next((kind.__name__ for kind in known if isinstance(error, kind)), "ModelNotFound")
        failed = messages.Failed(id=request.id, error=name, message=str(error)[:4096])  # type: ignore[arg-type]
        self._pipe.send(failed)

    def _answer(self, request: messages.Request, payload: memoryview) -> None:
        match request:
            case messages.Step():
                self._step(request, payload)
            case messages.Inspect():
                inspection = self._engine.inspect(Path(request.path))
                self._pipe.send(_inspected(request.id, inspection))
            case messages.Load():
                self._load(request)
            case _:
                self._change_state(request, payload)

    def _load(self, request: messages.Load) -> None:
        if self._shard is not None:
            raise ConfigError("a child holds one shard at a time")

        def report(progress: Progress) -> None:
            reply = messages.Progressed(
                id=request.id, step=progress.step, done=progress.done, total=progress.total
            )
            self._pipe.send(reply)

        os.environ["OPENBLAS_NUM_THREADS"] = str(request.threads)
        self._engine.progress = report
        path = Path(request.path)
        inspection = self._engine.inspect(path)
        if not 0 <= request.start < request.end <= inspection.layer_count:
            raise ConfigError(
                f"layers [{request.start}, {request.end}) of a model with {inspection.layer_count}"
            )
        self._shard = self._engine.load(
            path,
            start=request.start,
            end=request.end,
            slots=request.slots,
            context=request.context,
            exact=request.exact,
        )
        is_last = request.end == inspection.layer_count
        self._received = inspection.wire_specs[request.start] if request.start else ()
        self._vocabulary_size = inspection.vocabulary_size
        loaded = messages.Loaded(
            id=request.id,
            weight_bytes=self._shard.weight_bytes,
            exactness=self._shard.exactness,
            received=self._received,
            sent=() if is_last else inspection.wire_specs[request.end],
            vocabulary_size=inspection.vocabulary_size if is_last else 0,
        )
        self._pipe.send(loaded)

    def _loaded_shard(self) -> Shard:
        if self._shard is None:
            raise ConfigError("no shard is loaded")
        return self._shard

    def _step(self, request: messages.Step, payload: memoryview) -> None:
        shard = self._loaded_shard()
        rows, outputs = self._rows(request, payload)
        began = perf_counter()
        computed = iter(shard.step(rows) if rows else ())
        engine_s = perf_counter() - began
        outputs = [next(computed) if output is None else output for output in outputs]
        self._pipe.send(*_stepped(request.id, outputs, engine_s))

    def _rows(
        self, request: messages.Step, payload: memoryview
    ) -> tuple[list[Row], list[Output | None]]:
        """Return the rows that may be computed, and by row an error or None for those."""
        tensors = iter(split(request.tensors, payload))
        rows: list[Row] = []
        outputs: list[Output | None] = []
        for header in request.rows:
            token_ids = next(tensors) if header.has_token_ids else None
            hidden = tuple(next(tensors) for _ in range(header.hidden_count))
            try:
                rows.append(self._row(header, token_ids, hidden))
                outputs.append(None)
            except (BadMessage, FrameTooLarge) as error:
                outputs.append(Output(slot=header.slot, error=str(error)))
        return rows, outputs

    def _row(
        self, header: messages.RowHeader, token_ids: Tensor | None, hidden: tuple[Tensor, ...]
    ) -> Row:
        """Check one row's tensors and return it.

        Raises:
            BadMessage: Not what this shard takes, or not finite.
        """
        check_hidden(hidden, self._received, count=header.count)
        if not all(is_finite(tensor) for tensor in hidden):
            raise BadMessage("hidden state not finite")
        ids: npt.NDArray[np.int32] | None = None
        if token_ids is not None:
            ids = _token_ids(token_ids, header.count, self._vocabulary_size)
        return Row(
            slot=header.slot,
            position=header.position,
            count=header.count,
            token_ids=ids,
            hidden=hidden or None,
            want=Want(header.want),
        )

    def _change_state(self, request: messages.Request, payload: memoryview) -> None:
        shard = self._loaded_shard()
        match request:
            case messages.Truncate():
                shard.truncate(request.slot, request.position)
            case messages.Snapshot():
                number = shard.snapshot(request.slot)
                self._pipe.send(messages.Snapshotted(id=request.id, snapshot=number))
                return
            case messages.Restore():
                shard.restore(request.slot, request.snapshot)
            case messages.Export():
                self._export(request, shard)
                return
            case messages.Import():
                tensors = split(request.tensors, payload)
                if len(tensors) != len(request.names):
                    raise RowError(f"{len(request.names)} names for {len(tensors)} tensors")
                state = dict(zip(request.names, tensors, strict=True))
                shard.import_state(request.slot, request.start, request.end, state)
            case messages.Free():
                shard.free(request.slot)
            case messages.Unload():
                shard.close()
                self._shard = None
            case _:
                raise EngineLost(f"unexpected request {type(request).__name__}")
        self._pipe.send(messages.Done(id=request.id))

    def _export(self, request: messages.Export, shard: Shard) -> None:
        state = shard.export_state(request.slot, request.start, request.end)
        tensors = tuple(state.values())
        if sum(len(tensor.data) for tensor in tensors) > messages.PAYLOAD_BYTES_MAX:
            raise RowError("the state is too large for one frame: export fewer positions at a time")
        exported = messages.Exported(
            id=request.id, names=tuple(state), tensors=tuple(tensor.spec for tensor in tensors)
        )
        self._pipe.send(exported, tensors)


def _inspected(request_id: int, inspection: Inspection) -> messages.Inspected:
    fields = {
        field.name: getattr(inspection, field.name) for field in dataclasses.fields(inspection)
    }
    fields["state_kind"] = inspection.state_kind.value
    fields["wire_specs"] = dict(inspection.wire_specs)
    return messages.Inspected(id=request_id, **fields)


def _stepped(
    request_id: int, outputs: Sequence[Output | None], engine_s: float
) -> tuple[messages.Stepped, list[Tensor]]:
    headers: list[messages.OutputHeader] = []
    tensors: list[Tensor] = []
    for output in outputs:
        assert output is not None
        hidden = output.hidden or ()
        tensors += hidden
        if output.logits is not None:
            tensors.append(output.logits)
        header = messages.OutputHeader(
            slot=output.slot,
            hidden_count=len(hidden),
            has_logits=output.logits is not None,
            error=output.error[:4096],
        )
        headers.append(header)
    specs = tuple(tensor.spec for tensor in tensors)
    reply = messages.Stepped(
        id=request_id, outputs=tuple(headers), tensors=specs, engine_s=engine_s
    )
    return reply, tensors


def _token_ids(tensor: Tensor, count: int, vocabulary_size: int) -> npt.NDArray[np.int32]:
    import numpy as np

    if tensor.dtype != "int32" or tensor.shape != (count,):
        raise BadMessage(f"token ids {tensor.dtype} {tensor.shape}, expected int32 ({count},)")
    ids = np.frombuffer(tensor.data, np.int32)
    if count and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary_size):
        # An engine would read past its embedding.
        raise BadMessage(f"a token id is outside the vocabulary of {vocabulary_size}")
    return ids


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
