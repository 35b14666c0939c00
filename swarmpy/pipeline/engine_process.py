"""One engine child as the node sees it: a process at the far end of a socket pair.

Spawned, never forked; treated like a peer. A request and its reply are one `exchange`; a second
thread in the child answers heartbeats, so that a busy engine differs from a frozen one.
Spec: protocols/engine.md.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NoReturn

import trio

from swarmpy.errors import BadMessage, EngineLost, FrameTooLarge
from swarmpy.pipeline.engine_threads import ChildLock, count_children
from swarmpy.proto import engine as messages
from swarmpy.proto.tensor import Tensor

HEARTBEAT_S = 5.0
"""Silence during a request after which the child is pinged."""

HEARTBEATS_MISSED_MAX = 3
"""Pings in a row without an answer before the child counts as frozen: 15 to 20 seconds, since one
native call may hold the interpreter for several on a loaded machine."""

WATCH_S = 1.0
"""How often a request under way is looked at; its deadline is kept to this grain."""

STDERR_BYTES_MAX = 4096
"""The last of a child's error output that is kept, for the error message."""

STDERR_LINES_SHOWN = 6

EXIT_GRACE_S = 1.5
"""From the end of the pipe to SIGKILL, so that a child can end cleanly."""

SOCKET_BUFFER_BYTES = 1024 * 1024
"""Kernel buffer each way: a decode step's logits or a prefill chunk fit without a wake-up more."""

ENVIRONMENT_ALLOWED = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "DYLD_FALLBACK_LIBRARY_PATH",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "SWARMPY_LLAMA_LIBRARY",
    "SWARMPY_LLAMA_GPU_LAYERS",
)
"""All a child inherits of our environment: how to find programs and libraries, and the locale."""


class EngineProcess:
    """A running engine child.

    `watch` must run as long as the child does: it drains the child's error output, notices its end
    and cleans up after it.
    """

    def __init__(self, engine_name: str, *, lock_folder: Path, threads: int) -> None:
        """Spawn a child; it answers once its engine is imported.

        Raises:
            EngineLost: The process could not be started.
        """
        self.idle_scope = trio.CancelScope()
        """Ends the child when its deadline passes; set by whoever keeps it idle."""
        self.crashed: Callable[[str], None] | None = None
        """Told the reason once the child has ended without being asked to."""
        with contextlib.ExitStack() as undo:
            try:
                self._spawn(engine_name, lock_folder=lock_folder, threads=threads, undo=undo)
            except OSError as error:
                raise EngineLost(f"cannot start an engine child: {error}") from error
            undo.pop_all()
        self._stderr_tail = bytearray()
        self._reader = messages.FrameReader()
        self._frames: deque[messages.Frame] = deque()
        self._unsent: deque[memoryview] = deque()
        self._requests = trio.Lock()
        self._next_id = 1
        self._pings_open = 0
        self._heard_s = 0.0
        self._deadline_s = math.inf
        self._is_expected_to_end = False
        self._reason = ""
        self._ended = trio.Event()

    def _spawn(
        self, engine_name: str, *, lock_folder: Path, threads: int, undo: contextlib.ExitStack
    ) -> None:
        count_children(lock_folder)  # It also removes what dead ones left.
        self._lock_file = ChildLock(lock_folder)
        undo.callback(self._lock_file.remove)
        folder = self._lock_file.scratch.absolute()
        self._socket, remote = socket.socketpair()
        undo.callback(self._socket.close)
        self._beat, remote_beat = socket.socketpair()
        undo.callback(self._beat.close)
        for end in (self._socket, remote):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        self._socket.setblocking(False)
        self._beat.setblocking(False)
        self._stderr, stderr_write = os.pipe()
        undo.callback(os.close, self._stderr)
        command = [sys.executable, "-P", "-s", "-X", "faulthandler"]
        command += ["-m", "swarmpy.pipeline.engine_child", engine_name]
        inherited = (remote.fileno(), remote_beat.fileno())
        command += [*map(str, inherited), str(os.getpid())]
        try:
            # Not through trio: it spawns in a worker thread, and the kernel sends the signal that
            # ends a child with its parent when the spawning *thread* ends.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr_write,
                cwd=folder,
                env=child_environment(folder, threads=threads),
                pass_fds=(*inherited, self._lock_file.descriptor),
                start_new_session=True,
            )
        finally:
            remote.close()
            remote_beat.close()
            os.close(stderr_write)
            self._lock_file.hand_over()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether requests can still be sent; False as soon as anything went wrong."""
        return not self._reason and not self._ended.is_set()

    async def wait_ended(self) -> str:
        """Wait until the process is gone and everything of it cleaned up; return why it ended."""
        await self._ended.wait()
        return self._reason

    def rss_bytes(self) -> int:
        """Resident memory of the process, 0 where it is gone or the system does not tell."""
        try:
            fields = Path(f"/proc/{self.pid}/statm").read_text("ascii").split()
        except OSError:
            return 0
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    # Requests ---------------------------------------------------------------

    def next_id(self) -> int:
        """Return a number for the next request."""
        self._next_id += 1
        return self._next_id

    async def exchange(
        self,
        request: messages.Request,
        tensors: Sequence[Tensor] = (),
        *,
        timeout_s: float,
        progressed: Callable[[messages.Progressed], None] | None = None,
    ) -> tuple[messages.Reply, memoryview]:
        """Send one request and wait for its reply; requests are served in order of arrival.

        A cancelled exchange leaves the child usable: its late reply is dropped.

        Raises:
            EngineLost: The child ended, froze, took longer than `timeout_s` or broke the protocol.
            FrameTooLarge: The request is beyond its bounds; nothing was sent.
        """
        buffers = messages.encode_frame(request, tensors)
        # The lock's own way in costs a turn of the scheduler, which a free lock can do without.
        try:
            self._requests.acquire_nowait()
        except trio.WouldBlock:
            await self._requests.acquire()
        try:
            await self._check_alive()
            self._heard_s = trio.current_time()
            self._deadline_s = self._heard_s + timeout_s
            self._pings_open = 0
            self._unsent.extend(memoryview(buffer).cast("B") for buffer in buffers if len(buffer))
            try:
                await self._flush()
                return await self._receive_reply(request.id, progressed)
            except trio.Cancelled:
                # The caller's buffers may change once we return.
                self._unsent = deque(memoryview(bytes(buffer)) for buffer in self._unsent)
                raise
        finally:
            self._deadline_s = math.inf
            self._requests.release()

    async def _check_alive(self) -> None:
        if not self.is_alive:
            await self._raise_lost("the engine child has ended")

    async def _raise_lost(self, reason: str) -> NoReturn:
        """End the child for `reason` and raise it with the child's last words."""
        self.kill(reason)
        await self._ended.wait()
        raise EngineLost(self._reason)

    async def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._socket.sendmsg(list(self._unsent)[:16])
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_writable)
                continue
            except OSError:
                await self._raise_lost("the engine child closed its pipe")
            while sent:
                if sent < len(self._unsent[0]):
                    self._unsent[0] = self._unsent[0][sent:]
                    break
                sent -= len(self._unsent.popleft())

    async def _receive_reply(
        self,
        request_id: int,
        progressed: Callable[[messages.Progressed], None] | None,
    ) -> tuple[messages.Reply, memoryview]:
        while True:
            reply, payload = await self._receive()
            if reply.id > request_id:
                await self._raise_lost(f"the engine child answered request {reply.id} of none")
            elif reply.id == request_id:
                if not isinstance(reply, messages.Progressed):
                    return reply, payload
                if progressed is not None:
                    progressed(reply)

    async def _receive(self) -> tuple[messages.Reply, memoryview]:
        """Wait for the next frame, whoever it answers."""
        try:
            while not self._frames:
                # Wait first: a reply is never there already.
                await self._wait(trio.lowlevel.wait_readable)
                # Of a large frame the first read brings the beginning; its rest is there as well.
                if not self._read() or not (self._frames or self._read()):
                    await self._raise_lost("the engine child ended")
            head, payload = self._frames.popleft()
            return messages.decode_reply(head), payload
        except (BadMessage, FrameTooLarge) as error:
            await self._raise_lost(f"the engine child broke the protocol: {error}")
        except ConnectionError:
            await self._raise_lost("the engine child ended")

    def _read(self) -> bool:
        """Read what is there; False at the end of the pipe."""
        try:
            count = self._socket.recv_into(self._reader.wanted)
        except BlockingIOError:
            return True
        if count:
            self._frames.extend(self._reader.received(count))
        return count > 0

    async def _wait(self, wait_ready: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Wait for the socket. `_keep_watch` ends a child that makes this wait too long."""
        try:
            await wait_ready(self._socket)
        except trio.ClosedResourceError:
            await self._raise_lost("the engine child ended")

    # Keeping watch ----------------------------------------------------------

    async def _keep_watch(self) -> None:
        """Give up on a child that is late with its answer, or frozen.

        Beside the requests, not around each: two cancel scopes were a tenth of a decode step's
        Python calls.
        """
        while True:
            await trio.sleep(min(HEARTBEAT_S, WATCH_S))
            now_s = trio.current_time()
            if now_s >= self._deadline_s:
                self.kill("the engine child did not answer before the deadline")
            elif self._deadline_s < math.inf and now_s - self._heard_s >= HEARTBEAT_S:
                self._heard_s = now_s
                self._ping()

    def _ping(self) -> None:
        try:
            if self._beat.recv(64):
                self._pings_open = 0
        except OSError:
            pass  # No answer yet, or the child is gone, which its pipe will tell.
        if self._pings_open >= HEARTBEATS_MISSED_MAX:
            self.kill(f"the engine child is frozen: {self._pings_open} pings unanswered")
        self._pings_open += 1
        with contextlib.suppress(OSError):
            self._beat.send(b"?")

    # End --------------------------------------------------------------------

    def kill(self, reason: str) -> None:
        """End the process now. The first reason stays."""
        self._reason = self._reason or reason
        if self._process.poll() is None:
            self._process.kill()

    def close(self) -> None:
        """Ask the process to end: it sees the end of its pipe; `watch` does the rest."""
        self._is_expected_to_end = True
        self._reason = self._reason or "closed"
        if not self._ended.is_set():
            for end in (self._socket, self._beat):
                with contextlib.suppress(OSError):  # It has ended on its own.
                    end.shutdown(socket.SHUT_RDWR)
            self.idle_scope.deadline = trio.current_time() + EXIT_GRACE_S

    async def watch(self) -> None:
        """Read the child's error output until it ends, however it ends; then clean up."""
        try:
            with self.idle_scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_watch)
                    await self._read_stderr()
                    nursery.cancel_scope.cancel()
            if self.idle_scope.cancelled_caught:
                self.close()
        except trio.Cancelled:
            self.close()
            raise
        finally:
            with trio.CancelScope(shield=True):
                await self._clean_up()

    async def _read_stderr(self) -> None:
        async with trio.lowlevel.FdStream(self._stderr) as stderr:
            while data := await stderr.receive_some(STDERR_BYTES_MAX):
                self._stderr_tail += data
                del self._stderr_tail[:-STDERR_BYTES_MAX]

    async def _clean_up(self) -> None:
        if self._process.poll() is None:
            # Its error output ended, so it is ending too; a clean exit needs a moment more.
            with trio.move_on_after(EXIT_GRACE_S if self._is_expected_to_end else 0.2):
                await trio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)
            if self._process.poll() is None:
                self._process.kill()
                await trio.to_thread.run_sync(self._process.wait)
        self._reason = self._describe_end()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        self._beat.close()
        await trio.to_thread.run_sync(self._lock_file.remove)
        self._ended.set()
        if self.crashed is not None and not self._is_expected_to_end:
            self.crashed(self._reason)

    def _describe_end(self) -> str:
        code = self._process.returncode
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {signal.Signals(-code).name}"
        reason = self._reason or "the engine child ended"
        lines = self._stderr_tail.decode("utf-8", "replace").strip().splitlines()
        tail = "\n".join(lines[-STDERR_LINES_SHOWN:])
        if self._is_expected_to_end:
            return reason
        return f"{reason} ({how})" + (f":\n{tail}" if tail else "")

    @property
    def exit_code(self) -> int | None:
        """The process's exit code, negative for a signal, None while it runs."""
        return self._process.returncode


def child_environment(folder: Path, *, threads: int) -> dict[str, str]:
    """Return the whole environment of a child that owns `folder`."""
    environ = {name: os.environ[name] for name in ENVIRONMENT_ALLOWED if name in os.environ}
    return environ | {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if os.path.isabs(path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # MLX would run the system's C++ compiler; no gain from that was measured.
        "MLX_DISABLE_COMPILE": "1",
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        # Idle BLAS threads sleep after 2^4 cycles instead of spinning: 17 -> 23 tok/s with three
        # children on two cores.
        "OPENBLAS_THREAD_TIMEOUT": "4",
    }
