"""Real nodes in network namespaces on one bridge: found by multicast DNS, lost and found again."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from lan_world import Lan, Program, local_network, program
from zeroconf import DNSIncoming, DNSText  # type: ignore[attr-defined]

from swarmpy.proto import mdns
from swarmpy.testing.engine import EchoModel

SEEN_S_MAX = 1.0
"""From the moment the second of two nodes runs until both list each other."""

LOST_S_MAX = 15.0
"""From the cut of a link until the peer behind it counts as lost."""

FOUND_S_MAX = 20.0
"""From the mending of a link until the peer is a member again; the redial pause has grown."""

HOST_NAME_MIN = 5
"""A shorter host name may be found in the random names by chance."""

PTR, TXT, SRV, NSEC = 12, 16, 33, 47
"""DNS record types; what is told of a service without an address (RFC 1035, 2782, 4034)."""


@pytest.fixture
def lan() -> Iterator[Lan]:
    """Two machines on one switch."""
    with local_network() as made:
        made.add_machine("east", "10.77.0.1")
        made.add_machine("west", "10.77.0.2")
        yield made


async def test_two_nodes_on_one_link_see_each_other_at_once_and_tell_no_more_than_that(
    lan: Lan, tmp_path: Path
) -> None:
    """Method: all multicast DNS of the link is captured, its records read, its bytes searched."""
    packets: list[bytes] = []

    async def keep(capture: Program) -> None:
        while True:
            packets.append(bytes.fromhex(await capture.line()))

    async with program(lan, "switch", "lan_capture.py", "bridge") as capture:
        assert await capture.line() == "\n"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep, capture)
            async with node(lan, "east", tmp_path) as east, node(lan, "west", tmp_path) as west:
                ready_s = max(east.ready_s, west.ready_s)
                for one, other in ((east, west), (west, east)):
                    view = await one.wait_view(of(other, "visible"))
                    assert float(str(view["at_s"])) - ready_s < SEEN_S_MAX
            nursery.cancel_scope.cancel()
    assert_tells_only_where_it_is(packets, {east.peer: "10.77.0.1", west.peer: "10.77.0.2"})


async def test_a_connection_that_a_cut_link_broke_is_made_again_when_it_is_mended(
    lan: Lan, tmp_path: Path
) -> None:
    async with members(lan, tmp_path) as (east, west):
        lan.cut("west")
        with trio.fail_after(LOST_S_MAX):
            await east.wait_view(of(west, "lost", "connecting"))
        lan.mend("west")
        with trio.fail_after(FOUND_S_MAX):
            await east.wait_view(of(west, "member"))


async def test_a_member_is_found_at_its_new_address(lan: Lan, tmp_path: Path) -> None:
    """Whoever of the two notices first: the connection they end with is one to the new address."""
    async with members(lan, tmp_path) as (east, _):
        lan.change_address("west", "10.77.0.2", "10.77.0.7")
        with trio.fail_after(LOST_S_MAX + FOUND_S_MAX):
            await east.wait_view(lambda view: "/10.77.0.7/" in str(view["reached_at"]))


def assert_tells_only_where_it_is(packets: list[bytes], peers: dict[str, str]) -> None:
    """The records are those of the specification, and nothing a node knows is among their bytes."""
    assert packets
    host = socket.gethostname().encode().lower()
    secrets = [b"secret", b"swarm", b"127.0.0.1", *([host] if len(host) >= HOST_NAME_MIN else [])]
    told: set[str] = set()
    for packet in packets:
        assert [secret for secret in secrets if secret in packet.lower()] == []
        message = DNSIncoming(packet)
        assert message.valid
        for record in message.answers():
            assert record.type in (PTR, TXT, SRV, NSEC), record
            if isinstance(record, DNSText):
                found = mdns.decode_txt(record.text)
                assert found is not None
                peer, where = found
                assert [address.split("/")[2] for address in where] == [peers[peer]]
                told.add(peer)
    assert told == set(peers)


@asynccontextmanager
async def node(lan: Lan, machine: str, folder: Path) -> AsyncIterator[Program]:
    """Run a node on a machine until the end of the block; it has a name and a model of its own."""
    own = folder / machine
    own.mkdir()
    model = EchoModel(layers=4).write(own / f"secret-model-{machine}")
    name = f"secret-{machine}"
    async with program(lan, machine, "lan_node.py", str(own), name, str(model)) as made:
        with trio.fail_after(60):
            while "peer" not in (first := await made.receive()):
                made.views.append(first)
        made.peer, made.ready_s = str(first["peer"]), float(str(first["at_s"]))
        yield made


@asynccontextmanager
async def members(lan: Lan, folder: Path) -> AsyncIterator[tuple[Program, Program]]:
    """Two nodes of which the second has joined the first one's network."""
    async with node(lan, "east", folder) as east, node(lan, "west", folder) as west:
        with trio.fail_after(60):
            invite = (await east.ask(do="invite"))["invite"]
            await west.ask(join=str(invite))
            await east.wait_view(of(west, "member"))
        yield east, west


def of(peer: Program, *states: str) -> Callable[[dict[str, object]], bool]:
    """Return what tells a view of a peer in one of some states."""
    return lambda view: view["seen"] == peer.peer and view["state"] in states
