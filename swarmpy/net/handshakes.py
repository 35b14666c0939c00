"""Half-open connections: how many strangers may be in a handshake, and who makes room for another.

Spec: protocols/noise.md, limits.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from swarmpy import config
from swarmpy.abc import Address
from swarmpy.proto.multiaddr import parse_tcp


class Handshakes:
    """The inbound handshakes under way, oldest first."""

    def __init__(
        self,
        *,
        count_max: int = config.HANDSHAKES_MAX,
        per_subnet_max: int = config.HANDSHAKES_PER_SUBNET_MAX,
    ) -> None:
        self._count_max = count_max
        self._per_subnet_max = per_subnet_max
        self._scopes: dict[trio.CancelScope, str] = {}

    @property
    def count(self) -> int:
        return len(self._scopes)

    @contextmanager
    def admit(self, remote: Address) -> Iterator[None]:
        """Run a handshake in this block; it is cancelled if newer ones need its place.

        The oldest of the same subnet goes first, then the oldest of all: a flood from one place
        pushes out itself.
        """
        subnet = subnet_of(remote)
        same = [scope for scope, other in self._scopes.items() if other == subnet]
        if len(same) >= self._per_subnet_max:
            self._drop(same[0])
        elif len(self._scopes) >= self._count_max:
            self._drop(next(iter(self._scopes)))
        with trio.CancelScope() as scope:
            self._scopes[scope] = subnet
            try:
                yield
            finally:
                self._scopes.pop(scope, None)

    def _drop(self, scope: trio.CancelScope) -> None:
        del self._scopes[scope]
        scope.cancel()


def subnet_of(address: Address) -> str:
    """Return what one party surely holds of an address: an IPv4 address, an IPv6 /64."""
    literal = ipaddress.ip_address(parse_tcp(address)[0])
    if isinstance(literal, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((literal, 64), strict=False))
    return str(literal)
