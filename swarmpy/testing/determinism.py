"""What makes a run repeatable, and cheap: a seeded scheduler, no threads, signatures checked once.

All of it is switched on for one run and off again after it. Seeding trio's scheduler uses two
private names; they are held here, and a test guards them.
"""

from __future__ import annotations

import gc
import importlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import trio

from swarmpy import public_keys
from swarmpy.proto import envelope
from swarmpy.public_keys import PublicKey

T = TypeVar("T")

GC_THRESHOLDS = (200_000, 50, 50)
"""A swarm is a heap of a million objects and few cycles: looking for them took 15 % of a run."""

FILES_WANTED = 16_384
"""Files open at a time that 1,000 nodes need, and the rest of the process."""

SIGNATURES_MAX = 100_000
"""Signatures remembered in one run, each some 300 bytes; then the oldest are checked again."""


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Make what runs inside depend on `seed` alone.

    `_r` shuffles the runnable tasks; without `_ALLOW_DETERMINISTIC_SCHEDULING` tasks whose timers
    share a deadline would still be ordered by their place in memory.
    """
    scheduler = importlib.import_module("trio._core._run")
    changes: list[tuple[object, str, object]] = [
        (scheduler, "_r", random.Random(seed)),
        (scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        (trio.to_thread, "run_sync", _run_inline),
        (trio.from_thread, "run_sync", _call),
        (trio.from_thread, "check_cancelled", _call),
        (envelope, "verify", _verify_once(public_keys.verify)),
    ]
    if (engines := sys.modules.get("swarmpy.pipeline.engines")) is not None:
        # A simulated machine has no engine installed but the one its settings name.
        changes.append((engines, "engine_names", list))
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    thresholds = gc.get_threshold()
    _allow_files()
    for module, name, value in changes:
        setattr(module, name, value)
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        for module, name, value in before:
            setattr(module, name, value)


def _allow_files() -> None:
    """Let this process open as many files as it may: a node has six, and 1,024 is a usual bound."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft >= FILES_WANTED:
            return
        # mlx-lm sets both bounds when it is imported; root may raise them again, others the first.
        for wanted in ((FILES_WANTED, max(hard, FILES_WANTED)), (hard, hard)):
            with suppress(ValueError, OSError):
                return resource.setrlimit(resource.RLIMIT_NOFILE, wanted)


def _verify_once(
    verify: Callable[[PublicKey, bytes, bytes], None],
) -> Callable[[PublicKey, bytes, bytes], None]:
    """Return a `verify` that checks each signature once: 1,000 nodes get it 1,000 times."""
    sound: dict[tuple[bytes, bytes, bytes], None] = {}

    def verify_once(key: PublicKey, signature: bytes, message: bytes) -> None:
        seen = (key.data, bytes(signature), bytes(message))
        if seen not in sound:
            verify(key, signature, message)
            while len(sound) >= SIGNATURES_MAX:
                del sound[next(iter(sound))]
            sound[seen] = None

    return verify_once


def _call(work: Callable[..., T] | None = None, *args: object) -> T | None:
    return None if work is None else work(*args)


async def _run_inline(work: Callable[..., T], *args: object, **_: object) -> T:
    """Run blocking work here and now: the clock would jump while a real thread is waited for."""
    await trio.lowlevel.checkpoint()
    return work(*args)
