"""Summaries of a table of records: two nodes find what differs in a few hundred bytes.

A record is known by a key of 8 bytes and a version. The table's root is a sum of one hash for each
entry, so that a change costs two hashes however many entries there are; sums of the entries whose
keys begin with one and with two hexadecimal digits lead down to where two tables differ.
Sans-IO. Spec: protocols/announce.md (revision 2), States.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterable, Iterator

from swarmpy.errors import BadMessage
from swarmpy.identity import PeerId
from swarmpy.proto.membership import NetworkId

KEY_BYTES = 8
"""Nobody can find a second peer of the same key with fewer than 2^64 tries; an accident among 2,000
has a chance of 10^-13."""

ENTRY_BYTES = 16
ROOT_BYTES = 32

PREFIX_MAX = 2
"""Digits of the longest prefix: 256 buckets hold 8 entries each of a full table."""

KEYS_CACHED = 4096

REVOKED_VERSION = 2**62
"""Above every other version: no announcement takes a revocation's place."""

_BUCKETS = 16**PREFIX_MAX
_MASK = (1 << 8 * ROOT_BYTES) - 1
_SHORT_MASK = (1 << 8 * KEY_BYTES) - 1
_ENTRY = struct.Struct(">8sQ")
_DIGITS = "0123456789abcdef"

Entry = tuple[bytes, int]
"""A key and a version."""


@functools.lru_cache(maxsize=KEYS_CACHED)
def record_key(network_id: NetworkId, peer: PeerId) -> bytes:
    """Return the key of what is known of a member of a network (8 bytes)."""
    return hashlib.sha256(f"{network_id} {peer}".encode()).digest()[:KEY_BYTES]


def revocation_key(network_id: NetworkId, peer: PeerId, signer: PeerId) -> bytes:
    """Return the key of a member's revocation of another (8 bytes).

    One of its own: what a member says of another must not take the other's place in the table.
    """
    return hashlib.sha256(f"{network_id} {peer} {signer}".encode()).digest()[:KEY_BYTES]


def alive_version(seq: int) -> int:
    """Return the version of an announcement."""
    return seq << 1


def gone_version(seq: int) -> int:
    """Return the version of the news that a member's announcement `seq` was its last."""
    return seq << 1 | 1


def is_gone(version: int) -> bool:
    """Whether a version is of the news that a member is gone."""
    return bool(version & 1)


def pack_entries(entries: Iterable[Entry]) -> bytes:
    """Return entries as they travel, 16 bytes each."""
    return b"".join(_ENTRY.pack(key, version) for key, version in entries)


def unpack_entries(data: bytes) -> Iterator[Entry]:
    """Iterate over entries as they travel.

    Raises:
        BadMessage: Not a whole number of entries.
    """
    if len(data) % ENTRY_BYTES:
        raise BadMessage(f"entries of {len(data)} bytes, expected a multiple of {ENTRY_BYTES}")
    return _ENTRY.iter_unpack(data)


def unpack_keys(data: bytes) -> list[bytes]:
    """Return keys as they travel.

    Raises:
        BadMessage: Not a whole number of keys.
    """
    if len(data) % KEY_BYTES:
        raise BadMessage(f"keys of {len(data)} bytes, expected a multiple of {KEY_BYTES}")
    return [data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)]


def check_prefix(prefix: str) -> None:
    """Refuse a prefix that no key begins with.

    Raises:
        BadMessage: It holds something else than lower-case hexadecimal digits.
    """
    if prefix.strip(_DIGITS):
        raise BadMessage(f"{prefix!r} is no prefix of a record key")


def first_bytes(prefix: str) -> range:
    """Return the first bytes of the keys under a prefix, one bucket each."""
    width = _BUCKETS >> 4 * len(prefix)
    first = int(prefix or "0", 16) * width
    return range(first, first + width)


class Summary:
    """The sums over one network's entries."""

    def __init__(self) -> None:
        self._sums = [0] * _BUCKETS
        self._children: dict[str, bytes] = {}
        """What was asked for since it changed last."""

    def add(self, key: bytes, version: int) -> None:
        """Count an entry."""
        self._count(key[0], _hash(key, version))

    def remove(self, key: bytes, version: int) -> None:
        """Take an entry back that was counted."""
        self._count(key[0], -_hash(key, version))

    def _count(self, bucket: int, value: int) -> None:
        self._sums[bucket] = (self._sums[bucket] + value) & _MASK
        self._children.pop("", None)
        self._children.pop(_DIGITS[bucket >> 4], None)

    @property
    def root(self) -> bytes:
        """What two equal tables have in common (32 bytes)."""
        return (sum(self._sums) & _MASK).to_bytes(ROOT_BYTES, "big")

    def children(self, prefix: str) -> bytes:
        """Return the short hashes of a prefix's 16 children, in order (128 bytes).

        Args:
            prefix: No digit or one.
        """
        assert len(prefix) < PREFIX_MAX
        children = self._children.get(prefix)
        if children is None:
            under = first_bytes(prefix)
            width = len(under) // 16
            sums = [sum(self._sums[start : start + width]) for start in under[::width]]
            # The last bytes of a sum are those of the sum of the last bytes.
            children = b"".join([(item & _SHORT_MASK).to_bytes(KEY_BYTES, "big") for item in sums])
            self._children[prefix] = children
        return children


def differing(prefix: str, ours: bytes, theirs: bytes) -> list[str]:
    """Return the children of a prefix whose short hashes differ."""
    return [
        prefix + digit
        for index, digit in enumerate(_DIGITS)
        if ours[index * KEY_BYTES : (index + 1) * KEY_BYTES]
        != theirs[index * KEY_BYTES : (index + 1) * KEY_BYTES]
    ]


@functools.lru_cache(maxsize=KEYS_CACHED)
def _hash(key: bytes, version: int) -> int:
    return int.from_bytes(hashlib.sha256(_ENTRY.pack(key, version)).digest(), "big")
