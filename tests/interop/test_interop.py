"""swarmpy, js-libp2p, go-libp2p and py-libp2p understand each other, whichever of them dials."""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import trio
from interop_peers import ECHO, KEYS, RESET, STACKS, UPPER, PeerProcess, Peers, lone_peer
from net_hosts import DATA, RST, SYN, WINDOW, RawPeer, exchange, frame, raw_peer, receive_all

from swarmpy.abc import Address, Connection, ProtocolId, Stream
from swarmpy.errors import ConnectionLost, HandshakeFailed, StreamReset
from swarmpy.identity import Identity, parse_peer_id
from swarmpy.net.host import NativeHost
from swarmpy.net.stream import NativeStream
from swarmpy.net.tcp import TcpNetwork
from swarmpy.proto.multistream import Dialer

MIB = 1024 * 1024
SIZES = [64, 16 * 1024, 256 * 1024, MIB, 4 * MIB]

pytestmark = pytest.mark.interop


@dataclass
class Link:
    """A swarmpy host and a peer of another stack, connected."""

    host: NativeHost
    peer: PeerProcess
    connection: Connection

    async def ask(self, do: str, **arguments: object) -> dict[str, object]:
        """Let the peer do something with the host."""
        return await self.peer.must(do, peer=str(self.host.identity.peer_id), **arguments)

    async def open(self, protocol: ProtocolId) -> Stream:
        """Open a stream to the peer."""
        return await self.host.open_stream(self.peer.peer, [protocol])


async def connect(host: NativeHost, peer: PeerProcess, *, dialler: str) -> Link:
    """Let one of the two dial the other."""
    events = host.connection_events()
    address = await host.listen(Address("/ip4/127.0.0.1/tcp/0"))
    with trio.fail_after(30):
        if dialler == "swarmpy":
            await host.dial(peer.peer, [peer.address])
        else:
            await peer.must("dial", address=f"{address}/p2p/{host.identity.peer_id}")
        return Link(host, peer, (await anext(events)).connection)


@pytest.fixture(params=["swarmpy", "the peer"])
def dialler(request: pytest.FixtureRequest) -> str:
    """Who dials; afterwards both sides do the same."""
    return str(request.param)


@pytest.fixture
async def link(stack: str, peers: Peers, host: NativeHost, dialler: str) -> AsyncIterator[Link]:
    """Each test runs with every stack, dialled by either side."""
    made = await connect(host, await peers.get(stack), dialler=dialler)
    with trio.fail_after(60):
        yield made


class TestTwoStacks:
    """What two peers on one connection can expect of each other."""

    async def test_each_proves_to_be_who_it_says(self, link: Link, dialler: str) -> None:
        assert link.connection.peer == link.peer.peer
        assert link.connection.direction == ("outbound" if dialler == "swarmpy" else "inbound")

    async def test_swarmpy_learns_who_the_peer_is(self, link: Link) -> None:
        info = await link.host.wait_identified(link.peer.peer)
        assert {ECHO, UPPER, RESET} <= set(info.protocols)
        assert [address.partition("/p2p/")[0] for address in info.addresses] == [link.peer.address]
        assert info.record_seq > 0, "no signed peer record"
        assert "libp2p" in info.agent

    async def test_the_peer_learns_who_swarmpy_is(self, link: Link) -> None:
        """Its own library checks the signature of the peer record."""
        found = await link.ask("identify")
        assert str(found["agent"]).startswith("swarmpy/")
        protocols, addresses = found["protocols"], found["record_addresses"]
        assert isinstance(protocols, list)
        assert {ECHO, UPPER, RESET} <= set(protocols)
        assert addresses == list(link.host.addresses)

    async def test_a_ping_comes_back_each_way(self, link: Link) -> None:
        assert 0 < await link.host.ping(link.peer.peer) < 10
        found = await link.ask("ping")
        assert isinstance(found["rtt_s"], (int, float))
        assert 0 <= found["rtt_s"] < 10

    @pytest.mark.parametrize("size", SIZES)
    async def test_the_peer_echoes_what_swarmpy_sends(self, link: Link, size: int) -> None:
        sent = random.Random(size).randbytes(size)
        stream = await link.open(ECHO)
        assert await exchange(stream, sent) == sent
        await stream.close_write()
        assert await stream.receive_some() == b""

    async def test_swarmpy_echoes_what_the_peer_sends(self, link: Link) -> None:
        """The peer compares what comes back."""
        assert (await link.ask("echo", sizes=SIZES))["echoed"] == SIZES

    async def test_fifty_streams_of_swarmpy_run_side_by_side(self, link: Link) -> None:
        async def converse(index: int) -> None:
            sent = random.Random(index).randbytes(40_000)
            stream = await link.open(ECHO)
            assert await exchange(stream, sent) == sent
            await stream.close_write()
            assert await stream.receive_some() == b""

        async with trio.open_nursery() as nursery:
            for index in range(50):
                nursery.start_soon(converse, index)

    async def test_fifty_streams_of_the_peer_run_side_by_side(self, link: Link) -> None:
        assert (await link.ask("parallel", count=50, size=40_000))["count"] == 50

    async def test_the_peer_answers_after_swarmpys_end(self, link: Link) -> None:
        """The end is asked for in one go with the proposal; js-libp2p resets a stream that ends
        before its protocol is agreed on, so it has to wait for the answer."""
        stream = await link.open(UPPER)
        await stream.send_all(b"question")
        await stream.close_write()
        assert await receive_all(stream) == b"QUESTION"

    async def test_swarmpy_answers_after_the_peers_end(self, link: Link) -> None:
        assert (await link.ask("half-close", text="question"))["answer"] == "QUESTION"

    async def test_a_reset_of_the_peer_is_no_end(self, link: Link) -> None:
        stream = await link.open(RESET)
        await stream.send_all(b"x")
        with pytest.raises(StreamReset, match="the peer gave it up"):
            await receive_all(stream)
        assert await exchange(await link.open(ECHO), b"hello") == b"hello"

    async def test_a_reset_of_swarmpy_is_no_end(self, link: Link) -> None:
        assert (await link.ask("reset"))["was_reset"] is True
        assert (await link.ask("echo", sizes=[64]))["echoed"] == [64]

    async def test_they_find_the_one_protocol_both_speak(self, link: Link) -> None:
        newer = ProtocolId("/swarmpy-test/echo/2")
        stream = await link.host.open_stream(link.peer.peer, [newer, ECHO])
        assert stream.protocol == ECHO
        assert await exchange(stream, b"hello") == b"hello"


class TestOneStack:
    """What concerns the process of a peer, or its keys, and not a connection that is open."""

    async def test_a_peer_that_disappears_is_a_lost_connection(
        self, host: NativeHost, stack: str, dialler: str
    ) -> None:
        with lone_peer(stack) as peer:
            await peer.start()
            link = await connect(host, peer, dialler=dialler)
            stream = await link.open(ECHO)
            assert await exchange(stream, b"hello") == b"hello"
            peer.process.kill()
            with trio.fail_after(5), pytest.raises(ConnectionLost):
                await receive_all(stream)

    async def test_the_peer_sees_a_reset_that_is_all_swarmpy_says_on_a_stream(
        self,
        host: NativeHost,
        peers: Peers,
        stack: str,
        dialler: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """py-libp2p overlooks one in a frame that also acknowledges, and waits for 30 s.

        Method: swarmpy resets one stream before a protocol is agreed on, then serves again.
        """
        serve, is_resetting = host._router.serve, False

        async def reset_or_serve(stream: NativeStream) -> None:
            if is_resetting:
                stream.reset()
            else:
                await serve(stream)

        monkeypatch.setattr(host._router, "serve", reset_or_serve)
        link = await connect(host, await peers.get(stack), dialler=dialler)
        assert (await link.ask("reset"))["was_reset"] is True  # after whatever it opens unasked
        is_resetting = True
        with trio.fail_after(10):
            refused = await link.peer.ask("reset", peer=str(host.identity.peer_id))
        assert "error" in refused
        is_resetting = False
        assert (await link.ask("echo", sizes=[64]))["echoed"] == [64]

    async def test_the_peer_refuses_swarmpy_under_another_peers_id(
        self, host: NativeHost, peers: Peers, stack: str
    ) -> None:
        address = await host.listen(Address("/ip4/127.0.0.1/tcp/0"))
        peer = await peers.get(stack)
        other = Identity(b"x" * 32).peer_id
        assert "error" in await peer.ask("dial", address=f"{address}/p2p/{other}")

    async def test_swarmpy_refuses_the_peer_under_another_peers_id(
        self, host: NativeHost, peers: Peers, stack: str
    ) -> None:
        peer = await peers.get(stack)
        with pytest.raises(HandshakeFailed, match="expected peer"):
            await host.dial(Identity(b"x" * 32).peer_id, [peer.address])

    @pytest.mark.parametrize("size", [65_519, 65_536, 131_072, 262_000])
    async def test_the_peer_takes_frames_as_large_as_its_window(
        self, peers: Peers, stack: str, size: int
    ) -> None:
        """Method: one data frame of each size, sent below our own muxer, comes back."""
        peer = await peers.get(stack)
        byte_stream = await TcpNetwork().dial(peer.address)
        try:
            with trio.fail_after(30):
                raw = await raw_peer(byte_stream, f"frames of {size}")
                if stack == "py-libp2p":
                    await agree_on_yamux(raw)
                hello = b"\x13/multistream/1.0.0\n"
                proposal = hello + bytes([len(ECHO) + 1]) + ECHO.encode() + b"\n"
                await raw.send(frame(DATA, SYN, 1, len(proposal), proposal))
                await raw.send(frame(WINDOW, 0, 1, MIB))
                sent = random.Random(size).randbytes(size)
                echoed = proposal + sent
                message = frame(DATA, 0, 1, size, sent)
                for start in range(0, len(message), 65_519):
                    await raw.send(message[start : start + 65_519])
                assert await receive_stream(raw, 1, len(echoed)) == echoed
        finally:
            byte_stream.close()


@pytest.mark.parametrize(
    ("stack", "key"), [(s, k) for s in STACKS for k in KEYS[s]], indirect=["stack"]
)
async def test_a_peer_with_any_kind_of_key_is_understood(
    host: NativeHost, peers: Peers, stack: str, key: str, dialler: str
) -> None:
    link = await connect(host, await peers.get(stack, key), dialler=dialler)
    with trio.fail_after(30):
        assert parse_peer_id(str(link.peer.peer)) == link.connection.peer
        assert await exchange(await link.open(ECHO), b"hello") == b"hello"
        info = await link.host.wait_identified(link.peer.peer)
        assert info.record_seq > 0
        assert (await link.ask("echo", sizes=[64]))["echoed"] == [64]


async def agree_on_yamux(raw: RawPeer) -> None:
    """Agree on the muxer after the handshake: py-libp2p does not within it."""
    dialer = Dialer(["/yamux/1.0.0"])
    await raw.send(dialer.start())
    while dialer.selected is None:
        dialer.receive(await raw.receive())


async def receive_stream(raw: RawPeer, stream_id: int, size: int) -> bytes:
    """Return the next `size` bytes that arrive on a Yamux stream of a bare connection."""
    received, pending = b"", b""
    while len(received) < size:
        while len(pending) < 12:
            pending += await raw.receive()
        _, kind, flags, from_stream, length = struct.unpack("!BBHII", pending[:12])
        assert not flags & RST or from_stream != stream_id, "the peer reset the stream"
        pending = pending[12:]
        while kind == DATA and len(pending) < length:
            pending += await raw.receive()
        if kind == DATA:
            data, pending = pending[:length], pending[length:]
            received += data if from_stream == stream_id else b""
    return received
