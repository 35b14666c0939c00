"""Dials of a simulated host: tasks that want one peer share the attempt, as with a native host."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from swarmpy import config
from swarmpy.abc import Address
from swarmpy.errors import DialFailed, HandshakeFailed, NetworkError, ProtocolError
from swarmpy.identity import PeerId
from swarmpy.testing.host_connection import HostConnection

DialOne = Callable[[PeerId, Address], Awaitable[HostConnection]]
Keep = Callable[[HostConnection], None]


class _Attempt:
    """One dial that several tasks may wait for."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.outcome: HostConnection | Exception | None = None
        self._finished = trio.Event()
        self._waiting = 0

    def finish(self, outcome: HostConnection | Exception) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._finished.set()

    async def wait(self) -> HostConnection:
        self._waiting += 1
        try:
            await self._finished.wait()
        finally:
            self._waiting -= 1
            if not self._waiting and self.outcome is None:
                self.scope.cancel()
        if isinstance(self.outcome, HostConnection):
            return self.outcome
        assert self.outcome is not None
        raise self.outcome


class Dials:
    """The dials under way, one a peer."""

    def __init__(self, dial_one: DialOne, keep: Keep) -> None:
        self._dial_one = dial_one
        self._keep = keep
        self._attempts: dict[PeerId, _Attempt] = {}

    async def dial(
        self, nursery: trio.Nursery, peer: PeerId, addresses: Sequence[Address]
    ) -> HostConnection:
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

    async def _first_of(self, peer: PeerId, addresses: list[Address]) -> HostConnection:
        """Try addresses in turn, each with a head start over the next."""
        winners: list[HostConnection] = []
        errors: list[Exception] = []

        async def attempt(address: Address, failed: trio.Event) -> None:
            try:
                connection = await self._dial_one(peer, address)
            except (NetworkError, ProtocolError) as error:
                errors.append(error)
                failed.set()
                return
            if winners:
                connection.close()
            else:
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
                connection.close()
            raise
        if winners:
            return winners[0]
        for error in errors:
            if isinstance(error, HandshakeFailed):
                raise error
        causes = "; ".join(str(error) for error in errors) or "no address is known"
        raise DialFailed(f"{peer}: {causes}")
