"""Dialling: several addresses of one peer, and several tasks that want the same peer.

Addresses are tried in turn with a head start for the earlier ones; the first proven connection
wins. Tasks that dial one peer share the attempt, which ends when the last of them gives up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import trio

from swarmpy import config
from swarmpy.abc import Address, Connection
from swarmpy.errors import DialFailed, HandshakeFailed, NetworkError, ProtocolError
from swarmpy.identity import PeerId

C = TypeVar("C", bound=Connection)
DialOne = Callable[[PeerId, Address], Awaitable[C]]
"""Connects to one address and proves the peer."""


class _Attempt(Generic[C]):
    """One dial that several tasks may wait for, each with addresses of its own."""

    def __init__(self) -> None:
        self.addresses: list[Address] = []
        self.running = 0
        self._scopes: list[trio.CancelScope] = []
        self._connection: C | None = None
        self._error: Exception | None = None
        self._finished = trio.Event()
        self._is_given_up = False
        self._waiting = 0

    @property
    def is_over(self) -> bool:
        """Whether who comes now must begin anew."""
        return self._is_given_up or self._finished.is_set()

    def take(self, addresses: Sequence[Address]) -> list[Address]:
        """Add addresses and return those that are new, as many as one dial may try."""
        fresh = [address for address in addresses if address not in self.addresses]
        fresh = fresh[: config.DIAL_ADDRESSES_MAX - len(self.addresses)]
        self.addresses += fresh
        return fresh

    def scope(self) -> trio.CancelScope:
        """Return a scope that ends with the attempt."""
        scope = trio.CancelScope()
        self._scopes.append(scope)
        return scope

    def succeed(self, connection: C) -> None:
        self._connection = connection
        self._finished.set()
        self._cancel()

    def fail(self, error: Exception) -> None:
        """Say how the dial failed, unless its outcome is known."""
        if not self._finished.is_set():
            self._error = error
            self._finished.set()

    async def wait(self) -> C:
        self._waiting += 1
        try:
            await self._finished.wait()
        finally:
            self._waiting -= 1
            if not self._waiting and not self._finished.is_set():
                self._is_given_up = True
                self._cancel()
        if self._connection is not None:
            return self._connection
        assert self._error is not None
        raise self._error

    def _cancel(self) -> None:
        for scope in self._scopes:
            scope.cancel()


class Dials(Generic[C]):
    """The dials under way, one a peer."""

    def __init__(
        self,
        dial_one: DialOne[C],
        keep: Callable[[C], None],
        *,
        places: trio.CapacityLimiter | None = None,
    ) -> None:
        """Prepare to dial.

        Args:
            keep: Told of the winning connection, at once.
            places: Addresses dialled at a time, over all peers; None for no bound.
        """
        self._dial_one = dial_one
        self._keep = keep
        self._places = places
        self._attempts: dict[PeerId, _Attempt[C]] = {}

    async def dial(self, nursery: trio.Nursery, peer: PeerId, addresses: Sequence[Address]) -> C:
        """Dial a peer in `nursery`, or join a dial of that peer which is under way.

        Raises:
            DialFailed: No address answered.
            HandshakeFailed: Whoever answered is not that peer.
        """
        attempt = self._attempts.get(peer)
        if attempt is None or attempt.is_over:
            attempt = self._attempts[peer] = _Attempt()
        fresh = attempt.take(addresses)
        if fresh or not attempt.running:
            # Addresses that nobody tries yet need not wait for those under way to fail.
            attempt.running += 1
            nursery.start_soon(self._run, attempt, peer, fresh)
        return await attempt.wait()

    async def _run(self, attempt: _Attempt[C], peer: PeerId, addresses: list[Address]) -> None:
        outcome: Exception = DialFailed(f"the dial of {peer} was given up")
        try:
            with attempt.scope():
                connection = await first_of(peer, addresses, self._dial_one, places=self._places)
                if attempt.is_over:
                    connection.close()
                else:
                    self._keep(connection)
                    attempt.succeed(connection)
        except (NetworkError, ProtocolError) as error:
            outcome = error
        finally:
            attempt.running -= 1
            if not attempt.running:
                attempt.fail(outcome)
                if self._attempts.get(peer) is attempt:
                    del self._attempts[peer]


async def first_of(
    peer: PeerId,
    addresses: Sequence[Address],
    dial_one: DialOne[C],
    *,
    places: trio.CapacityLimiter | None = None,
) -> C:
    """Dial addresses in turn, each with a head start over the next; return who is proven first.

    All other connections are closed, and all of them where this is cancelled.

    Raises:
        DialFailed: No address answered; those beyond `DIAL_ADDRESSES_MAX` were not tried.
        HandshakeFailed: Whoever answered is not that peer.
    """
    if not addresses:
        raise DialFailed(f"no address of {peer} is known")
    winners: list[C] = []
    errors: list[Exception] = []

    async def dial(address: Address) -> C:
        if places is None:
            return await dial_one(peer, address)
        async with places:
            return await dial_one(peer, address)

    async def attempt(address: Address, failed: trio.Event) -> None:
        try:
            connection = await dial(address)
        except (NetworkError, ProtocolError) as error:
            errors.append(error)
            failed.set()
            return
        if winners:
            connection.close()
            return
        winners.append(connection)
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for address in addresses[: config.DIAL_ADDRESSES_MAX]:
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                with trio.move_on_after(config.DIAL_STAGGER_S):
                    await failed.wait()
    except BaseException:
        for connection in winners:
            connection.close()  # proven in the very moment in which nobody waited any more
        raise
    if winners:
        return winners[0]
    for error in errors:
        if isinstance(error, HandshakeFailed):
            raise error
    raise DialFailed(f"{peer}: " + "; ".join(str(error) for error in errors))
