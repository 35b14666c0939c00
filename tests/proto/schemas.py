"""Writes the JSON Schemas of our messages to protocols/schemas: `make schemas` after a change.

They are made of the message types themselves and say what those say. Bytes stand as base64, as
everywhere in JSON (protocols/README.md, framing).
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

import swarmpy.proto

FOLDER = Path(__file__).parents[2] / "protocols" / "schemas"

NO_PROTOCOLS = {"tensor", "yamux"}
"""Modules whose types are part of others' messages, or events; libp2p's own messages are in
protocols/libp2p.proto."""


def messages(module: ModuleType) -> list[type[msgspec.Struct]]:
    """Return the Struct types a module defines, in its order."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, msgspec.Struct)
        and value.__module__ == module.__name__
    ]


def protocols() -> list[str]:
    """Return the modules of `swarmpy.proto` that have messages of ours."""
    names = [module.name for module in pkgutil.iter_modules(swarmpy.proto.__path__)]
    return [name for name in names if name not in NO_PROTOCOLS and messages(proto(name))]


def proto(name: str) -> ModuleType:
    return importlib.import_module(f"swarmpy.proto.{name}")


def schema(name: str) -> dict[str, Any]:
    """Return one protocol's schema: its types, and which of them stand alone."""
    types = messages(proto(name))
    refs, definitions = msgspec.json.schema_components(types, ref_template="#/$defs/{name}")
    for kind in types:
        _name_elements(kind, definitions[kind.__name__])
    texts = [json.dumps(definition) for definition in definitions.values()]
    alone = [ref for ref in refs if not any(f'"{ref["$ref"]}"' in text for text in texts)]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"protocols/{name}.md",
        "anyOf": alone,
        "$defs": definitions,
    }


def _name_elements(kind: type[msgspec.Struct], definition: dict[str, Any]) -> None:
    """Say what each element of an array is called; a tag comes before them."""
    names = kind.__struct_fields__
    items = definition.get("prefixItems", [])
    for item, field in zip(items[-len(names) :], names, strict=False):
        item["title"] = field


def text(name: str) -> str:
    """Return one schema's file."""
    return json.dumps(schema(name), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in protocols():
        (FOLDER / f"{name}.json").write_text(text(name), "utf-8")


if __name__ == "__main__":
    main()
