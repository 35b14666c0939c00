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
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import msgspec
import trio

from swarmpy.abc import Format, ModelLabel, ModelSource, Progress
from swarmpy.errors import DownloadFailed, ModelNotFound, ModelRefused
from swarmpy.shards.describe import Description, describe
from swarmpy.shards.hub import HubSource
from swarmpy.shards.hub_download import missing_bytes
from swarmpy.shards.locks import hold_lock_blocking
from swarmpy.shards.manifest import (
    HashCache,
    Manifest,
    build_manifest,
    format_of,
    is_model_id,
    write_index,
)
from swarmpy.shards.partial import PartialModel, partial_model
from swarmpy.shards.ranges import Range, missing, show_layers
from swarmpy.shards.sources import FolderSource, PackageSource, in_thread, plain_model_name
from swarmpy.shards.titles import display_title

log = logging.getLogger(__name__)

MODELS_MAX = 1000
"""Models listed on one machine."""

ID_PREFIX_MIN = 8
"""Fewest hex digits of an id that are taken for a model: 32 bits do not collide by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model on this machine."""

    model_id: str
    """The hash of its manifest, 64 hex digits: equal on every machine that holds the same files."""
    name: str
    """As used in requests; lower case, unique on this machine."""
    display_name: str
    path: Path
    """The folder in Hugging Face layout, or the GGUF: what an engine is given."""
    format: Format
    size_bytes: int
    """Of the source files together."""
    license: str
    source: str
    """Where it came from, in words."""
    architecture: str
    layer_count: int
    parameter_count: int
    context_max: int
    quantization: str
    layers: tuple[Range, ...] | None = None
    """Ranges `[start, end)` of layers whose files are here; None: all of them are."""
    held_bytes: int = 0
    """Of the files, where only some layers are here."""
    derived_from: str = ""
    """Id of the model this one was quantised from, by its own metadata; empty for an original."""

    @property
    def layers_shown(self) -> str:
        """What is here, in words: "layers 0-9 of 30"."""
        if self.layers is None:
            return f"all {self.layer_count} layers"
        return f"layers {show_layers(self.layers) or 'none'} of {self.layer_count}"

    def check_layers(self, start: int, end: int) -> None:
        """Check that the files of layers `[start, end)` are here, before anything loads them.

        Raises:
            ModelNotFound: Some are not; the fix is the command that fetches them.
        """
        absent = missing([(start, end)], self.layers) if self.layers is not None else ()
        if absent:
            first, last = absent[0][0], absent[-1][1] - 1
            raise ModelNotFound(
                f"{self.name}: layers {show_layers(absent)} are not on this machine "
                f"({self.layers_shown} are)",
                fix=f"swarmpy models pull {self.name} --layers {first}-{last}",
            )


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
        if isinstance(source, HubSource):
            request = source.pinned(path)
        label = source.label(request)
        manifest = await in_thread(
            partial(build_manifest, path, self._hashes, source=label.origin), progress, "checking"
        )
        entry = await trio.to_thread.run_sync(_entry, path, manifest, label)
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
    ) -> ModelEntry:
        """Bring the headers and layers `[start, end)` of a hub's model to this machine.

        Where no layer is missing any more the model is listed as by `pull`.

        Args:
            start: Equal to `end` for the headers alone.

        Raises:
            ModelNotFound, ModelRefused, DownloadFailed: As `pull`; also for layers that the model
                does not have, and for sources that give whole models only.
        """
        request = self._request(model)
        source = self._source(request)
        if not isinstance(source, HubSource):
            raise ModelNotFound(
                f"{model!r:.80} is no model of a hub; only those can be fetched by layers",
                fix=f"swarmpy models pull {model}",
            )
        path = await source.fetch_layers(request, self.cache_folder, progress, start=start, end=end)
        pinned = source.pinned(path)
        for held in await trio.to_thread.run_sync(self._partials):
            if held.path == path:
                return await trio.to_thread.run_sync(_partial_entry, held)
        return await self.pull(pinned, progress)

    async def obtain(
        self,
        entry: ModelEntry,
        *,
        start: int,
        end: int,
        progress: Callable[[Progress], None] = ignore,
    ) -> ModelEntry:
        """Make sure that the files of layers `[start, end)` are here and intact; raises as `pull`.

        Returns:
            The entry as it is now.
        """
        held = entry.layers
        if held is None or not missing([(start, end)], held):
            return await self.verify(entry, progress)
        return await self.pull_layers(entry.model_id, start=start, end=end, progress=progress)

    def missing_bytes(self, entry: ModelEntry, *, start: int, end: int) -> int:
        """Return the bytes that `obtain` would fetch. Blocks: reads headers."""
        if entry.layers is None or not missing([(start, end)], entry.layers):
            return 0
        return missing_bytes(entry.path, (start, end))

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
        """Return the models whose files are there with their sizes, or in part, by name. Blocks."""
        entries = [record.entry for record in self._read() if _is_present(record)]
        whole = {entry.model_id for entry in entries}
        entries += [_partial_entry(it) for it in self._partials() if it.model_id not in whole]
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
        if held is None:
            raise self._not_found(name_or_id)
        return _partial_entry(held)

    def by_id(self, model_id: str) -> ModelEntry | None:
        """Return the model with an id, None if it is not here."""
        return next((entry for entry in self.list() if entry.model_id == model_id), None)

    async def remove(self, name_or_id: str) -> ModelEntry:
        """Take a model off the list, and delete its files if they lie in the cache.

        Files in folders of the user's own are never deleted.

        Raises:
            ModelNotFound: No such model is listed.
        """
        record = self._match(name_or_id)
        if record is not None:
            await trio.to_thread.run_sync(self._remove, record)
            return record.entry
        held = self._match_partial(name_or_id)
        if held is None:
            raise self._not_found(name_or_id)
        entry = await trio.to_thread.run_sync(_partial_entry, held)
        await trio.to_thread.run_sync(shutil.rmtree, held.folder, True)
        return entry

    async def rename(self, name_or_id: str, name: str) -> ModelEntry:
        """Give a listed model another name, by which requests and members then know it.

        Raises:
            ModelNotFound: No such model is listed whole.
            ModelRefused: The name is no plain word, another model has it, or a source gives it.
        """
        record = self._match(name_or_id)
        if record is None:
            raise self._not_found(name_or_id)
        return await trio.to_thread.run_sync(self._rename, record, name)

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
            name = names[0] if names else self._free_name(record, records)
            entry = dataclasses.replace(entry, name=name)
            records.append(msgspec.structs.replace(record, entry=entry))
            return entry

    def _free_name(self, record: _Record, records: Sequence[_Record]) -> str:
        """The wanted name, or it with a number, free and not another source's to give."""
        taken = {item.entry.name for item in records}
        wanted, number = record.entry.name, 1
        name = wanted
        while name in taken or (name != record.request.lower() and self._is_offered(name)):
            number += 1
            name = f"{wanted}-{number}"
        return name

    def _rename(self, record: _Record, name: str) -> ModelEntry:
        if name != plain_model_name(name):
            raise ModelRefused(
                f"{name!r:.80} is no name for a model",
                fix=f"Lower-case letters, digits, '.', '_' and '-': {plain_model_name(name)}",
            )
        entry = dataclasses.replace(record.entry, name=name)
        with self._changing() as records:
            others = [item for item in records if item.entry.model_id != entry.model_id]
            taken = any(item.entry.name == name for item in others)
            if taken or (self._is_offered(name) and name != record.request.lower()):
                raise ModelRefused(f"{name} is another model's name", fix="Choose another name.")
            records[:] = [*others, msgspec.structs.replace(record, entry=entry)]
        return entry

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

    def _partials(self) -> Sequence[PartialModel]:
        """The models of which only some layers are here."""
        found = map(partial_model, sorted((self.cache_folder / "partial").glob("*")))
        return [held for held in found if held is not None]

    def _match_partial(self, name_or_id: str) -> PartialModel | None:
        """The only partial model of a name or id."""
        text = name_or_id.lower()
        found = [held for held in self._partials() if text in (held.name, held.model_id)]
        return found[0] if len(found) == 1 else None

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
        text, records = name_or_id.lower(), self._read()
        for record in records:
            if text in (record.entry.name, record.entry.model_id):
                return record
        if len(text) < ID_PREFIX_MIN or not is_model_id(text.ljust(64, "0")):
            return None
        found = [record for record in records if record.entry.model_id.startswith(text)]
        return found[0] if len(found) == 1 else None

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


@cache
def _describe_partial(path: Path, model_id: str) -> Description:
    """Describe a model by its headers, which came first and do not change."""
    return describe(path)


def _partial_entry(held: PartialModel) -> ModelEntry:
    """Describe a model that is here in part. Blocks: reads its headers, once."""
    label = HubSource().label(held.request)
    entry = _entry_of(
        _describe_partial(held.path, held.model_id),
        path=held.path,
        model_id=held.model_id,
        size_bytes=held.size_bytes,
        label=dataclasses.replace(label, name=held.name, display_name=held.display_name),
    )
    return dataclasses.replace(entry, layers=held.layers, held_bytes=held.held_bytes)


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


def _entry(path: Path, manifest: Manifest, label: ModelLabel) -> ModelEntry:
    """Describe a fetched model. Blocks: reads its headers."""
    return _entry_of(
        describe(path),
        path=path,
        model_id=manifest.model_id,
        size_bytes=manifest.size_bytes,
        label=label,
    )


def _entry_of(
    description: Description, *, path: Path, model_id: str, size_bytes: int, label: ModelLabel
) -> ModelEntry:
    return ModelEntry(
        model_id=model_id,
        name=label.name,
        display_name=display_title(label.display_name, description.quantization),
        path=path,
        format=format_of(path),
        size_bytes=size_bytes,
        license=description.license,
        source=label.origin,
        architecture=description.architecture,
        layer_count=description.layer_count,
        parameter_count=description.parameter_count,
        context_max=description.context_max,
        quantization=description.quantization,
        derived_from=description.derived_from,
    )
