"""A fast BLAS for MLX on Linux CPUs, without a compiler.

The wheel of MLX for CPUs links the reference BLAS (4 GFLOP/s a core where OpenBLAS has 100). The
package scipy-openblas32 carries OpenBLAS under prefixed names, so the one entry of libmlx's table
of imported functions that all its float32 products go through, `cblas_sgemm`, is pointed there.
Every step is checked and a doubt leaves MLX as it was; the reason is then part of the build id.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

LIBRARY_BYTES_MAX = 1 << 30
"""Largest libmlx looked at (the CUDA build has 300 MB)."""

SPEEDUP_MIN = 1.5
"""A timed product must get this much faster, or the entry is put back: it was not the one used."""

_SYMBOL = "cblas_sgemm"
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = np.dtype(
    [
        ("name", "<u4"),
        ("type", "<u4"),
        ("flags", "<u8"),
        ("address", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("link", "<u4"),
        ("info", "<u4"),
        ("align", "<u8"),
        ("entry_size", "<u8"),
    ]
)
_RELOCATION = np.dtype([("offset", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
_SYMBOL_ENTRY = np.dtype(
    [
        ("name", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("section", "<u2"),
        ("value", "<u8"),
        ("size", "<u8"),
    ]
)
_SECTION_RELA = 4
_SECTION_DYNSYM = 11
_SLOT_RELOCATIONS = {"x86_64": (62, (6, 7)), "aarch64": (183, (1025, 1026))}
"""By machine: its ELF number, and the types of relocation that fill a slot with a function."""


class BlasUnavailable(Exception):
    """OpenBLAS cannot be used here; the message says why."""


@dataclass(frozen=True, slots=True)
class Blas:
    """The BLAS in use."""

    name: str
    """For the exactness class: library, version and kernel, or why it is MLX's own."""
    gflops: float
    """Speed of a small product at start, 10^9 operations a second."""


_bound: Blas | None = None


def bind_openblas() -> Blas:
    """Make MLX compute with OpenBLAS, once a process; return what it computes with."""
    global _bound
    if _bound is None:
        before = _measure_gflops()
        try:
            _bound = _bind(before)
        except (BlasUnavailable, OSError) as error:
            _bound = Blas(f"mlx-blas ({error})", before)
    return _bound


def set_threads_from_environment() -> int:
    """Set OpenBLAS's threads to OPENBLAS_NUM_THREADS, and return how many MLX computes with."""
    bind_openblas()
    if _bound is None or not _bound.name.startswith("openblas"):
        return 1
    threads = max(1, int(os.environ.get("OPENBLAS_NUM_THREADS", "1")))
    _library().scipy_openblas_set_num_threads(threads)
    return threads


def _bind(before_gflops: float) -> Blas:
    if sys.platform != "linux":
        raise BlasUnavailable("the system's own")
    library = _library()
    target = ctypes.cast(library.scipy_cblas_sgemm, ctypes.c_void_p).value
    library.scipy_openblas_get_config.restype = ctypes.c_char_p
    library.scipy_openblas_get_corename.restype = ctypes.c_char_p
    assert target is not None
    slot = _find_slot()
    threads = library.scipy_openblas_get_num_threads()
    # Several would wait for each other on a busy machine: its load would choose the library then,
    # and with it the speed and the bits of every reply.
    library.scipy_openblas_set_num_threads(1)
    original = slot.point_to(target)
    gflops = _measure_gflops()
    library.scipy_openblas_set_num_threads(threads)
    if not _is_correct() or gflops < before_gflops * SPEEDUP_MIN:
        slot.point_to(original)
        raise BlasUnavailable(f"bound, but no faster: {before_gflops:.0f} and {gflops:.0f} GFLOP/s")
    version = library.scipy_openblas_get_config().decode().split()[1]
    return Blas(f"openblas {version} {library.scipy_openblas_get_corename().decode()}", gflops)


def _library() -> ctypes.CDLL:
    """Load the package's OpenBLAS."""
    try:
        import scipy_openblas32
    except ImportError as error:
        raise BlasUnavailable("scipy-openblas32 is not installed") from error
    folder = Path(scipy_openblas32.get_lib_dir())
    try:
        library = ctypes.CDLL(str(folder / "libscipy_openblas.so"))
        _ = library.scipy_cblas_sgemm
        _ = library.scipy_openblas_get_num_threads, library.scipy_openblas_set_num_threads
    except (OSError, AttributeError) as error:
        raise BlasUnavailable(f"scipy-openblas32 does not load: {error}") from error
    return library


# The slot -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Slot:
    """One entry of a loaded library's table of imported functions."""

    address: int
    protection: int
    """Of the page it lies on, as `mprotect` takes it."""

    def point_to(self, function: int) -> int:
        """Store a function's address and return the one before; the page's protection stays."""
        page_bytes = mmap.PAGESIZE
        page = self.address - self.address % page_bytes
        _protect(page, page_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        try:
            entry = ctypes.c_uint64.from_address(self.address)
            original, entry.value = entry.value, function
        finally:
            _protect(page, page_bytes, self.protection)
        return original


def _protect(page: int, size: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(size), protection) != 0:
        raise BlasUnavailable(f"mprotect: {os.strerror(ctypes.get_errno())}")


def _find_slot() -> _Slot:
    """Find where libmlx in this process keeps the address of `cblas_sgemm`."""
    base, path = _loaded_library("libmlx.so")
    address = base + _slot_offset(path)
    for start, end, protection, _ in _mappings():
        if start <= address < end - 8 and address % 8 == 0 and protection & mmap.PROT_READ:
            return _Slot(address, protection)
    raise BlasUnavailable("libmlx's table is not mapped where its file says")


def _loaded_library(name: str) -> tuple[int, Path]:
    """Return the lowest address and the file of a library in this process."""
    found = [(start, path) for start, _, _, path in _mappings() if Path(path).name == name]
    if not found:
        raise BlasUnavailable(f"{name} is not loaded")
    base, path = min(found)
    if len({path for _, path in found}) != 1:
        raise BlasUnavailable(f"{name} is loaded twice")
    return base, Path(path)


def _mappings() -> list[tuple[int, int, int, str]]:
    """Return this process's mappings: start, end, protection, file ("" if none)."""
    mappings = []
    bits = {"r": mmap.PROT_READ, "w": mmap.PROT_WRITE, "x": mmap.PROT_EXEC}
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in fields[0].split("-"))
        protection = sum(bits.get(flag, 0) for flag in fields[1])
        mappings.append((start, end, protection, fields[5] if len(fields) == 6 else ""))
    return mappings


def _slot_offset(path: Path) -> int:
    """Return the slot's offset from the library's base, from the relocations in its ELF file."""
    size = path.stat().st_size
    if not _ELF_HEADER.size <= size <= LIBRARY_BYTES_MAX:
        raise BlasUnavailable(f"{path.name} of {size} bytes is no library")
    machine, slot_types = _SLOT_RELOCATIONS.get(platform.machine(), (0, ()))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        sections = _sections(data, machine)
        offsets = set()
        for section in sections[sections["type"] == _SECTION_RELA]:
            relocations = _table(data, section, _RELOCATION)
            symbols = sections[_checked(int(section["link"]), len(sections))]
            if symbols["type"] != _SECTION_DYNSYM:
                continue
            wanted = _symbol_indexes(data, symbols, sections)
            fits = np.isin(relocations["symbol"], wanted)
            fits &= np.isin(relocations["type"], slot_types) & (relocations["addend"] == 0)
            offsets |= {int(offset) for offset in relocations["offset"][fits]}
    if len(offsets) != 1:
        raise BlasUnavailable(f"{path.name} has {len(offsets)} slots for {_SYMBOL}, expected 1")
    return offsets.pop()


def _sections(data: mmap.mmap, machine: int) -> np.ndarray:
    """Return the file's section table after checking that it is a library for this machine."""
    header = _ELF_HEADER.unpack_from(data)
    if header[0][:6] != b"\x7fELF\x02\x01" or header[1] != 3 or header[2] != machine:
        raise BlasUnavailable("libmlx is no little-endian 64-bit ELF library of this machine")
    table_offset, entry_size, count = header[6], header[11], header[12]
    if entry_size != _SECTION.itemsize or table_offset + count * entry_size > len(data):
        raise BlasUnavailable("libmlx has no section table")
    return np.frombuffer(data[table_offset : table_offset + count * entry_size], _SECTION)


def _symbol_indexes(data: mmap.mmap, symbols: np.void, sections: np.ndarray) -> np.ndarray:
    """Return which entries of a symbol table are called `cblas_sgemm`."""
    strings = sections[_checked(int(symbols["link"]), len(sections))]
    start, size = int(strings["offset"]), int(strings["size"])
    text = data[start : start + size]
    # A name may be the tail of a longer one; the byte before must end another.
    at = text.find(b"\0" + _SYMBOL.encode() + b"\0")
    if at < 0:
        raise BlasUnavailable(f"libmlx does not import {_SYMBOL}")
    names = _table(data, symbols, _SYMBOL_ENTRY)["name"]
    return np.flatnonzero(names == at + 1)


def _table(data: mmap.mmap, section: np.void, dtype: np.dtype) -> np.ndarray:
    start, size = int(section["offset"]), int(section["size"])
    if start + size > len(data) or size % dtype.itemsize:
        raise BlasUnavailable("a section of libmlx passes the end of the file")
    return np.frombuffer(data[start : start + size], dtype)


def _checked(index: int, count: int) -> int:
    if index >= count:
        raise BlasUnavailable("a section of libmlx refers to none")
    return index


# Did it work? ---------------------------------------------------------------


def _measure_gflops() -> float:
    """Time a product of the shape of a prefill chunk, the best of five."""
    import mlx.core as mx

    left = mx.ones((64, 576))
    right = mx.ones((1536, 576))
    mx.eval(left, right)
    best = float("inf")
    for _ in range(5):
        began = perf_counter()
        mx.eval(left @ right.T)
        best = min(best, perf_counter() - began)
    return 2 * 64 * 576 * 1536 / best / 1e9


def _is_correct() -> bool:
    """Whether MLX's product agrees with numpy's."""
    import mlx.core as mx

    left = np.linspace(-1, 1, 24 * 36, dtype=np.float32).reshape(24, 36)
    right = np.linspace(-2, 1, 36 * 40, dtype=np.float32).reshape(36, 40)
    product = np.array(mx.array(left) @ mx.array(right))
    return bool(np.allclose(product, left.astype(np.float64) @ right, atol=1e-4))
