"""How every message of ours is framed, encoded and decoded: one function decodes, strictly.

A message is a frozen `msgspec.Struct` as MessagePack; a frame is its length as an unsigned varint
and then its bytes. Spec: protocols/README.md.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import msgspec
import msgspec.inspect

from swarmpy.errors import BadMessage, FrameTooLarge

MESSAGE_BYTES_MAX = 64 * 1024
"""Largest message without tensors. Every control message of ours is far smaller."""

VARINT_BYTES_MAX = 9
"""Longest unsigned varint (multiformats): 63 bits."""

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}
_float_fields: dict[type[msgspec.Struct], tuple[str, ...]] = {}


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message as MessagePack."""
    return _encoder.encode(message)


def encode_elements(elements: tuple[object, ...]) -> bytes:
    """Encode the first elements of a message that is an array, where the last are left out."""
    return _encoder.encode(elements)


def decode(data: bytes | bytearray | memoryview, kind: type[T]) -> T:
    """Decode a message of `kind` (a Struct type or a tagged union), or say why it is none.

    Raises:
        FrameTooLarge: More than `MESSAGE_BYTES_MAX` bytes.
        BadMessage: Not MessagePack, wrong types, a bound broken, or a NaN or Inf among the numbers.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise FrameTooLarge(f"message of {len(data)} bytes exceeds {MESSAGE_BYTES_MAX}")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        message = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(str(error)) from error
    if not _is_finite(message):
        raise BadMessage("a number is NaN or infinite")
    return message  # type: ignore[no-any-return]


def _is_finite(value: object) -> bool:
    """Whether no float anywhere inside is NaN or infinite. Depth is bounded by the types."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, msgspec.Struct):
        kind = type(value)
        names = _float_fields.get(kind)
        if names is None:
            names = _float_fields[kind] = _fields_with_floats(kind)
        return all(_is_finite(getattr(value, name)) for name in names)
    if isinstance(value, (list, tuple, frozenset)):
        return all(_is_finite(item) for item in value)
    if isinstance(value, dict):
        return all(_is_finite(item) for item in value.values())
    return True


def _fields_with_floats(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    """Names of a message's fields that can hold a float at any depth.

    Most have none: looking into every field was a fifth of all Python calls of a decode step.
    """
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    return tuple(field.name for field in info.fields if _holds_floats(field.type))


def _holds_floats(info: msgspec.inspect.Type) -> bool:
    match info:
        case msgspec.inspect.FloatType() | msgspec.inspect.AnyType():
            return True
        case msgspec.inspect.UnionType(types=inner):
            return any(map(_holds_floats, inner))
        case msgspec.inspect.TupleType(item_types=inner):
            return any(map(_holds_floats, inner))
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            return _holds_floats(key) or _holds_floats(value)
        case msgspec.inspect.CollectionType(item_type=item):
            return _holds_floats(item)
        case msgspec.inspect.StructType(fields=fields):
            return any(_holds_floats(field.type) for field in fields)
        case _:
            return False


def printable(text: str) -> str:
    """Return a stranger's text without what a terminal would take for commands."""
    return "".join(character for character in text if character.isprintable())


def encode_varint(value: int) -> bytes:
    """Encode an unsigned varint (multiformats unsigned-varint)."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int] | None:
    """Decode an unsigned varint at `offset`.

    Returns:
        The value and the offset behind it, or None while bytes are missing.

    Raises:
        BadMessage: Longer than nine bytes, or not in its shortest form.
    """
    value = shift = 0
    for index in range(offset, min(len(data), offset + VARINT_BYTES_MAX)):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and shift:
                raise BadMessage("varint is not in its shortest form")
            return value, index + 1
        shift += 7
    if len(data) - offset >= VARINT_BYTES_MAX:
        raise BadMessage("varint of more than nine bytes")
    return None


def frame(payload: bytes) -> bytes:
    """Return `payload` behind its length."""
    return encode_varint(len(payload)) + payload
