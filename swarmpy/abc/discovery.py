"""Where a node hears of peers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from swarmpy.abc.network import Address
from swarmpy.identity import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """Somebody claims that a peer can be reached somewhere; believed only once dialled."""

    peer: PeerId
    addresses: tuple[Address, ...]
    source: str
    """The source's name: "cache", "mdns", "invite", "announce"."""


class DiscoverySource(ABC):
    """One way to hear of peers."""

    name: str

    @abstractmethod
    async def run(self, see: Callable[[Sighting], None]) -> None:
        """Report sightings until cancelled; a source that cannot work says so and returns."""
