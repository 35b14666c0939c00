"""Makes a model of one that is here: the same GGUF with its weights in another type.

The result is a model of its own, with an id of its own, and says in its metadata which one it was
made from. The work is done in a child process (`quantize_child.py`): an assertion in the library
must not end its caller. The original is only read, and checked again once it was; the result is run
once before it is listed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec
import trio

from swarmpy.abc import Progress
from swarmpy.errors import (
    ConfigError,
    DoesNotFit,
    EngineLost,
    ExtensionNotFound,
    ModelRefused,
    RowError,
)
from swarmpy.pipeline.engine_process import child_environment
from swarmpy.pipeline.engine_threads import threads_for
from swarmpy.plugins.llama.architectures import architecture_of
from swarmpy.plugins.llama.file_types import FileType, file_type
from swarmpy.plugins.llama.library import find_library
from swarmpy.plugins.llama.measure import check_runs
from swarmpy.plugins.llama.quantized_file import QuantizedFile, quantized_file
from swarmpy.shards.catalog import Catalog, ModelEntry, ignore
from swarmpy.shards.gguf import read_header
from swarmpy.shards.locks import hold_lock
from swarmpy.shards.sources import make_empty, plain_model_name

CHILD = "swarmpy.plugins.llama.quantize_child"
"""The module that is run."""

LINE_BYTES_MAX = 16_384
"""Longest line of the child."""

SILENCE_S_MAX = 120.0
"""Longest wait for progress. The child tells of each million numbers, and writes them to the disk
a gibibyte at a time (`quantize_child.SYNC_BYTES`)."""

STDERR_SHOWN = 500
"""Last characters of what the child wrote to standard error, for the message."""

_TYPE_AT_END = re.compile(r"[\s._-]*\(?(?<![A-Za-z0-9])(?:I?Q\d\w*|B?F16|F32)\)?$", re.IGNORECASE)
"""How names of models say their type: "model-Q4_K_M", "Model (F16)"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A model that was made of another."""

    entry: ModelEntry
    is_new: bool
    """False where it had been made before, and was left as it is."""


async def quantize_model(
    catalog: Catalog,
    original: ModelEntry,
    to: str,
    *,
    is_forced: bool = False,
    progress: Callable[[Progress], None] = ignore,
) -> Quantized:
    """Make a model of `original` with its weights in another type, and list it.

    It appears in the cache whole or not at all; whatever ends the work leaves nothing behind.

    Args:
        to: A file type, one of `file_types.TARGETS` in any case.
        is_forced: Make it again where it is here already.

    Raises:
        ConfigError: No such file type, or a disk that is full or cannot be written.
        ExtensionNotFound: The llama.cpp library is not installed.
        ModelRefused: The original is no GGUF, is of that type already, changed since it was listed
            or while it was read, or has weights that are not finite; or the result does not run.
        DoesNotFit: The result is too large for this machine to run it once.
        EngineLost: The child process ended, or hung.
    """
    target = file_type(to)
    find_library()  # It is opened by the child alone, yet its absence must be said first.
    if original.format != "gguf":
        raise ModelRefused(
            f"{original.name} is a folder of safetensors; only GGUF files can be quantised",
            fix="Fetch a GGUF of the model: swarmpy models pull owner/name:file.gguf",
        )
    original = await catalog.verify(original, progress)
    state = await trio.to_thread.run_sync(_state_of, original.path)
    planned = await trio.to_thread.run_sync(_plan, original, target)
    title = derived_title(original.display_name, target)
    release = f"derived--{plain_model_name(title)}--{original.model_id[:12]}"
    path = catalog.cache_folder / "models" / release / f"{title}.gguf"
    tell = partial(progress, Progress(step="waiting for another quantisation", done=0, total=0))
    async with hold_lock(catalog.cache_folder / "locks" / f"{release}.lock", waiting=tell):
        listed = await trio.to_thread.run_sync(_listed, catalog, path)
        if listed is not None and not is_forced:
            return Quantized(entry=listed, is_new=False)
        folder = catalog.cache_folder / "downloads" / release
        try:
            needed = planned.laid_out.size_bytes
            make = partial(make_empty, folder, needed, what="the new model", failed=ConfigError)
            await trio.to_thread.run_sync(make)
            written = folder / path.name
            await _run_child(original, written, target, catalog.cache_folder, progress)
            await _check_unchanged(catalog, original, state, progress)
            await trio.to_thread.run_sync(_check_written, written, planned)
            await _check_runs(written, catalog.cache_folder, progress)
            entry = await _install(catalog, written, path, progress)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(partial(shutil.rmtree, folder, ignore_errors=True))
    return Quantized(entry=entry, is_new=True)


def derived_title(title: str, target: FileType) -> str:
    """Return what a derived model is called, as a plain file name: "SmolLM2 135M (Q4_0)"."""
    bare = _TYPE_AT_END.sub("", title)
    plain = re.sub(r"[^\w .()+-]+", "-", bare, flags=re.ASCII).strip(" .-")[:80]
    return f"{plain or 'model'} ({target.name})"


def _plan(original: ModelEntry, target: FileType) -> QuantizedFile:
    header = read_header(original.path)
    architecture_of(header)  # Only of these it is known which tensors bear it.
    planned = quantized_file(header, target, derived_from=original.model_id)
    if planned.changes_nothing:
        raise ModelRefused(
            f"{original.name} is {target.name} already", fix="Name another type with --to."
        )
    return planned


def _listed(catalog: Catalog, path: Path) -> ModelEntry | None:
    return next((entry for entry in catalog.list() if entry.path == path), None)


class _Line(msgspec.Struct, frozen=True):
    """What the child says: how far it is, or why it ends."""

    done: int = 0
    total: int = 0
    error: str = ""
    message: str = ""
    fix: str = ""


async def _run_child(
    original: ModelEntry,
    written: Path,
    target: FileType,
    cache_folder: Path,
    progress: Callable[[Progress], None],
) -> None:
    """Run the child to its end; killed when this is cancelled."""
    threads = threads_for(cache_folder / "run" / "engines", configured=0)
    command = [sys.executable, "-P", "-s", "-m", CHILD]
    command += [str(original.path), str(written), target.name, str(threads), original.model_id]
    log = written.with_name("errors.log")
    with log.open("wb") as errors:
        try:
            process = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=written.parent,
                env=child_environment(written.parent, threads=1),
                start_new_session=True,  # Ctrl-C is ours to hear.
            )
        except OSError as error:
            raise EngineLost(f"cannot start a process: {error.strerror}") from error
    last = _Line()
    try:
        assert process.stdout is not None
        unread, furthest = bytearray(), -1
        with trio.move_on_after(SILENCE_S_MAX) as patience:
            async for data in process.stdout:
                unread += data
                for last in _lines(unread):
                    if not last.error:
                        progress(Progress(step="quantising", done=last.done, total=last.total))
                    if last.done > furthest:
                        furthest = last.done
                        patience.deadline = trio.current_time() + SILENCE_S_MAX
            await process.wait()
        if patience.cancelled_caught:
            raise EngineLost(
                f"the quantising process made no progress for {SILENCE_S_MAX:g} s",
                fix="Nothing was changed. Where the disk is not stuck, please report this.",
            )
    finally:
        if process.returncode is None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    if last.error:
        _raise_as_said(last)
    if process.returncode:
        raise _child_lost(process.returncode, log)


def _lines(unread: bytearray) -> Iterator[_Line]:
    """Yield the whole lines, and leave what follows them."""
    *lines, rest = unread.split(b"\n")
    unread[:] = rest
    try:
        if len(rest) > LINE_BYTES_MAX:
            raise EngineLost(f"the quantising process sent a line beyond {LINE_BYTES_MAX} bytes")
        for line in lines:
            yield msgspec.json.decode(line, type=_Line)
    except msgspec.MsgspecError as error:
        raise EngineLost(f"the quantising process sent what is no progress: {error}") from error


def _raise_as_said(line: _Line) -> NoReturn:
    """Raise what the child could say of its end."""
    kinds = {kind.__name__: kind for kind in (ConfigError, ExtensionNotFound, ModelRefused)}
    raise kinds.get(line.error, EngineLost)(line.message, fix=line.fix)


def _child_lost(code: int, log: Path) -> EngineLost:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    with contextlib.suppress(OSError):
        said = log.read_text("utf-8", "replace").strip()[-STDERR_SHOWN:]
        how += f": {said}" if said else ""
    return EngineLost(
        f"the quantising process ended ({how})", fix="Nothing was changed; please report this."
    )


async def _check_unchanged(
    catalog: Catalog,
    original: ModelEntry,
    state: tuple[int, int],
    progress: Callable[[Progress], None],
) -> None:
    """Hold the original against its id once more: the child read it long after that was done.

    Raises:
        ModelRefused: It changed, be it that what it was has been fetched again since.
    """
    await catalog.verify(original, progress)
    if await trio.to_thread.run_sync(_state_of, original.path) != state:
        raise ModelRefused(
            f"{original.name}: {original.path.name} changed while it was quantised",
            fix="Try again.",
        )


def _state_of(path: Path) -> tuple[int, int]:
    """What another file in its place has not, though its bytes be the same."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelRefused(f"cannot read {path}: {error.strerror}") from error
    return status.st_ino, status.st_mtime_ns


async def _check_runs(
    written: Path, cache_folder: Path, progress: Callable[[Progress], None]
) -> None:
    """Run the result once: of a type that it does not expect, the library may end a process.

    Raises:
        DoesNotFit: It is too large for this machine to say.
        ModelRefused: It does not run.
    """
    progress(Progress(step="running it once", done=0, total=0))
    try:
        await check_runs(written, cache_folder=cache_folder)
    except DoesNotFit as error:
        raise DoesNotFit(
            f"{written.stem} cannot be run once here, and so is not listed: {error}",
            fix="Free memory, or quantise it on a larger machine.",
        ) from error
    except (EngineLost, ModelRefused, RowError) as error:
        raise ModelRefused(
            f"{written.stem} does not run, and so is not listed: {error}",
            fix="Nothing was changed. Use another type, or the original; please report this.",
        ) from error


def _check_written(written: Path, planned: QuantizedFile) -> None:
    """Hold the file against the plan, read by our own reader.

    Raises:
        ModelRefused: It is no such file.
    """
    is_whole = written.stat().st_size == planned.laid_out.size_bytes
    if not is_whole or not planned.is_like(read_header(written)):
        raise ModelRefused(f"{written.name} did not become what was planned", fix="Try again.")


async def _install(
    catalog: Catalog, written: Path, path: Path, progress: Callable[[Progress], None]
) -> ModelEntry:
    """Move the file to its place and list it; where it cannot be listed nothing stays."""
    folder, entry = path.parent, None
    is_replaced = await trio.to_thread.run_sync(path.exists)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.replace(written, path)
        entry = await catalog.pull(str(path), progress)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    finally:
        is_elsewhere = entry is not None and entry.path != path  # The same bytes were listed.
        if is_elsewhere or (entry is None and not is_replaced):
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(partial(shutil.rmtree, folder, ignore_errors=True))
    return entry
