"""Gives back memory of a mapped file that nobody will read.

On Linux the library reads the file that it maps ahead, holes included: of a large vocabulary
they are more than some layers have. Elsewhere it does not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_MAPS = Path("/proc/self/maps")

_DONTNEED = 4
"""`MADV_DONTNEED`: the pages are forgotten, and read again from the file if anybody asks."""


def drop_mapped(path: Path, ranges: Iterable[tuple[int, int]]) -> int:
    """Forget the pages of ranges of a file that this process has mapped; return their bytes.

    Args:
        ranges: Offsets [start, end) in the file; of pages that lie in them in part nothing changes.
    """
    try:
        lines = _MAPS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    name, wanted, dropped = os.path.realpath(path), list(ranges), 0
    for line in lines:
        # Addresses, permissions, offset, device, inode, and the name, which may have spaces.
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5] != name:
            continue
        address, behind = (int(number, 16) for number in fields[0].split("-"))
        offset = int(fields[2], 16)
        for start, end in wanted:
            first = _page_up(max(start, offset))
            size = min(end, offset + behind - address) // mmap.PAGESIZE * mmap.PAGESIZE - first
            if size > 0 and madvise(address + first - offset, size, _DONTNEED) == 0:
                dropped += size
    return dropped


def _page_up(offset: int) -> int:
    return -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
