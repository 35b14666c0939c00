"""A quantised GGUF before it is written: its header, to the byte, and the type of each tensor.

The metadata is the original's, the tokeniser included, but for what was said of its own weights.
Nothing in it depends on when or where it is written: one original gives the same file, and so the
same model id, wherever the same build quantises it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from swarmpy.errors import ModelRefused
from swarmpy.plugins.llama.file_types import FileType, tensor_types
from swarmpy.shards.describe import DERIVED_FROM_KEY
from swarmpy.shards.gguf import GgmlType, GgufHeader
from swarmpy.shards.gguf_write import LaidOut, lay_out, text_value, uint32_value

QUANTIZATION_VERSION = 2
"""Version of the blocks' layout that the library writes (`GGML_QNT_VERSION`)."""

_DROPPED_KEYS = ("split.", "quantize.", "swarmpy.")
"""Beginnings of keys that were said of the original's own files and weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedFile:
    """What a quantised file consists of; its tensors are in the original's order."""

    header: GgufHeader
    """The original's."""
    types: Mapping[str, GgmlType]
    laid_out: LaidOut

    @property
    def changes_nothing(self) -> bool:
        """Whether every tensor has its type already."""
        return all(
            self.types[tensor.name] is tensor.type for tensor in self.header.tensors.values()
        )

    def is_like(self, written: GgufHeader) -> bool:
        """Whether a file has these tensors, at these places, and this origin."""
        placed = zip(self.types.items(), self.laid_out.offsets, strict=True)
        return written.metadata.keys() >= {DERIVED_FROM_KEY} and list(placed) == [
            ((tensor.name, tensor.type), tensor.offset) for tensor in written.tensors.values()
        ]


def quantized_file(header: GgufHeader, target: FileType, *, derived_from: str) -> QuantizedFile:
    """Plan a model's quantised file; no tensor is read.

    Args:
        derived_from: Id of the original's model.

    Raises:
        ModelRefused: The original cannot be read, or contradicts itself.
    """
    types = tensor_types(header, target)
    metadata = dict(_taken_over(header))
    metadata["general.quantization_version"] = uint32_value(QUANTIZATION_VERSION)
    metadata["general.file_type"] = uint32_value(target.number)
    metadata[DERIVED_FROM_KEY] = text_value(derived_from)
    tensors = [(name, kind, header.tensors[name].shape) for name, kind in types.items()]
    laid_out = lay_out(header.version, metadata, tensors, alignment=header.alignment)
    return QuantizedFile(header=header, types=types, laid_out=laid_out)


def _taken_over(header: GgufHeader) -> Mapping[str, bytes]:
    """Return the metadata that stays, each value as the file has it."""
    path = header.path
    try:
        with path.open("rb") as file:
            return {
                key: os.pread(file.fileno(), size, offset)
                for key, (offset, size) in header.spans.items()
                if not key.startswith(_DROPPED_KEYS)
            }
    except OSError as error:
        raise ModelRefused(f"cannot read {path}: {error.strerror}") from error
