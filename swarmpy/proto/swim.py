"""Liveness: the signed statement that a member is gone, and how much one accuser may say.

A statement about somebody else is a suspicion, which the accused refutes with a newer announcement;
one about its own signer is a farewell. Sans-IO: `swarmpy/discovery/liveness.py` probes and judges.
Spec: protocols/swim.md (revision 1).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from swarmpy.errors import BadMessage, StaleRecord
from swarmpy.identity import Identity, PeerId
from swarmpy.proto.envelope import open_envelope, seal
from swarmpy.proto.membership import (
    CLOCK_SKEW_S,
    KeyHash,
    NetworkId,
    PeerIdText,
    WallSecondsInt,
    check_version,
    key_hash_of,
    network_id_of,
    read_peer_id,
)
from swarmpy.proto.summary import gone_version, record_key
from swarmpy.proto.wire import decode, encode

DOMAIN = "swarmpy-swim"
PAYLOAD_TYPE = b"s"
VERSION = 1

STATEMENT_BYTES_MAX = 320
"""Largest signed statement: two PeerIds, a network, three numbers, a key and a signature."""

STATEMENT_TTL_S = 3600.0 + 2 * CLOCK_SKEW_S
"""A statement is remembered for longer than the announcement that it ends, whatever the clocks."""

STATEMENTS_CACHED = 1024

SILENCE_S = 6.5
"""A neighbour that was not heard for so long is asked for; its keepalives come every 5 s."""

PROBE_TIMEOUT_S = 3.0
"""Time for it, or somebody who can reach it, to answer. A slow mobile link needs 1 s."""

HELPERS = 3
"""Members that are asked to look, too: the fault may be this node's own link."""

SUSPICION_S = 5.0
"""From a suspicion to its end: word goes round a network of 1,000 and back in 2 s."""

ACCUSATIONS_MAX = 32
"""Suspicions of one accuser in a row. A node has 16 neighbours, and a cut may take all of them."""

ACCUSATION_INTERVAL_S = 30.0
"""After which one more is heard: each may make its victim announce itself anew, to everybody."""


class Statement(msgspec.Struct, frozen=True, array_like=True):
    """The signer says that a member, as of its announcement `seq`, is gone."""

    version: int
    network: KeyHash
    accused: PeerIdText
    seq: Annotated[int, Meta(ge=0, lt=2**53)]
    issued_wall_s: WallSecondsInt


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedStatement:
    """A verified statement and the bytes to pass on."""

    network_id: NetworkId
    peer: PeerId
    """Whom it is about."""
    signer: PeerId
    seq: int
    issued_wall_s: float
    envelope: bytes
    key: bytes
    version: int

    @property
    def is_farewell(self) -> bool:
        """Whether the member itself says that it is leaving."""
        return self.signer == self.peer

    @property
    def expires_wall_s(self) -> float:
        return self.issued_wall_s + STATEMENT_TTL_S


def seal_statement(
    identity: Identity, *, network_id: NetworkId, accused: PeerId, seq: int, wall_s: float
) -> bytes:
    """Sign a suspicion, or a farewell where the accused is the signer itself."""
    statement = Statement(
        version=VERSION,
        network=key_hash_of(network_id),
        accused=accused,
        seq=seq,
        issued_wall_s=int(wall_s),
    )
    return seal(identity, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=encode(statement))


def open_statement(sealed: bytes, *, wall_s: float) -> SignedStatement:
    """Verify a statement, whoever delivered it.

    Raises:
        BadMessage: Oversized or malformed.
        BadSignature: Forged.
        StaleRecord: Sound but of no use now; no fault of whoever delivered it.
    """
    signed = _open(sealed)
    age_s = wall_s - signed.issued_wall_s
    if not -CLOCK_SKEW_S <= age_s <= STATEMENT_TTL_S:
        raise StaleRecord(f"statement is {age_s:.0f} s old, expected up to {STATEMENT_TTL_S:.0f}")
    return signed


@functools.lru_cache(maxsize=STATEMENTS_CACHED)
def _open(sealed: bytes) -> SignedStatement:
    if len(sealed) > STATEMENT_BYTES_MAX:
        raise BadMessage(f"statement of {len(sealed)} bytes exceeds {STATEMENT_BYTES_MAX}")
    envelope = open_envelope(sealed, domain=DOMAIN, payload_type=PAYLOAD_TYPE)
    statement = decode(envelope.payload, Statement)
    check_version(statement.version, "statement")
    accused = read_peer_id(statement.accused)
    network_id = network_id_of(statement.network)
    return SignedStatement(
        network_id=network_id,
        peer=accused,
        signer=envelope.signer,
        seq=statement.seq,
        issued_wall_s=float(statement.issued_wall_s),
        envelope=envelope.signed,
        key=record_key(network_id, accused),
        version=gone_version(statement.seq),
    )


def is_plausible(seq: int, *, known_seq: int, wall_s: float) -> bool:
    """Whether a member may have announced itself with `seq`, as far as this node can tell.

    Numbers are wall milliseconds or one more than the last: a liar that names one far ahead would
    drive the accused to the end of the numbers.
    """
    return seq <= max(known_seq, int((wall_s + CLOCK_SKEW_S) * 1000))
