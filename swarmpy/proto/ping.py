"""Ping: 32 bytes there and back, as libp2p does it.

Sans-IO. Spec: libp2p specs, ping; protocols/ping.md.
"""

from __future__ import annotations

from swarmpy.errors import BadMessage

PROTOCOL = "/ipfs/ping/1.0.0"

PAYLOAD_BYTES = 32


def check_pong(sent: bytes, received: bytes) -> None:
    """Check the answer to a ping.

    Raises:
        BadMessage: It is not what was sent.
    """
    if received != sent:
        raise BadMessage(f"ping of {len(sent)} bytes came back as {len(received)} other bytes")
