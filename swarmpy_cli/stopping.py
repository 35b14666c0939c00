"""Ctrl-C: once lets running replies finish, twice ends everything now. SIGTERM counts as Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import trio

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

EXIT_FORCED = 130
"""Exit code where replies were cut; what shells expect of Ctrl-C, 128 + SIGINT."""

FORCED_EXIT_S = 1.5
"""After the second Ctrl-C the process ends in any case; engine children end with their parent."""


class Stopper:
    """Counts requests to stop and cancels what each of them ends.

    Attributes:
        requested: Set by the first request.
        running: Everything the process does runs in this scope; cancelled by the second request, or
            by the first as long as `is_serving` is False.
        starting: What follows once the node serves, as loading a model; ended by the first request.
        is_serving: Whether there may be replies to wait for.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.requested = trio.Event()
        self.running = trio.CancelScope()
        self.starting = trio.CancelScope()
        self.is_serving = False
        self.is_forced = False
        self._announce = announce

    def request(self) -> None:
        """Ask for a stop: gently the first time, at once the second."""
        if self.requested.is_set():
            self._force()
            return
        self.requested.set()
        self.starting.cancel()
        if self.is_serving:
            self._announce("stopping: running replies finish; Ctrl-C again cancels them")
        else:
            self.running.cancel()

    async def watch_signals(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Take each SIGINT or SIGTERM as a request."""
        with trio.open_signal_receiver(*STOP_SIGNALS) as received:
            task_status.started()
            async for _ in received:
                self.request()

    async def watch_parent(self) -> None:
        """Take the end of standard input as a request: whoever started this process has ended."""
        # Not sys.stdin.read: a thread inside it would hold its lock when the interpreter ends.
        while await trio.to_thread.run_sync(os.read, 0, 4096, abandon_on_cancel=True):
            pass
        if not self.requested.is_set():
            self.request()

    def _force(self) -> None:
        self.is_forced = True
        self.running.cancel()
        # A thread that cannot be cancelled (a hash over gigabytes) must not keep the process.
        last = threading.Timer(FORCED_EXIT_S, os._exit, [EXIT_FORCED])
        last.daemon = True
        last.start()
