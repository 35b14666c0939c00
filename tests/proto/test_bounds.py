"""Every text, bytes and collection in every message of `swarmpy.proto` has a bound."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import msgspec
import msgspec.inspect as inspect
import pytest

import swarmpy.proto

EVENTS = {"swarmpy.proto.yamux"}
"""Modules whose Structs are events for the caller, cut out of bounded frames and never decoded."""


class Inner(msgspec.Struct):
    """Part of a message as it must not be."""

    texts: list[str]


class Loose(msgspec.Struct):
    """A message as it must not be."""

    name: str
    inner: dict[int, Inner]


def structs() -> list[type[msgspec.Struct]]:
    """All Struct types defined in the modules of `swarmpy.proto`."""
    found: list[type[msgspec.Struct]] = []
    for module_info in pkgutil.iter_modules(swarmpy.proto.__path__, "swarmpy.proto."):
        if module_info.name in EVENTS:
            continue
        module = importlib.import_module(module_info.name)
        for value in vars(module).values():
            is_struct = isinstance(value, type) and issubclass(value, msgspec.Struct)
            if is_struct and value.__module__ == module_info.name:
                found.append(value)
    return found


def unbounded(kind: inspect.Type, path: str, seen: tuple[type, ...] = ()) -> Iterator[str]:
    """Yield the paths below `kind` that could hold anything of any length."""
    match kind:
        case inspect.StrType() | inspect.BytesType() | inspect.ByteArrayType():
            if kind.max_length is None:
                yield path
        case inspect.MemoryViewType() | inspect.AnyType() | inspect.RawType():
            yield path
        case (
            inspect.ListType()
            | inspect.SetType()
            | inspect.FrozenSetType()
            | inspect.VarTupleType()
        ):
            if kind.max_length is None:
                yield path
            yield from unbounded(kind.item_type, f"{path}[]", seen)
        case inspect.TupleType():
            for item in kind.item_types:
                yield from unbounded(item, f"{path}[]", seen)
        case inspect.DictType():
            if kind.max_length is None:
                yield path
            yield from unbounded(kind.key_type, f"{path} keys", seen)
            yield from unbounded(kind.value_type, f"{path} values", seen)
        case inspect.UnionType():
            for item in kind.types:
                yield from unbounded(item, path, seen)
        case inspect.StructType():
            if kind.cls in seen:
                yield f"{path} (recursive)"
                return
            for field in kind.fields:
                yield from unbounded(field.type, f"{path}.{field.name}", (*seen, kind.cls))


@pytest.mark.parametrize("struct", structs(), ids=lambda struct: struct.__qualname__)
def test_every_field_of_a_message_is_bounded(struct: type[msgspec.Struct]) -> None:
    assert list(unbounded(inspect.type_info(struct), struct.__qualname__)) == []


@pytest.mark.parametrize("struct", structs(), ids=lambda struct: struct.__qualname__)
def test_every_message_is_frozen(struct: type[msgspec.Struct]) -> None:
    assert struct.__struct_config__.frozen


def test_the_walk_finds_what_has_no_bound() -> None:
    found = list(unbounded(inspect.type_info(Loose), "Loose"))

    assert found == [
        "Loose.name",
        "Loose.inner",
        "Loose.inner values.texts",
        "Loose.inner values.texts[]",
    ]
