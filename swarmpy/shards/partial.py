"""A model that is here in part: sparse files, and a list of the byte ranges of them that are whole.

A range is listed only once its bytes are on the disk, and the list is replaced whole, so whatever
ends a download, what the list says is true. Headers come first: every reader of models works on
such a folder, and only tensors outside the ranges read as zeros.
Spec: protocols/manifest.md, section 5.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec

from swarmpy.abc import Format
from swarmpy.errors import DownloadFailed, ModelRefused
from swarmpy.shards.describe import Description, describe
from swarmpy.shards.manifest import (
    CHUNK_BYTES,
    GGUF_NAME,
    SMALL_FILES,
    Manifest,
    ManifestFile,
    write_index,
)
from swarmpy.shards.ranges import Range, bytes_in, merged
from swarmpy.shards.safetensors import FILES_MAX, INDEX_NAME

log = logging.getLogger(__name__)

SIDECAR_NAME = ".swarmpy.json"
"""Beside the files, so that they move together; readers of models skip names with a dot."""

RANGES_MAX = 200_000
"""Ranges of one file: no more than a model may have tensors."""

DISK_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""What the system says of a full disk, or of a user's full share of it."""

_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}$")]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
_Ranges = Annotated[tuple[tuple[_Count, _Count], ...], msgspec.Meta(max_length=RANGES_MAX)]


class SourceFile(msgspec.Struct, frozen=True):
    """One file of a model as its hub describes it, and the ranges of it that are here."""

    name: _Name
    size: _Count
    sha256: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")] = ""
    """Of the whole file. Empty until the file is whole where the hub knows a git id alone."""
    git_id: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{40})?$")] = ""
    """SHA-1 of the file as a git object, where it is one."""
    ranges: _Ranges = ()
    is_verified: bool = False
    """Whether the whole file was here and had the hub's hash."""


class Holding(msgspec.Struct, frozen=True):
    """What is here of one commit of a model. Kept as JSON beside the files."""

    repository: str
    commit: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{40}$")]
    name: str
    """As used in requests, also once the model is whole."""
    display_name: str
    revision: str = "main"
    """What was asked for when it led to this commit."""
    file: str = ""
    """The GGUF's name; empty for a folder of safetensors."""
    asked_file: str = ""
    """The GGUF that the name asked for; empty where the only one was meant."""
    layer_count: _Count = 0
    """0 until the headers are here."""
    layers: _Ranges = ()
    """Ranges of layers whose tensors are here."""
    files: Annotated[tuple[SourceFile, ...], msgspec.Meta(max_length=FILES_MAX + 8)] = ()
    version: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1

    @property
    def request(self) -> str:
        """The name that always means these files, "owner/name@commit:file.gguf"."""
        return f"{self.repository}@{self.commit}" + (f":{self.file}" if self.file else "")

    @property
    def is_whole(self) -> bool:
        """Whether every file is here and has been verified."""
        return bool(self.files) and all(file.is_verified for file in self.files)

    @property
    def held_bytes(self) -> int:
        """Bytes of all files that are here."""
        return sum(bytes_in(file.ranges) for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialModel:
    """A model of which only some layers are on this machine."""

    model_id: str
    """As it will be once whole."""
    name: str
    display_name: str
    request: str
    folder: Path
    """Where everything of it lies."""
    path: Path
    """As an engine is given it: a folder in Hugging Face layout, or the GGUF; with holes."""
    layers: tuple[Range, ...]
    """Ranges `[start, end)` that are here."""
    layer_count: int
    size_bytes: int
    """Of the whole model."""
    held_bytes: int


class PartialFolder:
    """A release's folder that is being filled. Its methods block: for worker threads."""

    def __init__(self, path: Path, holding: Holding) -> None:
        """Args: path: Created if need be. holding: What the hub says of this commit.

        Ranges that the folder holds of the same files count; files of other contents do not. The
        name that it has there stays.

        Raises:
            DownloadFailed: The folder cannot be written.
        """
        self.path = path
        before = read_holding(path)
        known = {file.name: file for file in before.files} if before else {}
        self._holding = holding
        self._files: dict[str, SourceFile] = {}
        if before is not None and before.commit == holding.commit:
            self._holding = msgspec.structs.replace(
                holding,
                layers=before.layers,
                layer_count=before.layer_count,
                name=before.name,
            )
        self._dirty: set[str] = set()
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file in holding.files:
            self._files[file.name] = self._open(file, known.get(file.name))

    @property
    def holding(self) -> Holding:
        """What is here now, as it would be saved."""
        return msgspec.structs.replace(self._holding, files=tuple(self._files.values()))

    @property
    def files(self) -> Mapping[str, SourceFile]:
        """The files by name."""
        return self._files

    def keep_only(self, names: set[str]) -> None:
        """Forget and delete the files that turned out not to be the model's."""
        for name in set(self._files) - names:
            del self._files[name]
            with disk_errors(self.path):
                (self.path / name).unlink(missing_ok=True)

    def note_layers(self, layer_count: int, layers: tuple[Range, ...] = ()) -> None:
        """Note how many layers the model has, and which of them have become whole."""
        self._holding = msgspec.structs.replace(
            self._holding,
            layer_count=layer_count,
            layers=merged([*self._holding.layers, *layers]),
        )

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write bytes of a file at `offset` and count them as here (on disk after `save`).

        Raises:
            DownloadFailed: The disk is full or cannot be written; nothing new counts.
        """
        file = self._files[name]
        with disk_errors(self.path), (self.path / name).open("r+b", buffering=0) as opened:
            opened.seek(offset)
            view = memoryview(data)
            while view:
                view = view[opened.write(view) :]
        self._dirty.add(name)
        self._files[name] = msgspec.structs.replace(
            file, ranges=merged([*file.ranges, (offset, offset + len(data))])
        )

    def save(self) -> None:
        """Bring what was written to the disk, and only then the list that counts it.

        Raises:
            DownloadFailed: The disk refused; the list is as it was.
        """
        with disk_errors(self.path):
            for name in sorted(self._dirty):
                with (self.path / name).open("r+b") as opened:
                    os.fsync(opened.fileno())
        self._dirty.clear()
        write_index(self.path / SIDECAR_NAME, msgspec.json.encode(self.holding))

    def verify(self, name: str, report: Callable[[int, int], None]) -> None:
        """Hash a file that is whole and hold it against what the hub says of it.

        Raises:
            DownloadFailed: It has another hash. Its bytes count no more: which of them are wrong
                cannot be known.
        """
        file = self._files[name]
        if file.is_verified:
            return
        sha256 = hashlib.sha256()
        git_id = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        with disk_errors(self.path), (self.path / name).open("rb", buffering=0) as opened:
            done = 0
            while chunk := opened.read(CHUNK_BYTES):
                sha256.update(chunk)
                if file.git_id:
                    git_id.update(chunk)
                done += len(chunk)
                report(done, file.size)
        digest = sha256.hexdigest()
        if (file.sha256 and file.sha256 != digest) or (
            not file.sha256 and file.git_id and file.git_id != git_id.hexdigest()
        ):
            self.forget(name)
            raise DownloadFailed(
                f"{name} of {self._holding.request} has SHA-256 {digest}, which is not the hub's "
                f"{file.sha256 or file.git_id}",
                fix="The same command fetches this file anew; the others are kept.",
            )
        self._files[name] = msgspec.structs.replace(file, sha256=digest, is_verified=True)

    def forget(self, name: str) -> None:
        """Count no byte of a file as here, and no layer, at once and after a restart.

        Raises:
            DownloadFailed: The list cannot be written.
        """
        self._files[name] = msgspec.structs.replace(self._files[name], ranges=(), is_verified=False)
        self.save()

    def _open(self, file: SourceFile, before: SourceFile | None) -> SourceFile:
        """Make the sparse file, or take over the one that is there."""
        path = self.path / file.name
        is_same = (
            before is not None
            and path.is_file()
            and path.stat().st_size == file.size
            and _is_same(before, file)
        )
        if before is not None and is_same:
            return before
        with disk_errors(self.path), path.open("wb") as opened:
            opened.truncate(file.size)
        return msgspec.structs.replace(file, ranges=(), is_verified=False)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A block whose `OSError`s are the disk's, at the folder `path`: told with what to do.

    Raises:
        DownloadFailed: Instead of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise _disk_error(error, path) from error


def _disk_error(error: OSError, path: Path) -> DownloadFailed:
    """Return what to tell of an error of the disk."""
    if error.errno in DISK_FULL:
        return DownloadFailed(
            f"the disk of {path} is full; what came so far is kept",
            fix="Free disk space, or name another cache folder in SWARMPY_CACHE; then run the same "
            "command again, which goes on where it stopped.",
        )
    return DownloadFailed(f"cannot write {path}: {error.strerror or error}")


def read_holding(folder: Path) -> Holding | None:
    """Return what a release's folder says it holds; None where it does not say, or not in order."""
    try:
        data = (folder / SIDECAR_NAME).read_bytes()
        return msgspec.json.decode(data, type=Holding)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def model_path(folder: Path, holding: Holding) -> Path:
    """Return what an engine is given of a release: its folder, or the GGUF in it."""
    return folder / holding.file if holding.file else folder


def rename_release(folder: Path, name: str) -> None:
    """Give what a release's folder holds another name. Nobody else may be writing its list.

    Raises:
        DownloadFailed: The folder does not say what it holds (any more), or cannot be written.
    """
    holding = read_holding(folder)
    if holding is None:
        raise DownloadFailed(f"{folder} is no longer there")
    renamed = msgspec.structs.replace(holding, name=name)
    write_index(folder / SIDECAR_NAME, msgspec.json.encode(renamed))


def has_same_files(held: Holding, wanted: Holding) -> bool:
    """Whether two commits of a repository are one model: only files that are not its own differ.

    Args:
        held: What is here. Once its headers are, it lists no weights but those of the index.
        wanted: What the hub lists.
    """
    if held.repository.lower() != wanted.repository.lower() or held.file != wanted.file:
        return False
    known = {file.name: file for file in held.files}
    listed = {file.name: file for file in wanted.files}
    beyond = set(listed) - set(known)
    if set(known) - set(listed) or any(is_small(name) for name in beyond):
        return False
    if beyond and INDEX_NAME not in known:
        return False
    return all(
        bool(listed[name].sha256 or listed[name].git_id) and _is_same(file, listed[name])
        for name, file in known.items()
    )


def _is_same(held: SourceFile, listed: SourceFile) -> bool:
    return (
        held.size == listed.size
        and held.git_id == listed.git_id
        and listed.sha256 in ("", held.sha256)
    )


def partial_releases(cache_folder: Path) -> Sequence[PartialModel]:
    """Return what the folders of partial models hold, by folder; damaged files are not noticed."""
    found = map(partial_model, sorted((cache_folder / "partial").glob("*")))
    return [held for held in found if held is not None]


def partial_models(cache_folder: Path) -> Sequence[PartialModel]:
    """Return the models of which only some layers are here, each once.

    Two commits or repositories can hold one model: of its folders that with the most bytes counts.
    """
    best: dict[str, PartialModel] = {}
    for held in sorted(partial_releases(cache_folder), key=lambda held: -held.held_bytes):
        best.setdefault(held.model_id, held)
    return list(best.values())


def remove_partial(cache_folder: Path, model_id: str) -> None:
    """Delete every folder that holds a part of a model."""
    for held in partial_releases(cache_folder):
        if held.model_id == model_id:
            shutil.rmtree(held.folder, ignore_errors=True)


def describe_partial(held: PartialModel) -> Description | None:
    """Return what the headers say; None, with a warning, where they are gone or damaged.

    Another process may be moving or deleting the folder at this moment. Blocks: reads, once.
    """
    try:
        return _describe_once(held.path, held.model_id)
    except (ModelRefused, OSError) as error:
        _warn_once(held.folder, str(error))
        return None


@cache
def _describe_once(path: Path, model_id: str) -> Description:
    """Describe a model by its headers, which came first and do not change."""
    return describe(path)


@cache
def _warn_once(folder: Path, reason: str) -> None:
    """Warn of a damaged folder; once, as the list is made anew for every question."""
    log.warning("catalog.partial_damaged", extra={"path": str(folder), "reason": reason})


def partial_model(folder: Path) -> PartialModel | None:
    """Describe what a release's folder holds; None where the headers are not all there yet."""
    holding = read_holding(folder)
    if holding is None or not holding.layer_count:
        return None
    model_id = _model_id(holding)
    if not model_id:
        return None
    return PartialModel(
        model_id=model_id,
        name=holding.name,
        display_name=holding.display_name,
        request=holding.request,
        folder=folder,
        path=model_path(folder, holding),
        layers=merged(holding.layers),
        layer_count=holding.layer_count,
        size_bytes=sum(file.size for file in holding.files),
        held_bytes=holding.held_bytes,
    )


def is_small(name: str) -> bool:
    """Whether a file is fetched whole before any tensor: configuration, tokenizer, index."""
    return name in SMALL_FILES


def _model_id(holding: Holding) -> str:
    """The id that the whole model has: hashes of files suffice, their bytes need not be here.

    Empty where the hub does not know them all.
    """
    if not all(file.sha256 for file in holding.files):
        return ""
    kind: Format = "gguf" if holding.file else "safetensors"
    files = tuple(
        ManifestFile(
            name=GGUF_NAME if holding.file else file.name, size=file.size, sha256=file.sha256
        )
        for file in holding.files
    )
    return Manifest(format=kind, files=files).model_id
