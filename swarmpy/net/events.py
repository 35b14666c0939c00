"""Connection events: a bounded queue for each listener, the oldest dropped when nobody reads."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import AsyncIterator

import trio

from swarmpy.abc import ConnectionEvent

EVENTS_MAX = 1024
"""Events one listener may leave unread: twice `CONNECTIONS_MAX`, so a full turnover is not lost."""


class Subscription(AsyncIterator[ConnectionEvent]):
    """Events from the moment of subscribing; ends when the host does."""

    def __init__(self) -> None:
        self._events: deque[ConnectionEvent] = deque(maxlen=EVENTS_MAX)
        self._waiting = trio.lowlevel.ParkingLot()
        self._is_closed = False

    async def __anext__(self) -> ConnectionEvent:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._events:
            if self._is_closed:
                raise StopAsyncIteration
            await self._waiting.park()
        return self._events.popleft()

    def put(self, event: ConnectionEvent) -> None:
        """Add an event."""
        self._events.append(event)
        self._waiting.unpark()

    def close(self) -> None:
        """Add no more; what is there can still be read."""
        self._is_closed = True
        self._waiting.unpark_all()


class EventFeed:
    """Hands each event to every subscription that is still referenced."""

    def __init__(self) -> None:
        self._subscriptions: list[weakref.ref[Subscription]] = []
        self._is_closed = False

    def subscribe(self) -> Subscription:
        """Return an iterator over the events from now on."""
        subscription = Subscription()
        if self._is_closed:
            subscription.close()
        self._subscriptions.append(weakref.ref(subscription))
        return subscription

    def publish(self, event: ConnectionEvent) -> None:
        """Hand an event to all."""
        for subscription in self._living():
            subscription.put(event)

    def close(self) -> None:
        """End all iterators once they are read empty."""
        self._is_closed = True
        for subscription in self._living():
            subscription.close()

    def _living(self) -> list[Subscription]:
        living = [item for ref in self._subscriptions if (item := ref()) is not None]
        self._subscriptions = [weakref.ref(item) for item in living]
        return living
