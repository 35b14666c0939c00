"""The peers a node met or was told of by somebody else than their own announcements.

Where each can be reached is proven or hearsay; hearsay is counted before it is dialled, and private
addresses are dialled only on a network where this node itself is or meets members.
Spec: protocols/announce.md, section 3 and States.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import trio

from swarmpy.abc import Address, Connection, Host, NowSeconds
from swarmpy.config import RECORDS_MAX
from swarmpy.discovery.cache import PeerCache
from swarmpy.discovery.limits import DialLimits
from swarmpy.environment import Environment
from swarmpy.errors import BadMessage
from swarmpy.identity import PeerId
from swarmpy.proto.endpoint import IpAddress, ip_endpoint

STRANGERS_MAX = 256
"""Visible strangers listed; on a link with more, the rest is not looked at."""

UNSEEN_TTL_S = 600.0
"""A peer that nobody spoke of for so long is not listed any more, unless it is a member whose
announcement is still good or that is in the cache."""

ADDRESSES_PER_PEER_MAX = 16

PROVEN_MAX = 4

REDIAL_PAUSE_S_MAX = 60.0
"""Longest pause between two dials of a lost member."""

PRIVATE_REALMS = tuple(
    ipaddress.ip_network(block)
    for block in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "::1/128",
        "fc00::/7",
        "fe80::/10",
    )
)
"""Addresses that mean another machine on another network. Whole blocks: offices route between the
subnets of one, and at home there is one."""


@dataclass(slots=True, kw_only=True)
class Peer:
    """One peer, and when it may be dialled."""

    peer: PeerId
    source: str
    name: str = ""
    proven: list[Address] = field(default_factory=list)
    """Where this node reached it; never counted against the dial limits."""
    claimed: dict[Address, bool] = field(default_factory=dict)
    """Hearsay, and whether it was heard on the own link."""
    is_known_member: bool = False
    refused_until_s: float = -math.inf
    """Until then there is no reason to dial it again: it showed no network in common (for ever, or
    until it is sighted elsewhere), or its clock is wrong (for a while)."""
    is_dialling: bool = False
    is_lost: bool = False
    """Whether it was connected, or could not be reached, the last time."""
    dialled_s: float = -math.inf
    next_dial_s: float = -math.inf
    pause_s: float = 0.0
    """Before the dial after the next failure."""
    seen_wall_s: float = 0.0
    seen_s: float = 0.0

    @property
    def addresses(self) -> list[Address]:
        return [*self.proven, *(item for item in self.claimed if item not in self.proven)]

    def is_due(self, now_s: float) -> bool:
        """Whether it may be dialled now."""
        is_free = not self.is_dialling and now_s >= self.refused_until_s
        return is_free and now_s >= self.next_dial_s and bool(self.proven or self.claimed)

    def start_over(self, now_s: float) -> None:
        """Dial it again without waiting for the pause to end."""
        self.pause_s = 0.0
        self.next_dial_s = now_s


class PeerBook:
    """Peers by id: bounded, so that strangers cannot fill it, and backed by the cache."""

    def __init__(
        self,
        *,
        host: Host,
        environment: Environment,
        cache: PeerCache | None,
        is_in_view: Callable[[PeerId], bool],
        is_member: Callable[[PeerId], bool],
    ) -> None:
        """Make an empty book.

        Args:
            is_in_view: Whether a peer's announcement is stored.
        """
        self._host = host
        self._environment = environment
        self._cache = cache
        self._is_in_view = is_in_view
        self._is_member = is_member
        self._peers: dict[PeerId, Peer] = {}
        self._limits = DialLimits(self._own_ips)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def get(self, peer: PeerId) -> Peer | None:
        """Return a peer's entry."""
        return self._peers.get(peer)

    def entry(self, peer: PeerId, source: str, *, is_member: bool = False) -> Peer | None:
        """Return a peer's entry, a new one if there is room: strangers cannot fill the book."""
        entry = self._peers.get(peer)
        if entry is not None:
            return entry
        if not self._has_room(is_member=is_member):
            self.drop_old()
            if not self._has_room(is_member=is_member):
                return None
        entry = Peer(peer=peer, source=source, is_known_member=is_member)
        entry.seen_s = trio.current_time()
        self._peers[peer] = entry
        return entry

    def _has_room(self, *, is_member: bool) -> bool:
        alike = sum(item.is_known_member is is_member for item in self._peers.values())
        return alike < (RECORDS_MAX if is_member else STRANGERS_MAX)

    def drop_old(self) -> None:
        """Forget peers that are not connected and that nobody spoke of for long."""
        oldest_s = trio.current_time() - UNSEEN_TTL_S
        for peer, entry in list(self._peers.items()):
            if entry.seen_s > oldest_s or self._host.connection_to(peer) is not None:
                continue
            is_cached = self._cache is not None and self._cache.get(peer) is not None
            if not entry.is_known_member or not (is_cached or self._is_in_view(peer)):
                del self._peers[peer]

    # Addresses ------------------------------------------------------------------------

    def claim(self, entry: Peer, addresses: Sequence[Address], *, is_lan: bool) -> bool:
        """Add hearsay addresses; return whether one was new."""
        own = set(self._host.addresses)
        is_new = False
        for address in addresses[:ADDRESSES_PER_PEER_MAX]:
            try:
                ip, _ = ip_endpoint(address)
            except BadMessage:
                continue
            if address in own:
                continue
            is_new = is_new or address not in entry.addresses
            # A forged record on the own link may name a victim far away: that is hearsay.
            entry.claimed[address] = entry.claimed.get(address, False) or (is_lan and ip.is_private)
        while len(entry.claimed) > ADDRESSES_PER_PEER_MAX:
            del entry.claimed[next(iter(entry.claimed))]
        return is_new

    def reached(self, entry: Peer, connection: Connection) -> None:
        """Note where a peer was reached, the last such address first."""
        address = connection.remote_address
        others = [item for item in entry.proven if item != address]
        entry.proven = [address, *others][:PROVEN_MAX]

    def dialable(self, entry: Peer) -> tuple[list[Address], float]:
        """Return the addresses that may be dialled now, or in how many seconds to look again.

        Those returned are counted as dialled.
        """
        now_s = NowSeconds(trio.current_time())
        allowed = list(entry.proven)
        waits = [REDIAL_PAUSE_S_MAX]
        for address in entry.addresses[len(entry.proven) :]:
            is_lan = entry.claimed[address]
            if not is_lan and not self._is_near(address):
                continue
            wait_s = self._limits.wait_s(address, is_lan=is_lan, now_s=now_s)
            if wait_s:
                waits.append(wait_s)
            else:
                self._limits.count(address, is_lan=is_lan, now_s=now_s)
                allowed.append(address)
        return allowed, min(waits)

    def _is_near(self, address: Address) -> bool:
        """Whether an address is public, or of a private network where this node is itself, or meets
        members."""
        ip, _ = ip_endpoint(address)
        for realm in PRIVATE_REALMS:
            if ip.version == realm.version and ip in realm:
                return any(known.version == ip.version and known in realm for known in self._met())
        return True

    def _met(self) -> Iterator[IpAddress]:
        yield from self._own_ips()
        for connection in self._host.connections:
            if self._is_member(connection.peer):
                try:
                    yield ip_endpoint(connection.remote_address)[0]
                except BadMessage:
                    continue

    def _own_ips(self) -> Collection[IpAddress]:
        ips = set()
        for address in self._host.addresses:
            try:
                ips.add(ip_endpoint(address)[0])
            except BadMessage:
                continue
        return ips

    # The cache ------------------------------------------------------------------------

    def recall(self, entry: Peer) -> None:
        """Take from the cache what it holds of a peer."""
        cached = self._cache.get(entry.peer) if self._cache is not None else None
        if cached is not None:
            entry.name = entry.name or cached.name
            entry.proven += [item for item in cached.proven if item not in entry.proven]
            entry.is_known_member = True
            entry.seen_wall_s = cached.seen_wall_s

    def remember(self, entry: Peer) -> None:
        """Put a member into the cache."""
        if self._cache is not None and entry.addresses:
            self._cache.put(
                entry.peer,
                name=entry.name,
                proven=entry.proven,
                claimed=[item for item in entry.claimed if item not in entry.proven],
                wall_s=self._environment.wall_time(),
            )

    def flush(self) -> None:
        """Write the cache's changes to the disk."""
        if self._cache is not None:
            self._cache.flush()

    def disown(self, entry: Peer) -> None:
        """A peer is no member after all."""
        entry.is_known_member = False
        if self._cache is not None:
            self._cache.forget(entry.peer)
