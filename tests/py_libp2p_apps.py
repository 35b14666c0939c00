"""Programs that own a py-libp2p host, for tests of a node on it; py-libp2p is imported late."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import trio

from swarmpy.abc import Gate
from swarmpy.identity import Identity

if TYPE_CHECKING:
    from libp2p.abc import IHost

    from swarmpy.plugins.libp2p import LibP2PHost

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def require_py_libp2p() -> None:
    """Skip a test where py-libp2p is not installed; fail it in CI."""
    if find_spec("libp2p") is not None:
        return
    reason = "py-libp2p is not installed: pip install '.[libp2p]' (needs cc and gmp.h)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def needs_py_libp2p() -> None:
    """For modules whose every test needs it: they import this name."""
    require_py_libp2p()


class Application:
    """A program that owns a py-libp2p host, which listens on loopback."""

    def __init__(self, host: IHost) -> None:
        self.host = host
        self.stop = trio.Event()
        self.stopped = trio.Event()

    @classmethod
    def of(cls, who: Identity) -> Application:
        """Return a program with this identity, its host made as a node needs it."""
        import libp2p
        from libp2p.crypto.ed25519 import Ed25519PrivateKey
        from libp2p.crypto.keys import KeyPair
        from libp2p.crypto.x25519 import create_new_key_pair
        from libp2p.security.noise.transport import Transport as NoiseTransport

        private_key = Ed25519PrivateKey.from_bytes(who._seed)
        keys = KeyPair(private_key, private_key.get_public_key())
        noise = NoiseTransport(keys, noise_privkey=create_new_key_pair().private_key)
        return cls(libp2p.new_host(key_pair=keys, sec_opt={"/noise": noise}))  # type: ignore[dict-item]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until `stop` is set."""
        from multiaddr import Multiaddr

        try:
            async with self.host.run(listen_addrs=[Multiaddr(LOOPBACK)]):
                task_status.started()
                await self.stop.wait()
                await self.host.close()  # the end of `run` alone leaves sockets behind
        finally:
            self.stopped.set()

    async def end(self) -> None:
        """End the program and wait for it."""
        self.stop.set()
        await self.stopped.wait()


def attached(application: IHost, *, gate: Gate | None = None) -> LibP2PHost:
    """Return a node's host on a program's."""
    from swarmpy.plugins.libp2p import LibP2PHost

    return LibP2PHost(application, gate=gate)
