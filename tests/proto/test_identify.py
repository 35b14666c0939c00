"""Identify: what is said survives, and nothing is believed of somebody else."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadMessage, BadSignature, RemoteProtocolError
from swarmpy.identity import Identity, peer_id_bytes, peer_id_of_key
from swarmpy.proto import identify, multiaddr, protobuf, wire
from swarmpy.proto.identify import IdentifyInfo
from swarmpy.public_keys import KeyKind, PublicKey

ALICE = Identity(b"\x01" * 32)
MALLORY = Identity(b"\x02" * 32)
ADDRESSES = ("/ip4/192.0.2.1/tcp/4001", "/ip6/2001:db8::1/tcp/4001")
INFO = IdentifyInfo(
    agent="swarmpy/0.1.0",
    protocols=("/a/1", "/b/2"),
    addresses=ADDRESSES,
    observed_address="/ip4/198.51.100.7/tcp/50000",
)


def test_a_message_survives_encoding() -> None:
    data = identify.encode(INFO, public_key=ALICE.public_key)
    assert identify.decode(data, peer=ALICE.peer_id) == INFO


def test_a_message_in_parts_is_the_parts_joined() -> None:
    """go-libp2p splits large answers; protobuf messages joined are merged."""
    whole = identify.encode(INFO, public_key=ALICE.public_key)
    more = protobuf.encode([(3, b"/c/3")])
    assert identify.decode(whole + more, peer=ALICE.peer_id).protocols == ("/a/1", "/b/2", "/c/3")


def test_addresses_come_from_the_signed_record_where_there_is_one() -> None:
    record = identify.seal_peer_record(ALICE, ADDRESSES[:1], seq=7)
    data = identify.encode(INFO, public_key=ALICE.public_key, signed_record=record)
    info = identify.decode(data, peer=ALICE.peer_id)
    assert info.addresses == ADDRESSES[:1]
    assert info.record_seq == 7


def test_another_peers_record_is_refused() -> None:
    record = identify.seal_peer_record(MALLORY, ADDRESSES, seq=7)
    with pytest.raises(BadSignature, match="signed by"):
        identify.open_peer_record(record, peer=ALICE.peer_id)


def test_a_peer_with_another_kind_of_key_may_sign_its_record() -> None:
    """Its key is too long for its id, so it stands in the message; the record has it too."""
    secret = ec.generate_private_key(ec.SECP256R1())
    der = secret.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    key = PublicKey(KeyKind.ECDSA, der)
    peer = peer_id_of_key(key)
    address = protobuf.encode([(1, multiaddr.to_bytes(ADDRESSES[0]))])
    payload = protobuf.encode([(1, peer_id_bytes(peer)), (2, 7), (3, address)])
    domain = b"libp2p-peer-record"
    signed = b"".join(wire.frame(part) for part in (domain, b"\x03\x01", payload))
    signature = secret.sign(signed, ec.ECDSA(SHA256()))
    record = protobuf.encode([(1, key.encoded), (2, b"\x03\x01"), (3, payload), (5, signature)])
    message = protobuf.encode([(1, key.encoded), (8, record)])

    info = identify.decode(message, peer=peer)

    assert (info.addresses, info.record_seq) == (ADDRESSES[:1], 7)
    with pytest.raises(BadMessage, match="another peer"):
        identify.decode(message, peer=ALICE.peer_id)


def test_a_changed_record_is_refused() -> None:
    record = bytearray(identify.seal_peer_record(ALICE, ADDRESSES, seq=7))
    record[-1] ^= 1
    with pytest.raises(BadSignature):
        identify.open_peer_record(bytes(record), peer=ALICE.peer_id)


def test_another_peers_key_is_refused() -> None:
    data = identify.encode(INFO, public_key=MALLORY.public_key)
    with pytest.raises(BadMessage, match="another peer"):
        identify.decode(data, peer=ALICE.peer_id)


def test_a_message_without_an_observed_address_survives_too() -> None:
    info = IdentifyInfo(agent="swarmpy/0.1.0")
    data = identify.encode(info, public_key=ALICE.public_key)
    assert identify.decode(data, peer=ALICE.peer_id) == info


def test_what_a_terminal_would_obey_is_left_out() -> None:
    data = protobuf.encode([(6, b"evil\x1b[2J\n" + b"x" * 300), (3, b"/a/1\x07")])
    info = identify.decode(data, peer=ALICE.peer_id)
    assert info.agent.startswith("evil[2Jx")
    assert len(info.agent) < identify.TEXT_MAX
    assert info.protocols == ("/a/1",)


def test_a_message_without_fields_says_nothing() -> None:
    info = identify.decode(b"", peer=ALICE.peer_id)
    assert info == IdentifyInfo(agent="", version="")


def test_addresses_in_unknown_protocols_are_left_out() -> None:
    quic = b"\x04\xc0\x00\x02\x01\x91\x02\x0f\xa1\xcd\x03"
    data = protobuf.encode([(2, quic), (2, multiaddr.to_bytes(ADDRESSES[0])), (4, quic)])
    info = identify.decode(data, peer=ALICE.peer_id)
    assert info.addresses == ADDRESSES[:1]
    assert info.observed_address == ""


@pytest.mark.parametrize("count", [identify.PROTOCOLS_MAX - 1, identify.PROTOCOLS_MAX])
def test_protocols_up_to_the_bound_are_taken(count: int) -> None:
    data = protobuf.encode([(3, b"/p")] * count)
    assert len(identify.decode(data, peer=ALICE.peer_id).protocols) == count


@pytest.mark.parametrize(
    "fields",
    [
        [(3, b"/p")] * (identify.PROTOCOLS_MAX + 1),
        [(2, multiaddr.to_bytes(ADDRESSES[0]))] * (identify.ADDRESSES_MAX + 1),
        [(6, b"a" * identify.MESSAGE_BYTES_MAX)],
    ],
)
def test_a_message_beyond_a_bound_is_refused(fields: list[tuple[int, bytes | int]]) -> None:
    with pytest.raises(BadMessage):
        identify.decode(protobuf.encode(fields), peer=ALICE.peer_id)


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_raise_remote_protocol_error(data: bytes) -> None:
    try:
        identify.decode(data, peer=ALICE.peer_id)
    except RemoteProtocolError:
        return
