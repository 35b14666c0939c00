"""The models of this machine: what is here, under which name, and whether it is still intact.

The catalog is one small file in the machine-wide cache folder, changed under a lock and written
whole, so that any number of nodes and commands share it. It only ever lists models that somebody
added on this machine; nothing a peer or client says adds one.
Spec: protocols/manifest.md, section 5.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import trio

from swarmpy.abc import ModelSource, Progress
from swarmpy.errors import DownloadFailed, ModelNotFound, ModelRefused
from swarmpy.shards.entries import ModelEntry, damaged_entry, partial_entry, whole_entry
from swarmpy.shards.hub import HubSource
from swarmpy.shards.hub_download import missing_bytes
from swarmpy.shards.locks import hold_lock, hold_lock_blocking
from swarmpy.shards.manifest import (
    HashCache,
    Manifest,
    build_manifest,
    is_model_id,
    write_index,
)
from swarmpy.shards.partial import (
    PartialModel,
    partial_models,
    partial_releases,
    remove_partial,
    rename_release,
)
from swarmpy.shards.ranges import missing
from swarmpy.shards.sources import FolderSource, PackageSource, in_thread, plain_model_name

__all__ = ["Catalog", "ModelEntry", "ignore"]

T = TypeVar("T")

log = logging.getLogger(__name__)

MODELS_MAX = 1000
"""Models listed on one machine."""

ID_PREFIX_MIN = 8
"""Fewest hex digits of an id that are taken for a model: 32 bits do not collide by chance."""


class _Record(msgspec.Struct, frozen=True):
    """A listed model, with what it takes to verify it or to fetch it again."""

    entry: ModelEntry
    request: str
    """What its source is asked for: a name or a path."""
    manifest: Manifest


class _Index(msgspec.Struct, frozen=True):
    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    models: Annotated[tuple[_Record, ...], msgspec.Meta(max_length=MODELS_MAX)]


def ignore(progress: Progress) -> None:
    """Do nothing with a report of progress."""


class Catalog:
    """Finds, adds, verifies and removes the models of this machine."""

    def __init__(self, cache_folder: Path, *, sources: Sequence[ModelSource] | None = None) -> None:
        """Args: cache_folder: Machine-wide. sources: In order; default: package, hub and folder."""
        self.cache_folder = cache_folder = Path(os.path.abspath(cache_folder))
        if sources is None:
            sources = (PackageSource(), HubSource(), FolderSource())
        self._sources = tuple(sources)
        self._hashes = HashCache(cache_folder)
        self._path = cache_folder / "index" / "models.json"
        self._lock = cache_folder / "locks" / "models.lock"

    async def pull(self, model: str, progress: Callable[[Progress], None] = ignore) -> ModelEntry:
        """Bring a model to this machine and list it; again is cheap and verifies or repairs it.

        Args:
            model: A listed name or id, a source's name, or a path. Callers vouch that an admin of
                this machine asked for it: a path makes local files servable.

        Raises:
            ModelNotFound: Nothing is known by this name.
            ModelRefused: The files ask for what a model must not do, or contradict themselves.
            DownloadFailed: The files could not be fetched or did not verify.
        """
        request = self._request(model)
        source = self._source(request)
        if source is None:
            raise self._not_found(model)
        path = await source.fetch(request, self.cache_folder, progress)
        return await self._list_fetched(source, request, path, progress)

    async def _list_fetched(
        self, source: ModelSource, request: str, path: Path, progress: Callable[[Progress], None]
    ) -> ModelEntry:
        """List the whole model that a source returned at `path`."""
        label = source.label(request)
        if isinstance(source, HubSource):
            holding = await trio.to_thread.run_sync(source.holding, path)
            request = holding.request
            label = dataclasses.replace(source.label(request), name=holding.name)
        manifest = await in_thread(
            partial(build_manifest, path, self._hashes, source=label.origin), progress, "checking"
        )
        entry = await trio.to_thread.run_sync(whole_entry, path, manifest, label)
        if isinstance(source, FolderSource):
            request = str(path)
        return await trio.to_thread.run_sync(
            self._add, _Record(entry=entry, request=request, manifest=manifest)
        )

    async def pull_layers(
        self,
        model: str,
        *,
        start: int,
        end: int,
        progress: Callable[[Progress], None] = ignore,
        keeps_reserve: bool = False,
    ) -> ModelEntry:
        """Bring the headers and layers `[start, end)` of a hub's model to this machine.

        Where no layer is missing any more the model is listed as by `pull`.

        Args:
            start: Equal to `end` for the headers alone.
            keeps_reserve: Whether to refuse what would leave too little of the disk free
                (`hub_download.reserve_bytes`): for fetches that others ask for.

        Raises:
            ModelNotFound, ModelRefused, DownloadFailed: As `pull`; also for layers that the model
                does not have, for sources that give whole models only, and where another process
                removes the model meanwhile.
        """
        request = self._request(model)
        source = self._source(request)
        if not isinstance(source, HubSource):
            raise ModelNotFound(
                f"{model!r:.80} is no model of a hub; only those can be fetched by layers",
                fix=f"swarmpy models pull {model}",
            )
        path = await source.fetch_layers(
            request,
            self.cache_folder,
            progress,
            start=start,
            end=end,
            keeps_reserve=keeps_reserve,
        )
        entry = await trio.to_thread.run_sync(self._partial_at, path)
        if entry is not None:
            return await self._freely_named(entry)
        whole = await trio.to_thread.run_sync(source.whole_path, path, self.cache_folder)
        if whole is None:
            raise DownloadFailed(
                f"{path} was removed while it was fetched", fix="The same command fetches it anew."
            )
        return await self._list_fetched(source, request, whole, progress)

    async def obtain(
        self,
        entry: ModelEntry,
        *,
        start: int,
        end: int,
        progress: Callable[[Progress], None] = ignore,
    ) -> ModelEntry:
        """Make sure that the files of layers `[start, end)` are here and intact; raises as `pull`.

        Others may have asked for it, so layers are only fetched while the disk keeps its reserve.

        Returns:
            The entry as it is now.
        """
        held = entry.layers
        if held is None or not missing([(start, end)], held):
            return await self.verify(entry, progress)
        return await self.pull_layers(
            entry.model_id, start=start, end=end, progress=progress, keeps_reserve=True
        )

    def missing_bytes(self, entry: ModelEntry, *, start: int, end: int) -> int:
        """Return the bytes that `obtain` would fetch; 0 where the files are gone meanwhile.

        Blocks: reads headers, once.
        """
        if entry.layers is None or not missing([(start, end)], entry.layers):
            return 0
        return missing_bytes(entry.path, entry.model_id, (start, end))

    async def verify(
        self, entry: ModelEntry, progress: Callable[[Progress], None] = ignore
    ) -> ModelEntry:
        """Check that a listed model's files are still those of its id; do so before a load.

        Unchanged files cost one `stat` each. A damaged package is fetched again. Of a model that
        is here in part nothing can be checked: the hashes are those of whole files.

        Returns:
            The entry as it is now.

        Raises:
            ModelNotFound: The model is no longer listed.
            ModelRefused: Its files changed: they are another model now, or none.
            DownloadFailed: The files were damaged and could not be fetched again.
        """
        if entry.layers is not None:
            return self.find(entry.model_id)
        record = self._record(entry.model_id)
        source = self._source(record.request)
        if source is None:
            raise self._not_found(record.request)
        path = await source.fetch(record.request, self.cache_folder, progress)
        manifest = await in_thread(
            partial(build_manifest, path, self._hashes), progress, "checking"
        )
        if manifest.model_id != entry.model_id:
            changed = _changed_files(record.manifest, manifest)
            raise ModelRefused(
                f"{record.entry.name}: {', '.join(changed)} changed since the model was added",
                fix=f"Restore the files, or list them anew: swarmpy models pull {record.request}",
            )
        return record.entry

    def list(self) -> Sequence[ModelEntry]:
        """Return the models whose files are there with their sizes, or in part, by name. Blocks.

        A model in part whose headers are damaged is left out, with a warning.
        """
        entries = [record.entry for record in self._read() if _is_present(record)]
        whole = {entry.model_id for entry in entries}
        parts = [it for it in partial_models(self.cache_folder) if it.model_id not in whole]
        entries += [entry for held in parts if (entry := partial_entry(held)) is not None]
        return sorted(entries, key=lambda entry: entry.name)

    def find(self, name_or_id: str) -> ModelEntry:
        """Return a model by its name (in any case), its id or the first digits of the id.

        Raises:
            ModelNotFound: No such model is here; the message lists names that come close.
        """
        record = self._match(name_or_id)
        if record is not None and _is_present(record):
            return record.entry
        held = self._match_partial(name_or_id)
        entry = partial_entry(held) if held is not None else None
        if entry is None:
            raise self._not_found(name_or_id)
        return entry

    def by_id(self, model_id: str) -> ModelEntry | None:
        """Return the model with an id, None if it is not here."""
        return next((entry for entry in self.list() if entry.model_id == model_id), None)

    async def remove(self, name_or_id: str) -> ModelEntry:
        """Take a model off the list, and delete its files, all copies of them, in the cache.

        Files in folders of the user's own are never deleted.

        Raises:
            ModelNotFound: No such model is listed.
        """
        record = self._match(name_or_id)
        held = self._match_partial(name_or_id) if record is None else None
        if record is not None:
            entry = record.entry
            await trio.to_thread.run_sync(self._remove, record)
        elif held is not None:
            entry = partial_entry(held) or damaged_entry(held)
        else:
            raise self._not_found(name_or_id)
        await trio.to_thread.run_sync(remove_partial, self.cache_folder, entry.model_id)
        return entry

    async def rename(self, name_or_id: str, name: str) -> ModelEntry:
        """Give a model another name, by which requests and members then know it.

        One that is here in part keeps it when it becomes whole.

        Raises:
            ModelNotFound: No such model is here.
            ModelRefused: The name is no plain word or looks like an id, another model has it, a
                source gives it, or layers of the model are being fetched.
        """
        entry = self.find(name_or_id)
        if entry.layers is None:
            return await trio.to_thread.run_sync(self._rename, entry, name)
        held = self._match_partial(entry.model_id)
        if held is None:
            raise self._not_found(name_or_id)
        lock = self.cache_folder / "locks" / f"{held.folder.name}.lock"
        async with hold_lock(lock, waiting=partial(_refuse_busy, entry)):
            return await trio.to_thread.run_sync(self._rename, entry, name, held.folder)

    # The index ------------------------------------------------------------------

    def _add(self, record: _Record) -> ModelEntry:
        """List a model, once by id and once by path, under a name nobody else has.

        A copy in a folder does not displace the model where it is listed; a package does, so that
        its name always means it. What a path held before is forgotten with its name kept.
        """
        entry = record.entry
        is_named = record.request.lower() == entry.name
        with self._changing() as records:
            for item in records:
                is_elsewhere = item.entry.path != entry.path and _is_present(item)
                if item.entry.model_id == entry.model_id and is_elsewhere and not is_named:
                    return item.entry
            names = [item.entry.name for item in records if item.entry.path == entry.path]
            records[:] = [
                item
                for item in records
                if item.entry.path != entry.path and item.entry.model_id != entry.model_id
            ]
            if len(records) >= MODELS_MAX:
                raise ModelRefused(
                    f"{len(records)} models are listed, no more fit", fix="Remove some of them."
                )
            name = names[0] if names else self._free_name(entry, record.request, records)
            entry = dataclasses.replace(entry, name=name)
            records.append(msgspec.structs.replace(record, entry=entry))
            return entry

    def _free_name(self, entry: ModelEntry, request: str, records: Iterable[_Record]) -> str:
        """The wanted name, or it with a number, free and not another source's to give."""
        taken = self._names_of_others(entry.model_id, records)
        wanted, number = entry.name, 1
        name = wanted
        while name in taken or (name != request.lower() and self._is_offered(name)):
            number += 1
            name = f"{wanted}-{number}"
        return name

    async def _freely_named(self, entry: ModelEntry) -> ModelEntry:
        """A model in part, renamed where its name is another model's or a source's to give."""
        records = await trio.to_thread.run_sync(self._read)
        name = self._free_name(entry, self._request(entry.model_id), records)
        if name != entry.name:
            # More of it is being fetched, and then it comes here; or it is whole or gone.
            with suppress(ModelRefused, ModelNotFound, DownloadFailed):
                return await self.rename(entry.model_id, name)
        return entry

    def _names_of_others(self, model_id: str, records: Iterable[_Record]) -> set[str]:
        """The names that models have but for one, those in part included."""
        named = [(item.entry.model_id, item.entry.name) for item in records]
        named += [(held.model_id, held.name) for held in partial_models(self.cache_folder)]
        return {name for other_id, name in named if other_id != model_id}

    def _rename(self, entry: ModelEntry, name: str, folder: Path | None = None) -> ModelEntry:
        """Rename a model in the index, and in the folder that holds a part of it."""
        if name != plain_model_name(name):
            raise ModelRefused(
                f"{name!r:.80} is no name for a model",
                fix=f"Lower-case letters, digits, '.', '_' and '-': {plain_model_name(name)}",
            )
        if _is_id_prefix(name):
            raise ModelRefused(f"{name} looks like a model's id", fix="Choose another name.")
        with self._changing() as records:
            request = self._request(entry.model_id)
            taken = name in self._names_of_others(entry.model_id, records)
            if taken or (self._is_offered(name) and name != request.lower()):
                raise ModelRefused(f"{name} is another model's name", fix="Choose another name.")
            if folder is not None:
                rename_release(folder, name)
            elif all(item.entry.model_id != entry.model_id for item in records):
                raise self._not_found(entry.name)  # Another process removed it meanwhile.
            records[:] = [_renamed(item, entry.model_id, name) for item in records]
        return dataclasses.replace(entry, name=name)

    def _is_offered(self, name: str) -> bool:
        return self._source(name) is not None

    def _source(self, request: str) -> ModelSource | None:
        return next((item for item in self._sources if item.matches(request)), None)

    def _request(self, model: str) -> str:
        """What the source of a model is asked for, where the model is here in whole or in part."""
        record = self._match(model)
        if record is not None:
            return record.request
        held = self._match_partial(model)
        return model if held is None else held.request

    def _partial_at(self, path: Path) -> ModelEntry | None:
        """The model in part at a path, if one is there."""
        releases = partial_releases(self.cache_folder)
        held = next((held for held in releases if held.path == path), None)
        return partial_entry(held) if held is not None else None

    def _match_partial(self, name_or_id: str) -> PartialModel | None:
        """The one model in part that a name, id or id prefix means."""
        held = partial_models(self.cache_folder)
        return _meant(name_or_id, [(item.name, item.model_id, item) for item in held])

    def _remove(self, record: _Record) -> None:
        with self._changing() as records:
            records[:] = [item for item in records if item.entry.name != record.entry.name]
        path, models = record.entry.path, self.cache_folder / "models"
        release = path if record.entry.format == "safetensors" else path.parent
        if release.parent == models:
            shutil.rmtree(release, ignore_errors=True)

    def _record(self, model_id: str) -> _Record:
        for record in self._read():
            if record.entry.model_id == model_id:
                return record
        raise self._not_found(model_id)

    def _match(self, name_or_id: str) -> _Record | None:
        """The one record that a name, id or id prefix means."""
        records = self._read()
        return _meant(name_or_id, [(it.entry.name, it.entry.model_id, it) for it in records])

    def _not_found(self, name: str) -> ModelNotFound:
        if self._is_offered(name):
            # Names of packages are lower case; a hub's file names are what they are.
            shown = name if "/" in name else name.lower()
            return ModelNotFound(
                f"{name!r} is not on this machine yet", fix=f"swarmpy models pull {shown}"
            )
        names = [entry.name for entry in self.list()]
        close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        if close:
            return ModelNotFound(f"no model {name!r:.80} is here; did you mean {', '.join(close)}?")
        return ModelNotFound(
            f"no model {name!r:.80} is here (here: {', '.join(names[:20]) or 'none'})"
        )

    @contextmanager
    def _changing(self) -> Iterator[MutableSequence[_Record]]:
        """The records, to be changed in place; written when the block ends without an error."""
        with hold_lock_blocking(self._lock):
            records = self._read()
            before = list(records)
            yield records
            if records != before:
                index = _Index(version=1, models=tuple(records))
                write_index(self._path, msgspec.json.encode(index, enc_hook=_encode_path))

    def _read(self) -> MutableSequence[_Record]:
        """The index's records. A damaged one is set aside: pulling a model lists it again."""
        try:
            data = self._path.read_bytes()
            index = msgspec.json.decode(data, type=_Index, dec_hook=_decode_path)
        except FileNotFoundError:
            return []
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            log.warning("catalog.damaged", extra={"path": str(self._path)})
            with suppress(FileNotFoundError):  # Another process was first.
                os.replace(self._path, self._path.with_suffix(".damaged"))
            return []
        except OSError as error:
            raise DownloadFailed(f"cannot read {self._path}: {error.strerror}") from error
        return list(index.models)


def _is_present(record: _Record) -> bool:
    """Whether all files are there with their sizes; `verify` looks closer."""
    path = record.entry.path
    for file in record.manifest.files:
        try:
            status = (path / file.name if record.entry.format == "safetensors" else path).stat()
        except OSError:
            return False
        if status.st_size != file.size:
            return False
    return True


def _is_id_prefix(text: str) -> bool:
    """Whether a text is taken for an id or the first digits of one."""
    return len(text) >= ID_PREFIX_MIN and is_model_id(text.ljust(64, "0"))


def _meant(name_or_id: str, items: Iterable[tuple[str, str, T]]) -> T | None:
    """The only one of `(name, id, item)` that has a name or id, or whose id begins so."""
    text, known = name_or_id.lower(), list(items)
    found = [item for name, model_id, item in known if text in (name, model_id)]
    if not found and _is_id_prefix(text):
        found = [item for _, model_id, item in known if model_id.startswith(text)]
    return found[0] if len(found) == 1 else None


def _renamed(record: _Record, model_id: str, name: str) -> _Record:
    """The record, under another name if it is of this model."""
    if record.entry.model_id != model_id:
        return record
    return msgspec.structs.replace(record, entry=dataclasses.replace(record.entry, name=name))


def _refuse_busy(entry: ModelEntry) -> None:
    raise ModelRefused(
        f"layers of {entry.name} are being fetched", fix="Rename it when they are here."
    )


def _changed_files(before: Manifest, after: Manifest) -> Sequence[str]:
    """Names of files that are not the same in both, in alphabetical order."""
    return sorted({file.name for file in set(before.files) ^ set(after.files)})


def _encode_path(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"no JSON form for {type(value)}")


def _decode_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"no JSON form for {kind}")
