"""Identify and ping as a host runs them: asks, answers, pushes, and remembers what peers said.

Spec: protocols/identify.md, protocols/ping.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import trio

from swarmpy.abc import Address, Connection, Priority, ProtocolId, Stream, WallSeconds
from swarmpy.errors import BadMessage, FrameTooLarge, NetworkError, PeerTimeout, ProtocolError
from swarmpy.identity import Identity, PeerId, RandomBytes
from swarmpy.net.connection import NativeConnection
from swarmpy.net.messages import MessageStream
from swarmpy.net.stream import NativeStream
from swarmpy.proto import identify, multiaddr, ping
from swarmpy.proto.identify import IdentifyInfo
from swarmpy.proto.multistream import Dialer

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""For one identify exchange or ping."""

PING_IDLE_S = 60.0
"""A ping stream that is not used this long is closed."""

IDENTIFY = ProtocolId(identify.PROTOCOL)
IDENTIFY_PUSH = ProtocolId(identify.PUSH_PROTOCOL)
PING = ProtocolId(ping.PROTOCOL)


class PeerInfo:
    """What this node says about itself, and what others said about themselves."""

    def __init__(
        self,
        identity: Identity,
        *,
        agent: str,
        random: RandomBytes,
        addresses: Callable[[], Sequence[Address]],
        protocols_for: Callable[[PeerId], Sequence[ProtocolId]],
        wall_time: Callable[[], WallSeconds] | None,
    ) -> None:
        """Args: wall_time: Dates the signed peer record; without it none is sent."""
        self._identity = identity
        self._agent = agent
        self._random = random
        self._addresses = addresses
        self._protocols_for = protocols_for
        self._wall_time = wall_time
        self._seq = 0
        self._record = b""
        self._recorded: list[Address] | None = None  # what `_record` says
        self._infos: dict[Connection, IdentifyInfo] = {}
        self._news = trio.lowlevel.ParkingLot()

    def of(self, connection: Connection) -> IdentifyInfo | None:
        """Return what was said on a connection, None before it was."""
        return self._infos.get(connection)

    def forget(self, connection: Connection) -> None:
        """Forget what was said on a connection that is closed."""
        self._infos.pop(connection, None)
        self._news.unpark_all()

    def observations(self) -> list[tuple[Connection, str]]:
        """Return where the peers say they see this node, by connection."""
        return [
            (connection, info.observed_address)
            for connection, info in self._infos.items()
            if info.observed_address
        ]

    async def wait_news(self) -> None:
        """Wait until any peer says something about itself, or is forgotten."""
        await self._news.park()

    async def ask(self, connection: NativeConnection) -> None:
        """Ask a peer who it is; without an answer nothing is known and nothing breaks."""
        try:
            with trio.fail_after(TIMEOUT_S), _opened(connection, IDENTIFY) as stream:
                await stream.close_write()
                await self._take(stream)
        except (NetworkError, ProtocolError, trio.TooSlowError) as error:
            fields = {"peer": connection.peer, "error": str(error)}
            logger.debug("identify.failed", extra=fields)

    async def answer(self, stream: Stream) -> None:
        """Handler of identify."""
        await self._tell(stream)

    async def take_push(self, stream: Stream) -> None:
        """Handler of identify/push: the peer says what changed."""
        with trio.move_on_after(TIMEOUT_S):
            await self._take(stream)

    async def push(self, connection: NativeConnection) -> None:
        """Tell a peer what changed here, if it listens to that."""
        info = self.of(connection)
        if info is None or IDENTIFY_PUSH not in info.protocols:
            return
        try:
            with trio.fail_after(TIMEOUT_S), _opened(connection, IDENTIFY_PUSH) as stream:
                await self._tell(stream)
                while await stream.receive_some():  # to its end, or its refusal
                    pass
        except (NetworkError, ProtocolError, trio.TooSlowError) as error:
            logger.debug("push.failed", extra={"peer": connection.peer, "error": str(error)})

    async def answer_ping(self, stream: Stream) -> None:
        """Handler of ping: send every 32 bytes back, to whoever also reads them."""
        received = b""
        while True:
            with trio.move_on_after(PING_IDLE_S) as scope:
                data = await stream.receive_some()
                received += data
                whole = len(received) - len(received) % ping.PAYLOAD_BYTES
                if whole:
                    await stream.send_all(received[:whole])
                    received = received[whole:]
            if scope.cancelled_caught or not data:
                return

    async def ping(self, connection: NativeConnection) -> float:
        """Send one ping and return its round trip in seconds.

        Raises:
            RemoteProtocolError: Something else came back.
            PeerTimeout, ConnectionLost, StreamReset: Nothing came back.
        """
        payload = self._random.randbytes(ping.PAYLOAD_BYTES)
        start_s = trio.current_time()
        received = b""
        try:
            with trio.fail_after(TIMEOUT_S), _opened(connection, PING) as stream:
                await stream.send_all(payload)
                while len(received) < len(payload) and (data := await stream.receive_some()):
                    received += data
                ping.check_pong(payload, received)
                rtt_s = trio.current_time() - start_s
                await stream.close_write()
        except trio.TooSlowError:
            raise PeerTimeout(f"no answer to a ping within {TIMEOUT_S:.0f} s") from None
        return rtt_s

    async def _tell(self, stream: Stream) -> None:
        addresses = list(self._addresses())[: identify.ADDRESSES_MAX]
        info = IdentifyInfo(
            agent=self._agent,
            protocols=tuple(self._protocols_for(stream.peer)),
            addresses=tuple(addresses),
            observed_address=_known_or_nothing(stream.connection.remote_address),
        )
        message = identify.encode(
            info,
            public_key=self._identity.public_key,
            signed_record=self._signed_record(addresses),
        )
        await MessageStream(stream).send_frame(message)
        await stream.close_write()

    def _signed_record(self, addresses: list[Address]) -> bytes:
        """Return the signed peer record, made anew only where the addresses changed."""
        if self._wall_time is not None and self._recorded != addresses:
            self._seq = max(self._seq + 1, int(self._wall_time() * 1000))
            self._record = identify.seal_peer_record(self._identity, addresses, seq=self._seq)
            self._recorded = addresses
        return self._record

    async def _take(self, stream: Stream) -> None:
        """Read an identify message, which may come in parts, and remember it."""
        frames = MessageStream(stream)
        message = b""
        count = 0
        while (part := await frames.receive_frame(identify.MESSAGE_BYTES_MAX)) is not None:
            message += part
            count += 1
            if len(message) > identify.MESSAGE_BYTES_MAX or count > identify.PARTS_MAX:
                said = f"identify of {len(message)} bytes in {count} parts"
                raise FrameTooLarge(said, peer=stream.peer)
        info = identify.decode(message, peer=stream.peer)
        if stream.connection.is_open:
            self._infos[stream.connection] = info
            self._news.unpark_all()


def _known_or_nothing(address: Address) -> str:
    """Return an address that identify can carry, "" for one in protocols unknown here."""
    try:
        multiaddr.components(address)
    except BadMessage:
        return ""
    return address


@contextmanager
def _opened(connection: NativeConnection, protocol: ProtocolId) -> Iterator[NativeStream]:
    """Open a stream for the block, and give it up where the block does not end well."""
    stream = connection.open_stream(protocol, Priority.CONTROL)
    stream.propose(Dialer([protocol]))
    try:
        yield stream
    except BaseException:
        stream.reset()
        raise
