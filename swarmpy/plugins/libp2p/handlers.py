"""The node's handlers on an application's host: their bounds, and what an error of theirs costs.

A failing or hostile stream costs its stream, then its connection; never the application's host.
"""

from __future__ import annotations

import trio

from swarmpy import config
from swarmpy.abc import ProtocolId, StreamHandler
from swarmpy.errors import ConfigError
from swarmpy.net.containment import Containment
from swarmpy.plugins.libp2p.stream import LibP2PStream


class Handlers:
    """The handlers by protocol."""

    def __init__(self) -> None:
        self._handlers: dict[ProtocolId, StreamHandler] = {}
        self._allowed_limited: set[ProtocolId] = set()
        self._containment = Containment()

    def __contains__(self, protocol: object) -> bool:
        return protocol in self._handlers

    @property
    def protocols(self) -> list[ProtocolId]:
        """Protocols served, in alphabetical order."""
        return sorted(self._handlers)

    def set_handler(
        self, protocol: ProtocolId, handler: StreamHandler, *, allow_limited: bool
    ) -> None:
        """Serve a protocol from now on.

        Raises:
            ConfigError: It already has a handler.
        """
        if protocol in self._handlers:
            raise ConfigError(f"{protocol} already has a handler")
        self._handlers[protocol] = handler
        if allow_limited:
            self._allowed_limited.add(protocol)

    async def serve(self, stream: LibP2PStream, done: trio.Event) -> None:
        """Run the handler of a stream whose protocol is agreed on, and contain what goes wrong."""
        connection = stream.connection
        connection.inbound_count += 1
        scope = connection.handler_scope()
        try:
            with self._containment.around(stream), scope:
                await self._serve(stream)
        finally:
            connection.inbound_count -= 1
            connection.handler_returned(scope)
            done.set()

    async def _serve(self, stream: LibP2PStream) -> None:
        connection = stream.connection
        is_full = connection.inbound_count > config.INBOUND_STREAMS_MAX
        is_limited = connection.limit is not None and stream.protocol not in self._allowed_limited
        if is_full or is_limited:
            stream.reset()
            return
        await self._handlers[stream.protocol](stream)
        await stream.finish()
