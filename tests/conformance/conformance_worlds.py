"""Worlds in which hosts of one kind meet: each keeps the same contract in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio
from net_hosts import World, echo, exchange, identity
from py_libp2p_apps import Application, attached

from swarmpy.abc import Address, Gate, Host, ProtocolId
from swarmpy.identity import PeerId
from swarmpy.net.host import NativeHost
from swarmpy.proto.yamux import INITIAL_WINDOW_BYTES
from swarmpy.testing.host import SimHost
from swarmpy.testing.network import SimNetwork

MEET = ProtocolId("/swarmpy-test/meet/1")
"""Served by every host that `connect` connects: for hosts that see a connection once it is used."""


class HostWorld:
    """Makes hosts that can reach each other, and ends them."""

    window_bytes_max = INITIAL_WINDOW_BYTES
    """What a receiver that does not read lets its sender send at most."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery

    async def host(self, name: str, *, gate: Gate | None = None) -> Host:
        """Return a running host that listens."""
        raise NotImplementedError

    async def stop(self, host: Host) -> None:
        """End a host and its connections, as a process that exits does."""
        host.close()

    async def close(self) -> None:
        """End all hosts, where the end of the test's nursery is not enough."""

    async def connect(self, near: Host, far: Host) -> PeerId:
        """Let one host dial the other; on return both have the connection."""
        await near.dial(far.identity.peer_id, far.addresses)
        return far.identity.peer_id

    async def settle(self, host: Host, peer: PeerId) -> None:
        """Wait until no stream of the host's own is on its connection to a peer."""


class NativeWorld(HostWorld):
    """Native hosts, on the machine's own TCP or on the simulated network."""

    def __init__(self, nursery: trio.Nursery, kind: str) -> None:
        super().__init__(nursery)
        self.world = World(kind, nursery)

    async def host(self, name: str, *, gate: Gate | None = None) -> Host:
        return await self.world.host(name, gate=gate)

    async def settle(self, host: Host, peer: PeerId) -> None:
        assert isinstance(host, NativeHost)
        await host.wait_identified(peer)


class SimHostWorld(HostWorld):
    """Simulated hosts: the contract without Noise and Yamux."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery)
        self.sim = SimNetwork()
        self._count = 0

    async def host(self, name: str, *, gate: Gate | None = None) -> Host:
        self._count += 1
        made = SimHost(identity(name), self.sim.network(f"10.0.0.{self._count}"), gate=gate)
        await self.nursery.start(made.run)
        await made.listen(Address("/ip4/0.0.0.0/tcp/0"))
        return made


class LibP2PWorld(HostWorld):
    """Hosts of py-libp2p, each owned by an application, with a node's host on it."""

    window_bytes_max = 16 * 1024 * 1024  # py-libp2p grows it to this

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery)
        self._applications: dict[Host, Application] = {}

    async def host(self, name: str, *, gate: Gate | None = None) -> Host:
        application = Application.of(identity(name))
        await self.nursery.start(application.run)
        made = attached(application.host, gate=gate)
        made.set_handler(MEET, echo)
        await self.nursery.start(made.run)
        self._applications[made] = application
        return made

    async def stop(self, host: Host) -> None:
        await self._applications[host].end()

    async def close(self) -> None:
        for host in self._applications:
            await self.stop(host)

    async def connect(self, near: Host, far: Host) -> PeerId:
        """Dial, and use the connection: what only the application sees is not the node's."""
        peer = await super().connect(near, far)
        stream = await near.open_stream(peer, [MEET])
        assert await exchange(stream, b"hello") == b"hello"
        await stream.close_write()
        assert await stream.receive_some() == b""
        return peer


WORLDS: Mapping[str, Callable[[trio.Nursery], HostWorld]] = {
    "native on TCP": lambda nursery: NativeWorld(nursery, "tcp"),
    "native on SimNetwork": lambda nursery: NativeWorld(nursery, "sim"),
    "SimHost": SimHostWorld,
    "py-libp2p": LibP2PWorld,
}

LACKS: Mapping[str, Mapping[str, str]] = {
    "py-libp2p": {
        "listening": "the application of a py-libp2p host listens, not the node",
        "accepting": "a py-libp2p host accepts connections for its application too",
        "tasks of its own": "a py-libp2p host's tasks are its application's",
    }
}
"""What a kind of host cannot do by its nature, and why."""
