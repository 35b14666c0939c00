"""Models of the Hugging Face Hub: whole, or only the layers that this machine is to hold.

Configuration, tokenizer and headers come first and are checked by our own readers; no byte of a
tensor is asked for before. Only files that are data are ever fetched. A download that ends half-way
goes on where it stopped, and counts as a model once every file has the Hub's hash.
Spec: protocols/manifest.md, section 5.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from swarmpy.abc import ModelLabel, ModelSource, Progress
from swarmpy.errors import ModelNotFound, ModelRefused
from swarmpy.shards.hub_download import Download
from swarmpy.shards.hub_http import HubUnreachable, access, connect, list_files
from swarmpy.shards.hub_names import HubName, choose, parse_name, pinned_name, release_of
from swarmpy.shards.locks import hold_lock
from swarmpy.shards.manifest import HashCache
from swarmpy.shards.partial import (
    Holding,
    PartialFolder,
    disk_errors,
    has_same_files,
    model_path,
    read_holding,
)
from swarmpy.shards.ranges import Range
from swarmpy.shards.sources import Report, in_thread, plain_model_name

T = TypeVar("T")


class HubSource(ModelSource):
    """Models of the Hugging Face Hub, or of another hub that HF_ENDPOINT names."""

    name = "hub"

    def __init__(self, *, endpoint: str = "", token: str | None = None) -> None:
        """Args: endpoint, token: Instead of those of huggingface_hub's own settings."""
        self._endpoint = endpoint
        self._token = token

    def matches(self, model: str) -> bool:
        """Whether the name has the form `owner/name[@revision][:file.gguf]`."""
        return parse_name(model) is not None

    def label(self, model: str) -> ModelLabel:
        """Name it after the repository, or the GGUF without its ending."""
        name = _parsed(model)
        title = name.file[:-5] or name.repository.partition("/")[2]
        return ModelLabel(
            name=plain_model_name(title),
            display_name=title,
            origin=f"Hugging Face {name.repository}@{name.revision}",
        )

    async def fetch(self, model: str, into: Path, progress: Callable[[Progress], None]) -> Path:
        """Return the whole, verified model in the cache; fetch what of it is not there yet.

        A name with a commit that is here needs no network. Where the Hub cannot be reached, the
        newest copy that the same name gave before will do.

        Raises:
            ModelNotFound: No such repository, revision or file, or not for this user.
            ModelRefused: Its headers or configuration are not those of harmless model files.
            DownloadFailed: The network, the Hub or the disk failed, or a file is not the one that
                the Hub lists. What came so far is kept but for a file that is not.
            ExtensionNotFound: huggingface_hub is not installed.
        """
        return await self._fetch(_parsed(model), into, progress, layers=None)

    async def fetch_layers(
        self,
        model: str,
        into: Path,
        progress: Callable[[Progress], None],
        *,
        start: int,
        end: int,
        keeps_reserve: bool = False,
    ) -> Path:
        """Fetch the headers and the tensors of layers `[start, end)` alone; raises as `fetch`.

        Args:
            keeps_reserve: Whether to leave the reserve of the disk (manifest.md 5) free.

        Returns:
            The model with holes in `into/partial`, or the whole one where no layer is missing.
        """
        layers = (start, end)
        return await self._fetch(
            _parsed(model), into, progress, layers=layers, keeps_reserve=keeps_reserve
        )

    @staticmethod
    def holding(path: Path) -> Holding:
        """Return what is held of the model that this source returned at `path`."""
        holding = read_holding(path) or read_holding(path.parent)
        if holding is None:
            raise ModelNotFound(f"{path} is no longer there")
        return holding

    @staticmethod
    def whole_path(path: Path, into: Path) -> Path | None:
        """Return where the model that `fetch_layers` returned at `path` now lies whole, if so."""
        folder = into / "models" / path.relative_to(into).parts[1]
        holding = read_holding(folder)
        return model_path(folder, holding) if holding is not None and holding.is_whole else None

    async def _fetch(
        self,
        name: HubName,
        into: Path,
        progress: Callable[[Progress], None],
        *,
        layers: Range | None,
        keeps_reserve: bool = False,
    ) -> Path:
        if name.is_pinned and (path := await _intact_copy(name, into, progress)):
            return path
        progress(Progress(step="asking the Hub", done=0, total=0))
        try:
            reached = await _abandonable(
                partial(access, endpoint=self._endpoint, token=self._token)
            )
            listing = await _abandonable(
                partial(list_files, name.repository, name.revision, reached)
            )
        except HubUnreachable:
            path = await _intact_copy(name, into, progress)
            if path is None:
                raise
            progress(
                Progress(step="the Hub is out of reach, the copy here will do", done=0, total=0)
            )
            return path
        wanted = choose(listing, name)
        if not name.is_pinned:
            wanted = await trio.to_thread.run_sync(_begun, wanted, into)
        release = release_of(wanted)
        tell = partial(progress, Progress(step="waiting for another download", done=0, total=0))
        async with hold_lock(into / "locks" / f"{release}.lock", waiting=tell):
            path = await _intact_copy(pinned_name(wanted), into, progress)
            if path is not None:
                return path
            await trio.to_thread.run_sync(_reopen_damaged, into, release)
            folder = await trio.to_thread.run_sync(
                PartialFolder, into / "partial" / release, wanted
            )
            async with connect(listing, reached) as connection:
                download = Download(folder, connection, progress, keeps_reserve=keeps_reserve)
                is_whole = await download.run(layers)
            if is_whole:
                return await trio.to_thread.run_sync(_finish, folder, into)
            return model_path(folder.path, folder.holding)


def _parsed(model: str) -> HubName:
    name = parse_name(model)
    if name is None:
        raise ModelNotFound(
            f"{model!r:.80} is no name of the Hub, expected owner/name[@revision][:file.gguf]"
        )
    return name


async def _abandonable(work: Callable[[], T]) -> T:
    """Run a blocking question in a thread that a cancellation leaves behind: it changes nothing."""
    return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


async def _intact_copy(
    name: HubName, into: Path, progress: Callable[[Progress], None]
) -> Path | None:
    """Return a whole copy of what a name means, or meant when it was last asked for."""
    return await in_thread(partial(_find_intact, name, into), progress, "checking")


def _find_intact(name: HubName, into: Path, report: Report) -> Path | None:
    place = name.repository.lower().replace("/", "--")
    hashes = HashCache(into)
    for folder in sorted((into / "models").glob(f"hub--{place}--*"), key=_age, reverse=True):
        holding = read_holding(folder)
        if holding is None or not holding.is_whole:
            continue
        is_meant = (
            holding.repository.lower() == name.repository.lower()
            and name.revision in (holding.commit, holding.revision)
            and name.file in (holding.file, holding.asked_file)
        )
        if is_meant and not _damaged(folder, holding, hashes, report):
            return model_path(folder, holding)
    return None


def _begun(wanted: Holding, into: Path) -> Holding:
    """Return what is wanted, by the commit under which most of the very same files are here.

    A commit that changes a README makes no other model: nothing of it is to come twice.
    """
    place = wanted.repository.lower().replace("/", "--")
    folders = [*into.glob(f"models/hub--{place}--*"), *into.glob(f"partial/hub--{place}--*")]
    found = [held for folder in sorted(folders) if (held := read_holding(folder)) is not None]
    same = [held for held in found if has_same_files(held, wanted)]
    best = max(same, key=lambda held: held.held_bytes, default=wanted)
    return msgspec.structs.replace(wanted, commit=best.commit)


def _age(folder: Path) -> int:
    """When a folder last changed; 0 where it has gone since it was listed."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _damaged(folder: Path, holding: Holding, hashes: HashCache, report: Report) -> Sequence[str]:
    """Return the names of files that are missing or no longer what they were."""
    damaged = []
    for file in holding.files:
        path = folder / file.name
        try:
            is_intact = path.stat().st_size == file.size and file.sha256 == hashes.sha256(
                path, partial(_report_file, report, file.size)
            )
        except (OSError, ModelRefused):
            is_intact = False
        if not is_intact:
            damaged.append(file.name)
    return damaged


def _report_file(report: Report, total: int, done: int) -> None:
    report(done, total)


def _reopen_damaged(into: Path, release: str) -> None:
    """Make a damaged model a partial one again, which a download then completes."""
    folder, target = into / "models" / release, into / "partial" / release
    holding = read_holding(folder)
    with disk_errors(folder):
        if holding is None:
            shutil.rmtree(folder, ignore_errors=True)
            return
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.replace(folder, target)
    reopened = PartialFolder(target, holding)
    for name in _damaged(target, holding, HashCache(into), lambda done, total: None):
        reopened.forget(name)


def _finish(folder: PartialFolder, into: Path) -> Path:
    """Move a whole release among the models, and remember the hashes that were just computed."""
    holding = folder.holding
    target = into / "models" / folder.path.name
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.replace(folder.path, target)
    hashes = HashCache(into)
    for file in holding.files:
        hashes.remember(target / file.name, file.sha256)
    return model_path(target, holding)
