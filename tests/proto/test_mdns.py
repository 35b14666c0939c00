"""The TXT record of multicast DNS, in libp2p's form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, RemoteProtocolError
from swarmpy.identity import Identity
from swarmpy.proto.mdns import ADDRESSES_MAX, TXT_BYTES_MAX, decode_txt, encode_txt

PEER = Identity(b"a" * 32).peer_id
OTHER = Identity(b"b" * 32).peer_id
ADDRESS = "/ip4/192.168.1.20/tcp/4001"


def string(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def test_a_record_is_one_dnsaddr_string_an_address() -> None:
    assert encode_txt(PEER, [ADDRESS]) == string(f"dnsaddr={ADDRESS}/p2p/{PEER}")


def test_a_record_reads_back() -> None:
    addresses = (ADDRESS, "/ip6/fd00::1/tcp/4001")

    assert decode_txt(encode_txt(PEER, addresses)) == (PEER, addresses)


def test_a_record_names_at_most_eight_addresses() -> None:
    many = [f"/ip4/10.0.0.{number}/tcp/1" for number in range(1, 12)]

    data = encode_txt(PEER, many)
    assert decode_txt(data) == (PEER, tuple(many[:ADDRESSES_MAX]))
    more = b"".join(string(f"dnsaddr={address}/p2p/{PEER}") for address in many)
    assert decode_txt(more) == (PEER, tuple(many[:ADDRESSES_MAX]))


@pytest.mark.parametrize(
    "text",
    [
        "other=value",
        "dnsaddr=",
        f"dnsaddr={ADDRESS}",
        f"dnsaddr=/dns4/example.org/tcp/1/p2p/{PEER}",
        f"dnsaddr=/ip4/1.2.3.4/udp/1/quic-v1/p2p/{PEER}",
        "dnsaddr=/ip4/1.2.3.4/tcp/1/p2p/nobody",
        f"dnsaddr=/ip4/1.2.3.4/tcp/000000065536/p2p/{PEER}",
    ],
)
def test_strings_that_name_nobody_we_could_dial_are_skipped(text: str) -> None:
    assert decode_txt(string(text)) is None
    assert decode_txt(string(text) + encode_txt(PEER, [ADDRESS])) == (PEER, (ADDRESS,))


def test_a_record_of_two_peers_is_refused() -> None:
    with pytest.raises(BadMessage, match="two peers"):
        decode_txt(encode_txt(PEER, [ADDRESS]) + encode_txt(OTHER, [ADDRESS]))


def test_a_truncated_record_is_refused() -> None:
    with pytest.raises(BadMessage, match="truncated"):
        decode_txt(encode_txt(PEER, [ADDRESS])[:-1])


def test_an_oversized_record_is_refused() -> None:
    with pytest.raises(BadMessage, match="exceeds"):
        decode_txt(bytes(TXT_BYTES_MAX + 1))


def test_an_address_too_long_for_a_string_is_left_out() -> None:
    assert encode_txt(PEER, ["/dns4/" + "a" * 250 + "/tcp/1"]) == b""


@given(st.binary(max_size=600))
def test_any_bytes_are_a_record_or_a_breach(data: bytes) -> None:
    try:
        decode_txt(data)
    except RemoteProtocolError:
        pass
