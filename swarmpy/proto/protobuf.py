"""The few bytes of protobuf that libp2p's own messages need: varints and length-delimited fields.

Identify, the Noise payload and signed envelopes are flat messages of strings and bytes; reading
them takes 40 lines, while the protobuf package costs a pin that conflicts with py-libp2p's and time
at import (docs/decisions/0006). Unknown fields are skipped, as the format demands.
Spec: protocols/libp2p.proto.
"""

from __future__ import annotations

from collections.abc import Iterable

from swarmpy.errors import BadMessage
from swarmpy.proto.wire import decode_varint, encode_varint

FIELDS_MAX = 512
"""Most fields of one message: identify with 256 protocols and 64 addresses has 326."""

Fields = dict[int, list[bytes | int]]


def encode(fields: Iterable[tuple[int, bytes | int]]) -> bytes:
    """Encode (number, value) pairs in the given order: int as varint, bytes length-delimited."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += encode_varint(number << 3) + encode_varint(value)
        else:
            out += encode_varint(number << 3 | 2) + encode_varint(len(value)) + value
    return bytes(out)


def decode(data: bytes) -> Fields:
    """Decode a message into its fields by number, repeated ones in order.

    Raises:
        BadMessage: Truncated, a wire type beyond 0, 1, 2, 5, or more than `FIELDS_MAX` fields.
    """
    fields: Fields = {}
    offset = count = 0
    while offset < len(data):
        count += 1
        if count > FIELDS_MAX:
            raise BadMessage(f"protobuf message of more than {FIELDS_MAX} fields")
        tag, offset = _varint(data, offset)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise BadMessage("protobuf field number 0")
        match wire_type:
            case 0:
                value, offset = _varint(data, offset)
                fields.setdefault(number, []).append(value)
            case 1:
                offset = _skip(data, offset, 8)
            case 2:
                size, offset = _varint(data, offset)
                end = _skip(data, offset, size)
                fields.setdefault(number, []).append(bytes(data[offset:end]))
                offset = end
            case 5:
                offset = _skip(data, offset, 4)
            case _:
                raise BadMessage(f"protobuf wire type {wire_type}")
    return fields


def bytes_field(fields: Fields, number: int) -> bytes:
    """Return the last value of a bytes field, b"" where it is absent."""
    values = fields.get(number)
    if not values:
        return b""
    if not isinstance(values[-1], bytes):
        raise BadMessage(f"protobuf field {number} is not bytes")
    return values[-1]


def bytes_fields(fields: Fields, number: int) -> list[bytes]:
    """Return all values of a repeated bytes field."""
    values = fields.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise BadMessage(f"protobuf field {number} is not bytes")
    return [value for value in values if isinstance(value, bytes)]


def text_field(fields: Fields, number: int) -> str:
    """Return the last value of a string field, "" where it is absent."""
    try:
        return bytes_field(fields, number).decode()
    except UnicodeDecodeError as error:
        raise BadMessage(f"protobuf field {number} is not UTF-8") from error


def int_field(fields: Fields, number: int) -> int:
    """Return the last value of a varint field, 0 where it is absent."""
    values = fields.get(number)
    if not values:
        return 0
    if not isinstance(values[-1], int):
        raise BadMessage(f"protobuf field {number} is not a varint")
    return values[-1]


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    # Protobuf writes 64-bit values in up to ten bytes; nine carry every value our messages use.
    decoded = decode_varint(data, offset)
    if decoded is None:
        raise BadMessage("protobuf message is truncated")
    return decoded


def _skip(data: bytes, offset: int, size: int) -> int:
    if offset + size > len(data):
        raise BadMessage("protobuf message is truncated")
    return offset + size
