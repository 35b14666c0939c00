"""What the catalog tells of a model: made from its headers, its label, and what of it is here.

Spec: protocols/manifest.md, sections 2 and 5.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from swarmpy.abc import Format, ModelLabel
from swarmpy.errors import ModelNotFound
from swarmpy.shards.describe import Description, describe
from swarmpy.shards.hub import HubSource
from swarmpy.shards.manifest import Manifest, format_of
from swarmpy.shards.partial import PartialModel, describe_partial
from swarmpy.shards.ranges import Range, missing, show_layers
from swarmpy.shards.titles import display_title


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


def whole_entry(path: Path, manifest: Manifest, label: ModelLabel) -> ModelEntry:
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


def partial_entry(held: PartialModel) -> ModelEntry | None:
    """Describe a model that is here in part; None where it is damaged. Blocks: reads, once."""
    description = describe_partial(held)
    return None if description is None else _held_entry(held, description)


def damaged_entry(held: PartialModel) -> ModelEntry:
    """What can be told of a model in part whose headers are damaged: enough to remove it."""
    unknown = Description(
        architecture="",
        layer_count=held.layer_count,
        parameter_count=0,
        context_max=0,
        quantization="",
        license="",
    )
    return _held_entry(held, unknown)


def _held_entry(held: PartialModel, description: Description) -> ModelEntry:
    label = HubSource().label(held.request)
    entry = _entry_of(
        description,
        path=held.path,
        model_id=held.model_id,
        size_bytes=held.size_bytes,
        label=dataclasses.replace(label, name=held.name, display_name=held.display_name),
    )
    return dataclasses.replace(entry, layers=held.layers, held_bytes=held.held_bytes)
