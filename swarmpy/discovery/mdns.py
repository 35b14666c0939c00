"""Multicast DNS: finds peers on the local link without configuration, in libp2p's form.

Bridges the zeroconf library, which runs in a thread of its own, into trio. Nothing is told but
addresses and the PeerId, under random names; what is heard is a sighting like any other.
Spec: protocols/mdns.md.
"""

from __future__ import annotations

import logging
import socket
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from swarmpy.abc import Address, DiscoverySource, Sighting
from swarmpy.environment import Environment
from swarmpy.errors import BadMessage
from swarmpy.identity import PeerId
from swarmpy.proto import mdns as proto
from swarmpy.proto.endpoint import advertised

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

logger = logging.getLogger(__name__)

PORT = 5353
"""Of multicast DNS."""

UNUSED_PORT = 4001
"""For the SRV record that DNS-SD demands; libp2p reads the TXT record only."""

ASK_PAUSE_S = 1.0
ASK_PAUSE_S_MAX = 300.0
"""Pauses between two questions to the link double from the first to the second (RFC 6762, 5.2)."""

HEARD_MAX = 256
"""Records heard and not yet looked at; a flooded link loses the rest."""

_QUERY_FLAGS = 0
_CLASS_IN = 1
_TYPE_PTR = 12
"""DNS numbers (RFC 1035, 3.2 and 4.1.1)."""


class MdnsSource(DiscoverySource):
    """Tells the link where this node is, and hears where others are."""

    name = "mdns"

    def __init__(
        self,
        peer: PeerId,
        addresses: Callable[[], Sequence[Address]],
        environment: Environment,
        *,
        interfaces: Sequence[str] | None = None,
    ) -> None:
        """Make a source that is silent until `run`.

        Args:
            addresses: Where this node listens now.
            interfaces: IP literals of the interfaces to use; None: all of this machine.
        """
        self._peer = peer
        self._addresses = addresses
        self._environment = environment
        self._interfaces = None if interfaces is None else list(interfaces)
        self._waiting = 0

    async def run(self, see: Callable[[Sighting], None]) -> None:
        """Report sightings until cancelled; where multicast is impossible, say why and return."""
        token = trio.lowlevel.current_trio_token()

        def heard(data: bytes) -> None:
            # Called in the library's thread.
            if self._waiting < HEARD_MAX:
                self._waiting += 1
                token.run_sync_soon(self._report, data, see)

        try:
            link = await trio.to_thread.run_sync(_open_link, self._interfaces, heard)
        except (OSError, RuntimeError, ImportError) as error:
            logger.warning("mdns.unavailable", extra={"error": str(error)})
            return
        try:
            await self._tell_and_ask(link)
        finally:
            # Says goodbye to the link and joins the library's thread.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(link.close)

    async def _tell_and_ask(self, link: Zeroconf) -> None:
        from zeroconf import Error

        instance, host = self._random_name(), self._random_name()
        told = b""
        pause_s = ASK_PAUSE_S
        while True:
            txt = proto.encode_txt(
                self._peer, advertised(self._addresses(), count_max=proto.ADDRESSES_MAX)
            )
            info = _service(instance, host, txt)
            try:
                await trio.to_thread.run_sync(_ask, link, info)
                if txt != told:
                    change = _update if told else _register
                    await trio.to_thread.run_sync(change, link, info)
                    told = txt
            except Error as error:
                # The library gives up after seconds without the processor. It may have told this
                # name or not: the next round takes another.
                logger.warning("mdns.stalled", extra={"error": repr(error)})
                instance, told = self._random_name(), b""
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, ASK_PAUSE_S_MAX)

    def _report(self, data: bytes, see: Callable[[Sighting], None]) -> None:
        self._waiting -= 1
        try:
            found = proto.decode_txt(data)
        except BadMessage as error:
            logger.debug("mdns.malformed", extra={"error": str(error)})
            return
        if found is None or found[0] == self._peer:
            return
        peer, addresses = found
        see(
            Sighting(
                peer=peer,
                addresses=tuple(Address(address) for address in addresses),
                source=self.name,
            )
        )

    def _random_name(self) -> str:
        letters = string.ascii_lowercase + string.digits
        random = self._environment.random
        return "".join(random.choice(letters) for _ in range(proto.INSTANCE_NAME_CHARACTERS))


def _open_link(interfaces: list[str] | None, heard: Callable[[bytes], None]) -> Zeroconf:
    """Open the multicast sockets and the thread that serves them.

    Raises:
        OSError, RuntimeError: Multicast is not possible here.
    """
    from zeroconf import InterfaceChoice, RecordUpdate, RecordUpdateListener, Zeroconf

    class Listener(RecordUpdateListener):
        """Hands on the TXT records of our service; a goodbye (no life left) is no sighting."""

        def async_update_records(
            self, zc: Zeroconf, now: float, records: list[RecordUpdate]
        ) -> None:
            for update in records:
                record = update.new
                text = getattr(record, "text", None)  # of TXT records only
                if isinstance(text, bytes) and record.ttl and _is_ours(record.name):
                    heard(text)

    _check_sockets(interfaces or [""])
    link = Zeroconf(interfaces=interfaces or InterfaceChoice.All, use_asyncio=False)
    link.add_listener(Listener(), None)
    return link


def _check_sockets(interfaces: list[str]) -> None:
    """Try what the library is about to do: where it fails half-way it leaves sockets open.

    Raises:
        OSError: An interface is not there, or the port is taken by somebody who does not share it.
    """
    for interface in interfaces:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            trial.bind((interface, PORT))


def _ask(link: Zeroconf, own: ServiceInfo) -> None:
    """Ask the link who else is there.

    Answers are to be multicast: of several nodes on one machine a unicast answer reaches only one.
    The own record is named as known: answering itself, this node would be silent for the next
    second, as RFC 6762 (section 6) demands, to whoever starts and asks then.
    """
    # Offered to importers, says zeroconf's source, but not to type checkers.
    from zeroconf import DNSOutgoing, DNSQuestion  # type: ignore[attr-defined]

    question = DNSOutgoing(_QUERY_FLAGS)
    question.add_question(DNSQuestion(proto.SERVICE, _TYPE_PTR, _CLASS_IN))
    question.add_answer_at_time(own.dns_pointer(), 0)
    link.send(question)


def _register(link: Zeroconf, own: ServiceInfo) -> None:
    # The random name cannot be taken: no probing, which takes 0.75 s.
    link.register_service(own, cooperating_responders=True)


def _update(link: Zeroconf, own: ServiceInfo) -> None:
    link.update_service(own)


def _service(instance: str, host: str, txt: bytes) -> ServiceInfo:
    from zeroconf import ServiceInfo

    return ServiceInfo(
        proto.SERVICE,
        f"{instance}.{proto.SERVICE}",
        port=UNUSED_PORT,
        properties=txt,
        server=f"{host}.local.",
    )


def _is_ours(name: str) -> bool:
    return name.lower().endswith("." + proto.SERVICE)
