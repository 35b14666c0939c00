"""How an input becomes the next: libFuzzer's way, and two that it would hardly find.

A message is decoded in native code, which coverage does not see into: from there libFuzzer would
not come back to a message that is nearly right. So some inputs start from the corpus again, and
some messages are changed in one value of theirs, by what has broken decoders elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**53,
    2**63 - 1,
    2**64 - 1,
    -(2**63),
    1.5,
    float("nan"),
    float("inf"),
    "",
    "\x00\x1b[2J\u202e",
    "x" * 5000,
    "\N{GRINNING FACE}" * 64,
    b"",
    b"\xff" * 700,
    [],
    {},
    [[]] * 300,
    {"type": "done"},
    {1: {2: {3: []}}},
    msgspec.msgpack.Ext(-1, b"\xff" * 12),
    msgspec.Raw(b"\x91" * 2000 + b"\xc0"),
    msgspec.Raw(b"\xdd\xff\xff\xff\xff"),
    msgspec.Raw(b"\xdf\xff\xff\xff\xff"),
    msgspec.Raw(b"\xdb\xff\xff\xff\xff"),
    msgspec.Raw(b"\xc6\xff\xff\xff\xff"),
    msgspec.Raw(b"\xc1"),
    msgspec.Raw(b"\xa2\xff\xfe"),
)
"""Values of wrong type, beyond bounds, nested deeper than recursion goes, or longer than told."""

Mutate = Callable[[bytes, int], bytes]


def mutator(seeds: Sequence[bytes], mutate: Mutate) -> Callable[[bytes, int, int], bytes]:
    """Return a custom mutator for one target.

    Args:
        seeds: The committed corpus.
        mutate: libFuzzer's own mutation: bytes and the most bytes it may return.
    """

    def change(data: bytes, bytes_max: int, seed: int) -> bytes:
        generator = random.Random(seed)
        choice = generator.random()
        if seeds and choice < 0.2:
            data = generator.choice(seeds)
        if not 0.1 <= choice < 0.9:
            data = with_hostile_value(data, generator) or data
            if generator.random() < 0.5:
                return data[:bytes_max]
        return mutate(data[:bytes_max], bytes_max)

    return change


def with_hostile_value(data: bytes, generator: random.Random) -> bytes | None:
    """Return a MessagePack message with one value replaced; None where it is none."""
    try:
        return msgspec.msgpack.encode(_replaced(msgspec.msgpack.decode(data), generator))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError, OverflowError):
        return None


def _replaced(value: Any, generator: random.Random) -> Any:
    """Go down to some value at random and put a hostile one in its place."""
    if isinstance(value, list) and value and generator.random() < 0.9:
        index = generator.randrange(len(value))
        return [*value[:index], _replaced(value[index], generator), *value[index + 1 :]]
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(list(value))
        if generator.random() < 0.1:
            return {other: item for other, item in value.items() if other != key}
        return value | {key: _replaced(value[key], generator)}
    return generator.choice(HOSTILE)
