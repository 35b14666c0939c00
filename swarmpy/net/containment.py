"""What an error of a stream's handler costs: its stream, then its connection, never the node.

This is one of the two borders where any exception is caught; every host's handlers run inside it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

from swarmpy.abc import ProtocolId
from swarmpy.errors import NetworkError, RemoteProtocolError
from swarmpy.identity import PeerId

logger = logging.getLogger(__name__)

CONNECTION_PENALTY = 10
"""Breaches that weigh this much together cost the connection, not only their streams."""


class Blamable(Protocol):
    """A connection that can be closed for what its peer did."""

    def close_for(self, error: Exception) -> None:
        """Close for a reason that streams will name."""


class Served(Protocol):
    """A stream that a handler serves."""

    @property
    def peer(self) -> PeerId: ...

    @property
    def protocol(self) -> ProtocolId: ...

    @property
    def connection(self) -> Blamable: ...

    def reset(self) -> None: ...


class Containment:
    """The border around the handlers of a host; it counts what each connection's peer broke."""

    def __init__(self) -> None:
        self._penalties: WeakKeyDictionary[Blamable, int] = WeakKeyDictionary()

    @contextmanager
    def around(self, stream: Served) -> Iterator[None]:
        """Contain whatever goes wrong in serving a stream; a cancellation goes through."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the border named in the module's docstring
            self._contain(stream, error)
        except BaseExceptionGroup as group:
            ours, others = group.split(Exception)
            if ours is not None:
                self._contain(stream, ours)
            if others is not None:
                raise others from None

    def _contain(self, stream: Served, error: Exception) -> None:
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
        self._penalties[connection] = penalty
        if breaches and penalty >= CONNECTION_PENALTY:
            connection.close_for(max(breaches, key=lambda breach: breach.penalty))
        else:
            stream.reset()


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors inside nested groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
