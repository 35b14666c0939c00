"""Audience: who may be sent anything of a session, checked where it is sent.

Attached to a session at admission and never changed: what comes later (another stage, a standby, a
recovery) inherits it. Spec: protocols/pipeline.md, section "Audience".
"""

from __future__ import annotations

from collections.abc import Iterable

from swarmpy.errors import LocalProtocolError
from swarmpy.identity import PeerId
from swarmpy.net.messages import MessageStream


class Audience:
    """An immutable set of peers."""

    __slots__ = ("_peers",)
    _peers: frozenset[PeerId]

    def __init__(self, peers: Iterable[PeerId]) -> None:
        object.__setattr__(self, "_peers", frozenset(peers))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("an audience never changes")

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._peers

    def __repr__(self) -> str:
        return f"Audience({sorted(self._peers)})"

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """The peers, in PeerId order."""
        return tuple(sorted(self._peers))

    def require(self, peer: PeerId) -> None:
        """Refuse any peer outside.

        Raises:
            LocalProtocolError: This node was about to send something to a peer it is not for.
        """
        if peer not in self._peers:
            raise LocalProtocolError(f"{peer} is not in the session's audience {self.peers}")


async def send_private(messages: MessageStream, audience: Audience, frame: bytes) -> None:
    """Send a frame that holds tensors, tokens or a prompt: the only function that may.

    Raises:
        LocalProtocolError: The stream's peer is not in the audience; nothing was sent.
        StreamReset, ConnectionLost: As for `Stream.send_all`.
    """
    audience.require(messages.peer)
    await messages.send_frame(frame)
