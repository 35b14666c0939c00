"""The node's handlers on an application's host: their bounds, and what an error of theirs costs.

A failing or hostile stream costs its stream, then its connection; never the application's host.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import trio

from swarmpy import config
from swarmpy.abc import Connection, ProtocolId, StreamHandler
from swarmpy.errors import ConfigError, NetworkError, RemoteProtocolError
from swarmpy.net.router import CONNECTION_PENALTY
from swarmpy.plugins.libp2p.stream import LibP2PStream

logger = logging.getLogger(__name__)


class Handlers:
    """The handlers by protocol."""

    def __init__(self) -> None:
        self._handlers: dict[ProtocolId, StreamHandler] = {}
        self._allowed_limited: set[ProtocolId] = set()
        self._penalties: WeakKeyDictionary[Connection, int] = WeakKeyDictionary()

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
            with scope:
                await self._serve(stream)
        except Exception as error:  # noqa: BLE001 - the border named in the module's docstring
            self._contain(stream, error)
        except BaseExceptionGroup as group:
            ours, others = group.split(Exception)
            if ours is not None:
                self._contain(stream, ours)
            if others is not None:
                raise others from None
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

    def _contain(self, stream: LibP2PStream, error: Exception) -> None:
        """Reset the stream, or close its connection once its breaches weigh that much."""
        causes = list(_leaves(error))
        fields = {"peer": stream.peer, "protocol": stream.protocol}
        breaches = [
            cause
            for cause in causes
            if isinstance(cause, RemoteProtocolError) and cause.peer in ("", stream.peer)
        ]
        if all(isinstance(cause, (RemoteProtocolError, NetworkError)) for cause in causes):
            logger.debug("stream.failed", extra=fields | {"error": str(causes[0])})
        else:
            logger.error("handler.failed", extra=fields, exc_info=error)
        connection = stream.connection
        penalty = self._penalties.get(connection, 0) + sum(item.penalty for item in breaches)
        if breaches and penalty >= CONNECTION_PENALTY:
            connection.close_for(max(breaches, key=lambda breach: breach.penalty))
        else:
            self._penalties[connection] = penalty
            stream.reset()


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
