"""What a host's addresses are: those it listens on, spelled out, and those its peers see it at.

Spec: protocols/identify.md.
"""

from __future__ import annotations

import ipaddress
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import trio

from swarmpy.abc import Address, Connection
from swarmpy.errors import BadMessage
from swarmpy.identity import PeerId
from swarmpy.proto import multiaddr

OBSERVED_ADDRESSES_MAX = 8
"""Addresses under which peers see this node, the most often seen first; a node behind one router
has one, and whoever says others only lengthens the list."""

INTERFACES_KEPT_S = 1.0
"""How old the list of interfaces may be: every peer that comes wants the addresses told, and to ask
the system for them takes as long as a handshake, 0.7 ms."""

_ANY = {"0.0.0.0": "ip4", "::": "ip6"}


class Interfaces:
    """The machine's IP addresses, asked for again after `INTERFACES_KEPT_S`."""

    def __init__(self, ask: Callable[[], Sequence[str]]) -> None:
        self._ask = ask
        self._found: Sequence[str] = ()
        self._asked_s = -math.inf

    def __call__(self) -> Sequence[str]:
        now_s = trio.current_time()
        if now_s - self._asked_s >= INTERFACES_KEPT_S:
            self._found, self._asked_s = self._ask(), now_s
        return self._found


def expanded(listened: Iterable[Address], interfaces: Callable[[], Sequence[str]]) -> list[Address]:
    """Return listened addresses as others can dial them: 0.0.0.0 is each of the interfaces.

    Args:
        interfaces: Gives the machine's IP literals; asked only where an address is a wildcard.
    """
    found: list[Address] = []
    for listened_address in listened:
        host, port = multiaddr.parse_tcp(listened_address)
        version = _ANY.get(host)
        if version is None:
            found.append(listened_address)
            continue
        for literal in interfaces():
            address = Address(multiaddr.format_tcp(literal, port))
            if address.startswith(f"/{version}/"):
                found.append(address)
    return found


def observed(
    reports: Iterable[tuple[Connection, str]], listened: Iterable[Address]
) -> tuple[Address, ...]:
    """Return the addresses that peers say they see this node at, each peer counted once for each.

    Only a connection whose end here is a port we listen on tells anything: any other port is one
    that nobody can dial. At most `OBSERVED_ADDRESSES_MAX`.

    Args:
        reports: Open connections, and what the peer at the other end said.
        listened: Addresses listened on.
    """
    ports = {multiaddr.parse_tcp(address)[1] for address in listened}
    peers: defaultdict[Address, set[PeerId]] = defaultdict(set)
    for connection, address in reports:
        is_telling = connection.path == "direct" and _port_of(connection.local_address) in ports
        if is_telling and _port_of(address) is not None:
            peers[Address(address)].add(connection.peer)
    ordered = sorted(peers, key=lambda address: (-len(peers[address]), address))
    return tuple(ordered[:OBSERVED_ADDRESSES_MAX])


def _port_of(address: str) -> int | None:
    """Return the port of a TCP address with an IP literal, None for any other."""
    try:
        host, port = multiaddr.parse_tcp(address)
        ipaddress.ip_address(host)
    except (BadMessage, ValueError):
        return None
    return port
