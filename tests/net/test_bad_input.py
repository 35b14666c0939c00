"""What strangers and hostile peers send costs them a stream or the connection, never the node."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from net_hosts import (
    ACK,
    DATA,
    ECHO,
    PING,
    RST,
    SYN,
    WINDOW,
    RawPeer,
    World,
    connect,
    echo,
    exchange,
    frame,
    identity,
    receive_raw,
    send_raw,
    wait_raw_end,
    wait_until_closed,
)

from swarmpy import config
from swarmpy.abc import Address, ConnectionEvent, Stream
from swarmpy.errors import ConnectionLost, DialFailed, FrameTooLarge, HandshakeFailed
from swarmpy.net.host import NativeHost
from swarmpy.net.messages import MessageStream
from swarmpy.net.peer_info import TIMEOUT_S
from swarmpy.proto import yamux
from swarmpy.proto.multistream import HEADER, LINE_BYTES_MAX, Dialer, encode_line
from swarmpy.proto.noise import HANDSHAKE_BYTES_MAX
from swarmpy.proto.yamux import INITIAL_WINDOW_BYTES

NOISE_PROPOSAL = Dialer(["/noise"]).start()

STRANGE = {
    "garbage": random.Random(1).randbytes(500),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tls": bytes.fromhex("160301020001000100") + bytes(500),
    "endless varint": b"\xff" * 50,
    "other protocol": Dialer(["/plaintext/2.0.0"]).start() + encode_line("/tls/1.0.0") * 40,
    "long line": encode_line(HEADER) + encode_line("a" * LINE_BYTES_MAX),
    "long handshake": NOISE_PROPOSAL + (HANDSHAKE_BYTES_MAX + 1).to_bytes(2, "big"),
    "low-order key": NOISE_PROPOSAL + b"\x00\x20" + bytes(32),
    "short key": NOISE_PROPOSAL + b"\x00\x1f" + bytes(31),
    "forged third message": NOISE_PROPOSAL + b"\x00\x20" + b"\x09" * 32 + b"\x00\xff" + bytes(255),
}

HALF = {
    "silence": b"",
    "half a line": NOISE_PROPOSAL[:5],
    "half a handshake": NOISE_PROPOSAL + b"\x00\x20" + b"\x09" * 32,
    "half a message": NOISE_PROPOSAL + b"\x00\x20" + b"\x09" * 10,
}


async def still_serves(world: World, host: NativeHost) -> None:
    """Check that an honest peer is served as ever."""
    honest = await world.host("honest")
    stream = await honest.open_stream(await connect(honest, host), [ECHO])
    assert await exchange(stream, b"hello") == b"hello"


# Before the peer is proven ----------------------------------------------------------------


@pytest.mark.parametrize("what", STRANGE)
async def test_strange_bytes_on_the_port_are_closed_at_once(tcp: World, what: str) -> None:
    host = await tcp.host("host")
    host.set_handler(ECHO, echo)
    stranger = await tcp.stranger(host)
    await send_raw(stranger, STRANGE[what])
    with trio.fail_after(5):
        await wait_raw_end(stranger)
    await still_serves(tcp, host)


@pytest.mark.parametrize("what", HALF)
async def test_an_unfinished_handshake_on_a_real_port_is_closed(tcp: World, what: str) -> None:
    host = await tcp.host("host", handshake_timeout_s=0.2)
    host.set_handler(ECHO, echo)
    stranger = await tcp.stranger(host)
    await send_raw(stranger, HALF[what])
    with trio.fail_after(5):
        await wait_raw_end(stranger)
    await still_serves(tcp, host)


@pytest.mark.parametrize("what", HALF)
async def test_an_unfinished_handshake_is_closed_within_ten_seconds(
    sim: World, what: str, autojump_clock: trio.testing.MockClock
) -> None:
    host = await sim.host("host")
    stranger = await sim.stranger(host)
    await send_raw(stranger, HALF[what])
    await wait_raw_end(stranger)
    assert trio.current_time() == pytest.approx(10.0)


async def test_a_stranger_that_drips_bytes_is_closed_within_ten_seconds(
    sim: World, autojump_clock: trio.testing.MockClock
) -> None:
    """The deadline is for the whole handshake, not for each byte."""
    host = await sim.host("host")
    stranger = await sim.stranger(host)

    async def drip() -> None:
        for byte in NOISE_PROPOSAL:
            await send_raw(stranger, bytes([byte]))
            await trio.sleep(1)

    with pytest.raises(ConnectionLost):
        await drip()
    assert trio.current_time() < 12


async def test_a_dialled_peer_that_is_silent_is_a_failed_dial(
    sim: World, autojump_clock: trio.testing.MockClock
) -> None:
    dialer = await sim.host("dialer")
    network = sim.network()
    listener = await network.listen(Address("/ip4/0.0.0.0/tcp/0"))
    address = Address(f"/ip4/{network.interface_addresses()[0]}/tcp/10001")
    assert listener.address.endswith("/tcp/10001")
    with pytest.raises(DialFailed, match="no handshake"):
        await dialer.dial(identity("silent").peer_id, [address])
    assert trio.current_time() == pytest.approx(10.0)


async def test_an_impostor_is_refused_and_nothing_is_kept(tcp: World) -> None:
    dialer, impostor = await tcp.host("dialer"), await tcp.host("impostor")
    with pytest.raises(HandshakeFailed, match="expected peer"):
        await dialer.dial(identity("victim").peer_id, impostor.addresses)
    assert not dialer.connections
    await wait_until_closed(impostor)


async def test_handshakes_beyond_the_bound_push_out_the_oldest(
    sim: World, autojump_clock: trio.testing.MockClock
) -> None:
    host = await sim.host("host")
    host.set_handler(ECHO, echo)
    first = await sim.stranger(host)
    network = sim.network()
    strangers = [
        await network.dial(host.addresses[0]) for _ in range(config.HANDSHAKES_PER_SUBNET_MAX + 1)
    ]
    await trio.testing.wait_all_tasks_blocked()
    # One place by IP address: the same machine pushed out its own oldest, nobody else's.
    assert await receive_raw(strangers[0]) == b""
    for spared in (first, strangers[1]):
        assert spared.receive_into_nowait(memoryview(bytearray(1))) is None
    assert trio.current_time() == 0.0
    await still_serves(sim, host)


async def test_a_peer_with_this_nodes_own_key_is_refused(tcp: World) -> None:
    """A copied data folder, or a node that was led to its own port."""
    host = await tcp.host("host")
    host.set_handler(ECHO, echo)
    twin = await tcp.raw_peer(host, name="host")
    with trio.fail_after(5):
        await twin.wait_closed()
    assert not host.connections
    await still_serves(tcp, host)


# After the peer is proven ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "wire",
    [
        frame(WINDOW, SYN, 1, 0) + frame(DATA, 0, 1, INITIAL_WINDOW_BYTES + 1),
        b"\x07" + bytes(11),
        frame(9, 0, 0, 0),
        frame(WINDOW, SYN, 2, 0),
        frame(WINDOW, 0, 2, 5),
        frame(WINDOW, SYN, 1, 0) * 2,
    ],
    ids=["window", "version", "kind", "our id", "our stream", "twice"],
)
async def test_a_broken_rule_of_yamux_costs_the_connection(tcp: World, wire: bytes) -> None:
    host = await tcp.host("host")
    host.set_handler(ECHO, echo)
    peer = await tcp.raw_peer(host)
    await peer.send(wire)
    with trio.fail_after(5):
        await peer.wait_closed()
    assert not host.connections
    await still_serves(tcp, host)


async def test_a_sender_that_ignores_its_window_is_cut_at_the_window(tcp: World) -> None:
    """Goal: bounded memory. Method: push without reading credit; count what was taken."""
    host = await tcp.host("host")
    host.set_handler(ECHO, wait_for_ever)
    peer = await tcp.raw_peer(host)
    events = host.connection_events()
    proposal = Dialer([ECHO]).start()
    await peer.send(frame(DATA, SYN, 1, len(proposal), proposal))
    with trio.fail_after(5), pytest.raises(ConnectionLost):
        await send_for_ever(peer, frame(DATA, 0, 1, 32768, bytes(32768)))
    assert "were granted" in await closing_reason(events)


async def test_a_forged_frame_costs_the_connection(tcp: World) -> None:
    host = await tcp.host("host")
    peer = await tcp.raw_peer(host)
    await send_raw(peer.byte_stream, b"\x00\x20" + bytes(32))
    with trio.fail_after(5):
        await peer.wait_closed()
    assert not host.connections


async def test_a_flood_of_streams_is_refused_and_then_cut(tcp: World) -> None:
    host = await tcp.host("host")
    host.set_handler(ECHO, echo)
    peer = await tcp.raw_peer(host)
    opened = b"".join(frame(WINDOW, SYN, 2 * index + 1, 0) for index in range(300))
    events = host.connection_events()
    await peer.send(opened)
    with trio.fail_after(5):
        await peer.wait_closed()
    assert "streams refused" in await closing_reason(events)
    await still_serves(tcp, host)


async def test_a_peer_that_asks_and_never_reads_is_cut(
    tcp: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every ping costs an answer; unread answers must not pile up, however slowly it asks."""
    monkeypatch.setattr(yamux, "CONTROL_FRAMES_PER_SECOND_MAX", math.inf)
    host = await tcp.host("host")
    host.set_handler(ECHO, echo)
    peer = await tcp.raw_peer(host)
    events = host.connection_events()
    pings = frame(PING, SYN, 0, 1) * 2000
    with trio.fail_after(20), pytest.raises(ConnectionLost):
        await send_for_ever(peer, pings)
    assert "does not read" in await closing_reason(events)
    await still_serves(tcp, host)


async def test_a_stream_that_proposes_nothing_is_reset_in_time(
    sim: World, autojump_clock: trio.testing.MockClock
) -> None:
    host = await sim.host("host")
    peer = await sim.raw_peer(host)
    await peer.send(frame(WINDOW, SYN, 1, 0))
    while True:
        received = await peer.receive()
        if received[1] == PING:
            # Stay alive: answer, as an honest peer does.
            await peer.send(frame(PING, ACK, 0, int.from_bytes(received[8:12], "big")))
        elif received[1] == WINDOW and received[3] & RST:
            break
    assert trio.current_time() == pytest.approx(config.STREAM_NEGOTIATION_TIMEOUT_S)
    assert len(host.connections) == 1


async def test_a_peer_that_never_says_who_it_is_leaves_no_stream(
    sim: World, autojump_clock: trio.testing.MockClock
) -> None:
    """Method: the peer answers the host's identify stream with nothing, and sees it reset."""
    host = await sim.host("host")
    peer = await sim.raw_peer(host)
    with trio.fail_after(TIMEOUT_S + 1):
        while True:
            received = await peer.receive()
            if received[1] == WINDOW and received[3] & RST:
                break
    assert [connection.stream_count for connection in host.connections] == [0]


async def test_a_long_line_on_a_stream_costs_the_stream(tcp: World) -> None:
    host = await tcp.host("host")
    host.set_handler(ECHO, echo)
    peer = await tcp.raw_peer(host)
    line = encode_line(HEADER) + b"\xff\xff\x7f"
    await peer.send(frame(DATA, SYN, 1, len(line), line))
    with trio.fail_after(5):
        while True:
            received = await peer.receive()
            if received[1] == WINDOW and received[3] & RST:
                break
    assert len(host.connections) == 1


async def test_a_frame_beyond_its_bound_costs_the_stream(tcp: World) -> None:
    alice, bob = await tcp.host("alice"), await tcp.host("bob")
    caught: list[Exception] = []

    async def receive(stream: Stream) -> None:
        try:
            await MessageStream(stream).receive_frame(1000)
        except FrameTooLarge as error:
            caught.append(error)
            raise

    bob.set_handler(ECHO, receive)
    stream = await alice.open_stream(await connect(alice, bob), [ECHO])
    frames = MessageStream(stream)
    await frames.send_frame(bytes(1001))
    with pytest.raises(Exception, match="gave it up"):
        await frames.receive_frame(1000)
    assert "1001 bytes exceeds 1000" in str(caught[0])
    assert len(alice.connections) == 1


async def send_for_ever(peer: RawPeer, wire: bytes) -> None:
    while True:
        await peer.send(wire)


async def closing_reason(events: AsyncIterator[ConnectionEvent]) -> str:
    """Wait for a connection to be closed, and return why."""
    with trio.fail_after(5):
        while (event := await anext(events)).kind != "closed":
            pass
    return event.reason


async def wait_for_ever(_: Stream) -> None:
    await trio.sleep_forever()
