"""What a host's addresses are: the listened ones spelled out, and those peers see it at."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, cast

import pytest
import trio
from net_hosts import World, connect

from swarmpy.abc import Address, Connection
from swarmpy.net.addresses import (
    INTERFACES_KEPT_S,
    OBSERVED_ADDRESSES_MAX,
    Interfaces,
    expanded,
    observed,
)

LISTENED = (Address("/ip4/0.0.0.0/tcp/4001"), Address("/ip6/::/tcp/4002"))


@dataclass
class Seen:
    """As much of a connection as counts here."""

    peer: str
    local_address: str = "/ip4/10.0.0.1/tcp/4001"
    path: Literal["direct", "relayed"] = "direct"


def reports(*items: tuple[Seen, str]) -> list[tuple[Connection, str]]:
    return [(cast("Connection", seen), address) for seen, address in items]


def test_a_wildcard_is_each_interface_of_its_version() -> None:
    interfaces = ["192.0.2.1", "2001:db8::1", "127.0.0.1"]
    found = expanded([*LISTENED, Address("/ip4/127.0.0.1/tcp/5")], lambda: interfaces)
    assert found == [
        "/ip4/192.0.2.1/tcp/4001",
        "/ip4/127.0.0.1/tcp/4001",
        "/ip6/2001:db8::1/tcp/4002",
        "/ip4/127.0.0.1/tcp/5",
    ]


def test_nobody_asks_for_interfaces_where_no_address_is_a_wildcard() -> None:
    address = Address("/ip4/127.0.0.1/tcp/5")
    assert expanded([address], lambda: pytest.fail("asked")) == [address]


async def test_the_system_is_asked_for_interfaces_once_a_second(autojump_clock: object) -> None:
    answers = iter([["192.0.2.1"], ["192.0.2.2"]])
    interfaces = Interfaces(lambda: next(answers))
    assert interfaces() == interfaces() == ["192.0.2.1"]
    await trio.sleep(INTERFACES_KEPT_S - 0.1)
    assert interfaces() == ["192.0.2.1"]
    await trio.sleep(0.1)
    assert interfaces() == ["192.0.2.2"]


def test_what_most_peers_see_comes_first_and_each_peer_counts_once() -> None:
    rare, common = "/ip4/198.51.100.1/tcp/9", "/ip4/203.0.113.1/tcp/4001"
    found = observed(
        reports(*[(Seen("loud"), rare)] * 5, (Seen("one"), common), (Seen("two"), common)),
        LISTENED,
    )
    assert found == (common, rare)


@pytest.mark.parametrize(
    ("seen", "address"),
    [
        (Seen("a", local_address="/ip4/10.0.0.1/tcp/50000"), "/ip4/203.0.113.1/tcp/50000"),
        (Seen("a", path="relayed"), "/ip4/203.0.113.1/tcp/4001"),
        (Seen("a"), "/dns4/example.org/tcp/4001"),
        (Seen("a"), "/ip4/203.0.113.1"),
        (Seen("a", local_address="/p2p-circuit"), "/ip4/203.0.113.1/tcp/4001"),
    ],
    ids=["a port nobody can dial", "a relayed path", "a name", "no port", "no local port"],
)
def test_what_tells_nothing_is_left_out(seen: Seen, address: str) -> None:
    assert observed(reports((seen, address)), LISTENED) == ()


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_so_many_observed_addresses_and_no_more(beyond: int) -> None:
    count = OBSERVED_ADDRESSES_MAX + beyond
    found = observed(
        reports(*[(Seen(str(n)), f"/ip4/203.0.113.{n}/tcp/4001") for n in range(count)]), LISTENED
    )
    assert len(found) == min(count, OBSERVED_ADDRESSES_MAX)


async def test_a_host_learns_where_its_peers_see_it(world: World) -> None:
    """Over TCP on Linux also whom it dialled sees it at the port it listens on."""
    alice, bob = await world.host("alice"), await world.host("bob")
    assert alice.observed_addresses == ()
    await connect(alice, bob)
    with trio.fail_after(5):
        assert await bob.wait_observed() == tuple(bob.addresses)
        if world.kind == "tcp" and sys.platform == "linux":
            assert await alice.wait_observed() == tuple(alice.addresses)


async def test_what_a_peer_saw_is_forgotten_with_its_connection(world: World) -> None:
    alice, bob = await world.host("alice"), await world.host("bob")
    await connect(alice, bob)
    with trio.fail_after(5):
        before = await bob.wait_observed()
        alice.close()
        assert await bob.wait_observed(after=before) == ()
