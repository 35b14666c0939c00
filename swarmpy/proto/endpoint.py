"""IP endpoints: which addresses of a signed record may be dialled, and to which subnet they belong.

Sans-IO. Names are refused: resolving one on a stranger's word would let it aim our dials anywhere.
Spec: protocols/announce.md, section 3.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable

from swarmpy.errors import BadMessage
from swarmpy.proto import multiaddr

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_ADDRESSES_CACHED = 4096
"""Addresses whose parts are remembered: each is looked at whenever somebody might be dialled."""

SUBNET_BITS = {4: 24, 6: 64}
"""What one household or rack usually has, by IP version."""


@functools.lru_cache(maxsize=_ADDRESSES_CACHED)
def ip_endpoint(address: str) -> tuple[IpAddress, int]:
    """Return IP and port of an address that is an IP literal and a TCP port, and nothing else.

    Raises:
        BadMessage: A name, another transport, port 0, or an IP that no single peer listens on.
    """
    pairs = multiaddr.components(address)
    if len(pairs) != 2 or pairs[0][0] not in ("ip4", "ip6") or pairs[1][0] != "tcp":
        raise BadMessage(f"{address} is not an IP literal and a TCP port")
    ip = ipaddress.ip_address(pairs[0][1])
    port = int(pairs[1][1])
    if port == 0 or ip.is_unspecified or ip.is_multicast:
        raise BadMessage(f"{address} cannot be dialled")
    if ip.version == 6 and ip.ipv4_mapped is not None:
        raise BadMessage(f"{address} hides an IPv4 address")
    return ip, port


@functools.lru_cache(maxsize=_ADDRESSES_CACHED)
def subnet_of(ip: IpAddress) -> str:
    """Return the IPv4 /24 or IPv6 /64 around an IP."""
    return str(ipaddress.ip_network((ip, SUBNET_BITS[ip.version]), strict=False))


def advertised(addresses: Iterable[str], *, count_max: int) -> list[str]:
    """Return the addresses worth telling others, in the given order and without repetition.

    Loopback only where there is nothing else: elsewhere it is another machine's own. Link-local
    IPv6 needs a zone that only this machine knows. Names and other transports are left out.
    """
    told: list[str] = []
    loopback: list[str] = []
    for address in addresses:
        try:
            ip, _ = ip_endpoint(address)
        except BadMessage:
            continue
        if ip.version == 6 and ip.is_link_local:
            continue
        kept = loopback if ip.is_loopback else told
        if address not in kept:
            kept.append(address)
    return (told or loopback)[:count_max]
