"""An existing py-libp2p program that becomes a swarmpy peer; its host and protocols stay its own.

    python examples/py_libp2p_app.py FOLDER INVITE

It joins the invite's network, lists the members it sees, and serves until it is stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import libp2p
import trio
from libp2p.abc import INetStream
from libp2p.crypto import ed25519, x25519
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr

import swarmpy
from swarmpy.plugins.libp2p import LibP2PHost

GREETING = TProtocol("/example/greeting/1")


async def greet(stream: INetStream) -> None:
    """What the program serves itself, with or without swarmpy."""
    await stream.write(b"hello from the application\n")
    await stream.close()


def load_keys(path: Path) -> KeyPair:
    """Read the program's key, which is the node's identity too, or make one."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_bytes(ed25519.create_new_key_pair().private_key.to_bytes())
    private_key = ed25519.Ed25519PrivateKey.from_bytes(path.read_bytes())
    return KeyPair(private_key, private_key.get_public_key())


async def main(folder: Path, invite: str) -> None:
    keys = load_keys(folder / "application.key")
    # A node shares a host that speaks Noise alone: py-libp2p's default offers plaintext too.
    noise = NoiseTransport(keys, noise_privkey=x25519.create_new_key_pair().private_key)
    host = libp2p.new_host(key_pair=keys, sec_opt={"/noise": noise})
    host.set_stream_handler(GREETING, greet)
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        # So far an ordinary py-libp2p program. From here on it is a swarmpy peer as well.
        config = swarmpy.load_config(folder)
        environment = swarmpy.local_environment(folder)
        async with swarmpy.Node.open(config, environment, host=LibP2PHost(host)) as node:
            await node.join(invite)
            await node.wait_members(1)
            for peer in node.peers():
                print(peer.peer, peer.name, peer.state, flush=True)
            await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
