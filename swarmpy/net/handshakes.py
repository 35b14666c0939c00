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

SITE_SHARE = 4
"""How many times as often as one subnet a whole IPv6 /48 may come: one owner, or many."""


class Arrivals:
    """How often each place may begin a handshake: a bucket of places for bursts, refilled evenly.

    An IPv6 address takes from two, its /64's and a larger one of the /48 around it: who holds a
    site has 65,536 of the former. What is refused costs an accept and a close, a tenth of a
    handshake.
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
        """Whether a handshake with `remote` may begin now; if so it is counted.

        A site that came too often adds no subnets to what is remembered.
        """
        left: dict[str, float] = {}
        for place, share in _shares(remote):
            left[place] = self._left(place, share, now_s=now_s)
            if left[place] < 1.0:
                break
        is_allowed = min(left.values()) >= 1.0
        for place, count in left.items():
            self._places[place] = (count - is_allowed, now_s)
            self._places.move_to_end(place)
        while len(self._places) > SUBNETS_MAX:
            self._places.popitem(last=False)
        return is_allowed

    def _left(self, place: str, share: int, *, now_s: float) -> float:
        full = float(share * self._burst_max)
        left, then_s = self._places.get(place, (full, now_s))
        return min(full, left + (now_s - then_s) * share * self._per_second_max)


class Handshakes:
    """The inbound handshakes under way, oldest first."""

    def __init__(
        self,
        *,
        count_max: int = config.HANDSHAKES_MAX,
        per_subnet_max: int = config.HANDSHAKES_PER_SUBNET_MAX,
        per_site_max: int = config.HANDSHAKES_PER_SITE_MAX,
    ) -> None:
        self._count_max = count_max
        self._per_subnet_max = per_subnet_max
        self._per_site_max = per_site_max
        self._scopes: dict[trio.CancelScope, tuple[str, str]] = {}

    @property
    def count(self) -> int:
        return len(self._scopes)

    @contextmanager
    def admit(self, remote: Address) -> Iterator[None]:
        """Run a handshake in this block; it is cancelled if newer ones need its place.

        The oldest of the same subnet goes first, then that of the same site, then the oldest of
        all: a flood from one place pushes out itself.
        """
        subnet, site = subnet_of(remote), site_of(remote)
        same = [scope for scope, (other, _) in self._scopes.items() if other == subnet]
        near = [scope for scope, (_, other) in self._scopes.items() if other == site]
        if len(same) >= self._per_subnet_max:
            self._drop(same[0])
        elif len(near) >= self._per_site_max:
            self._drop(near[0])
        elif len(self._scopes) >= self._count_max:
            self._drop(next(iter(self._scopes)))
        with trio.CancelScope() as scope:
            self._scopes[scope] = (subnet, site)
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
    return _around(address, 64)


def site_of(address: Address) -> str:
    """Return the most that one party may hold of an address: an IPv6 /48; else as `subnet_of`."""
    return _around(address, 48)


def _shares(address: Address) -> list[tuple[str, int]]:
    """Return the places that an address counts for, the widest first, with their shares."""
    subnet, site = subnet_of(address), site_of(address)
    return [(subnet, 1)] if site == subnet else [(site, SITE_SHARE), (subnet, 1)]


def _around(address: Address, prefix_bits: int) -> str:
    try:
        literal = ipaddress.ip_address(parse_tcp(address)[0])
    except (BadMessage, ValueError):
        return address
    if isinstance(literal, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((literal, prefix_bits), strict=False))
    return str(literal)
