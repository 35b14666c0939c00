"""What a model of the Hub is called, and which files of a commit are it; others are ignored.

Pure: decides from a listing, asks nobody. Spec: protocols/manifest.md, sections 1 and 5.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from swarmpy.errors import ModelNotFound, ModelRefused
from swarmpy.shards.hub_http import Listing
from swarmpy.shards.manifest import REQUIRED_FILES, SMALL_FILES
from swarmpy.shards.partial import Holding
from swarmpy.shards.refusals import CONFIG_BYTES_MAX, TOKENIZER_CONFIG_BYTES_MAX
from swarmpy.shards.safetensors import INDEX_BYTES_MAX, INDEX_NAME, check_plain_name
from swarmpy.shards.sources import plain_model_name

SMALL_BYTES_MAX: Mapping[str, int] = {
    "config.json": CONFIG_BYTES_MAX,
    "generation_config.json": CONFIG_BYTES_MAX,
    "tokenizer.json": 64 * 1024 * 1024,
    "tokenizer_config.json": TOKENIZER_CONFIG_BYTES_MAX,
    "chat_template.jinja": CONFIG_BYTES_MAX,
    "chat_template.json": CONFIG_BYTES_MAX,
    INDEX_NAME: INDEX_BYTES_MAX,
}
"""Longest small files, as far as their readers go; the tokenizer's is the gateway's."""

_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,199}))?"
    r"(?::(?P<file>[A-Za-z0-9_][A-Za-z0-9._-]{0,190}\.[Gg][Gg][Uu][Ff]))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """A model's name as users write it: `owner/name[@revision][:file.gguf]`."""

    repository: str
    revision: str
    """A branch, tag or commit."""
    file: str
    """The GGUF meant; empty where none is named."""

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a whole commit, which never means anything else."""
        return re.fullmatch("[0-9a-f]{40}", self.revision) is not None


def parse_name(model: str) -> HubName | None:
    """Return what a name means on the Hub; None where it is not of that form.

    "folder/file.gguf" is a path, not a repository of that name.
    """
    found = _NAME.fullmatch(model)
    if found is None or ".." in model or "--" in found["repository"]:
        return None
    if not found["file"] and not found["revision"] and model.lower().endswith(".gguf"):
        return None
    return HubName(
        repository=found["repository"],
        revision=found["revision"] or "main",
        file=found["file"] or "",
    )


def choose(listing: Listing, name: HubName) -> Holding:
    """Decide which files of a commit are the model; everything else is never asked for.

    Raises:
        ModelNotFound: The GGUF named is not there, or several are and none was named.
        ModelRefused: There are no weights that are plain data, or a file is too long.
    """
    ggufs = sorted(item for item in listing.files if item.lower().endswith(".gguf"))
    weights = sorted(item for item in listing.files if item.endswith(".safetensors"))
    if name.file or (ggufs and not weights):
        chosen = _chosen_gguf(listing.repository, ggufs, name)
        return _holding(listing, name, [chosen], file=chosen)
    if not weights:
        others = ", ".join(sorted(listing.files)[:8]) or "no file"
        raise ModelRefused(
            f"{listing.repository} has no *.safetensors and no *.gguf at its top level ({others})",
            fix="Use a conversion of the model: other formats can hold code and are never fetched.",
        )
    for required in REQUIRED_FILES:
        if required not in listing.files:
            raise ModelRefused(
                f"{listing.repository} has no {required}",
                fix="Use a repository in the layout of transformers, or a GGUF of the model.",
            )
    small = [item for item in SMALL_FILES if item in listing.files]
    for item in small:
        size = listing.files[item].size
        if size > SMALL_BYTES_MAX[item]:
            raise ModelRefused(
                f"{item} has {size} bytes, at most {SMALL_BYTES_MAX[item]} are accepted"
            )
    return _holding(listing, name, [*small, *weights])


def _chosen_gguf(repository: str, ggufs: Sequence[str], name: HubName) -> str:
    if name.file:
        same = [item for item in ggufs if item.lower() == name.file.lower()]
        if same:
            return name.file if name.file in same else same[0]
        known = ", ".join(ggufs[:20]) or "none"
        raise ModelNotFound(f"{repository} has no {name.file} (its GGUFs: {known})")
    if len(ggufs) > 1:
        raise ModelNotFound(
            f"{repository} has {len(ggufs)} GGUFs, and each is a model: {', '.join(ggufs[:20])}",
            fix=f"Name one: swarmpy models pull {repository}:{ggufs[0]}",
        )
    return ggufs[0]


def _holding(listing: Listing, name: HubName, names: Iterable[str], *, file: str = "") -> Holding:
    title = file[:-5] or listing.repository.rpartition("/")[2]
    for item in (chosen := list(names)):
        check_plain_name(item)
    return msgspec.convert(
        {
            "repository": listing.repository,
            "commit": listing.commit,
            "revision": name.revision,
            "name": plain_model_name(title),
            "display_name": title,
            "file": file,
            "asked_file": name.file,
            "files": [msgspec.structs.asdict(listing.files[item]) for item in chosen],
        },
        Holding,
    )


def pinned_name(holding: Holding) -> HubName:
    """Return the name that always means what is held."""
    return HubName(repository=holding.repository, revision=holding.commit, file=holding.file)


def release_of(holding: Holding) -> str:
    """The release's folder in the cache: one per repository, commit and GGUF."""
    place = holding.repository.lower().replace("/", "--")
    file = ""
    if holding.file:  # Names that differ by case alone are one on some disks.
        digest = hashlib.sha256(holding.file.encode()).hexdigest()
        file = f"--{plain_model_name(holding.file[:-5])[:60]}-{digest[:8]}"
    return f"hub--{place}--{holding.commit[:12]}{file}"
