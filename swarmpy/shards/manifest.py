"""What a model is: the names, sizes and SHA-256 hashes of its source files, and the hash of those.

Two machines hold the same model if and only if its id is the same, wherever the files came from.
Hashes are remembered by a file's size, times and inode: gigabytes are not read at each start.
Spec: protocols/manifest.md, section 1.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec

from swarmpy.abc import Format
from swarmpy.errors import ConfigError, DownloadFailed, ModelRefused
from swarmpy.shards.locks import hold_lock_blocking
from swarmpy.shards.refusals import file_size
from swarmpy.shards.safetensors import FILES_MAX, INDEX_NAME, check_plain_name, tensor_files
from swarmpy.store import write_file

CHUNK_BYTES = 4 * 1024 * 1024
"""Bytes hashed between two reports of progress (and chances to be cancelled): about 10 ms."""

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    INDEX_NAME,
)
"""Files of a folder that are read besides *.safetensors; any other file does not exist for us."""

REQUIRED_FILES = ("config.json", "tokenizer.json")

GGUF_NAME = "model.gguf"
"""A GGUF's name in its manifest: it is one file, and people rename it."""

HASHES_MAX = 10_000
"""Remembered hashes; beyond it the oldest are forgotten and computed again when needed."""


_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
_Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]  # What every JSON reader holds exactly.


class ManifestFile(msgspec.Struct, frozen=True):
    """One source file: its plain name, size in bytes, and SHA-256 in hex."""

    name: _Name
    size: _Size
    sha256: _Hash


class Manifest(msgspec.Struct, frozen=True):
    """A model's source files, sorted by name. `source` says where from; it is no part of the id."""

    format: Format
    files: Annotated[tuple[ManifestFile, ...], msgspec.Meta(min_length=1, max_length=FILES_MAX + 8)]
    source: Annotated[str, msgspec.Meta(max_length=4096)] = ""

    def canonical_bytes(self) -> bytes:
        """Return the bytes whose hash is the model's id: JSON, keys and files sorted, no spaces."""
        files = sorted(self.files, key=lambda file: file.name)
        return msgspec.json.encode(
            {"files": files, "format": self.format, "version": 1}, order="sorted"
        )

    @property
    def model_id(self) -> str:
        """The SHA-256 of the canonical bytes, 64 hex digits."""
        return hashlib.sha256(self.canonical_bytes()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


def source_files(path: Path) -> Mapping[str, Path]:
    """Return the files that make up the model at `path`, by their name in the manifest.

    Args:
        path: A folder in Hugging Face layout, or one GGUF file.

    Raises:
        ModelRefused: Neither, or a file that a model needs is missing.
    """
    if not path.is_dir():
        if path.suffix.lower() != ".gguf":
            raise ModelRefused(f"{path} is neither a folder nor a .gguf file")
        file_size(path)
        return {GGUF_NAME: path}
    files = {file.name: file for file in tensor_files(path)}
    for name in SMALL_FILES:
        if (path / name).exists():
            files[name] = path / name
        elif name in REQUIRED_FILES:
            raise ModelRefused(f"{path} has no {name}")
    for name, file in files.items():
        check_plain_name(name)
        file_size(file)
    return dict(sorted(files.items()))


def format_of(path: Path) -> Format:
    """Whether the model at `path` is a folder of safetensors or one GGUF."""
    return "safetensors" if path.is_dir() else "gguf"


def build_manifest(
    path: Path, hashes: HashCache, report: Callable[[int, int], None], *, source: str = ""
) -> Manifest:
    """Hash the model at `path`; unchanged files are not read again. Blocks: for a worker thread.

    Args:
        report: Called with bytes done and in all, about every 10 ms; what it raises ends the work.

    Raises:
        ModelRefused: A needed file is missing, unreadable, or changed while it was read.
    """
    files = source_files(path)
    sizes = {name: file_size(file) for name, file in files.items()}
    total, done, listed = sum(sizes.values()), 0, []
    for name, file in files.items():
        digest = hashes.sha256(file, partial(_report_file, report, done, total))
        if file_size(file) != sizes[name]:
            raise ModelRefused(f"{file} changed while it was read; try again")
        done += sizes[name]
        report(done, total)
        listed.append(ManifestFile(name=name, size=sizes[name], sha256=digest))
    return Manifest(format=format_of(path), files=tuple(listed), source=source)


def _report_file(report: Callable[[int, int], None], before: int, total: int, count: int) -> None:
    report(before + count, total)


class _Remembered(msgspec.Struct, frozen=True, array_like=True):
    """A file's hash, and the state it had when it was computed."""

    state: tuple[int, int, int, int, int]
    sha256: _Hash


class HashCache:
    """SHA-256 of files by their state (size, modification and change time, device and inode).

    A changed file has another state and is hashed anew. Bits that rot on disk without a write are
    not seen. One file, shared by the machine's processes.
    """

    def __init__(self, cache_folder: Path) -> None:
        """Args: cache_folder: The machine-wide cache folder; created when first written to."""
        self._path = cache_folder / "index" / "hashes.json"
        self._lock = cache_folder / "locks" / "hashes.lock"

    def sha256(self, file: Path, report: Callable[[int], None]) -> str:
        """Return a file's hash, remembered or computed; `report` gets the bytes done.

        Raises:
            ModelRefused: The file cannot be read, or changed while it was.
        """
        state = state_of(file)
        known = self._read().get(_key_of(file))
        if known is not None and known.state == state:
            return known.sha256
        digest = hash_file(file, report)
        if state_of(file) != state:
            raise ModelRefused(f"{file} changed while it was read; try again")
        self._put(file, _Remembered(state, digest))
        return digest

    def remember(self, file: Path, sha256: str) -> None:
        """Remember a hash that was computed while the file was written."""
        self._put(file, _Remembered(state_of(file), sha256))

    def _put(self, file: Path, entry: _Remembered) -> None:
        with hold_lock_blocking(self._lock):
            entries = self._read()
            entries.pop(_key_of(file), None)
            entries[_key_of(file)] = entry
            kept = dict(list(entries.items())[-HASHES_MAX:])
            write_index(self._path, msgspec.json.encode(kept))

    def _read(self) -> dict[str, _Remembered]:
        """All entries. A file that cannot be read costs only the time to hash again."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, _Remembered])
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return {}


def hash_file(file: Path, report: Callable[[int], None]) -> str:
    """Return the SHA-256 of a file in hex, reporting the bytes done about every 10 ms.

    Raises:
        ModelRefused: The file cannot be read.
    """
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                digest.update(buffer[:count])
                done += count
                report(done)
    except OSError as error:
        raise ModelRefused(f"cannot read {file}: {error.strerror}") from error
    return digest.hexdigest()


def write_index(path: Path, data: bytes) -> None:
    """Write a file of the cache's index, whole or not at all.

    Raises:
        DownloadFailed: The cache folder cannot be written.
    """
    try:
        write_file(path, data)
    except ConfigError as error:
        raise DownloadFailed(str(error)) from error


def is_model_id(text: str) -> bool:
    """Whether a text has the form of a model's id."""
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _key_of(file: Path) -> str:
    """The path of a file behind all links, which may be no text: its bytes then stand escaped."""
    return os.fsencode(file.resolve()).decode("utf-8", "backslashreplace")


def state_of(file: Path) -> tuple[int, int, int, int, int]:
    """Return what changes when a file does: its size, times, device and inode.

    Raises:
        ModelRefused: The file cannot be read.
    """
    try:
        status = os.stat(file)
    except OSError as error:
        raise ModelRefused(f"cannot read {file}: {error.strerror}") from error
    return (
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_dev,
        status.st_ino,
    )
