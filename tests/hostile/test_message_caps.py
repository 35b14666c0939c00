"""Every bound of every field of every message, at one below, at it and one beyond.

The bounds are read from the types themselves, so a field that is added is tested with them.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import msgspec.inspect as inspect
import pytest
from hostile.garbage import value_of

import swarmpy.proto
from swarmpy.errors import BadMessage, FrameTooLarge
from swarmpy.proto import membership, wire

EVENTS = {"swarmpy.proto.yamux"}
"""Modules whose Structs never cross a wire."""

Edge = tuple[Any, bool]
"""A value, and whether it is allowed."""


def structs() -> list[type[msgspec.Struct]]:
    """Return all messages and parts of messages."""
    found = []
    for module_info in pkgutil.iter_modules(swarmpy.proto.__path__, "swarmpy.proto."):
        if module_info.name not in EVENTS:
            for value in vars(importlib.import_module(module_info.name)).values():
                is_struct = isinstance(value, type) and issubclass(value, msgspec.Struct)
                if is_struct and value.__module__ == module_info.name:
                    found.append(value)
    return found


def edges(info: inspect.Type) -> Iterator[Edge]:
    """Yield the values around each bound of a field's type."""
    match info:
        case inspect.IntType():
            yield from _numbers(info, 1)
        case inspect.FloatType():
            yield from _numbers(info, 2.0**-20)
            yield from ((float("nan"), False), (float("inf"), False), (float("-inf"), False))
        case inspect.StrType():
            yield from (("\u00e9" * size, fits) for size, fits in _lengths(info))
        case inspect.BytesType():
            yield from ((bytes(size), fits) for size, fits in _lengths(info))
        case inspect.VarTupleType():
            item = _one(info.item_type)
            yield from (((item,) * size, fits) for size, fits in _lengths(info))
            if not info.min_length or info.min_length == 1:
                yield from (((value,), fits) for value, fits in edges(info.item_type))
        case inspect.TupleType(item_types=kinds):
            for index, kind in enumerate(kinds):
                rest = [_one(other) for other in kinds]
                for value, fits in edges(kind):
                    yield (*rest[:index], value, *rest[index + 1 :]), fits
        case inspect.DictType():
            value = _one(info.value_type)
            for size, fits in _lengths(info):
                yield dict.fromkeys(range(size), value), fits
        case inspect.LiteralType():
            yield "no such word", False
        case inspect.UnionType(types=kinds):
            yield from (edge for kind in kinds for edge in edges(kind))


def _numbers(info: inspect.IntType | inspect.FloatType, step: float) -> Iterator[Edge]:
    kind = type(step)
    for bound, inward in ((info.ge, 1), (info.le, -1)):
        if bound is not None:
            scale = max(1.0, abs(bound)) if kind is float else 1
            for offset, fits in ((step, True), (0, True), (-step, False)):
                yield kind(bound + inward * offset * scale), fits
    for bound, inward in ((info.gt, 1), (info.lt, -1)):
        if bound is not None:
            scale = max(1.0, abs(bound)) if kind is float else 1
            yield kind(bound + inward * step * scale), True
            yield kind(bound), False


def _lengths(info: Any) -> Iterator[tuple[int, bool]]:
    least, most = info.min_length or 0, info.max_length
    yield from ((size, True) for size in {max(least, most - 1), most})
    yield most + 1, False
    if least:
        yield least - 1, False


def _one(info: inspect.Type) -> Any:
    """Return a small valid value of a type."""
    match info:
        case inspect.VarTupleType():
            return (_one(info.item_type),) * (info.min_length or 0)
        case inspect.BytesType():
            return bytes(info.min_length or 0)
        case inspect.StrType():
            return "a" * (info.min_length or 0)
        case inspect.IntType():
            return info.ge or 0
        case inspect.StructType():
            return info.cls(**{field.name: _one(field.type) for field in info.fields})
        case inspect.TupleType(item_types=kinds):
            return tuple(_one(kind) for kind in kinds)
        case _:
            return value_of(info, random.Random(1))


FIELDS = [
    pytest.param(
        struct, field, id=f"{struct.__module__.rpartition('.')[2]}.{struct.__name__}.{field.name}"
    )
    for struct in structs()
    for field in inspect.type_info(struct).fields  # type: ignore[attr-defined]
    if any(True for _ in edges(field.type))
]


@pytest.mark.parametrize(("struct", "field"), FIELDS)
def test_a_field_is_taken_up_to_its_bound_and_no_further(
    struct: type[msgspec.Struct], field: inspect.Field
) -> None:
    small = _one(inspect.type_info(struct))
    for value, is_allowed in edges(field.type):
        encoded = wire.encode(msgspec.structs.replace(small, **{field.name: value}))
        if len(encoded) > wire.MESSAGE_BYTES_MAX:
            with pytest.raises(FrameTooLarge):
                wire.decode(encoded, struct)
        elif is_allowed:
            assert getattr(wire.decode(encoded, struct), field.name) == value
        else:
            with pytest.raises(BadMessage):
                wire.decode(encoded, struct)


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_message_is_taken_up_to_its_bound_and_no_further(size: int) -> None:
    """Longer ones are refused unread, whatever is in them."""
    data = b"\xc0" * (wire.MESSAGE_BYTES_MAX + size)
    with pytest.raises(FrameTooLarge if size > 0 else BadMessage) as caught:
        wire.decode(data, membership.Hello)
    assert isinstance(caught.value, FrameTooLarge) == (size > 0)
