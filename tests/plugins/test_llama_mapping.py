"""Pages of a mapped file are given back, and only those."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from swarmpy.plugins.llama.mapping import drop_mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux reads ahead")

PAGE = mmap.PAGESIZE
PAGES = 64


def resident_pages(path: Path) -> int:
    """How many of a file's pages this process holds, by the kernel's own account."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    found = 0
    for line in lines:
        if line.endswith(str(path)):
            rss = next(item for item in lines if item.startswith("Rss:"))
            found += int(rss.split()[1]) * 1024 // PAGE
    return found


@pytest.mark.parametrize(
    ("ranges", "dropped"),
    [
        ([(0, PAGES * PAGE)], PAGES),
        ([(8 * PAGE, 24 * PAGE)], 16),
        ([(8 * PAGE - 1, 9 * PAGE + 1), (20 * PAGE, 21 * PAGE)], 2),
        ([(5, PAGE - 5)], 0),
        ([(60 * PAGE, 1000 * PAGE)], 4),
        ([], 0),
    ],
)
def test_whole_pages_of_the_ranges_are_given_back(
    tmp_path: Path, ranges: list[tuple[int, int]], dropped: int
) -> None:
    path = tmp_path / "a file"
    path.write_bytes(b"x" * (PAGES * PAGE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == b"x" * (PAGES * PAGE)  # Every page is touched.
        assert resident_pages(path) == PAGES

        assert drop_mapped(path, ranges) == dropped * PAGE

        assert resident_pages(path) == PAGES - dropped
        assert mapped[:] == b"x" * (PAGES * PAGE)


def test_a_file_that_is_not_mapped_is_left_alone(tmp_path: Path) -> None:
    assert drop_mapped(tmp_path / "nothing", [(0, 1 << 30)]) == 0
