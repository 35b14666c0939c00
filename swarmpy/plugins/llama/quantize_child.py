"""Quantises one GGUF in a process of its own: `python -m swarmpy.plugins.llama.quantize_child`.

Arguments: source, target, file type, threads, and the id of the source's model. On standard output
comes a JSON line for each piece of progress, and one for an error. The library is given numbers
alone, never a file: header and places are read and written by our own code.

The pinned wheel lacks `llama_model_quantize`; what that does is done here, with the same functions
of ggml, a few rows at a time, so that memory does not grow with the tensors.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

from swarmpy.errors import ConfigError, ModelRefused, SwarmError
from swarmpy.plugins.llama.file_types import file_type
from swarmpy.plugins.llama.library import Library, find_library, open_library
from swarmpy.plugins.llama.quantized_file import QuantizedFile, quantized_file
from swarmpy.shards.gguf import BLOCKS, GgmlType, GgufTensor, bytes_of, read_header

CHUNK_NUMBERS = 1 << 20
"""Numbers converted at once by a thread: 4 MiB as float32, some 10 ms."""


SYNC_BYTES = 1 << 30
"""Bytes of the source after which what was written is sent to the disk: progress is told between,
which one wait for all of a large model at the end would not let it."""


class Converter:
    """Turns rows of one type into rows of another, as the library does."""

    def __init__(self, library: Library) -> None:
        self._library = library
        native = library.native
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(native, name)
            function.restype, function.argtypes = result, arguments
        self._native = native
        self._readers = {kind: self._reader(kind) for kind in GgmlType}

    def convert(self, raw: bytes, source: GgmlType, target: GgmlType, *, columns: int) -> bytes:
        """Return whole rows in another type.

        Raises:
            ModelRefused: Numbers that are not finite, or a type that cannot be read.
        """
        count = len(raw) // BLOCKS[source][1] * BLOCKS[source][0]
        self._check(raw, source)
        numbers = self._floats(raw, source, count)
        if target is GgmlType.F32:
            return bytes(numbers)
        rows = count // columns
        result = ctypes.create_string_buffer(bytes_of(target, (rows, columns)))
        written = self._native.ggml_quantize_chunk(target, numbers, result, 0, rows, columns, None)
        if written != len(result):
            raise ModelRefused(f"{target.name}: {written} bytes came, expected {len(result)}")
        self._check(result, target)
        return result.raw

    def _floats(self, raw: bytes, source: GgmlType, count: int) -> ctypes.Array[ctypes.c_char]:
        if source is GgmlType.F32:
            return ctypes.create_string_buffer(raw, len(raw))
        read = self._readers[source]
        if read is None:
            raise ModelRefused(f"{source.name} weights cannot be quantised")
        numbers = ctypes.create_string_buffer(4 * count)
        read(raw, numbers, count)
        return numbers

    def _check(self, raw: bytes | ctypes.Array[ctypes.c_char], kind: GgmlType) -> None:
        """Refuse what is not finite: K-quants of it would end the process."""
        if not self._native.ggml_validate_row_data(kind, raw, len(raw)):
            raise ModelRefused(f"{kind.name} weights are not finite")

    def _reader(self, kind: GgmlType) -> Callable[..., None] | None:
        """Return what turns a type's blocks into float32, None where there is nothing such.

        Raises:
            ConfigError: The library's table of types is not laid out as `_Traits`.
        """
        traits = self._native.ggml_get_type_traits(kind).contents
        name = (traits.name or b"").decode("ascii", "replace")
        found = (name.lower(), traits.items, traits.bytes)
        expected = (kind.name.lower(), *BLOCKS[kind])
        if found != expected:
            raise ConfigError(
                f"{self._library.path.name} describes {kind.name} as {found}, expected {expected}"
            )
        return _Read(traits.to_float) if traits.to_float else None


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits`, up to what is used."""

    _fields_ = (
        ("name", c_char_p),
        ("items", c_int64),
        ("items_interleaved", c_int64),
        ("bytes", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", c_void_p),
    )


_Read = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)

_SIGNATURES: Mapping[str, tuple[type | None, tuple[type, ...]]] = {
    "ggml_get_type_traits": (ctypes.POINTER(_Traits), (c_int,)),
    "ggml_validate_row_data": (c_bool, (c_int, c_void_p, c_size_t)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
}


def write_quantised(
    planned: QuantizedFile,
    target: Path,
    converter: Converter,
    *,
    threads: int,
    report: Callable[[int, int], None],
) -> None:
    """Write a quantised file; it is on the disk when this returns.

    Args:
        target: A file that does not exist yet.
        report: Called with bytes of the source done, and in all.

    Raises:
        ModelRefused: The source was cut off, or holds numbers that are not finite.
        ConfigError: The target cannot be written, or its disk is full.
    """
    header, done, synced = planned.header, 0, 0
    total = sum(tensor.size_bytes for tensor in header.tensors.values())
    report(0, total)
    try:
        with target.open("xb") as output, header.path.open("rb") as source:
            output.write(planned.laid_out.header)
            output.truncate(planned.laid_out.size_bytes)
            with ThreadPoolExecutor(threads) as pool:
                for tensor, offset in zip(
                    header.tensors.values(), planned.laid_out.offsets, strict=True
                ):
                    kind = planned.types[tensor.name]
                    jobs = _pieces(tensor, kind, offset)
                    work = _Piecework(source.fileno(), output.fileno(), tensor, kind, converter)
                    for size in pool.map(work, jobs):
                        done += size
                        if done - synced >= SYNC_BYTES:
                            os.fsync(output.fileno())
                            synced = done
                        report(done, total)
            output.flush()
            os.fsync(output.fileno())
    except OSError as error:
        raise ConfigError(
            f"cannot write {target}: {error.strerror or error}",
            fix="Free disk space, or name another cache folder in SWARMPY_CACHE.",
        ) from error


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of a tensor: where they are, and where they go."""

    source_offset: int
    source_bytes: int
    target_offset: int


def _pieces(tensor: GgufTensor, kind: GgmlType, offset: int) -> Sequence[_Piece]:
    columns, rows = tensor.shape[-1] if tensor.shape else 1, math.prod(tensor.shape[:-1])
    step = max(1, CHUNK_NUMBERS // max(1, columns))
    before, after = bytes_of(tensor.type, (columns,)), bytes_of(kind, (columns,))
    return [
        _Piece(tensor.offset + row * before, min(step, rows - row) * before, offset + row * after)
        for row in range(0, rows, step)
    ]


@dataclass(frozen=True, slots=True)
class _Piecework:
    """Reads, converts and writes pieces of one tensor, in any order."""

    source: int
    target: int
    tensor: GgufTensor
    kind: GgmlType
    converter: Converter

    def __call__(self, piece: _Piece) -> int:
        raw = os.pread(self.source, piece.source_bytes, piece.source_offset)
        if len(raw) != piece.source_bytes:
            raise ModelRefused(f"{self.tensor.path.name}: the file was cut while it was read")
        if self.kind is not self.tensor.type:
            try:
                raw = self.converter.convert(
                    raw, self.tensor.type, self.kind, columns=self.tensor.shape[-1]
                )
            except ModelRefused as error:
                raise ModelRefused(f"tensor {self.tensor.name!r:.80}: {error}") from error
        view, offset = memoryview(raw), piece.target_offset
        while view:
            written = os.pwrite(self.target, view, offset)
            view, offset = view[written:], offset + written
        return piece.source_bytes


def main(arguments: Sequence[str]) -> int:
    """Quantise as the arguments say; return the process's exit code."""
    source, target, name, threads, derived_from = arguments
    try:
        header = read_header(Path(source))
        planned = quantized_file(header, file_type(name), derived_from=derived_from)
        converter = Converter(open_library(find_library()))
        write_quantised(
            planned, Path(target), converter, threads=int(threads), report=_say_progress
        )
    except SwarmError as error:
        _say({"error": type(error).__name__, "message": str(error), "fix": error.fix})
        return 1
    return 0


def _say_progress(done: int, total: int) -> None:
    _say({"done": done, "total": total})


def _say(line: Mapping[str, object]) -> None:
    """Tell the parent; where it is gone nobody wants the file, and this process ends."""
    try:
        print(json.dumps(line), flush=True)
    except OSError:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
