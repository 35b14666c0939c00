"""Dials on hearsay: one a minute to one IP, ten to one subnet."""

from __future__ import annotations

import ipaddress

import pytest

from swarmpy.abc import Address, NowSeconds
from swarmpy.discovery.limits import DIALS_MAX, DialLimits

OWN = ipaddress.ip_address("192.0.2.50")


def limits() -> DialLimits:
    return DialLimits(lambda: {OWN})


def dial(limit: DialLimits, address: str, now_s: float = 0.0, *, is_lan: bool = False) -> float:
    """Dial if it is allowed; return how long it is not."""
    wait_s = limit.wait_s(Address(address), is_lan=is_lan, now_s=NowSeconds(now_s))
    if not wait_s:
        limit.count(Address(address), is_lan=is_lan, now_s=NowSeconds(now_s))
    return wait_s


def test_one_ip_is_dialled_once_a_minute_whatever_the_port() -> None:
    limit = limits()

    assert dial(limit, "/ip4/198.51.100.1/tcp/1") == 0
    assert dial(limit, "/ip4/198.51.100.1/tcp/2", 20) == 40
    assert dial(limit, "/ip4/198.51.100.1/tcp/2", 60) == 0


@pytest.mark.parametrize("prefix", ["/ip4/198.51.100.", "/ip6/2001:db8::"])
def test_one_subnet_is_dialled_ten_times_a_minute(prefix: str) -> None:
    limit = limits()
    waits = [dial(limit, f"{prefix}{number}/tcp/1") for number in range(1, 13)]

    assert waits == [0.0] * 10 + [60.0] * 2


@pytest.mark.parametrize("ip", ["127.0.0.1", str(OWN)])
def test_on_this_machine_ports_are_different_nodes(ip: str) -> None:
    limit = limits()
    waits = [dial(limit, f"/ip4/{ip}/tcp/{port}") for port in range(1, 13)]

    assert waits == [0.0] * 10 + [60.0] * 2
    assert dial(limit, f"/ip4/{ip}/tcp/1", 59) == 1


def test_heard_on_the_own_link_ports_are_different_nodes_and_more_of_them() -> None:
    limit = limits()
    waits = [dial(limit, f"/ip4/192.168.0.9/tcp/{port}", is_lan=True) for port in range(1, 62)]

    assert waits == [0.0] * 60 + [60.0]


def test_all_hearsay_together_has_a_bound() -> None:
    limit = limits()
    waits = [
        dial(limit, f"/ip4/10.{number // 250}.{number % 250}.1/tcp/1")
        for number in range(DIALS_MAX + 1)
    ]

    assert waits[-2:] == [0.0, 60.0]
