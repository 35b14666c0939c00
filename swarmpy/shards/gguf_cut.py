"""Layers [start, end) of a GGUF as a smaller GGUF: a new header, and byte ranges of the original.

The layers are renumbered from 0, so a native library runs them as a whole model of that depth. What
it would conclude from a layer's number, or their count, is written out; where it cannot be, the cut
is refused. Tensors that the library wants to see and never uses are holes: present in the header,
absent on disk. Nothing is read here but by `write_cut`.
The tables are llama.cpp's own behaviour, read from the release that the engine pins.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from swarmpy.errors import ConfigError, ModelRefused
from swarmpy.shards.gguf import BLOCKS, GgmlType, GgufHeader, GgufTensor
from swarmpy.shards.gguf_write import (
    ARRAY,
    FLOAT32,
    UINT32,
    lay_out,
    text_value,
    uint32_value,
)
from swarmpy.shards.refusals import SIZES_MAX, file_size

UNUSED_ROWS = 32
"""Vocabulary of a shard that neither embeds tokens nor gives logits; the library wants some."""

NAME_BYTES_MAX = 63
"""Longest tensor name; ggml's own bound, without the closing zero."""

CHUNK_BYTES = 1 << 20
"""Bytes copied at once."""

_LAYERS_MAX = SIZES_MAX["num_hidden_layers"]

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.(.+)")

_EMBEDDING, _HEAD, _HEAD_BIAS = "token_embd.weight", "output.weight", "output.bias"
_FIRST_ONLY = frozenset({_EMBEDDING, "position_embd.weight"})
"""Tensors that only the shard with layer 0 reads; the embedding also the last, where it is tied."""

_HOLE_TYPES = (GgmlType.Q2_K, GgmlType.Q4_0)
"""What an unused table is said to hold, if its rows are whole blocks of it: the smallest types that
every backend has, for the library maps and prefetches holes like all else."""

_KEPT_KEYS = frozenset(
    {"general.architecture", "general.file_type", "general.quantization_version"}
)
"""Beside the architecture's own: the rest is for people and tokenisers, and one more thing for a
native parser to trip over."""

_KEPT_PREFIX = "xielu."
"""Activation constants of a layer each; the one group without the architecture's name before it."""

_WHOLE_ARRAYS = frozenset({"rope.dimension_sections"})
"""Arrays that do not have one item a layer, even where their length is the number of layers."""

_WINDOW_PATTERN = "attention.sliding_window_pattern"

_WINDOW_PERIODS: Mapping[str, tuple[int, bool]] = {
    "afmoe": (4, False),
    "cohere2": (4, False),
    "cohere2moe": (4, True),
    "exaone-moe": (4, False),
    "exaone4": (4, False),
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "gpt-oss": (2, False),
    "laguna": (4, True),
    "llama4": (4, False),
    "mellum": (4, False),
    "muse-glimmer": (4, False),
    "olmo2": (4, False),
    "plamo3": (8, False),
    "smallthinker": (4, True),
}
"""Default period of layers with a sliding window, and whether the full one comes first in it, by
architecture: what `load_swa_pattern` is called with. Counted from layer 0, so a shard that starts
elsewhere needs it written out."""

_DEPTHS: Mapping[str, tuple[range, ...]] = {
    "baichuan": (range(32, 33), range(40, 41)),  # rope, ALiBi, and neither of them
    "command-r": (range(64, _LAYERS_MAX + 1),),  # norms of queries and keys
    "deepseek2": (range(26, 28),),  # queries that are not of low rank
    "exaone4": (range(64, 65),),  # sliding windows, and no rope in full layers
    "gemma2": (range(46, 47),),  # attention scale
    "gemma3": (range(62, 63),),  # attention scale
    "mistral4": (range(26, 28),),  # as deepseek2
    "minicpm3": tuple(range(n, n + 1) for n in range(_LAYERS_MAX + 1)),  # residual scale
}
"""Numbers of layers from which the library infers which model it is, and computes otherwise: a
model is cut only into parts that lie in the same range as the whole, or in none like it."""

_LITE_48_VOCABULARY, _SIGMOID_VOCABULARY = 128_256, 154_880
"""Vocabularies by which it tells models of deepseek2 apart, with 48, and with 47 or 48 layers."""

_DEEPSEEK2 = frozenset({"deepseek2", "mistral4"})

_GATING_SOFTMAX, _GATING_SIGMOID = 1, 2

_RESIDUAL_SCALE = 1.4
"""Of minicpm, divided by the root of the number of layers."""

_TANGLED_KEYS = (
    "attention.shared_kv_layers",
    "decoder_block_count",
    "embedding_length_per_layer_input",
)
"""Keys that, where not 0, tie layers to others or to the token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`size_bytes` bytes of the file `source` from `source_offset`, at `target_offset` of a cut."""

    target_offset: int
    source: Path
    source_offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufCut:
    """What a file with some layers of a model consists of.

    `header` begins the file and is padded to where tensor data begins. The pieces lie behind it in
    order, without overlap; what lies between them is zeros. `size_bytes` is the whole file's size,
    holes included.
    """

    header: bytes
    pieces: tuple[Piece, ...]
    size_bytes: int

    @property
    def fetched_bytes(self) -> int:
        """Bytes of the original that are in the cut."""
        return sum(piece.size_bytes for piece in self.pieces)

    @property
    def holes(self) -> tuple[tuple[int, int], ...]:
        """Ranges [start, end) of the file that are zeros."""
        ends = [len(self.header), *(it.target_offset + it.size_bytes for it in self.pieces)]
        starts = [*(piece.target_offset for piece in self.pieces), self.size_bytes]
        return tuple((end, start) for end, start in zip(ends, starts, strict=True) if end < start)


def layer_count(header: GgufHeader) -> int:
    """Return how many layers can be cut: all but those that only predict further tokens.

    Raises:
        ModelRefused: The number is missing or out of range, a layer has no tensors, or a tensor
            names a layer that is not there.
    """
    name = header.path.name
    blocks = _integer(header, "block_count")
    extra = _integer(header, "nextn_predict_layers", 0)
    if not 0 < blocks <= _LAYERS_MAX:
        raise ModelRefused(f"{name}: {blocks} layers, expected 1 to {_LAYERS_MAX}")
    if not 0 <= extra < blocks:
        raise ModelRefused(f"{name}: {extra} of {blocks} layers predict further tokens")
    found = {layer for layer, _ in map(_split_name, header.tensors) if layer is not None}
    if beyond := [layer for layer in found if layer >= blocks]:
        raise ModelRefused(f"{name}: a tensor of layer {min(beyond)}, but {blocks} layers")
    if missing := set(range(blocks - extra)) - found:
        raise ModelRefused(f"{name}: layer {min(missing)} of {blocks} has no tensors")
    return blocks - extra


def cut_layers(header: GgufHeader, start: int, end: int) -> GgufCut:
    """Return the GGUF that holds layers [start, end), renumbered from 0.

    The cut that begins at layer 0 keeps the token embedding; the one that ends with the last layer
    keeps final norm and output, or the embedding they share. A cut between has a vocabulary of
    `UNUSED_ROWS`. None has a tokeniser. Layers for predicting further tokens are left out.

    Whether an architecture bears cuts, and where, is the engine's to say; refused here is only what
    no header could make right.

    Args:
        header: As `read_header` gives it: its tensors lie within the file.
        start: First layer, from 0.
        end: Behind the last layer, at most `layer_count(header)`.

    Raises:
        ModelRefused: No such layers, a header that contradicts itself, or a model whose layers mean
            something else in a model of another depth; the message says which.
    """
    layers = layer_count(header)
    if not 0 <= start < end <= layers:
        raise ModelRefused(f"{header.path.name}: no layers [{start}, {end}) of {layers}")
    _check_separable(header, layers, end - start)
    vocabulary = _vocabulary_size(header)
    rows = vocabulary if start == 0 or end == layers else min(UNUSED_ROWS, vocabulary)
    metadata = _metadata(header, start, end, layers=layers, vocabulary=rows)
    tensors = list(_tensors(header, start, end, layers=layers, vocabulary=rows))
    return _laid_out(header.version, metadata, tensors)


def write_cut(
    cut: GgufCut, target: Path, report: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write a cut to a file, with holes where no bytes are needed.

    The file appears under its name when it is whole and on disk; what was there before is replaced
    then, and stays on any error. Nothing else is left behind.

    Args:
        target: In an existing folder; none of the sources.
        report: Called with bytes written and bytes in all; what it raises ends the writing.

    Raises:
        ModelRefused: A source is missing or shorter than its header said.
        ConfigError: The folder cannot be written, or its disk is full.
    """
    assert all(piece.source != target for piece in cut.pieces), f"{target} would replace its source"
    temporary: Path | None = None
    try:
        _check_room(cut, target.parent)
        # A name that nobody knows before, and that was nobody's: a link there would be followed.
        descriptor, name = tempfile.mkstemp(".new", f"{target.name}.", target.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(cut.header)
            _copy(cut, file, report)
            file.truncate(cut.size_bytes)  # Flushes; bytes never written are holes.
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise ConfigError(
            f"cannot write {target}: {error.strerror or error}",
            fix="Free disk space, or name another folder.",
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


# What is refused --------------------------------------------------------------


def is_separable(header: GgufHeader, count: int, *, layers: int) -> bool:
    """Whether the library computes `count` layers alone as it computes them in the whole model.

    Args:
        layers: As `layer_count` gives it, which looks at every tensor.
    """
    return count == layers or _depth_range(header, count) == _depth_range(header, layers)


def why_undivided(header: GgufHeader) -> str:
    """Return why a model can only be run whole; empty where it can be cut."""
    architecture, layers = header.architecture, layer_count(header)
    if not any(is_separable(header, count, layers=layers) for count in range(1, layers)):
        return (
            f"llama.cpp tells models of architecture {architecture!r} apart by their number of "
            f"layers, so none of these {layers} can be run alone"
        )
    for key in _TANGLED_KEYS:
        if header.metadata.get(f"{architecture}.{key}", 0) != 0:
            return f"layers cannot be cut apart ({architecture}.{key})"
    return ""


def _depth_range(header: GgufHeader, count: int) -> range | None:
    """Return the range of depths that `count` layers would be taken for."""
    if header.architecture in _DEEPSEEK2:
        if _has_plain_queries(header):
            return None  # Which is written out.
        if count == 48 and _vocabulary_size(header) == _LITE_48_VOCABULARY:
            return range(48, 49)
    depths = _DEPTHS.get(header.architecture, ())
    return next((found for found in depths if count in found), None)


def _has_plain_queries(header: GgufHeader) -> bool:
    return "blk.0.attn_q.weight" in header.tensors


def _check_separable(header: GgufHeader, layers: int, count: int) -> None:
    """Refuse models whose layers would compute something else in a model of `count` layers."""
    name = header.path.name
    if header.integer("split.count", 1) > 1:
        raise ModelRefused(f"{name}: a GGUF in several files cannot be cut; merge it first")
    if count == layers:
        return
    if reason := why_undivided(header):
        raise ModelRefused(f"{name}: {reason}")
    if not is_separable(header, count, layers=layers):
        raise ModelRefused(
            f"{name}: llama.cpp would take {count} layers of architecture {header.architecture!r} "
            "for another model by their number"
        )


def _vocabulary_size(header: GgufHeader) -> int:
    """Rows of the embedding; the output must have as many."""
    embedding = header.tensors.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise ModelRefused(f"{header.path.name}: no {_EMBEDDING!r} of two dimensions")
    rows, width = embedding.shape
    if not 0 < rows <= SIZES_MAX["vocab_size"]:
        raise ModelRefused(f"{header.path.name}: a vocabulary of {rows} tokens")
    for name, shape in ((_HEAD, (rows, width)), (_HEAD_BIAS, (rows,))):
        tensor = header.tensors.get(name)
        if tensor is not None and tensor.shape != shape:
            raise ModelRefused(
                f"{header.path.name}: {name!r} has shape {tensor.shape}, expected {shape}"
            )
    return rows


def _check_tensor(tensor: GgufTensor, file_name: str) -> None:
    """Refuse names that the library would cut or mistake, and tensors of nothing."""
    if not _NAME.fullmatch(tensor.name) or len(tensor.name) > NAME_BYTES_MAX:
        raise ModelRefused(f"{file_name}: a tensor may not be called {tensor.name!r:.80}")
    if not tensor.size_bytes:
        raise ModelRefused(f"{file_name}: tensor {tensor.name!r} is empty")


def _split_name(name: str) -> tuple[int | None, str]:
    """Return a tensor's layer, None for the whole model's, and its name within the layer."""
    if not name.startswith("blk."):
        return None, name
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        raise ModelRefused(f"a tensor of a layer may not be called {name!r:.80}")
    return int(match[1]), match[2]


def _integer(header: GgufHeader, key: str, default: int | None = None) -> int:
    return header.integer(f"{header.architecture}.{key}", default)


# Metadata ---------------------------------------------------------------------


def _metadata(
    header: GgufHeader, start: int, end: int, *, layers: int, vocabulary: int
) -> dict[str, bytes]:
    """Return the cut's encoded metadata by key."""
    architecture = header.architecture
    prefix = f"{architecture}."
    result = {}
    for key, encoded in header.encoded.items():
        if key in _KEPT_KEYS:
            result[key] = encoded
        elif key.startswith((prefix, _KEPT_PREFIX)):
            short = key.removeprefix(prefix)
            if isinstance(header.metadata[key], tuple) and short not in _WHOLE_ARRAYS:
                encoded = _sliced(header, key, start, end, layers=layers)
            result[key] = encoded
    result[f"{prefix}block_count"] = uint32_value(end - start)
    for short, value in _shifted(header, start, end).items():
        result[prefix + short] = uint32_value(value)
    if start > 0:
        # What comes in was scaled by the first shard. Some architectures scale by default.
        result[f"{prefix}embedding_scale"] = struct.pack("<If", FLOAT32, 1.0)
    pattern = f"{prefix}{_WINDOW_PATTERN}"
    if architecture in _WINDOW_PERIODS and not isinstance(header.metadata.get(pattern), tuple):
        slides = sliding_layers(header)[start:end]
        result[pattern] = struct.pack(f"<IIQ{len(slides)}I", ARRAY, UINT32, len(slides), *slides)
    result |= {prefix + short: value for short, value in _depth_defaults(header, layers).items()}
    result[f"{prefix}vocab_size"] = uint32_value(vocabulary)
    result["tokenizer.ggml.model"] = text_value("none")
    return result


def _shifted(header: GgufHeader, start: int, end: int) -> dict[str, int]:
    """Return the counts of layers that mean other numbers here, of those the header has."""
    count, found = end - start, {}
    for key in ("leading_dense_block_count", "n_deepstack_layers", "nextn_predict_layers"):
        if f"{header.architecture}.{key}" in header.metadata:
            found[key] = _integer(header, key)
    if "leading_dense_block_count" in found:
        found["leading_dense_block_count"] -= start
    if "n_deepstack_layers" in found:
        found["n_deepstack_layers"] = 0  # Of images, which nobody gives us.
    if "nextn_predict_layers" in found:
        found["nextn_predict_layers"] = 0
    return {key: min(max(0, value), count) for key, value in found.items()}


def _sliced(header: GgufHeader, key: str, start: int, end: int, *, layers: int) -> bytes:
    """Return an encoded array's items of layers [start, end)."""
    encoded = header.encoded[key]
    kind, length = struct.unpack_from("<IQ", encoded, 4)
    size = _SIZES.get(kind)
    if size is None or length not in (layers, _integer(header, "block_count")):
        raise ModelRefused(
            f"{header.path.name}: metadata {key!r:.80} has {length} items for {layers} layers; "
            "how to cut it is not known"
        )
    first = _ARRAY_HEAD_BYTES + start * size
    items = encoded[first : first + (end - start) * size]
    return struct.pack("<IIQ", ARRAY, kind, end - start) + items


def sliding_layers(header: GgufHeader) -> tuple[bool, ...]:
    """Return which layers see a sliding window only, as the library counts them.

    All False where the architecture has no such layers; where it may have some and the model's
    window is switched off, still what they would be.

    Raises:
        ModelRefused: The pattern is out of range, or of another number of layers.
    """
    layers, key = layer_count(header), f"{header.architecture}.{_WINDOW_PATTERN}"
    flags = header.metadata.get(key)
    if isinstance(flags, tuple):
        if len(flags) < layers:
            raise ModelRefused(f"{header.path.name}: windows of {len(flags)} layers of {layers}")
        return tuple(bool(flag) for flag in flags[:layers])
    if header.architecture not in _WINDOW_PERIODS:
        return (False,) * layers
    default, is_full_first = _WINDOW_PERIODS[header.architecture]
    period = _integer(header, _WINDOW_PATTERN, default)
    if not 0 <= period <= _LAYERS_MAX:
        raise ModelRefused(f"{header.path.name}: windows with a period of {period} layers")
    full = 0 if is_full_first else period - 1
    return tuple(not period or layer % period != full for layer in range(layers))


def _depth_defaults(header: GgufHeader, layers: int) -> dict[str, bytes]:
    """Return, encoded, what can be told of that which the library concludes from the depth."""
    found: dict[str, bytes] = {}
    match header.architecture:
        case family if family in _DEEPSEEK2:
            if _has_plain_queries(header):
                found["attention.q_lora_rank"] = uint32_value(0)
            if not _integer(header, "expert_gating_func", 0):
                is_sigmoid = layers in (47, 48) and _vocabulary_size(header) == _SIGMOID_VOCABULARY
                found["expert_gating_func"] = uint32_value(
                    _GATING_SIGMOID if is_sigmoid else _GATING_SOFTMAX
                )
        case "minicpm":
            if "minicpm.residual_scale" not in header.metadata:
                # In single precision throughout, as the library computes it.
                root, scale = (_single(value) for value in (math.sqrt(layers), _RESIDUAL_SCALE))
                found["residual_scale"] = struct.pack("<If", FLOAT32, scale / root)
    return found


def _single(value: float) -> float:
    """Round to single precision."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


_SIZES: Mapping[int, int] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of an array's item, by value type; strings and arrays have no fixed size."""
_ARRAY_HEAD_BYTES = 16


# Tensors ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A tensor of the cut, and where its bytes are; None makes a hole."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    source: GgufTensor | None


def _tensors(
    header: GgufHeader, start: int, end: int, *, layers: int, vocabulary: int
) -> Iterator[_Placed]:
    """Yield the cut's tensors in the original's order."""
    is_tied = _HEAD not in header.tensors
    for tensor in header.tensors.values():
        layer, short = _split_name(tensor.name)
        if layer is not None and not start <= layer < end:
            continue
        _check_tensor(tensor, header.path.name)
        name = short if layer is None else f"blk.{layer - start}.{short}"
        placed = _Placed(name=name, type=tensor.type, shape=tensor.shape, source=tensor)
        is_embedding_used = start == 0 or (end == layers and is_tied and name == _EMBEDDING)
        if (name in _FIRST_ONLY and not is_embedding_used) or (
            name.startswith("output") and end < layers
        ):
            placed = _hole(placed, vocabulary)
        yield placed


def _hole(tensor: _Placed, vocabulary: int) -> _Placed:
    """Return a tensor without bytes; one with a row a token is made as small as it may be."""
    kind, shape = tensor.type, tensor.shape
    if tensor.name in (_EMBEDDING, _HEAD, _HEAD_BIAS):
        shape = (vocabulary, *shape[1:])
    if tensor.name in (_EMBEDDING, _HEAD):
        smaller = (other for other in _HOLE_TYPES if shape[-1] % BLOCKS[other][0] == 0)
        kind = next(smaller, kind)
    return replace(tensor, type=kind, shape=shape, source=None)


def _laid_out(version: int, metadata: Mapping[str, bytes], tensors: list[_Placed]) -> GgufCut:
    """Place the tensors one after the other behind their header, whatever their alignment was."""
    laid_out = lay_out(version, metadata, [(item.name, item.type, item.shape) for item in tensors])
    pieces: list[Piece] = []
    for tensor, offset in zip(tensors, laid_out.offsets, strict=True):
        if tensor.source is not None:
            _append(pieces, tensor.source, offset)
    return GgufCut(header=laid_out.header, pieces=tuple(pieces), size_bytes=laid_out.size_bytes)


def _append(pieces: list[Piece], tensor: GgufTensor, target_offset: int) -> None:
    """Add a tensor's bytes to the last piece where they go on there, else as a piece."""
    piece = Piece(
        target_offset=target_offset,
        source=tensor.path,
        source_offset=tensor.offset,
        size_bytes=tensor.size_bytes,
    )
    if pieces:
        last = pieces[-1]
        goes_on = (
            last.source == piece.source
            and last.source_offset + last.size_bytes == piece.source_offset
            and last.target_offset + last.size_bytes == piece.target_offset
        )
        if goes_on:
            pieces[-1] = replace(last, size_bytes=last.size_bytes + piece.size_bytes)
            return
    pieces.append(piece)


# Writing ----------------------------------------------------------------------


def _check_room(cut: GgufCut, folder: Path) -> None:
    needed, free = len(cut.header) + cut.fetched_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{needed} bytes are needed, {free} are free")


def _copy(cut: GgufCut, file: BinaryIO, report: Callable[[int, int], None]) -> None:
    """Copy the pieces to their places."""
    done, total = 0, cut.fetched_bytes
    for source, pieces in itertools.groupby(cut.pieces, key=lambda piece: piece.source):
        with _opened(source) as original:
            for piece in pieces:
                file.seek(piece.target_offset)
                for chunk in _chunks(original, piece):
                    file.write(chunk)
                    done += len(chunk)
                    report(done, total)


def _opened(source: Path) -> BinaryIO:
    file_size(source)
    try:
        return source.open("rb")
    except OSError as error:
        raise ModelRefused(f"cannot read {source}: {error.strerror}") from error


def _chunks(original: BinaryIO, piece: Piece) -> Iterator[bytes]:
    """Yield a piece's bytes, `CHUNK_BYTES` at a time."""
    left = piece.size_bytes
    try:
        original.seek(piece.source_offset)
        while left:
            chunk = original.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise ModelRefused(f"{piece.source.name}: the file was cut while it was read")
            left -= len(chunk)
            yield chunk
    except OSError as error:
        raise ModelRefused(f"cannot read {piece.source}: {error.strerror}") from error
