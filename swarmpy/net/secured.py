"""What a connection is made of: a handshake's outcome, and what all connections of a node share."""

from __future__ import annotations

from dataclasses import dataclass

from swarmpy.identity import PeerId
from swarmpy.net.pace import TURN_BYTES_MAX
from swarmpy.proto.noise import (
    LENGTH_BYTES,
    PLAINTEXT_BYTES_BULK,
    TAG_BYTES,
    Opener,
    Sealer,
)
from swarmpy.proto.receive_budget import ReceiveBudget
from swarmpy.proto.yamux import HEADER_BYTES

_TURN_FRAMES = 1 + TURN_BYTES_MAX // PLAINTEXT_BYTES_BULK

RECEIVE_BYTES = HEADER_BYTES + TURN_BYTES_MAX + _TURN_FRAMES * (LENGTH_BYTES + TAG_BYTES)
"""Asked of the kernel at a time, with what is held of a frame: a sender's longest turn. In bulk,
whole frames end where this does, and none is held."""

JOINED_BYTES_MAX = 32 * 1024
"""Up to here header and data share one Noise frame; a larger payload is encrypted where it lies."""


class Scratch:
    """What all connections of a node share: buffers, and a budget for what lies unread.

    The buffers are used in turn, never across an await. At rest a connection holds none of its own:
    only a partial frame and what was refused.
    """

    def __init__(self, budget: ReceiveBudget | None = None) -> None:
        self.budget = ReceiveBudget() if budget is None else budget
        self.received = memoryview(bytearray(RECEIVE_BYTES))
        sealed_bytes = 2 * JOINED_BYTES_MAX + RECEIVE_BYTES + _TURN_FRAMES * HEADER_BYTES
        self.joined = memoryview(bytearray(2 * JOINED_BYTES_MAX + HEADER_BYTES))
        self.sealed = memoryview(bytearray(sealed_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Secured:
    """What a handshake leaves behind: a proven peer, two ciphers, and bytes that came early."""

    peer: PeerId
    sealer: Sealer
    opener: Opener
    channel_binding: bytes
    early_ciphertext: bytes = b""
    early_plaintext: bytes = b""
