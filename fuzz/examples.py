"""Examples of message types, made from the types alone: what a decoder must take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import msgspec.inspect as inspect

from swarmpy.identity import Identity

PEER = Identity(b"a" * 32).peer_id


def structs_of(kind: Any) -> list[type[msgspec.Struct]]:
    """The Struct types that a type or a tagged union may be, without those inside them."""
    info = inspect.type_info(kind)
    options = info.types if isinstance(info, inspect.UnionType) else (info,)
    return [option.cls for option in options if isinstance(option, inspect.StructType)]


def structs_within(kind: Any) -> set[type[msgspec.Struct]]:
    """All Struct types that a type may hold at any depth, itself included."""
    return {info.cls for info in _walk(inspect.type_info(kind)) if _is_struct(info)}


def _is_struct(info: inspect.Type) -> bool:
    return isinstance(info, inspect.StructType)


def _walk(info: inspect.Type) -> Iterator[Any]:
    yield info
    match info:
        case inspect.StructType(fields=fields):
            inner: tuple[inspect.Type, ...] = tuple(field.type for field in fields)
        case inspect.UnionType(types=inner) | inspect.TupleType(item_types=inner):
            pass
        case inspect.DictType(key_type=key, value_type=value):
            inner = (key, value)
        case inspect.CollectionType(item_type=item):
            inner = (item,)
        case _:
            inner = ()
    for part in inner:
        yield from _walk(part)


def example(kind: Any, *, is_full: bool) -> object:
    """A valid value as plain data: every number at its least and nothing optional, or all there."""
    return _example(inspect.type_info(kind), is_full)


def _example(info: inspect.Type, is_full: bool) -> Any:
    match info:
        case inspect.StructType():
            return _struct(info, is_full)
        case inspect.UnionType(types=types):
            return None if not is_full and info.includes_none else _example(types[0], is_full)
        case inspect.TupleType(item_types=types):
            return [_example(item, is_full) for item in types]
        case inspect.DictType(key_type=key, value_type=value):
            return {_example(key, is_full): _example(value, is_full)} if is_full else {}
        case inspect.CollectionType(item_type=item, min_length=least):
            return [_example(item, is_full)] * max(least or 0, 2 if is_full else 0)
        case inspect.LiteralType(values=values):
            return values[-1 if is_full else 0]
        case inspect.IntType() | inspect.FloatType():
            return _number(info, is_full)
        case inspect.StrType(min_length=least, max_length=most):
            return (
                (PEER if (most or 0) >= len(PEER) else "x" * (most or 1))
                if is_full
                else "a" * (least or 0)
            )
        case inspect.BytesType(min_length=least, max_length=most):
            return b"\x01" * min(most or 0, max(least or 0, 16 if is_full else 0))
        case inspect.BoolType():
            return is_full
        case _:
            raise NotImplementedError(f"no example of {info}")


def _struct(info: inspect.StructType, is_full: bool) -> object:
    config = info.cls.__struct_config__
    fields = [field for field in info.fields if is_full or field.required or config.array_like]
    values = {field.encode_name: _example(field.type, is_full) for field in fields}
    if config.array_like:
        return [*([info.tag] if info.tag is not None else []), *values.values()]
    return ({info.tag_field: info.tag} if info.tag is not None else {}) | values


def _number(info: inspect.IntType | inspect.FloatType, is_full: bool) -> int | float:
    is_whole = isinstance(info, inspect.IntType)
    step = 1 if is_whole else 0.5
    if is_full and info.le is not None:
        return info.le
    if is_full and info.lt is not None:
        return info.lt - step
    if info.ge is not None:
        return info.ge
    return info.gt + step if info.gt is not None else step
