"""Conversations: begins the membership conversation, with one peer one at a time.

Of two connections made at once one is closed, maybe in the middle of it: then it is begun anew on
the other.
Spec: protocols/membership.md, section 3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from swarmpy.abc import Host, ProtocolId, Stream
from swarmpy.errors import (
    ConnectionLost,
    NetworkError,
    NotAMember,
    RemoteProtocolError,
    StreamReset,
)
from swarmpy.identity import PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto import membership as proto
from swarmpy.proto.invite import SignedInvite
from swarmpy.trust.exchange import CONVERSATION_TIMEOUT_S, Exchange, Shared, within
from swarmpy.trust.members import Members
from swarmpy.trust.redeeming import addresses_of

logger = logging.getLogger(__name__)

PROTOCOL = ProtocolId(proto.PROTOCOL)

EXCHANGE_ATTEMPTS_MAX = 3
"""Of two connections made at once one is closed, maybe in the middle of the conversation."""


class Conversations:
    """The conversations this node begins. What they come to is told to `Members`."""

    def __init__(
        self, host: Host, members: Members, exchange: Callable[[PeerId], Exchange]
    ) -> None:
        """Args: exchange: Returns what a conversation with a peer needs, as it is now."""
        self._host = host
        self._members = members
        self._exchange = exchange
        self._running: dict[PeerId, trio.Event] = {}

    async def wait(self, peer: PeerId) -> None:
        """Wait for the conversation under way with a peer, if there is one."""
        if (running := self._running.get(peer)) is not None:
            await running.wait()

    async def attempt(self, peer: PeerId) -> None:
        """Have the conversation; a peer that breaks off or speaks none stays a stranger."""
        try:
            await self.have(peer)
        except (NetworkError, RemoteProtocolError, NotAMember) as error:
            logger.debug("membership.exchange_failed", extra={"peer": peer, "error": str(error)})

    async def have(self, peer: PeerId) -> None:
        """Have a conversation, after the one under way if there is one.

        Raises:
            NetworkError: Every attempt broke, and the peer is not a member.
            NotAMember: The peer refused this node's membership.
        """
        while (running := self._running.get(peer)) is not None:
            await running.wait()
        self._running[peer] = trio.Event()
        try:
            for attempt in range(EXCHANGE_ATTEMPTS_MAX):
                try:
                    return await self._have_once(peer)
                except (ConnectionLost, StreamReset):
                    is_last = attempt == EXCHANGE_ATTEMPTS_MAX - 1
                    if is_last or self._host.connection_to(peer) is None:
                        raise
        finally:
            self._running.pop(peer).set()

    async def meet(self, signed: SignedInvite) -> None:
        """Become a member to the issuer of an invite, over another connection if one breaks.

        Raises:
            NetworkError, NotAMember: As for `have`; or it cannot be reached.
        """
        for attempt in range(EXCHANGE_ATTEMPTS_MAX):
            await self._host.dial(signed.issuer, addresses_of(signed))
            try:
                return await self.have(signed.issuer)
            except (ConnectionLost, StreamReset):
                if attempt == EXCHANGE_ATTEMPTS_MAX - 1:
                    raise

    async def _have_once(self, peer: PeerId) -> None:
        with within(CONVERSATION_TIMEOUT_S, "the membership conversation"):
            stream = await self._host.open_stream(peer, [PROTOCOL], allow_limited=True)
            try:
                shared = await self._exchange(peer).initiate(MessageStream(stream))
                await stream.close_write()
            except BaseException:
                stream.reset()
                raise
        self.ended(stream, shared)

    def ended(self, stream: Stream, shared: Shared) -> None:
        """Count the peer a member where it showed anything, unless the connection is gone."""
        if shared and self._host.connection_to(stream.peer) is not None:
            self._members.confirm(stream.connection, shared)
