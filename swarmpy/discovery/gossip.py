"""Announcements between members: each sends all it holds, then what is newer, as it comes.

One long-lived stream in each direction carries nothing but `Announce`. Every node verifies before
it passes on, so whoever delivers a forged announcement made it or is broken, and loses the
connection.
Spec: protocols/announce.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypedDict, Unpack

import trio

from swarmpy.abc import Host, NowSeconds, ProtocolId, Stream
from swarmpy.discovery.records import Key, RecordTable
from swarmpy.discovery.trust import Trust
from swarmpy.environment import Environment
from swarmpy.errors import NetworkError, RemoteProtocolError, StaleRecord
from swarmpy.identity import Identity, PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto import announce as proto
from swarmpy.proto.announce import (
    ANNOUNCE_INTERVAL_S,
    ANNOUNCEMENT_BYTES_MAX,
    Announce,
    AnnouncedModel,
    AnnouncedShard,
    Announcement,
    SignedAnnouncement,
    open_announcement,
    seal_announcement,
)
from swarmpy.proto.endpoint import advertised
from swarmpy.proto.membership import NAME_MAX, Membership

logger = logging.getLogger(__name__)

PROTOCOL = ProtocolId(proto.PROTOCOL)

FRAME_BYTES_MAX = ANNOUNCEMENT_BYTES_MAX + 32
"""An `Announce` around the largest announcement."""

COALESCE_S = 0.02
"""Announcements this close together go out in one pass, the older ones of a signer not at all."""

CHECK_INTERVAL_S = 10.0
"""How often changed addresses and better connections are looked for."""

REOPEN_PAUSE_S = 0.5
"""Before a broken push stream to a member that is still connected is opened anew."""

BURST_RECORDS = 200
BURST_PAUSE_S = 0.2
"""After this many announcements on one stream it is not read for a moment: a thousand signatures a
second cost a tenth of a core."""

BREACH_PENALTY = 10


class Changes(TypedDict, total=False):
    """What a node may change in its own announcement."""

    agent: str
    boot_id: str
    machine_id: str
    engine: str
    build_id: str
    memory_bytes_max: int
    memory_bytes_free: int
    speed_bytes_s: float
    models: tuple[AnnouncedModel, ...]
    shards: tuple[AnnouncedShard, ...]


class Gossip:
    """This node's own announcements, and those of the members of its networks."""

    def __init__(
        self,
        *,
        host: Host,
        environment: Environment,
        identity: Identity,
        name: str,
        trust: Trust,
        on_record: Callable[[SignedAnnouncement], None],
    ) -> None:
        """Serve the announcement protocol on `host`.

        Args:
            on_record: Called with each newly stored announcement of another member.
        """
        self._host = host
        self._environment = environment
        self._identity = identity
        self._name = name[:NAME_MAX]
        self._trust = trust
        self._on_record = on_record
        self._changes = Changes()
        self._addresses: tuple[str, ...] = ()
        self._seq = 0
        self._table = RecordTable()
        self._changed = trio.Event()
        self._pushing: dict[PeerId, trio.CancelScope] = {}
        host.set_handler(PROTOCOL, self._serve)

    # Own announcements -----------------------------------------------------------

    def announce(self, **changes: Unpack[Changes]) -> None:
        """Change this node's announcement; it goes out at once if that changed something."""
        merged = Changes(**{**self._changes, **changes})
        if merged != self._changes:
            self._changes = merged
            self.publish()

    def publish(self) -> None:
        """Sign this node's announcement anew, for each of its networks."""
        wall_s = self._environment.wall_time()
        self._addresses = tuple(advertised(self._host.addresses, count_max=proto.ADDRESSES_MAX))
        self._seq = max(self._seq + 1, int(wall_s * 1000))
        for membership in self._trust.own_memberships().values():
            sealed = seal_announcement(self._identity, self._own(membership, int(wall_s)))
            try:
                self._store(open_announcement(sealed, wall_s=wall_s))
            except StaleRecord as error:
                # The membership has ended, or the clock was set to before it began: nobody would
                # believe what is said on its strength.
                logger.warning("announce.unbelievable", extra={"error": str(error)})

    def _own(self, membership: Membership, wall_s: int) -> Announcement:
        return Announcement(
            peer=self._identity.peer_id,
            seq=self._seq,
            issued_wall_s=wall_s,
            membership=membership.proof,
            name=self._name,
            addresses=self._addresses,
            **self._changes,
        )

    # What is known ------------------------------------------------------------------

    def announcement(self, peer: PeerId) -> Announcement | None:
        """Return the newest announcement of a member, this node included."""
        self._expire()
        return self._table.newest(peer)

    def announcements(self) -> list[Announcement]:
        """Return the newest announcement of each other member, in PeerId order."""
        self._expire()
        others = [peer for peer in self._table.peers() if peer != self._identity.peer_id]
        return [found for peer in others if (found := self._table.newest(peer)) is not None]

    # Running ------------------------------------------------------------------------

    async def run(self) -> None:
        """Repeat this node's announcements, and renew them when its addresses change."""
        self.publish()
        published_s = trio.current_time()
        while True:
            await trio.sleep(CHECK_INTERVAL_S)
            addresses = tuple(advertised(self._host.addresses, count_max=proto.ADDRESSES_MAX))
            is_due = trio.current_time() - published_s >= ANNOUNCE_INTERVAL_S
            if is_due or addresses != self._addresses:
                self.publish()
                published_s = trio.current_time()

    async def push(self, peer: PeerId) -> None:
        """Send a member all that is known, then what is newer, while it is one.

        Called again for a member that returned, it starts anew: the former stream is of no use.
        """
        if (former := self._pushing.get(peer)) is not None:
            former.cancel()
        with trio.CancelScope() as scope:
            self._pushing[peer] = scope
            while self._trust.is_member(peer):
                try:
                    await self._push_on_stream(peer)
                except (NetworkError, RemoteProtocolError) as error:
                    logger.debug("announce.broken", extra={"peer": peer, "error": str(error)})
                    await trio.sleep(REOPEN_PAUSE_S)
        if self._pushing.get(peer) is scope:
            del self._pushing[peer]

    async def _push_on_stream(self, peer: PeerId) -> None:
        """Push until the peer is no member, or another connection to it is the better one."""
        stream = await self._host.open_stream(peer, [PROTOCOL])
        messages = MessageStream(stream)
        sent: dict[Key, int] = {}
        try:
            while (
                self._trust.is_member(peer) and self._host.connection_to(peer) is stream.connection
            ):
                changed = self._changed
                await self._send_newer(messages, sent)
                with trio.move_on_after(CHECK_INTERVAL_S):
                    await changed.wait()
                    await trio.sleep(COALESCE_S)
            await messages.close_write()
        except BaseException:
            stream.reset()
            raise

    async def _send_newer(self, messages: MessageStream, sent: dict[Key, int]) -> None:
        self._expire()
        records = self._table.of_networks(self._trust.shared_networks(messages.peer))
        is_first = not sent
        for gone in sent.keys() - {record.key for record in records}:
            del sent[gone]
        for record in records:
            # A peer is told what it said itself once: its clock may have been set back since.
            is_echo = record.key[0] == messages.peer and not is_first
            if not is_echo and record.seq > sent.get(record.key, -1):
                await messages.send(Announce(announcement=record.signed.envelope))
                sent[record.key] = record.seq

    async def _serve(self, stream: Stream) -> None:
        messages = MessageStream(stream)
        count = 0
        try:
            while (
                pushed := await messages.receive_or_end(Announce, bytes_max=FRAME_BYTES_MAX)
            ) is not None:
                self._receive(pushed.announcement, stream.peer)
                count += 1
                if count % BURST_RECORDS == 0:
                    await trio.sleep(BURST_PAUSE_S)
        except RemoteProtocolError as error:
            error.penalty = BREACH_PENALTY
            raise

    def _receive(self, sealed: bytes, deliverer: PeerId) -> None:
        """Store an announcement if it is new, verified, and of a network in common.

        Raises:
            RemoteProtocolError: It is forged or malformed.
        """
        if self._table.holds(sealed):
            return
        try:
            signed = open_announcement(sealed, wall_s=self._environment.wall_time())
        except StaleRecord as error:
            logger.debug("announce.stale", extra={"peer": deliverer, "error": str(error)})
            return
        if signed.membership.network_id not in self._trust.shared_networks(deliverer):
            return
        if signed.peer != self._identity.peer_id:
            if self._store(signed):
                self._on_record(signed)
        elif signed.announcement.seq > self._seq:
            # This node's own word from before its clock was set back: speak louder.
            self._seq = signed.announcement.seq
            self.publish()

    def _store(self, signed: SignedAnnouncement) -> bool:
        age_s = self._environment.wall_time() - signed.announcement.issued_wall_s
        now_s = NowSeconds(trio.current_time())
        if not self._table.add(signed, age_s=age_s, now_s=now_s):
            return False
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        return True

    def _expire(self) -> None:
        self._table.expire(now_s=NowSeconds(trio.current_time()))
