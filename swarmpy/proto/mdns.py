"""What a peer says in multicast DNS: its addresses and PeerId in libp2p's form, nothing more.

One TXT string "dnsaddr=<multiaddr>/p2p/<peer>" an address; the instance name means nothing.
Sans-IO: `swarmpy/discovery/mdns.py` sends and hears it.
Spec: libp2p specs, discovery/mdns; protocols/mdns.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from swarmpy.errors import BadMessage, RemoteProtocolError
from swarmpy.identity import PeerId
from swarmpy.proto import multiaddr
from swarmpy.proto.endpoint import ip_endpoint

SERVICE = "_p2p._udp.local."

INSTANCE_NAME_CHARACTERS = 32
"""The libp2p spec asks for at least 32 random ones; new at every start, so nobody is followed."""

ADDRESSES_MAX = 8
"""Addresses told and believed: a TXT record of eight stays in one packet of 1,500 bytes."""

TXT_BYTES_MAX = 4096
"""Largest TXT record looked at."""

_KEY = b"dnsaddr="
_STRING_BYTES_MAX = 255


def encode_txt(peer: PeerId, addresses: Iterable[str]) -> bytes:
    """Return the TXT record's data for a peer and the first `ADDRESSES_MAX` of its addresses."""
    out = b""
    for address in list(addresses)[:ADDRESSES_MAX]:
        text = _KEY + f"{address}/p2p/{peer}".encode()
        if len(text) <= _STRING_BYTES_MAX:
            out += bytes([len(text)]) + text
    return out


def decode_txt(data: bytes) -> tuple[PeerId, tuple[str, ...]] | None:
    """Return the peer and addresses a TXT record names; None where it names none we could dial.

    Strings with another key, other transports and names are skipped: other programs use the same
    service.

    Raises:
        BadMessage: Truncated, too long, or of two peers at once.
    """
    if len(data) > TXT_BYTES_MAX:
        raise BadMessage(f"TXT record of {len(data)} bytes exceeds {TXT_BYTES_MAX}")
    found: PeerId | None = None
    addresses: list[str] = []
    offset = 0
    while offset < len(data):
        end = offset + 1 + data[offset]
        if end > len(data):
            raise BadMessage("TXT record is truncated")
        parsed = _parse(data[offset + 1 : end])
        offset = end
        if parsed is None:
            continue
        peer, address = parsed
        if found not in (None, peer):
            raise BadMessage(f"TXT record of two peers, {found} and {peer}")
        found = peer
        if address not in addresses and len(addresses) < ADDRESSES_MAX:
            addresses.append(address)
    return None if found is None else (found, tuple(addresses))


def _parse(text: bytes) -> tuple[PeerId, str] | None:
    if not text.startswith(_KEY):
        return None
    try:
        address, peer = multiaddr.split_peer(text.removeprefix(_KEY).decode("ascii"))
        ip_endpoint(address)
    except (RemoteProtocolError, UnicodeDecodeError):
        return None
    return None if peer is None else (peer, address)
