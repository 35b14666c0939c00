"""Half-open connections: how many are admitted, and who is dropped."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from swarmpy import config
from swarmpy.abc import Address
from swarmpy.net.handshakes import (
    SITE_SHARE,
    SUBNETS_MAX,
    Arrivals,
    Handshakes,
    site_of,
    subnet_of,
)


async def hold(
    handshakes: Handshakes,
    remote: str,
    dropped: list[str],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Stay in a handshake until dropped."""
    with handshakes.admit(Address(remote)):
        task_status.started()
        await trio.sleep_forever()
    dropped.append(remote)


async def dropped_by(remotes: list[str], *, count_max: int, per_subnet_max: int) -> list[str]:
    """Return who is dropped when these come one after the other."""
    handshakes = Handshakes(count_max=count_max, per_subnet_max=per_subnet_max)
    dropped: list[str] = []
    async with trio.open_nursery() as nursery:
        for remote in remotes:
            await nursery.start(hold, handshakes, remote, dropped)
        await trio.testing.wait_all_tasks_blocked()
        result = list(dropped)
        assert handshakes.count == len(remotes) - len(result)
        nursery.cancel_scope.cancel()
    assert handshakes.count == 0
    return result


def remote(host: int, port: int) -> str:
    return f"/ip4/192.0.2.{host}/tcp/{port}"


@pytest.mark.parametrize(("count", "dropped"), [(2, 0), (3, 0), (4, 1)])
async def test_the_bound_in_total_drops_the_oldest(count: int, dropped: int) -> None:
    remotes = [remote(host, 1) for host in range(1, count + 1)]
    assert await dropped_by(remotes, count_max=3, per_subnet_max=2) == remotes[:dropped]


@pytest.mark.parametrize(("count", "dropped"), [(1, 0), (2, 0), (3, 1)])
async def test_the_bound_of_one_place_drops_its_own_oldest(count: int, dropped: int) -> None:
    flood = [remote(7, port) for port in range(1, count + 1)]
    remotes = [remote(1, 1), *flood]
    assert await dropped_by(remotes, count_max=9, per_subnet_max=2) == flood[:dropped]


def in_site(subnet: int, *, site: int = 1) -> str:
    """Return an address in a /64 of a /48."""
    return f"/ip6/2001:db8:{site:x}:{subnet:x}::1/tcp/1"


@pytest.mark.parametrize(("count", "dropped"), [(63, 0), (64, 0), (65, 1)])
async def test_who_holds_an_ipv6_site_takes_no_more_than_half_of_the_places(
    count: int, dropped: int
) -> None:
    """Method: a handshake from elsewhere, then a flood in which each comes from another /64."""
    assert config.HANDSHAKES_PER_SITE_MAX == config.HANDSHAKES_MAX // 2 == 64
    flood = [in_site(subnet) for subnet in range(count)]
    remotes = [in_site(0, site=2), *flood]
    assert await dropped_by(remotes, count_max=128, per_subnet_max=32) == flood[:dropped]


async def test_a_finished_handshake_frees_its_place() -> None:
    handshakes = Handshakes(count_max=1, per_subnet_max=1)
    for port in range(3):
        with handshakes.admit(Address(remote(1, port))):
            assert handshakes.count == 1
    assert handshakes.count == 0


# How often a place may begin a handshake ----------------------------------------------------


def admitted(arrivals: Arrivals, host: int, count: int, *, now_s: float) -> int:
    """Return how many of `count` strangers from one place are let in."""
    return sum(arrivals.take(Address(remote(host, 1)), now_s=now_s) for _ in range(count))


@pytest.mark.parametrize(("count", "let_in"), [(255, 255), (256, 256), (257, 256)])
def test_a_place_may_come_so_often_at_once(count: int, let_in: int) -> None:
    assert config.HANDSHAKES_BURST_MAX == 256
    assert admitted(Arrivals(), 1, count, now_s=5.0) == let_in


@pytest.mark.parametrize(("after_s", "let_in"), [(0.5, 8), (1.0, 16), (2.0, 32), (100.0, 256)])
def test_a_place_that_came_too_often_may_come_evenly_afterwards(
    after_s: float, let_in: int
) -> None:
    assert config.HANDSHAKES_PER_SECOND_MAX == 16.0
    arrivals = Arrivals()
    admitted(arrivals, 1, 1000, now_s=0.0)
    assert admitted(arrivals, 1, 1000, now_s=after_s) == let_in


def test_a_flood_costs_other_places_nothing() -> None:
    arrivals = Arrivals()
    admitted(arrivals, 1, 1000, now_s=0.0)
    assert admitted(arrivals, 2, 256, now_s=0.0) == 256


def flooded(arrivals: Arrivals, subnets: range, *, site: int = 1, now_s: float = 0.0) -> int:
    """Return how many strangers are let in that come from these /64 of a /48, one from each."""
    return sum(
        arrivals.take(Address(in_site(subnet, site=site)), now_s=now_s) for subnet in subnets
    )


@pytest.mark.parametrize(("count", "let_in"), [(1023, 1023), (1024, 1024), (1025, 1024)])
def test_an_ipv6_site_may_come_four_times_as_often_as_a_subnet(count: int, let_in: int) -> None:
    assert SITE_SHARE * config.HANDSHAKES_BURST_MAX == 1024
    assert flooded(Arrivals(), range(count)) == let_in


def test_an_ipv6_site_that_came_too_often_may_come_evenly_afterwards() -> None:
    arrivals = Arrivals()
    flooded(arrivals, range(2000))
    assert flooded(arrivals, range(2000, 4000), now_s=0.5) == 32


def test_a_site_is_remembered_whatever_subnets_it_comes_from() -> None:
    """No fresh start for who has more /64 than are remembered; other sites lose nothing."""
    arrivals = Arrivals()
    flooded(arrivals, range(512))
    assert flooded(arrivals, range(512, 20_000)) == 512
    assert flooded(arrivals, range(1024), site=2) == 1024


def test_a_site_that_came_too_often_pushes_nobody_out_of_memory() -> None:
    """Method: a place is emptied, four /64 empty their site, and thousands more come from there."""
    arrivals = Arrivals()
    admitted(arrivals, 7, 256, now_s=0.0)
    for subnet in range(4):
        assert sum(arrivals.take(Address(in_site(subnet)), now_s=0.0) for _ in range(256)) == 256
    assert flooded(arrivals, range(4, 4000)) == 0
    assert admitted(arrivals, 7, 256, now_s=0.0) == 0


def test_a_subnet_that_floods_takes_no_more_of_its_site_than_it_is_let_in() -> None:
    arrivals = Arrivals()
    assert sum(arrivals.take(Address(in_site(1)), now_s=0.0) for _ in range(5000)) == 256
    assert flooded(arrivals, range(2, 2000)) == 768


@pytest.mark.parametrize(("others", "let_in"), [(-2, 0), (-1, 0), (0, 256)])
def test_so_many_places_are_remembered(others: int, let_in: int) -> None:
    """The place that flooded is forgotten only when `SUBNETS_MAX` others came after it."""
    arrivals = Arrivals()
    admitted(arrivals, 7, 256, now_s=0.0)
    for index in range(SUBNETS_MAX + others):
        address = Address(f"/ip4/10.0.{index // 256}.{index % 256}/tcp/1")
        assert arrivals.take(address, now_s=0.0)
    assert admitted(arrivals, 7, 256, now_s=0.0) == let_in


def test_an_ipv6_party_holds_its_64_bit_prefix() -> None:
    first = subnet_of(Address("/ip6/2001:db8:1:2:3::4/tcp/1"))
    assert first == subnet_of(Address("/ip6/2001:db8:1:2:ffff::1/tcp/9"))
    assert first != subnet_of(Address("/ip6/2001:db8:1:3::4/tcp/1"))


def test_an_ipv6_party_may_hold_its_48_bit_prefix() -> None:
    first = site_of(Address("/ip6/2001:db8:1:2:3::4/tcp/1"))
    assert first == site_of(Address("/ip6/2001:db8:1:ffff::1/tcp/9"))
    assert first != site_of(Address("/ip6/2001:db8:2:2:3::4/tcp/1"))


@pytest.mark.parametrize("address", ["/ip4/192.0.2.1/tcp/1", "/p2p-circuit"])
def test_no_other_party_holds_more_than_its_subnet(address: str) -> None:
    assert site_of(Address(address)) == subnet_of(Address(address))
