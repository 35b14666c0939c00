"""Yamux frames written by hand, and sessions that take them."""

from __future__ import annotations

import struct

from swarmpy.proto.receive_budget import ReceiveBudget
from swarmpy.proto.yamux import Event, Yamux

DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

RTT_S = 0.03
MIB = 1024 * 1024


def session(
    *,
    is_initiator: bool = False,
    streams: int = 4,
    unread: int = 1 << 24,
    resets: int = 3,
    budget: ReceiveBudget | None = None,
) -> Yamux:
    return Yamux(
        is_initiator=is_initiator,
        inbound_streams_max=streams,
        unread_bytes_max=unread,
        resets_per_second_max=resets,
        budget=budget,
    )


def frame(kind: int, flags: int, stream_id: int, value: int, data: bytes = b"") -> bytes:
    return struct.pack("!BBHII", 0, kind, flags, stream_id, value) + data


def data_frame(stream_id: int, data: bytes, flags: int = 0) -> bytes:
    return frame(DATA, flags, stream_id, len(data), data)


def take(yamux: Yamux) -> bytes:
    """Empty a session's outbox."""
    sent = bytes(yamux.outbox)
    yamux.outbox.clear()
    return sent


def receive(yamux: Yamux, *frames: bytes, now_s: float = 0.0) -> list[Event]:
    yamux.now_s = now_s
    return yamux.receive(b"".join(frames))


def opened(count: int = 1, *, budget: ReceiveBudget | None = None, **bounds: int) -> Yamux:
    """Return the responder's session with streams 1, 3, ... opened by the peer."""
    yamux = session(budget=budget, **bounds)  # type: ignore[arg-type]
    for index in range(count):
        receive(yamux, frame(WINDOW, SYN, 2 * index + 1, 0))
    return yamux
