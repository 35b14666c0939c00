"""One neighbour: what it is to be sent, and the task that sends it on a stream of its own.

What waits is kept by record, not by message, so that a slow neighbour gets the newest of each and
costs no more than the table. Spec: protocols/announce.md, States.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Collection

import trio

from swarmpy.abc import Connection, Host, ProtocolId
from swarmpy.agenda import Agenda
from swarmpy.discovery.records import Record
from swarmpy.discovery.trust import Trust
from swarmpy.errors import NetworkError, RemoteProtocolError
from swarmpy.identity import PeerId
from swarmpy.net.messages import MessageStream
from swarmpy.proto import announce as proto
from swarmpy.proto.announce import (
    ENTRIES_PER_MESSAGE_MAX,
    RECORDS_BYTES_MAX,
    RECORDS_PER_MESSAGE_MAX,
    Have,
    Leave,
    Message,
    Records,
    SignedAnnouncement,
    Want,
)
from swarmpy.proto.membership import NetworkId
from swarmpy.proto.revocation import SignedRevocation
from swarmpy.proto.summary import pack_entries

logger = logging.getLogger(__name__)

PROTOCOL = ProtocolId(proto.PROTOCOL)

PUSH_SPACING_S = 0.2
PUSH_SPACING_S_MAX = 1.0
"""Between two messages of pushed records: the first goes out at once, the next so much later, and
twice that while there is always more. In a storm (many nodes start, a network heals) the records of
a second share a message, and most of what a message costs."""

REOPEN_PAUSE_S = 0.5
REOPEN_PAUSE_S_MAX = 60.0
"""Before a broken stream to a member that is still connected is opened anew; doubles."""

CONTROLS_MAX = 256
"""Questions and answers waiting for one neighbour; beyond it the oldest are forgotten."""

SHARED_S = 1.0
"""For so long a network that the neighbour was found to share is taken to be shared still: it is
looked at for each record, and once more before one is sent."""

LEAVE_GRACE_S = 1.0
"""From the last word on a connection that is given up to its end."""


class Link:
    """The sending side towards one connected member.

    Attributes:
        is_eager: Whether records are pushed to it, or only told of.
        since_s: When the member connected.
        has_parted: Whether either side gave the connection up on purpose.
    """

    def __init__(
        self,
        host: Host,
        peer: PeerId,
        *,
        trust: Trust,
        agenda: Agenda,
        record_of: Callable[[bytes], Record | None],
        on_broken: Callable[[Link], None],
    ) -> None:
        """Prepare to send.

        Args:
            agenda: Wakes this up when more may be pushed.
            record_of: The record of a key, as it is when it is sent.
            on_broken: Called when a stream broke: what was sent last may not have arrived.
        """
        self.peer = peer
        self.is_eager = False
        self.since_s = trio.current_time()
        self.has_parted = False
        self.has_compared = False
        """Whether the neighbour has told its root since it connected."""
        self.is_asked = False
        """Whether it was asked to push over a stream that it had opened."""
        self.compared_s = -math.inf
        """When this node told its own last."""
        self.scope = trio.CancelScope()
        self._host = host
        self._trust = trust
        self._agenda = agenda
        self._record_of = record_of
        self._on_broken = on_broken
        self._pushes: dict[bytes, None] = {}
        self._answers: dict[bytes, None] = {}
        self._haves: dict[bytes, int] = {}
        self._controls: deque[Message] = deque(maxlen=CONTROLS_MAX)
        self._wake = trio.Event()
        self._shared: frozenset[NetworkId] = frozenset()
        self._shared_until_s = -math.inf
        self._connection: Connection | None = None
        self._open: MessageStream | None = None
        """The stream, while the task has nothing to do."""
        self._refused: Message | None = None
        """What would have had to wait."""
        self._is_poked = False
        self._is_sending = False
        self._is_superseded = False
        self._is_push_due = False
        self._pushed_s = -math.inf
        self._push_spacing_s = PUSH_SPACING_S

    def shares(self, network_id: NetworkId, now_s: float) -> bool:
        """Whether the neighbour is in a network of this node: it hears of no other's members."""
        if now_s >= self._shared_until_s or network_id not in self._shared:
            self._shared = self._trust.shared_networks(self.peer)
            self._shared_until_s = now_s + SHARED_S
        return network_id in self._shared

    @property
    def is_drained(self) -> bool:
        """Whether nothing waits to be sent."""
        waiting = self._controls or self._answers or self._pushes or self._haves
        return not waiting and self._refused is None

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, and all that was sent was taken by the connection."""
        return self.is_drained and not self._is_sending

    @property
    def answers(self) -> Collection[bytes]:
        """Keys of the records that were asked for and are not sent yet."""
        return self._answers

    @property
    def connection(self) -> Connection | None:
        """The connection to use now, None if the peer is not connected."""
        return self._host.connection_to(self.peer)

    # What is to be sent ---------------------------------------------------------------

    def push(self, key: bytes, *, is_urgent: bool = False) -> None:
        """Send a record, or what is newer of it by then; an urgent one takes the others along."""
        if is_urgent:
            self._push_waiting()
        elif not self._pushes:
            wait_s = self._pushed_s + self._push_spacing_s - trio.current_time()
            self._is_push_due = wait_s <= 0
            if self._is_push_due:
                self._poke()
            else:
                self._agenda.after(wait_s, self._push_waiting)
        self._pushes[key] = None

    def _push_waiting(self) -> None:
        self._is_push_due = True
        self._poke()

    def _space_pushes(self) -> None:
        now_s = trio.current_time()
        is_storm = now_s < self._pushed_s + 2 * self._push_spacing_s
        spacing_s = 2 * self._push_spacing_s if is_storm else PUSH_SPACING_S
        self._push_spacing_s = min(spacing_s, PUSH_SPACING_S_MAX)
        self._pushed_s = now_s

    def answer(self, key: bytes) -> None:
        """Send a record that was asked for."""
        self._answers[key] = None
        self._poke()

    def tell(self, key: bytes, version: int) -> None:
        """Say that this node has a record."""
        self._haves[key] = version
        self._poke()

    def heard(self, key: bytes) -> None:
        """The neighbour has a record: it need not be sent or told of."""
        self._pushes.pop(key, None)
        self._haves.pop(key, None)

    def say(self, message: Message) -> None:
        """Send any other message."""
        self._controls.append(message)
        self._poke()

    def want(self, keys: list[bytes], *, is_graft: bool = False) -> None:
        """Ask for records, and maybe to be pushed what comes from now on."""
        if is_graft and not keys:
            self.say(Want(keys=b"", is_graft=True))
        for start in range(0, len(keys), ENTRIES_PER_MESSAGE_MAX):
            asked = b"".join(keys[start : start + ENTRIES_PER_MESSAGE_MAX])
            self.say(Want(keys=asked, is_graft=is_graft))

    def part(self) -> None:
        """Give the connection up, once what waits is sent."""
        if not self.has_parted:
            self.has_parted = True
            self.say(Leave())

    def check(self, best: Connection | None) -> None:
        """Move to another stream where another connection is the better one now."""
        if self._connection is not None and self._connection is not best:
            self._is_superseded = True
            self._poke()

    # Sending --------------------------------------------------------------------------

    async def run(self) -> None:
        """Send what is to be sent, until the peer is no member or `scope` is cancelled."""
        pause_s = REOPEN_PAUSE_S
        with self.scope:
            while self._trust.is_member(self.peer):
                try:
                    await self._send_on_stream()
                    pause_s = REOPEN_PAUSE_S
                except (NetworkError, RemoteProtocolError) as error:
                    logger.debug("announce.broken", extra={"peer": self.peer, "error": str(error)})
                    await trio.sleep(pause_s)
                    pause_s = min(pause_s * 2, REOPEN_PAUSE_S_MAX)
                    self._on_broken(self)

    async def _send_on_stream(self) -> None:
        """Send until the peer is no member, or another connection to it is the better one."""
        await self._wait_work()
        stream = await self._host.open_stream(self.peer, [PROTOCOL])
        self._connection = stream.connection
        self._is_superseded = False
        messages = MessageStream(stream)
        try:
            while self._is_wanted(stream.connection):
                # Another was the better one for a while, and is not any more.
                self._is_superseded = False
                while (message := self._next()) is not None:
                    self._is_sending = True
                    await messages.send(message)
                    self._is_sending = False
                    if isinstance(message, Leave):
                        await trio.sleep(LEAVE_GRACE_S)
                        stream.connection.close()
                        return
                self._open = messages
                await self._wait_work()
                self._open = None
            await messages.close_write()
        except BaseException:
            stream.reset()
            raise
        finally:
            self._connection = self._open = None
            self._is_sending = False

    def _is_wanted(self, connection: Connection) -> bool:
        return self._trust.is_member(self.peer) and self.connection is connection

    def _poke(self) -> None:
        """There is something to send: do so once whoever put it down has let go."""
        if not self._is_poked:
            self._is_poked = True
            self._agenda.soon(self._send_now)

    def _send_now(self) -> None:
        """Send what needs no waiting; the rest, and whatever is not ordinary, is the task's."""
        self._is_poked = False
        messages = self._open
        is_lost = messages is None or self._is_superseded
        if messages is None or is_lost or not self._is_wanted(messages.stream.connection):
            self._wake.set()
            return
        while (message := self._next()) is not None:
            if isinstance(message, Leave) or not messages.send_nowait(message):
                self._refused = message
                self._wake.set()
                return

    async def _wait_work(self) -> None:
        while not self._has_work():
            self._wake = trio.Event()
            await self._wake.wait()

    def _has_work(self) -> bool:
        is_urgent = bool(self._controls or self._answers or self._haves or self._is_superseded)
        is_due = self._is_push_due and bool(self._pushes)
        return is_urgent or is_due or self._refused is not None

    def _next(self) -> Message | None:
        if self._refused is not None:
            refused, self._refused = self._refused, None
            return refused
        if self._controls:
            return self._controls.popleft()
        if self._answers and (records := self._take_records(self._answers, is_answer=True)):
            return records
        is_due = self._is_push_due and bool(self._pushes)
        if is_due and (records := self._take_records(self._pushes, is_answer=False)):
            self._space_pushes()
            return records
        if self._haves:
            told = list(self._haves.items())[:ENTRIES_PER_MESSAGE_MAX]
            for key, _ in told:
                del self._haves[key]
            return Have(entries=pack_entries(told))
        return None

    def _take_records(self, keys: dict[bytes, None], *, is_answer: bool) -> Records | None:
        """Take records from the front of `keys`, as many as fit one message."""
        networks = self._trust.shared_networks(self.peer)
        taken: tuple[list[bytes], list[bytes], list[bytes]] = ([], [], [])
        size = count = 0
        while keys and count < RECORDS_PER_MESSAGE_MAX:
            key = next(iter(keys))
            record = self._record_of(key)
            if record is not None and record.network_id in networks:
                size += len(record.envelope)
                if size > RECORDS_BYTES_MAX:
                    break
                taken[_kind(record)].append(record.envelope)
                count += 1
            del keys[key]
        if not count:
            return None
        announcements, statements, revocations = map(tuple, taken)
        return Records(
            announcements=announcements,
            statements=statements,
            revocations=revocations,
            is_answer=is_answer,
        )


def _kind(record: Record) -> int:
    if isinstance(record, SignedAnnouncement):
        return 0
    return 2 if isinstance(record, SignedRevocation) else 1
