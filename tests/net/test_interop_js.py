"""swarmpy and js-libp2p understand each other on the wire, whichever of them dials."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from swarmpy.abc import Address, ProtocolId, Stream, WallSeconds
from swarmpy.identity import Identity, PeerId, parse_peer_id
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork

JS = Path(__file__).parent.parent / "js"
ECHO = ProtocolId("/swarmpy-test/echo/1")
SIZES = (64, 16 * 1024, 256 * 1024, 1024 * 1024)

pytestmark = [
    pytest.mark.node_js,
    pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed"),
    pytest.mark.skipif(
        not (JS / "node_modules" / "libp2p").is_dir(),
        reason="js-libp2p is not installed: npm install --prefix tests/js",
    ),
]


@dataclass
class JsPeer:
    """The echo peer of tests/js in its own process."""

    process: trio.Process
    peer: PeerId
    address: Address
    lines: AsyncIterator[dict[str, object]]

    async def visit(self, address: str) -> dict[str, object]:
        """Let it dial an address, and return what it found there."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(address.encode() + b"\n")
        return await anext(self.lines)


async def read_lines(process: trio.Process) -> AsyncIterator[dict[str, object]]:
    assert process.stdout is not None
    buffer = b""
    async for chunk in process.stdout:
        buffer += chunk
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            yield json.loads(line)


@pytest.fixture
async def js_peer() -> AsyncIterator[JsPeer]:
    process = await trio.lowlevel.open_process(
        ["node", str(JS / "echo_peer.mjs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        lines = read_lines(process)
        with trio.fail_after(30):
            first = await anext(lines)
        peer = parse_peer_id(str(first["peer"]))
        yield JsPeer(process, peer, Address(str(first["address"])), lines)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@pytest.fixture
async def host(nursery: trio.Nursery) -> NativeHost:
    source = random.SystemRandom()
    made = NativeHost(
        Identity.generate(source),
        TcpNetwork(),
        random=source,
        wall_time=lambda: WallSeconds(1_800_000_000.0),
    )
    made.set_handler(ECHO, echo)
    await nursery.start(made.run)
    return made


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def echoed(stream: Stream, sent: bytes) -> bytes:
    """Send bytes and return as many that come back, then what the end says: nothing more."""
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, sent)
        while len(received) < len(sent):
            received += await stream.receive_some()
    await stream.close_write()
    assert await stream.receive_some() == b""
    return bytes(received)


async def test_swarmpy_dials_js(host: NativeHost, js_peer: JsPeer) -> None:
    """Handshake, identify, ping, and echoes from 64 bytes to 1 MiB."""
    events = host.connection_events()
    with trio.fail_after(30):
        await host.dial(js_peer.peer, [js_peer.address])
        assert (await anext(events)).kind == "opened"
        assert await host.ping(js_peer.peer) < 5
        for size in SIZES:
            sent = random.Random(size).randbytes(size)
            stream = await host.open_stream(js_peer.peer, [ECHO])
            assert await echoed(stream, sent) == sent
    info = host.identified(js_peer.peer)
    assert info is not None
    assert info.agent.startswith("js-libp2p/")
    assert ECHO in info.protocols
    assert info.addresses == (js_peer.address.rpartition("/p2p/")[0],)
    assert info.record_seq > 0


async def test_swarmpy_finds_the_protocol_that_js_speaks_among_several(
    host: NativeHost, js_peer: JsPeer
) -> None:
    with trio.fail_after(30):
        await host.dial(js_peer.peer, [js_peer.address])
        stream = await host.open_stream(js_peer.peer, [ProtocolId("/swarmpy-test/echo/2"), ECHO])
        assert stream.protocol == ECHO
        assert await echoed(stream, b"hello") == b"hello"


async def test_js_dials_swarmpy(host: NativeHost, js_peer: JsPeer) -> None:
    """The same the other way round; js checks the echoes byte by byte."""
    address = await host.listen(Address("/ip4/127.0.0.1/tcp/0"))
    with trio.fail_after(30):
        found = await js_peer.visit(f"{address}/p2p/{host.identity.peer_id}")
    assert "error" not in found, found
    assert str(found["agent"]).startswith("swarmpy/")
    assert ECHO in found["protocols"]  # type: ignore[operator]
    assert found["record_addresses"] == [address]
    assert found["echoed"] == list(SIZES)


async def test_js_refuses_swarmpy_under_another_peers_id(host: NativeHost, js_peer: JsPeer) -> None:
    address = await host.listen(Address("/ip4/127.0.0.1/tcp/0"))
    other = Identity(b"x" * 32).peer_id
    with trio.fail_after(30):
        found = await js_peer.visit(f"{address}/p2p/{other}")
    assert "error" in found
