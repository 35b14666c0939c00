"""Which addresses may be dialled on somebody's word, and which are worth telling."""

from __future__ import annotations

import ipaddress

import pytest

from swarmpy.errors import BadMessage
from swarmpy.proto.endpoint import advertised, ip_endpoint, subnet_of


def test_an_ip_literal_and_a_port_are_an_endpoint() -> None:
    assert ip_endpoint("/ip4/192.0.2.1/tcp/80") == (ipaddress.ip_address("192.0.2.1"), 80)
    assert ip_endpoint("/ip6/2001:db8::1/tcp/80") == (ipaddress.ip_address("2001:db8::1"), 80)


@pytest.mark.parametrize(
    "address",
    [
        "/dns4/example.org/tcp/80",
        "/ip4/192.0.2.1",
        "/ip4/192.0.2.1/tcp/0",
        "/ip4/0.0.0.0/tcp/80",
        "/ip4/239.1.1.1/tcp/80",
        "/ip6/::/tcp/80",
        "/ip6/::ffff:c000:201/tcp/80",
        "192.0.2.1:80",
    ],
)
def test_everything_else_is_none(address: str) -> None:
    with pytest.raises(BadMessage):
        ip_endpoint(address)


def test_subnets_are_a_24_or_a_64() -> None:
    assert subnet_of(ipaddress.ip_address("192.0.2.9")) == "192.0.2.0/24"
    assert subnet_of(ipaddress.ip_address("2001:db8::9")) == "2001:db8::/64"


def test_loopback_is_told_only_where_there_is_nothing_else() -> None:
    loopback, lan = "/ip4/127.0.0.1/tcp/1", "/ip4/192.168.0.2/tcp/1"

    assert advertised([loopback, lan, lan], count_max=8) == [lan]
    assert advertised([loopback], count_max=8) == [loopback]


def test_link_local_names_and_the_surplus_are_not_told() -> None:
    told = advertised(
        ["/ip6/fe80::1/tcp/1", "/dns4/a.b/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1"],
        count_max=1,
    )

    assert told == ["/ip4/10.0.0.1/tcp/1"]
