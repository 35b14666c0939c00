"""Inbound streams: which handler serves one, who may ask, and what an error of a handler costs.

This is one of the two borders where any exception is caught: a failing or hostile stream costs its
stream, then its connection, never the node. Spec: protocols/multistream.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from weakref import WeakKeyDictionary

import trio

from swarmpy import config
from swarmpy.abc import Connection, ProtocolId, StreamHandler
from swarmpy.errors import ConfigError, NetworkError, RemoteProtocolError
from swarmpy.identity import PeerId
from swarmpy.net.stream import NativeStream
from swarmpy.proto.multistream import Selector

logger = logging.getLogger(__name__)

CONNECTION_PENALTY = 10
"""Breaches that weigh this much together cost the connection, not only their streams."""


class Router:
    """The handlers of a host, by protocol."""

    def __init__(self, allow: Callable[[PeerId, ProtocolId], bool]) -> None:
        """Args: allow: Whether the gate lets a peer use a protocol."""
        self._allow = allow
        self._handlers: dict[ProtocolId, StreamHandler] = {}
        self._allowed_limited: set[ProtocolId] = set()
        self._penalties: WeakKeyDictionary[Connection, int] = WeakKeyDictionary()

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
        try:
            await self._serve(stream)
        except Exception as error:  # noqa: BLE001 - the border named in the module's docstring
            self._contain(stream, error)
        except BaseExceptionGroup as group:
            ours, others = group.split(Exception)
            if ours is not None:
                self._contain(stream, ours)
            if others is not None:
                raise others from None

    async def _serve(self, stream: NativeStream) -> None:
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

    def _contain(self, stream: NativeStream, error: Exception) -> None:
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


def _leaves(error: BaseException) -> list[BaseException]:
    """Return the errors inside nested groups."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
