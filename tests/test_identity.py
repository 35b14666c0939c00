"""Identities: keys on disk, PeerIds as libp2p writes them, and keys that must not be believed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import BadSignature, ConfigError, RemoteProtocolError
from swarmpy.identity import (
    Identity,
    base58_decode,
    base58_encode,
    parse_peer_id,
    peer_id_of,
    public_key_of,
)
from swarmpy.public_keys import KeyKind, PublicKey, verify


def test_peer_id_is_the_one_libp2p_gives_this_key() -> None:
    """The Ed25519 key of the libp2p peer-ids specification's test vector."""
    public_key = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")

    assert peer_id_of(public_key) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


def test_public_key_can_be_read_back_from_a_peer_id() -> None:
    identity = Identity.generate(random.Random(1))

    assert public_key_of(identity.peer_id) == identity.public_key


def test_no_ed25519_key_can_be_read_out_of_an_id_that_has_none() -> None:
    with pytest.raises(RemoteProtocolError, match="Ed25519"):
        public_key_of("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")


def test_signature_verifies_and_a_changed_message_does_not() -> None:
    identity = Identity.generate(random.Random(1))
    signature = identity.sign(b"message")

    key = PublicKey(KeyKind.ED25519, identity.public_key)
    verify(key, signature, b"message")
    with pytest.raises(BadSignature):
        verify(key, signature, b"massage")


def test_key_file_is_private_and_gives_the_same_identity_again(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "identity.key"

    first = Identity.load_or_create(path, random.Random(1))
    second = Identity.load_or_create(path, random.Random(2))

    assert first.peer_id == second.peer_id
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_key_file_others_can_read_is_refused_with_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    Identity.load_or_create(path, random.Random(1))
    path.chmod(0o644)

    with pytest.raises(ConfigError) as caught:
        Identity.load_or_create(path, random.Random(1))

    assert "chmod 600" in caught.value.fix


def test_damaged_key_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    Identity.load_or_create(path, random.Random(1))
    path.write_bytes(b"short")

    with pytest.raises(ConfigError, match="5 bytes"):
        Identity.load_or_create(path, random.Random(1))


SMALL_ORDER_KEYS = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]
"""The eight points of order 1, 2, 4 and 8 on edwards25519 (RFC 8032's curve), both signs."""


@pytest.mark.parametrize("key", SMALL_ORDER_KEYS)
def test_small_order_key_is_no_identity(key: str) -> None:
    """One signature fits every message under such a key."""
    with pytest.raises(RemoteProtocolError, match="small order"):
        peer_id_of(bytes.fromhex(key))


def test_non_canonical_key_is_no_identity() -> None:
    with pytest.raises(RemoteProtocolError, match="canonical"):
        peer_id_of(b"\xff" * 31 + b"\x7f")


@given(st.binary(max_size=64))
def test_any_bytes_survive_base58(data: bytes) -> None:
    assert base58_decode(base58_encode(data)) == data


@given(st.text(max_size=200))
def test_any_text_is_a_peer_id_or_a_remote_protocol_error(text: str) -> None:
    try:
        peer = parse_peer_id(text)
    except RemoteProtocolError:
        return
    assert parse_peer_id(peer) == peer
