"""The published JSON Schemas are those of the message types; `make schemas` writes them anew."""

from __future__ import annotations

import json

import pytest
import schemas


@pytest.mark.parametrize("name", schemas.protocols())
def test_a_published_schema_is_that_of_the_code(name: str) -> None:
    published = (schemas.FOLDER / f"{name}.json").read_text("utf-8")

    assert published == schemas.text(name)


def test_no_schema_is_left_of_a_protocol_that_is_gone() -> None:
    assert {path.stem for path in schemas.FOLDER.iterdir()} == set(schemas.protocols())


@pytest.mark.parametrize("name", schemas.protocols())
def test_no_schema_leaves_anything_without_a_bound(name: str) -> None:
    """Whoever writes a second decoder from it needs the bounds as much as we do."""

    def unbounded(part: object, path: str) -> list[str]:
        if isinstance(part, list):
            return [item for inner in part for item in unbounded(inner, path)]
        if not isinstance(part, dict):
            return []
        found = [item for key, inner in part.items() for item in unbounded(inner, f"{path}.{key}")]
        kind = part.get("type")
        if kind == "string" and "maxLength" not in part and "enum" not in part:
            found.append(path)
        if kind == "array" and "maxItems" not in part and "prefixItems" not in part:
            found.append(path)
        return found

    assert unbounded(json.loads(schemas.text(name))["$defs"], name) == []
