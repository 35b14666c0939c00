"""The pages: every link between them leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from swarmpy.proto import pipeline

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "protocols/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: str) -> None:
    broken = [target for target in links(ROOT / page) if not leads_somewhere(ROOT / page, target)]
    assert broken == []


@pytest.mark.parametrize(
    "kind",
    sorted(
        {*get_args(pipeline.First), *get_args(pipeline.Command), *get_args(pipeline.Report)}
        | {pipeline.Described},
        key=lambda kind: kind.__name__,
    ),
)
def test_the_pipelines_page_names_every_field_of_every_message(kind: type[msgspec.Struct]) -> None:
    page = (ROOT / "protocols" / "pipeline.md").read_text("utf-8")
    tag = kind.__struct_config__.tag
    row = re.search(rf"^\| .*`{tag}`.* \|$", page.partition("## 9. Messages")[2], re.MULTILINE)
    assert row is not None
    assert [name for name in kind.__struct_fields__ if f"`{name}`" not in row[0]] == []


def links(page: Path) -> Iterator[str]:
    """Yield where a page's links lead, but for those that leave the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            yield target


def leads_somewhere(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    return file.exists() and (not anchor or anchor in anchors(file))


def anchors(page: Path) -> set[str]:
    """Return the headings of a page as links name them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
