"""The seam under the host: byte streams by address."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NewType

Address = NewType("Address", str)
"""A multiaddr as text, "/ip4/192.0.2.1/tcp/4001"."""


class ByteStream(ABC):
    """A two-way stream of bytes, shaped like a non-blocking socket.

    Sending and receiving are synchronous so that no cancellation can fall between encrypting a
    frame and handing it on; only waiting is asynchronous.
    """

    local_address: Address
    remote_address: Address

    @abstractmethod
    def send_nowait(self, data: memoryview) -> int:
        """Take as many bytes as fit now and return their count, 0 if none do.

        Raises:
            ConnectionLost: The stream is broken.
        """

    @abstractmethod
    async def wait_writable(self) -> None:
        """Wait until `send_nowait` may take bytes again, or the stream is broken or closed."""

    def limit_unsent(self, bytes_max: int) -> None:
        """Take no more than about `bytes_max` that could not be sent yet; a hint, here ignored.

        What was taken cannot be overtaken by anything more urgent, so a slow link is given little.
        """
        del bytes_max

    @abstractmethod
    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        """Read into `buffer` what is there; return its count, 0 at a clean end, None if none yet.

        Raises:
            ConnectionLost: The stream is broken.
        """

    @abstractmethod
    async def wait_readable(self) -> None:
        """Wait until `receive_into_nowait` will not return None, or for `wake_reader`."""

    @abstractmethod
    def wake_reader(self) -> None:
        """Let who is in `wait_readable` wait no longer, though nothing came."""

    @abstractmethod
    def close(self) -> None:
        """Close both directions at once and wake all waiters; repeated calls do nothing."""


class Listener(ABC):
    """A listening address."""

    address: Address
    """The address with the port really bound."""

    @abstractmethod
    async def accept(self) -> ByteStream:
        """Wait for the next inbound byte stream; survives running out of file descriptors."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening."""


class Network(ABC):
    """The seam under the host: production has TCP here, simulation a simulated network."""

    @abstractmethod
    async def listen(self, address: Address) -> Listener:
        """Listen on an address; port 0 picks a free one.

        Raises:
            ConfigError: The address is malformed or taken.
        """

    @abstractmethod
    async def dial(self, address: Address) -> ByteStream:
        """Connect to an address.

        Raises:
            DialFailed: Nobody answers there.
        """

    @abstractmethod
    def interface_addresses(self) -> Sequence[str]:
        """IP literals of this machine's interfaces, loopback last; to expand 0.0.0.0."""
