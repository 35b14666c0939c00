"""Multiaddrs: the addresses of libp2p, as text and as the bytes that identify carries.

Sans-IO. Only the protocols a TCP peer needs are known; an address with any other is refused whole.
Spec: libp2p specs, addressing; protocols/multistream.md, section 1.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from swarmpy.errors import BadMessage, RemoteProtocolError
from swarmpy.identity import PeerId, base58_encode, parse_peer_id, peer_id_bytes
from swarmpy.proto.wire import decode_varint, encode_varint
from swarmpy.public_keys import check_multihash_form

ADDRESS_BYTES_MAX = 512
"""Longest address, text or binary: a DNS name of 253 characters, a port and a PeerId fit."""

COMPONENTS_MAX = 8
"""Most "/protocol/value" pairs; a relayed address has six."""

_NAME_MAX = 253
"""Longest DNS name."""


@dataclass(frozen=True, slots=True)
class _Protocol:
    """One multiaddr protocol: `size` is its value's bytes, -1 for a length before the value."""

    name: str
    code: int
    size: int
    encode: Callable[[str], bytes]
    decode: Callable[[bytes], str]


def _encode_ip4(text: str) -> bytes:
    return ipaddress.IPv4Address(text).packed


def _decode_ip4(data: bytes) -> str:
    return str(ipaddress.IPv4Address(data))


def _encode_ip6(text: str) -> bytes:
    if "%" in text:
        raise ValueError("an IPv6 zone has no place in a multiaddr")
    return ipaddress.IPv6Address(text).packed


def _decode_ip6(data: bytes) -> str:
    return str(ipaddress.IPv6Address(data))


def _encode_port(text: str) -> bytes:
    if not (text.isascii() and text.isdigit() and len(text) <= 5) or int(text) > 0xFFFF:
        raise ValueError("a port is a number from 0 to 65535")
    return int(text).to_bytes(2, "big")


def _decode_port(data: bytes) -> str:
    return str(int.from_bytes(data, "big"))


def _encode_name(text: str) -> bytes:
    if not text or len(text) > _NAME_MAX or not text.isascii() or not text.isprintable():
        raise ValueError("not a DNS name")
    if any(character in "/ \\@:" for character in text):
        raise ValueError("not a DNS name")
    return text.encode()


def _decode_name(data: bytes) -> str:
    text = data.decode("ascii")
    _encode_name(text)
    return text


def _encode_peer(text: str) -> bytes:
    return peer_id_bytes(parse_peer_id(text))


def _decode_peer(data: bytes) -> str:
    check_multihash_form(data)
    return base58_encode(data)


_PROTOCOLS = (
    _Protocol("ip4", 4, 4, _encode_ip4, _decode_ip4),
    _Protocol("tcp", 6, 2, _encode_port, _decode_port),
    _Protocol("ip6", 41, 16, _encode_ip6, _decode_ip6),
    _Protocol("dns4", 54, -1, _encode_name, _decode_name),
    _Protocol("dns6", 55, -1, _encode_name, _decode_name),
    _Protocol("dnsaddr", 56, -1, _encode_name, _decode_name),
    _Protocol("p2p", 421, -1, _encode_peer, _decode_peer),
)
_BY_NAME = {protocol.name: protocol for protocol in _PROTOCOLS}
_BY_CODE = {protocol.code: protocol for protocol in _PROTOCOLS}
_HOST_NAMES = ("ip4", "ip6", "dns4", "dns6")


def components(address: str) -> list[tuple[str, str]]:
    """Split an address into (protocol, value) pairs, each value checked.

    Raises:
        BadMessage: Not a multiaddr, or one with a protocol that is not known here.
    """
    if len(address) > ADDRESS_BYTES_MAX:
        raise BadMessage(f"address of {len(address)} characters exceeds {ADDRESS_BYTES_MAX}")
    parts = address.split("/")
    if parts[0] or len(parts) < 3 or len(parts) % 2 == 0:
        raise BadMessage(f"{address!r} is not a multiaddr like /ip4/192.0.2.1/tcp/4001")
    if len(parts) > 2 * COMPONENTS_MAX + 1:
        raise BadMessage(f"address of more than {COMPONENTS_MAX} components")
    pairs = list(zip(parts[1::2], parts[2::2], strict=True))
    for name, value in pairs:
        _encode(name, value)
    return pairs


def to_bytes(address: str) -> bytes:
    """Return an address in the binary form that identify carries.

    Raises:
        BadMessage: As for `components`.
    """
    return b"".join(_encode(name, value) for name, value in components(address))


def from_bytes(data: bytes) -> str:
    """Return the text of a binary address.

    Raises:
        BadMessage: Truncated, too long, malformed, or with a protocol that is not known here.
    """
    if not 0 < len(data) <= ADDRESS_BYTES_MAX:
        raise BadMessage(f"address of {len(data)} bytes, expected 1 to {ADDRESS_BYTES_MAX}")
    text = ""
    offset = count = 0
    while offset < len(data):
        count += 1
        if count > COMPONENTS_MAX:
            raise BadMessage(f"address of more than {COMPONENTS_MAX} components")
        code, offset = _varint(data, offset)
        protocol = _BY_CODE.get(code)
        if protocol is None:
            raise BadMessage(f"multiaddr protocol {code} is not known here")
        size = protocol.size
        if size < 0:
            size, offset = _varint(data, offset)
        if offset + size > len(data):
            raise BadMessage("address is truncated")
        try:
            value = protocol.decode(data[offset : offset + size])
        except (ValueError, RemoteProtocolError) as error:
            raise BadMessage(f"malformed {protocol.name} in an address: {error}") from error
        text += f"/{protocol.name}/{value}"
        offset += size
    return text


def parse_tcp(address: str) -> tuple[str, int]:
    """Return host (IP literal or DNS name) and port of a TCP address; a peer behind it is ignored.

    Raises:
        BadMessage: Not a TCP address.
    """
    pairs = components(address)
    if pairs[-1][0] == "p2p":
        pairs = pairs[:-1]
    if len(pairs) == 2 and pairs[0][0] in _HOST_NAMES and pairs[1][0] == "tcp":
        return pairs[0][1], int(pairs[1][1])
    raise BadMessage(f"{address} is not a TCP address like /ip4/192.0.2.1/tcp/4001")


def format_tcp(host: str, port: int) -> str:
    """Return the address of a TCP endpoint whose host is an IP literal."""
    version = ipaddress.ip_address(host.partition("%")[0])
    return f"/ip{version.version}/{version}/tcp/{port}"


def split_peer(address: str) -> tuple[str, PeerId | None]:
    """Cut "/p2p/<peer>" off an address's end; the peer is None where there was none.

    Raises:
        BadMessage: As for `components`.
    """
    pairs = components(address)
    if len(pairs) > 1 and pairs[-1][0] == "p2p":
        return address[: address.rindex("/p2p/")], parse_peer_id(pairs[-1][1])
    return address, None


def _encode(name: str, value: str) -> bytes:
    protocol = _BY_NAME.get(name)
    if protocol is None:
        raise BadMessage(f"multiaddr protocol {name!r} is not known here")
    try:
        data = protocol.encode(value)
    except (ValueError, RemoteProtocolError) as error:
        raise BadMessage(f"malformed {name} in an address: {error}") from error
    size = encode_varint(len(data)) if protocol.size < 0 else b""
    return encode_varint(protocol.code) + size + data


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    decoded = decode_varint(data, offset)
    if decoded is None:
        raise BadMessage("address is truncated")
    return decoded
