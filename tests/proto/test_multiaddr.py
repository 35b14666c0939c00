"""Multiaddrs: text, bytes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, RemoteProtocolError
from swarmpy.identity import Identity
from swarmpy.proto import multiaddr

PEER = Identity(b"\x01" * 32).peer_id
VECTORS = Path(__file__).parents[2] / "protocols" / "vectors" / "multiaddr.json"

hosts = st.one_of(
    st.ip_addresses(v=4).map(lambda ip: f"/ip4/{ip}"),
    st.ip_addresses(v=6).filter(lambda ip: not ip.scope_id).map(lambda ip: f"/ip6/{ip}"),
    st.from_regex(r"[a-z0-9.-]{1,60}", fullmatch=True).map(lambda name: f"/dns4/{name}"),
)
addresses = st.builds(
    lambda host, port, peer: f"{host}/tcp/{port}{peer}",
    hosts,
    st.integers(0, 65535),
    st.sampled_from(["", f"/p2p/{PEER}"]),
)


@pytest.mark.parametrize(
    "vector", json.loads(VECTORS.read_text())["valid"], ids=lambda item: item["text"]
)
def test_vectors_encode_and_decode(vector: dict[str, str]) -> None:
    assert multiaddr.to_bytes(vector["text"]).hex() == vector["bytes"]
    assert multiaddr.from_bytes(bytes.fromhex(vector["bytes"])) == vector["text"]


@given(addresses)
def test_any_address_survives_its_binary_form(address: str) -> None:
    assert multiaddr.from_bytes(multiaddr.to_bytes(address)) == address


@given(st.binary(max_size=multiaddr.ADDRESS_BYTES_MAX))
def test_any_bytes_decode_or_raise_remote_protocol_error(data: bytes) -> None:
    try:
        text = multiaddr.from_bytes(data)
    except RemoteProtocolError:
        return
    assert multiaddr.from_bytes(multiaddr.to_bytes(text)) == text


@given(st.text(max_size=60))
def test_any_text_parses_or_raises_remote_protocol_error(text: str) -> None:
    try:
        multiaddr.components(text)
    except RemoteProtocolError:
        return
    assert text.startswith("/")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "/ip4",
        "ip4/192.0.2.1/tcp/1",
        "/ip4/192.0.2.1/tcp",
        "/ip4/192.0.2.256/tcp/1",
        "/ip6/fe80::1%eth0/tcp/1",
        "/ip4/192.0.2.1/tcp/65536",
        "/ip4/192.0.2.1/tcp/-1",
        "/ip4/192.0.2.1/tcp/000000065536",
        "/ip4/192.0.2.1/tcp/१",
        "/ip4/192.0.2.1/tcp/1/p2p/QmBadPeer",
        "/ip4/192.0.2.1/carrier-pigeon/1",
        "/dns4/a b/tcp/1",
        "/dns4/user@host/tcp/1",
        "/dns4//tcp/1",
        "/dns4/" + "a" * 254 + "/tcp/1",
        "/ip4/192.0.2.1" * 9,
        "/dns4/" + "a" * 600 + "/tcp/1",
    ],
)
def test_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadMessage):
        multiaddr.components(text)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x04\x7f\x00\x00",  # ip4 cut short
        b"\x80",  # code cut short
        b"\x36\x80",  # length cut short
        b"\x36\x05ab",  # name cut short
        b"\x36\x02a/",  # slash inside a name
        b"\x36\x02\xff\xfe",  # name that is not ASCII
        b"\xa5\x03\x02ab",  # p2p that is no PeerId
        b"\xcd\x03",  # quic-v1, not spoken here
        b"\x06\x00\x01" * 9,
        b"\x06\x00\x01" * 200,
    ],
)
def test_bytes_that_are_no_address_are_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        multiaddr.from_bytes(data)


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        ("/ip4/192.0.2.1/tcp/4001", ("192.0.2.1", 4001)),
        ("/ip6/2001:db8::1/tcp/1", ("2001:db8::1", 1)),
        ("/dns4/example.org/tcp/80", ("example.org", 80)),
        (f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}", ("192.0.2.1", 4001)),
    ],
)
def test_a_tcp_address_gives_host_and_port(address: str, endpoint: tuple[str, int]) -> None:
    assert multiaddr.parse_tcp(address) == endpoint


@pytest.mark.parametrize(
    "address", ["/ip4/192.0.2.1/ip4/192.0.2.1", "/tcp/1/ip4/192.0.2.1", "/dnsaddr/a.org/tcp/1"]
)
def test_an_address_that_is_not_tcp_is_refused_as_one(address: str) -> None:
    with pytest.raises(BadMessage):
        multiaddr.parse_tcp(address)


def test_an_endpoint_gives_its_address() -> None:
    assert multiaddr.format_tcp("192.0.2.1", 1) == "/ip4/192.0.2.1/tcp/1"
    assert multiaddr.format_tcp("fe80::1%eth0", 1) == "/ip6/fe80::1/tcp/1"


def test_a_peer_with_a_long_key_has_an_address_too() -> None:
    """Its id is a hash; ids as CIDs become the one form ids have here."""
    peer = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
    cid = "bafzbeie5745rpv2m6tjyuugywy4d5ewrqgqqhfnf445he3omzpjbx5xqxe"
    address = f"/ip4/192.0.2.1/tcp/1/p2p/{peer}"
    assert multiaddr.from_bytes(multiaddr.to_bytes(address)) == address
    as_cid = f"/ip4/192.0.2.1/tcp/1/p2p/{cid}"
    assert multiaddr.to_bytes(as_cid) == multiaddr.to_bytes(address)
    assert multiaddr.split_peer(as_cid) == ("/ip4/192.0.2.1/tcp/1", peer)


def test_a_peer_is_cut_off_an_addresss_end() -> None:
    assert multiaddr.split_peer(f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}") == (
        "/ip4/192.0.2.1/tcp/1",
        PEER,
    )
    assert multiaddr.split_peer("/ip4/192.0.2.1/tcp/1") == ("/ip4/192.0.2.1/tcp/1", None)
