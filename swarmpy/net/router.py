"""Inbound streams: which handler serves one, and who may ask.

Spec: protocols/multistream.md.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from swarmpy import config
from swarmpy.abc import ProtocolId, StreamHandler
from swarmpy.errors import ConfigError, RemoteProtocolError
from swarmpy.identity import PeerId
from swarmpy.net.containment import Containment
from swarmpy.net.stream import NativeStream
from swarmpy.proto.multistream import Selector


class Router:
    """The handlers of a host, by protocol."""

    def __init__(self, allow: Callable[[PeerId, ProtocolId], bool]) -> None:
        """Args: allow: Whether the gate lets a peer use a protocol."""
        self._allow = allow
        self._handlers: dict[ProtocolId, StreamHandler] = {}
        self._allowed_limited: set[ProtocolId] = set()
        self._containment = Containment()

    @property
    def protocols(self) -> tuple[ProtocolId, ...]:
        """Protocols served, in alphabetical order."""
        return tuple(sorted(self._handlers))

    def protocols_for(self, peer: PeerId) -> tuple[ProtocolId, ...]:
        """Protocols that the gate lets a peer use."""
        return tuple(item for item in self.protocols if self._allow(peer, item))

    def set_handler(
        self, protocol: ProtocolId, handler: StreamHandler, *, allow_limited: bool = False
    ) -> None:
        """Serve a protocol from now on; on connections with a byte limit only if allowed there.

        Raises:
            ConfigError: It already has a handler.
        """
        if protocol in self._handlers:
            raise ConfigError(f"{protocol} already has a handler")
        self._handlers[protocol] = handler
        if allow_limited:
            self._allowed_limited.add(protocol)

    async def serve(self, stream: NativeStream) -> None:
        """Agree on a protocol, run its handler, and contain whatever goes wrong."""
        with self._containment.around(stream):
            handler = await self._agree(stream)
            if handler is not None:
                await handler(stream)
            await stream.finish()

    async def _agree(self, stream: NativeStream) -> StreamHandler | None:
        """Negotiate the protocol; None if the peer left without finding one."""
        peer = stream.peer
        served = self._handlers if stream.connection.limit is None else self._allowed_limited

        def serves(protocol: str) -> bool:
            known = ProtocolId(protocol)
            return known in served and self._allow(peer, known)

        selector = Selector(serves)
        with trio.move_on_after(config.STREAM_NEGOTIATION_TIMEOUT_S) as scope:
            while selector.selected is None:
                data = await stream.receive_some()
                if not data:
                    return None
                if answer := selector.receive(data):
                    await stream.send_all(answer)
        if scope.cancelled_caught or selector.selected is None:
            raise RemoteProtocolError("no protocol was proposed in time", peer=peer)
        stream.protocol = ProtocolId(selector.selected)
        stream.push_back(selector.rest)
        return self._handlers[stream.protocol]
