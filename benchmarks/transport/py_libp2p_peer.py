"""A py-libp2p peer: TCP, Noise and Yamux, nothing else offered, all as that library ships it."""

from __future__ import annotations

import logging
import sys
import time
from importlib.metadata import version

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_static_pair
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID, Transport
from multiaddr import Multiaddr
from workload import Bytes, Channel, Peer, PieceChannel, run, serve

LOAD = TProtocol("/swarmpy-bench/load/1")
IDENTIFIED_POLL_S = 0.0002
"""py-libp2p tells nobody when identify is done, so it is asked."""


class PyChannel(PieceChannel):
    """A stream of a host."""

    def __init__(self, stream: INetStream) -> None:
        super().__init__()
        self._stream = stream

    async def send(self, data: Bytes) -> None:
        await self._stream.write(bytes(data))

    async def receive_some(self, bytes_max: int) -> bytes:
        try:
            return bytes(await self._stream.read(bytes_max))
        except StreamError:  # it says that of a clean end, too
            return b""

    async def close(self) -> None:
        await self._stream.close()


class PyPeer(Peer):
    """A host in its process."""

    version = f"py-libp2p {version('libp2p')}"
    remote: ID

    def __init__(self, host: str) -> None:
        self._listen_address = Multiaddr(f"/ip4/{host}/tcp/0")
        self.host = make_host()
        self.host.set_stream_handler(LOAD, serve_stream)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with self.host.run(listen_addrs=[self._listen_address]):
            self.address = str(self.host.get_addrs()[0])
            task_status.started()
            await trio.sleep_forever()

    async def dial(self, address: str) -> None:
        self.remote = await connect(self.host, address)

    async def connect(self, address: str) -> float:
        host = make_host()
        async with host.run(listen_addrs=[]):
            began = time.perf_counter()
            await connect(host, address)
            return time.perf_counter() - began

    async def open(self) -> Channel:
        return PyChannel(await self.host.new_stream(self.remote, [LOAD]))


def make_host() -> IHost:
    keys = create_new_key_pair()
    static = create_new_static_pair().private_key
    security = {PROTOCOL_ID: Transport(libp2p_keypair=keys, noise_privkey=static)}
    return new_host(key_pair=keys, sec_opt=security, muxer_preference="YAMUX")


async def connect(host: IHost, address: str) -> ID:
    """Dial a peer and wait until it has said who it is."""
    info = info_from_p2p_addr(Multiaddr(address))
    await host.connect(info)
    while info.peer_id not in host._identified_peers:  # noqa: ASYNC110
        await trio.sleep(IDENTIFIED_POLL_S)
    return info.peer_id


async def serve_stream(stream: INetStream) -> None:
    try:
        await serve(PyChannel(stream))
    except StreamError:
        pass  # the other side is done; an error that got out would end the process


async def start(nursery: trio.Nursery) -> Peer:
    peer = PyPeer(sys.argv[1])
    await nursery.start(peer.run)
    return peer


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    trio.run(run, start)
