"""A py-libp2p peer for tests/interop: serves three protocols, does on command what a test asks.

It prints one JSON object a line: first {"peer", "address"}, then one answer for each command it
reads. peers.py describes the commands; the peers in JavaScript and Go know the same ones.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import libp2p
import libp2p.network.swarm
import multiaddr
import trio
from libp2p.abc import IHost, INetStream
from libp2p.crypto import ecc, ed25519, rsa, secp256k1
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.host.ping import perform_ping_roundtrip
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.network.stream.exceptions import StreamEOF, StreamError, StreamReset
from libp2p.peer.envelope import consume_envelope
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import Transport as NoiseTransport

ECHO = "/swarmpy-test/echo/1"
UPPER = "/swarmpy-test/upper/1"
RESET = "/swarmpy-test/reset/1"
IDENTIFY = "/ipfs/id/1.0.0"
PING = "/ipfs/ping/1.0.0"

KEYS: dict[str, Callable[[], Any]] = {
    "Ed25519": ed25519.create_new_key_pair,
    "RSA": rsa.create_new_key_pair,
    "secp256k1": secp256k1.create_new_key_pair,
    "ECDSA": lambda: ecc.create_new_key_pair("P-256"),
}


async def main(key_type: str) -> None:
    keys = KEYS[key_type]()
    noise = NoiseTransport(keys, noise_privkey=create_new_x25519_key_pair().private_key)
    host = libp2p.new_host(key_pair=keys, sec_opt={"/noise": noise})  # type: ignore[dict-item]
    for protocol, handler in ((ECHO, serve_echo), (UPPER, serve_upper), (RESET, serve_reset)):
        host.set_stream_handler(protocol, contained(handler))  # type: ignore[arg-type]
    # Without this every dial waits 250 ms more, even where the first address answers at once.
    libp2p.network.swarm._HAPPY_EYEBALLS_DELAY = 0
    async with host.run(listen_addrs=[multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        show({"peer": str(host.get_id()), "address": str(host.get_addrs()[0])})
        async for line in lines():
            try:
                show(await obey(host, json.loads(line)))
            except Exception as error:  # noqa: BLE001 - the test is told, whatever it is
                show({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


def show(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def lines() -> Any:
    stdin = trio.lowlevel.FdStream(os.dup(0))
    received = b""
    async for chunk in stdin:
        *whole, received = (received + chunk).split(b"\n")
        for line in whole:
            yield line


Handler = Callable[[INetStream], Awaitable[None]]


def contained(handler: Handler) -> Handler:
    """An exception of a handler would end the process: py-libp2p lets it."""

    async def serve(stream: INetStream) -> None:
        try:
            await handler(stream)
        except StreamError:
            await stream.reset()

    return serve


async def serve_echo(stream: INetStream) -> None:
    while data := await receive(stream):
        await stream.write(data)
    await stream.close()


async def serve_upper(stream: INetStream) -> None:
    await stream.write((await receive_all(stream)).upper())
    await stream.close()


async def serve_reset(stream: INetStream) -> None:
    await receive(stream)
    await stream.reset()


async def receive(stream: INetStream) -> bytes:
    try:
        return await stream.read()  # read(n) may take a reset for an end
    except StreamEOF:
        return b""


async def receive_all(stream: INetStream) -> bytes:
    received = bytearray()
    while data := await receive(stream):
        received += data
    return bytes(received)


async def obey(host: IHost, command: dict[str, Any]) -> dict[str, Any]:
    if command["do"] == "dial":
        info = info_from_p2p_addr(multiaddr.Multiaddr(command["address"]))
        await host.connect(info)
        return {"peer": str(info.peer_id)}
    peer = ID.from_string(command["peer"])
    with trio.fail_after(10):  # the other end may have seen the handshake's end before
        while not host.get_network().get_connections(peer):  # noqa: ASYNC110 - nothing to wait for
            await trio.sleep(0.01)
    match command["do"]:
        case "identify":
            return await identify(host, peer)
        case "ping":
            stream = await host.new_stream(peer, [PING])  # type: ignore[list-item]
            start_s = time.perf_counter()
            await perform_ping_roundtrip(stream)
            return {"rtt_s": time.perf_counter() - start_s}
        case "echo":
            for size in command["sizes"]:
                await echo(host, peer, size)
            return {"echoed": command["sizes"]}
        case "parallel":
            async with trio.open_nursery() as nursery:
                for _ in range(command["count"]):
                    nursery.start_soon(echo, host, peer, command["size"])
            return {"count": command["count"]}
        case "half-close":
            stream = await host.new_stream(peer, [UPPER])  # type: ignore[list-item]
            await stream.write(command["text"].encode())
            await stream.close_write()
            return {"answer": (await receive_all(stream)).decode()}
        case "reset":
            return {"was_reset": await meets_reset(host, peer)}
    return {"error": f"no command {command['do']}"}


async def identify(host: IHost, peer: ID) -> dict[str, Any]:
    """What the peer says of itself; py-libp2p's own exchange keeps no agent, so this asks again."""
    stream = await host.new_stream(peer, [IDENTIFY])  # type: ignore[list-item]
    said = parse_identify_response(await receive_all(stream))
    envelope, record = consume_envelope(said.signedPeerRecord, "libp2p-peer-record")
    assert envelope.public_key.serialize() == said.public_key
    return {
        "agent": said.agent_version,
        "protocols": list(said.protocols),
        "record_addresses": [str(address) for address in record.addrs],
    }


async def echo(host: IHost, peer: ID, size: int) -> None:
    stream = await host.new_stream(peer, [ECHO])  # type: ignore[list-item]
    sent = os.urandom(size)
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, sent)
        while len(received) < size:
            received += await receive(stream)
    await stream.close_write()
    if bytes(received) != sent or await receive(stream):
        raise ValueError(f"echo of {size} bytes came back different")


async def meets_reset(host: IHost, peer: ID) -> bool:
    stream = await host.new_stream(peer, [RESET])  # type: ignore[list-item]
    await stream.write(b"x")
    try:
        await receive_all(stream)
    except StreamReset:
        return True
    return False


if __name__ == "__main__":
    trio.run(main, sys.argv[1] if len(sys.argv) > 1 else "Ed25519")
