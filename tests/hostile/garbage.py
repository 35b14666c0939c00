"""Garbage of two kinds: bytes of no structure, and messages that are well formed and make no sense.

Everything is drawn from a seeded generator, so that a test that fails fails again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import msgspec.inspect as inspect

from swarmpy.proto import wire

NESTED = [
    b"\x91" * 60_000 + b"\xc0",  # arrays in arrays
    b"\x81\xa1a" * 20_000 + b"\xc0",  # maps in maps
    b"\x82\xa4type\xa5hello\xa4tags" + b"\x91" * 50_000 + b"\xc0",
]
"""MessagePack deeper than any interpreter's stack."""

HUGE = [
    b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1 items
    b"\xdf\xff\xff\xff\xff",  # a map of as many
    b"\xc6\xff\xff\xff\xff",  # as many bytes
    b"\xdb\xff\xff\xff\xff" + b"a" * 100,
    b"\x82\xa4type\xa5hello\xa4tags\xdd\xff\xff\xff\xff",
]
"""Collections whose announced length would fill a memory."""

LENGTHS = [
    b"\xff" * 9,  # a varint that does not end
    b"\x80" * 8 + b"\x01",
    b"\xff\xff\xff\xff\x0f",  # 4 GiB
    b"\x80\x00",  # zero, not in its shortest form
    wire.encode_varint(wire.MESSAGE_BYTES_MAX + 1),
    b"\xff" * 8 + b"\x7f",  # 2**63 - 1
]
"""Frame lengths that nobody may send."""


_LETTERS = "aZ0/\u00e9\u202e\n\x00\U0001d518"
"""Letters of one to four bytes, and some that a terminal or a file system obeys."""


def message(kind: Any, generator: random.Random) -> msgspec.Struct:
    """Return a well formed message of a type (a Struct or a union) with random contents."""
    made: msgspec.Struct = value_of(inspect.type_info(kind), generator)
    return made


def value_of(info: inspect.Type, generator: random.Random) -> Any:
    """Return a random value of a field's type, within its bounds."""
    match info:
        case inspect.NoneType():
            return None
        case inspect.BoolType():
            return generator.random() < 0.5
        case inspect.LiteralType(values=values):
            return generator.choice(list(values))
        case inspect.IntType():
            least = info.ge if info.ge is not None else -(2**63)
            most = info.le if info.le is not None else (info.lt or 2**63) - 1
            return generator.choice([least, most, generator.randint(least, most)])
        case inspect.FloatType():
            least = next((bound for bound in (info.ge, info.gt) if bound is not None), -1e9)
            most = next((bound for bound in (info.le, info.lt) if bound is not None), 1e9)
            return least + (most - least) * generator.uniform(0.01, 0.99)
        case inspect.StrType():
            size = _size(info, generator)
            return "".join(
                generator.choice("aZ0/\u00e9\u202e\n\x00\U0001d518") for _ in range(size)
            )
        case inspect.BytesType():
            return generator.randbytes(_size(info, generator))
        case inspect.VarTupleType() | inspect.ListType():
            return tuple(value_of(info.item_type, generator) for _ in range(_size(info, generator)))
        case inspect.TupleType():
            return tuple(value_of(item, generator) for item in info.item_types)
        case inspect.DictType():
            return {
                value_of(info.key_type, generator): value_of(info.value_type, generator)
                for _ in range(_size(info, generator))
            }
        case inspect.UnionType():
            return value_of(generator.choice(info.types), generator)
        case inspect.StructType():
            fields = {field.name: value_of(field.type, generator) for field in info.fields}
            return info.cls(**fields)
        case _:
            raise NotImplementedError(f"a field of type {info}")


def _size(info: Any, generator: random.Random) -> int:
    least, most = info.min_length or 0, info.max_length
    assert most is not None, f"{info} has no bound"
    return generator.choice(
        [least, min(most, least + 1), min(most, least + generator.randint(0, 9))]
    )


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Return bytes with a few places changed, cut out, doubled or put in."""
    out = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(out) + 1)
        match generator.randrange(4):
            case 0:
                out[at : at + 1] = generator.randbytes(1)
            case 1:
                del out[at : at + generator.randint(1, 8)]
            case 2:
                out[at:at] = out[at : at + 16]
            case _:
                out[at:at] = generator.randbytes(generator.randint(1, 8))
    return bytes(out)


def unstructured(generator: random.Random, count: int) -> Iterator[bytes]:
    """Yield random bytes, random frames, and every length and collection that nobody may send."""
    yield b""
    yield from LENGTHS
    yield from (wire.frame(data) for data in (*NESTED, *HUGE))
    for _ in range(count):
        data = generator.randbytes(generator.choice([1, 2, 7, 32, 33, 300, 5000]))
        yield generator.choice([data, wire.frame(data), data[:1] + wire.frame(data)])


def structured(kinds: Any, generator: random.Random, count: int) -> Iterator[bytes]:
    """Yield messages of a protocol with random contents: whole, changed, cut and several in a row.

    Args:
        kinds: The union of all its messages, or a Struct.
    """
    for _ in range(count):
        encoded = wire.encode(message(kinds, generator))
        framed = wire.frame(encoded)
        match generator.randrange(5):
            case 0:
                yield framed
            case 1:
                yield wire.frame(mutated(encoded, generator))
            case 2:
                yield mutated(framed, generator)
            case 3:
                yield framed[: generator.randrange(len(framed))]
            case _:
                yield framed + wire.frame(wire.encode(message(kinds, generator)))
