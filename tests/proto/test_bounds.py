"""Every text, bytes and collection in every message of `swarmpy.proto` has a bound.

And nothing is decoded but through `wire.decode`, by types that these tests walk: whoever adds a
message, or another way to read one, is told here.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import msgspec.inspect as inspect
import pytest

import swarmpy
import swarmpy.proto

EVENTS = {"swarmpy.proto.yamux"}
"""Modules whose Structs are events for the caller, cut out of bounded frames and never decoded."""


MSGSPEC_DECODERS = {
    f"msgspec.{form}.{name}"
    for form in ("json", "msgpack", "toml", "yaml")
    for name in ("decode", "Decoder")
}

LOCAL_DECODERS = {
    "swarmpy/proto/wire.py": "the one way in for what peers say",
    "swarmpy/plugins/llama/quantize.py": "the lines of a child process of its own",
    "swarmpy/shards/catalog.py": "this machine's own index",
    "swarmpy/shards/manifest.py": "this machine's own hashes",
    "swarmpy/shards/partial.py": "this machine's own list of what is here of a model",
    "swarmpy/testing/engine.py": "the test engine's own model file",
}
"""Files that call msgspec's decoders themselves, and what for."""


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


def decoding_files() -> Iterator[str]:
    """Yield the files of `swarmpy` that decode by msgspec themselves."""
    root = Path(swarmpy.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in MSGSPEC_DECODERS:
                yield path.relative_to(root.parent).as_posix()


def test_what_peers_say_is_decoded_in_one_place() -> None:
    assert set(decoding_files()) == set(LOCAL_DECODERS)


def decoded_types() -> Iterator[str]:
    """Yield what is given to `wire.decode` as the type, wherever it is called."""
    for path in sorted(Path(swarmpy.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            is_call = isinstance(node, ast.Call) and len(node.args) == 2
            if is_call and ast.unparse(node.func) in ("decode", "wire.decode"):
                yield ast.unparse(node.args[1])


def test_every_type_that_is_decoded_is_a_message_of_proto() -> None:
    """A name from `swarmpy.proto`, or the variable by which `MessageStream` hands one on."""
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.iter_modules(swarmpy.proto.__path__, "swarmpy.proto.")
    ]
    known = {name for module in modules for name in vars(module)} | {"kind"}

    decoded = set(decoded_types())

    assert "MembershipRecord" in decoded
    assert decoded <= known


def test_the_walk_finds_what_has_no_bound() -> None:
    found = list(unbounded(inspect.type_info(Loose), "Loose"))

    assert found == [
        "Loose.name",
        "Loose.inner",
        "Loose.inner values.texts",
        "Loose.inner values.texts[]",
    ]
