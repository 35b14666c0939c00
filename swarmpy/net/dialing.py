"""Dialling: several addresses of one peer, and several tasks that want the same peer.

Addresses are tried in turn with a head start for the earlier ones; the first proven connection
wins. Tasks that dial one peer share the attempt, which ends when the last of them gives up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from swarmpy import config
from swarmpy.abc import Address
from swarmpy.errors import DialFailed, HandshakeFailed, NetworkError, ProtocolError
from swarmpy.identity import PeerId
from swarmpy.net.connection import NativeConnection

DialOne = Callable[[PeerId, Address], Awaitable[NativeConnection]]
Keep = Callable[[NativeConnection], None]


class _Attempt:
    """One dial that several tasks may wait for."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.outcome: NativeConnection | Exception | None = None
        self._finished = trio.Event()
        self._waiting = 0

    def finish(self, outcome: NativeConnection | Exception) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._finished.set()

    async def wait(self) -> NativeConnection:
        self._waiting += 1
        try:
            await self._finished.wait()
        finally:
            self._waiting -= 1
            if not self._waiting and self.outcome is None:
                self.scope.cancel()
        if isinstance(self.outcome, NativeConnection):
            return self.outcome
        assert self.outcome is not None
        raise self.outcome


class Dials:
    """The dials under way, one a peer."""

    def __init__(self, dial_one: DialOne, keep: Keep) -> None:
        """Prepare to dial.

        Args:
            dial_one: Connects to one address and proves the peer.
            keep: Told of the winning connection, at once.
        """
        self._dial_one = dial_one
        self._keep = keep
        self._attempts: dict[PeerId, _Attempt] = {}
        self._places = trio.CapacityLimiter(config.DIALS_MAX)

    async def dial(
        self, nursery: trio.Nursery, peer: PeerId, addresses: Sequence[Address]
    ) -> NativeConnection:
        """Dial a peer in `nursery`, or join a dial of that peer which is under way.

        Raises:
            DialFailed: No address answered.
            HandshakeFailed: Whoever answered is not that peer.
        """
        attempt = self._attempts.get(peer)
        if attempt is None or attempt.scope.cancel_called:
            attempt = self._attempts[peer] = _Attempt()
            nursery.start_soon(self._run, attempt, peer, list(addresses))
        return await attempt.wait()

    async def _run(self, attempt: _Attempt, peer: PeerId, addresses: list[Address]) -> None:
        try:
            with attempt.scope:
                connection = await self._first_of(peer, addresses)
                self._keep(connection)
                attempt.finish(connection)
        except (NetworkError, ProtocolError) as error:
            attempt.finish(error)
        finally:
            attempt.finish(DialFailed(f"the dial of {peer} was given up"))
            if self._attempts.get(peer) is attempt:
                del self._attempts[peer]

    async def _first_of(self, peer: PeerId, addresses: list[Address]) -> NativeConnection:
        if not addresses:
            raise DialFailed(f"no address of {peer} is known")
        winners: list[NativeConnection] = []
        errors: list[Exception] = []

        async def attempt(address: Address, failed: trio.Event) -> None:
            try:
                async with self._places:
                    connection = await self._dial_one(peer, address)
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
