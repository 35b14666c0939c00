"""How often hearsay may make this node dial: nobody can aim it at a victim.

Addresses that were never dialled with success are hearsay; the others are not counted here.
Spec: protocols/announce.md, section 3.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection

from swarmpy.abc import Address, NowSeconds
from swarmpy.identity import PeerId
from swarmpy.proto.endpoint import IpAddress, ip_endpoint, subnet_of

WINDOW_S = 60.0

DIALS_PER_IP_MAX = 1
DIALS_PER_SUBNET_MAX = 10
"""In one minute on a third party's word: one dial to an IP, ten to a /24 (IPv6: /64)."""

DIALS_PER_LAN_MAX = 60
"""In one minute by multicast DNS, which only the own link can send; there the unit is IP and port,
since one machine may run several nodes."""

DIALS_MAX = 200
"""In one minute on hearsay altogether; bounds the memory of this class too."""


class DialLimits:
    """A sliding window over the dials made on hearsay."""

    def __init__(self, own_ips: Callable[[], Collection[IpAddress]]) -> None:
        """Limit dials of a node.

        Args:
            own_ips: IPs of this machine. Behind one of them a port is another node, not another
                door of the same victim, so there the unit is IP and port.
        """
        self._own_ips = own_ips
        self._dials: deque[tuple[NowSeconds, str, str]] = deque()

    def wait_s(self, address: Address, *, is_lan: bool, now_s: NowSeconds) -> float:
        """Return the seconds until the address may be dialled, 0.0 for now.

        Args:
            is_lan: The address was heard by multicast DNS.
        """
        self._prune(now_s)
        unit, subnet = self._keys(address, is_lan=is_lan)
        subnet_max = DIALS_PER_LAN_MAX if is_lan else DIALS_PER_SUBNET_MAX
        same_unit = [time for time, key, _ in self._dials if key == unit]
        same_subnet = [time for time, _, key in self._dials if key == subnet]
        every = [time for time, _, _ in self._dials]
        return max(
            _until(same_unit, DIALS_PER_IP_MAX, now_s),
            _until(same_subnet, subnet_max, now_s),
            _until(every, DIALS_MAX, now_s),
        )

    def count(self, address: Address, *, is_lan: bool, now_s: NowSeconds) -> None:
        """Count a dial."""
        self._dials.append((now_s, *self._keys(address, is_lan=is_lan)))

    def _keys(self, address: Address, *, is_lan: bool) -> tuple[str, str]:
        ip, port = ip_endpoint(address)
        is_own = ip.is_loopback or ip in self._own_ips()
        unit = f"{ip} {port}" if is_own or is_lan else str(ip)
        return unit, f"{subnet_of(ip)} {'lan' if is_lan else ''}"

    def _prune(self, now_s: NowSeconds) -> None:
        while self._dials and now_s - self._dials[0][0] >= WINDOW_S:
            self._dials.popleft()


BUDGETS_MAX = 1024
"""Peers whose spending is remembered; the ones longest without any are forgotten first."""


class Budgets:
    """Something each peer may have `count_max` of at once and `per_s` of in the long run."""

    def __init__(self, *, count_max: float, per_s: float) -> None:
        self._count_max = count_max
        self._per_s = per_s
        self._spent: OrderedDict[PeerId, tuple[float, float]] = OrderedDict()

    def take(self, peer: PeerId, *, now_s: float) -> bool:
        """Whether the peer may have one more; it is counted if so."""
        spent, since_s = self._spent.get(peer, (0.0, now_s))
        spent = max(0.0, spent - (now_s - since_s) * self._per_s)
        is_left = spent <= self._count_max - 1
        self._remember(peer, spent + is_left, now_s)
        return is_left

    def spend(self, peer: PeerId, cost: float, *, now_s: float) -> float:
        """Count what a peer had already; return for how many seconds it is to have no more."""
        spent, since_s = self._spent.get(peer, (0.0, now_s))
        spent = max(0.0, spent - (now_s - since_s) * self._per_s) + cost
        self._remember(peer, spent, now_s)
        return max(0.0, spent - self._count_max) / self._per_s

    def _remember(self, peer: PeerId, spent: float, now_s: float) -> None:
        self._spent[peer] = (spent, now_s)
        self._spent.move_to_end(peer)
        if len(self._spent) > BUDGETS_MAX:
            self._spent.popitem(last=False)


def _until(times: list[NowSeconds], count_max: int, now_s: NowSeconds) -> float:
    """Seconds until fewer than `count_max` of `times` lie in the window."""
    if len(times) < count_max:
        return 0.0
    return times[-count_max] + WINDOW_S - now_s
