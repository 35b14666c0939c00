"""One release being filled from the Hub: small files, then headers, then the tensors asked for.

Spec: protocols/manifest.md, sections 2, 3 and 5.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path

import trio

from swarmpy.abc import Progress
from swarmpy.errors import DownloadFailed, ModelNotFound, ModelRefused
from swarmpy.shards import gguf, safetensors
from swarmpy.shards.describe import describe
from swarmpy.shards.hub_http import HubConnection, HubUnreachable
from swarmpy.shards.partial import (
    Holding,
    PartialFolder,
    SourceFile,
    disk_errors,
    is_small,
    model_path,
    read_holding,
)
from swarmpy.shards.ranges import Range, bytes_in, merged, missing, needed_tensors
from swarmpy.shards.refusals import read_json
from swarmpy.shards.safetensors import INDEX_BYTES_MAX, INDEX_NAME
from swarmpy.shards.sources import in_thread

SAVE_BYTES = 16 * 1024 * 1024
"""Bytes between two saves of the list of ranges: what a crash can cost (a cut network: none)."""

GAP_BYTES_MAX = 4096
"""Bytes between two wanted ranges that are fetched with them: paddings, never a tensor of weight;
less than a request costs."""

HEADER_STEP_BYTES = 16 * 1024
"""First piece of a GGUF's header, whose length nothing states; each further one is doubled."""

HEADER_STEP_BYTES_MAX = 1024 * 1024
"""So at most this much is fetched beyond a header."""

RESERVE_BYTES_MIN = 2_000_000_000
"""Always left free by what others make this machine fetch: a full disk stops its owner's work."""

RESERVE_DIVISOR = 20
"""The reserve is at least this part of the disk, 5 %: file systems grow slow and fail beyond."""

TENSOR_TABLES_MAX = 8
"""Models in part whose tables of tensors are remembered: as many as are planned at a time."""

ATTEMPTS_MAX = 3
"""Tries in a row without a byte before a download gives up; a byte starts the count anew."""


class Download:
    """One release being filled: small files, then headers, then tensors."""

    def __init__(
        self,
        folder: PartialFolder,
        connection: HubConnection,
        progress: Callable[[Progress], None],
        *,
        keeps_reserve: bool = False,
    ) -> None:
        """Args: keeps_reserve: Whether the disk is to be left as free as `reserve_bytes` says."""
        self._folder = folder
        self._keeps_reserve = keeps_reserve
        self._connection = connection
        self._progress = progress
        self._unsaved_bytes = 0
        self._done = self._total = 0

    async def run(self, layers: Range | None) -> bool:
        """Fetch what is missing of some layers, or of the whole; return whether all is here."""
        try:
            is_whole = await self._fetch(layers)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_save_quietly, self._folder)
            raise
        await trio.to_thread.run_sync(self._folder.save)
        return is_whole

    async def _fetch(self, layers: Range | None) -> bool:
        folder = self._folder
        await self._small_files()
        self._total = 0  # Headers are counted in files.
        weights = [item for item in folder.files.values() if not is_small(item.name)]
        for index, file in enumerate(weights):
            self._progress(
                Progress(step="reading headers", done=index, total=len(weights), unit="files")
            )
            await trio.to_thread.run_sync(self._read_header, file)
        path = model_path(folder.path, folder.holding)
        description = await trio.to_thread.run_sync(describe, path)
        folder.note_layers(description.layer_count)
        await trio.to_thread.run_sync(folder.save)
        if layers is not None:
            _check_layers(layers, folder.holding)
            held = merged([*folder.holding.layers, layers])  # Headers alone are the range (0, 0).
            if held != ((0, description.layer_count),):
                ranges = await trio.to_thread.run_sync(
                    lambda: _ranges_of(_read_tensors(path), layers, folder.holding)
                )
                await self._ranges(ranges, whole_bytes=False)
                folder.note_layers(description.layer_count, (layers,))
                return False
        await self._ranges({file.name: [(0, file.size)] for file in folder.files.values()})
        folder.note_layers(description.layer_count, ((0, description.layer_count),))
        return True

    async def _small_files(self) -> None:
        """Fetch configuration, tokenizer and index; then the index says which weights there are."""
        small = {
            file.name: [(0, file.size)]
            for file in self._folder.files.values()
            if is_small(file.name)
        }
        await self._ranges(small)
        if INDEX_NAME in small:
            names = await trio.to_thread.run_sync(_indexed_files, self._folder)
            await trio.to_thread.run_sync(self._folder.keep_only, {*small, *names})

    def _read_header(self, file: SourceFile) -> None:
        """Fetch a file's header and no more, and check it. In a worker thread.

        What a header claims is held against the file's size before its claim is believed.
        """
        source = _GrowingFile(file, self)
        path = self._folder.path / file.name
        if file.name == self._folder.holding.file:
            source.step_bytes = HEADER_STEP_BYTES
            gguf.parse_header(io.BufferedReader(source), path=path, file_bytes=file.size)
            return
        length = int.from_bytes(source.take(min(8, file.size)), "little")
        if length > min(safetensors.HEADER_BYTES_MAX, file.size - 8):
            raise ModelRefused(f"{file.name}: header of {length} bytes in a file of {file.size}")
        safetensors.parse_header(source.take(length), path=path, file_bytes=file.size)

    async def _ranges(
        self, wanted: Mapping[str, Iterable[Range]], *, whole_bytes: bool = True
    ) -> None:
        """Fetch what is missing of ranges of several files; verify those that become whole."""
        absent: dict[str, tuple[Range, ...]] = {}
        self._done = self._total = 0
        for name, ranges in wanted.items():
            ranges = merged(ranges)
            absent[name] = missing(ranges, self._folder.files[name].ranges)
            self._total += bytes_in(ranges)
            self._done += bytes_in(ranges) - bytes_in(absent[name])
        needed = sum(map(bytes_in, absent.values()))
        await trio.to_thread.run_sync(self._check_space, needed)
        for name, gaps in absent.items():
            for start, end in gaps:
                await self.fetch(name, start, end)
            file = self._folder.files[name]
            if not missing([(0, file.size)], file.ranges) and not file.is_verified:
                await trio.to_thread.run_sync(self._folder.save)
                await in_thread(
                    partial(self._folder.verify, name), self._progress, f"checking {name}"
                )

    async def fetch(self, name: str, start: int, end: int) -> None:
        """Fetch one range of a file, going on after a broken connection as long as that helps."""
        position, attempts = start, 0
        file = self._folder.files[name]

        async def keep(piece: bytes) -> None:
            nonlocal position, attempts
            await trio.to_thread.run_sync(self._folder.write, name, position, piece)
            position += len(piece)
            attempts = 0
            self._done += len(piece)
            self._unsaved_bytes += len(piece)
            if self._total:
                done = min(self._done, self._total)
                self._progress(Progress(step="downloading", done=done, total=self._total))
            if self._unsaved_bytes >= SAVE_BYTES:
                self._unsaved_bytes = 0
                await trio.to_thread.run_sync(self._folder.save)
                if self._keeps_reserve:  # Another download may have taken the space meanwhile.
                    await trio.to_thread.run_sync(self._check_space, self._total - self._done)

        while position < end:
            attempts += 1
            try:
                await self._connection.fetch(file, position, end, keep)
            except HubUnreachable:
                if attempts >= ATTEMPTS_MAX:
                    raise

    def _check_space(self, needed: int) -> None:
        if needed <= 0:
            return
        folder = self._folder.path
        with disk_errors(folder):
            usage = shutil.disk_usage(folder)
        reserve = reserve_bytes(usage.total) if self._keeps_reserve else 0
        if usage.free - reserve < needed:
            kept = f", of which {reserve} are kept" if reserve else ""
            raise DownloadFailed(
                f"{needed} more bytes are needed in {folder}, {usage.free} are free{kept}",
                fix="Free disk space, fetch fewer layers (--layers), or name another cache folder "
                "in SWARMPY_CACHE. What came so far is kept.",
            )

    def fetch_from_thread(self, name: str, start: int, end: int) -> bytes:
        """Return bytes of a file, fetching what of them is not here. In a worker thread."""
        for gap_start, gap_end in missing([(start, end)], self._folder.files[name].ranges):
            trio.from_thread.run(self.fetch, name, gap_start, gap_end)
        with disk_errors(self._folder.path), (self._folder.path / name).open("rb") as file:
            file.seek(start)
            return file.read(end - start)


class _GrowingFile(io.RawIOBase):
    """A file of the Hub read front to back: what a parser asks for is fetched when it does."""

    def __init__(self, file: SourceFile, download: Download) -> None:
        super().__init__()
        self.step_bytes = 0
        self._file = file
        self._download = download
        self._offset = 0
        self._ahead = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as the piece that is here goes; fetch the next where none is."""
        if not self._ahead:
            self._ahead = self.take(min(self.step_bytes, self._file.size - self._offset))
            self.step_bytes = min(2 * self.step_bytes, HEADER_STEP_BYTES_MAX)
        count = min(len(buffer), len(self._ahead))
        buffer[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return count

    def take(self, count: int) -> bytes:
        """Return exactly the next `count` bytes."""
        end = self._offset + count
        data = self._download.fetch_from_thread(self._file.name, self._offset, end)
        self._offset = end
        return data


def _indexed_files(folder: PartialFolder) -> set[str]:
    """Return the files of weights that the index names; each must be in the repository."""
    weight_map = read_json(folder.path / INDEX_NAME, bytes_max=INDEX_BYTES_MAX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelRefused(f"{INDEX_NAME} has no weight_map")
    names = set(map(str, weight_map.values()))
    for name in sorted(names):
        if name not in folder.files or not name.endswith(".safetensors"):
            raise ModelRefused(f"{INDEX_NAME} names {name!r:.80}, which is not in the repository")
    return names


def _check_layers(layers: Range, holding: Holding) -> None:
    start, end = layers
    if not 0 <= start <= end <= holding.layer_count:
        raise ModelNotFound(
            f"{holding.repository} has layers 0-{holding.layer_count - 1}, not {start}-{end - 1}",
            fix=f"swarmpy models pull {holding.request} --layers 0-{holding.layer_count - 1}",
        )


def _read_tensors(path: Path) -> Mapping[str, safetensors.FileRange]:
    """Return where the tensors of a folder or GGUF lie, by name. Blocks: reads the headers."""
    return safetensors.read_folder(path) if path.is_dir() else gguf.read_header(path).tensors


@lru_cache(maxsize=TENSOR_TABLES_MAX)
def _tensors_once(path: Path, model_id: str) -> Mapping[str, safetensors.FileRange]:
    """Return where the tensors lie; headers came first and do not change."""
    return _read_tensors(path)


def _ranges_of(
    tensors: Mapping[str, safetensors.FileRange], layers: Range, holding: Holding
) -> Mapping[str, tuple[Range, ...]]:
    """Return the byte ranges of every file that some layers need."""
    start, end = layers
    wanted: dict[str, list[Range]] = {}
    for name in needed_tensors(tensors, start=start, end=end, layer_count=holding.layer_count):
        entry = tensors[name]
        wanted.setdefault(entry.path.name, []).append(
            (entry.offset, entry.offset + entry.size_bytes)
        )
    for file in holding.files:
        if not file.sha256 and not is_small(file.name):
            wanted[file.name] = [(0, file.size)]  # Its hash, and so the model's id, is not known.
    return {name: merged(ranges, gap_bytes=GAP_BYTES_MAX) for name, ranges in wanted.items()}


def missing_bytes(path: Path, model_id: str, layers: Range) -> int:
    """Return the bytes that are to be fetched before some layers of a partial model are here.

    0 where the model lies at `path` no longer, whole, moved or deleted by another process: what
    loads it will tell. Blocks: reads the headers, once.
    """
    holding = read_holding(path) or read_holding(path.parent)
    if holding is None:
        return 0
    try:
        tensors = _tensors_once(path, model_id)
    except (ModelRefused, OSError):
        return 0
    held = {file.name: file.ranges for file in holding.files}
    wanted = _ranges_of(tensors, layers, holding)
    return sum(bytes_in(missing(ranges, held.get(name, ()))) for name, ranges in wanted.items())


def reserve_bytes(disk_bytes: int) -> int:
    """Return what fetches that others ask for leave free of a disk of `disk_bytes`."""
    return max(RESERVE_BYTES_MIN, disk_bytes // RESERVE_DIVISOR)


def _save_quietly(folder: PartialFolder) -> None:
    """Save the list where something else went wrong already; that is what is to be told."""
    try:
        folder.save()
    except DownloadFailed:
        pass  # The list as it was before is true as well, only shorter.
