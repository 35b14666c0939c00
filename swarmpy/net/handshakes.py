"""Half-open connections: how many strangers may be in a handshake, and who makes room for another.

Spec: protocols/noise.md, limits.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from swarmpy import config
from swarmpy.abc import Address
from swarmpy.errors import BadMessage
from swarmpy.proto.multiaddr import parse_tcp

SUBNETS_MAX = 1024
"""Places whose arrivals are remembered; the ones longest without any are forgotten first."""


class Arrivals:
    """How often each place may begin a handshake: a bucket of places for bursts, refilled evenly.

    What is refused costs an accept and a close, a tenth of a handshake.
    """

    def __init__(
        self,
        *,
        per_second_max: float = config.HANDSHAKES_PER_SECOND_MAX,
        burst_max: int = config.HANDSHAKES_BURST_MAX,
    ) -> None:
        self._per_second_max = per_second_max
        self._burst_max = burst_max
        self._places: OrderedDict[str, tuple[float, float]] = OrderedDict()  # left, and when

    def take(self, remote: Address, *, now_s: float) -> bool:
        """Whether a handshake with `remote` may begin now; if so it is counted."""
        subnet = subnet_of(remote)
        left, then_s = self._places.pop(subnet, (float(self._burst_max), now_s))
        left = min(float(self._burst_max), left + (now_s - then_s) * self._per_second_max)
        is_allowed = left >= 1.0
        self._places[subnet] = (left - is_allowed, now_s)
        if len(self._places) > SUBNETS_MAX:
            self._places.popitem(last=False)
        return is_allowed


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
    """Return what one party surely holds of an address: an IPv4 address, an IPv6 /64.

    Of one that is no TCP address (a relayed path's, say) it is the whole address.
    """
    try:
        literal = ipaddress.ip_address(parse_tcp(address)[0])
    except (BadMessage, ValueError):
        return address
    if isinstance(literal, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((literal, 64), strict=False))
    return str(literal)
