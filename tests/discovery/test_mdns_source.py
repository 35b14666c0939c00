"""Multicast DNS on the loopback interface of this machine, between real hosts on real sockets."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from small_nodes import Clock, small_node, until
from zeroconf import EventLoopBlocked, ServiceInfo

from swarmpy.abc import Address, DiscoverySource, Sighting
from swarmpy.discovery import mdns
from swarmpy.discovery.mdns import MdnsSource
from swarmpy.environment import Environment
from swarmpy.identity import Identity
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork
from swarmpy.proto.mdns import SERVICE, encode_txt

LOOPBACK = ["127.0.0.1"]


def multicast_problem() -> str:
    """Why multicast does not come back over loopback here; "" where it does."""
    group = ("224.0.0.251", 5354)
    try:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hearing,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaking,
        ):
            hearing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            hearing.bind(("", group[1]))
            interface = socket.inet_aton(LOOPBACK[0])
            joining = socket.inet_aton(group[0]) + interface
            hearing.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, joining)
            hearing.settimeout(1)
            speaking.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
            speaking.sendto(b"?", group)
            hearing.recv(1)
    except OSError as error:
        return f"no multicast over loopback on this machine: {error}"
    return ""


needs_multicast = pytest.mark.skipif(bool(multicast_problem()), reason=multicast_problem() or "-")


def mdns_of(host: NativeHost, environment: Environment) -> Sequence[DiscoverySource]:
    return [
        MdnsSource(host.identity.peer_id, lambda: host.addresses, environment, interfaces=LOOPBACK)
    ]


@needs_multicast
async def test_two_nodes_without_an_invite_see_each_other_in_less_than_a_second(
    tmp_path: Path,
) -> None:
    """Goal: visible, not joined, on both sides; nothing configured."""
    clock = Clock()
    async with (
        small_node(
            "ann",
            TcpNetwork(),
            tmp_path / "a",
            listen="/ip4/127.0.0.1/tcp/0",
            clock=clock,
            with_discovery=True,
            sources=mdns_of,
        ) as ann,
        small_node(
            "bob",
            TcpNetwork(),
            tmp_path / "b",
            listen="/ip4/127.0.0.1/tcp/0",
            clock=clock,
            with_discovery=True,
            sources=mdns_of,
        ) as bob,
    ):
        ann.membership.create_network()
        bob.membership.create_network()

        def states() -> list[str]:
            views = [ann.view(bob.peer), bob.view(ann.peer)]
            return [view.state for view in views if view is not None]

        await until(lambda: states() == ["visible", "visible"], within_s=1.0)
        await until(lambda: not ann.host.connections and not bob.host.connections)
        assert states() == ["visible", "visible"]


@needs_multicast
async def test_a_node_that_starts_later_is_heard_and_hears_in_less_than_a_second(
    tmp_path: Path,
) -> None:
    """Goal: the first one's answer comes by multicast, also to a second node on its machine."""
    seen: list[Sighting] = []
    heard_first, heard_second = trio.Event(), trio.Event()
    first, second = (Identity(bytes([number]) * 32).peer_id for number in (1, 2))

    def source(peer: str, port: int) -> MdnsSource:
        address = Address(f"/ip4/127.0.0.1/tcp/{port}")
        environment = Environment(network=TcpNetwork(), folder=tmp_path, cache_folder=tmp_path)
        return MdnsSource(peer, lambda: [address], environment, interfaces=LOOPBACK)  # type: ignore[arg-type]

    def see_second(sighting: Sighting) -> None:
        if sighting.peer == second:
            seen.append(sighting)
            heard_second.set()

    def see_first(sighting: Sighting) -> None:
        if sighting.peer == first:
            heard_first.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(source(first, 4001).run, see_second)
        await trio.sleep(1.5)
        nursery.start_soon(source(second, 4002).run, see_first)
        with trio.fail_after(1.0):
            await heard_first.wait()
            await heard_second.wait()
        nursery.cancel_scope.cancel()

    assert seen[0].addresses == ("/ip4/127.0.0.1/tcp/4002",)
    assert seen[0].source == "mdns"


@needs_multicast
async def test_nothing_is_told_but_addresses_and_the_peer_under_random_names(
    tmp_path: Path,
) -> None:
    """Goal: no host name, no model list, and names that say nothing. Method: read the records."""
    from zeroconf import DNSRecord, RecordUpdate, RecordUpdateListener, Zeroconf

    peer = Identity(b"x" * 32).peer_id
    address = Address("/ip4/127.0.0.1/tcp/4003")
    txt = encode_txt(peer, [address])
    told: list[DNSRecord] = []

    class Reader(RecordUpdateListener):
        def async_update_records(
            self, zc: Zeroconf, now: float, records: list[RecordUpdate]
        ) -> None:
            told.extend(update.new for update in records)

    def labels() -> tuple[str, str] | None:
        """The instance's and the host's name, once the TXT and SRV records were heard."""
        names = {record.name for record in told if getattr(record, "text", None) == txt}
        for record in told:
            if record.name in names and hasattr(record, "server"):
                return record.name.removesuffix("." + SERVICE), record.server
        return None

    environment = Environment(network=TcpNetwork(), folder=tmp_path, cache_folder=tmp_path)
    source = MdnsSource(peer, lambda: [address], environment, interfaces=LOOPBACK)
    reader = await trio.to_thread.run_sync(lambda: Zeroconf(interfaces=LOOPBACK))
    reader.add_listener(Reader(), None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run, lambda sighting: None)
        await until(lambda: labels() is not None)
        nursery.cancel_scope.cancel()
    await trio.to_thread.run_sync(reader.close)

    found = labels()
    assert found is not None
    instance, host = found
    assert re.fullmatch("[a-z0-9]{32}", instance)
    assert re.fullmatch(r"[a-z0-9]{32}\.local\.", host)
    ours = [record for record in told if record.name in (f"{instance}.{SERVICE}", host)]
    kinds = {type(record).__name__ for record in ours}
    assert kinds == {"DNSText", "DNSService"}


@needs_multicast
async def test_no_thread_outlives_the_source(tmp_path: Path) -> None:
    environment = Environment(network=TcpNetwork(), folder=tmp_path, cache_folder=tmp_path)
    before = {thread for thread in threading.enumerate() if "zeroconf" in thread.name.lower()}
    source = MdnsSource(Identity(b"y" * 32).peer_id, list, environment, interfaces=LOOPBACK)

    with trio.move_on_after(0.2):
        await source.run(lambda sighting: None)

    after = {thread for thread in threading.enumerate() if "zeroconf" in thread.name.lower()}
    assert after <= before


async def test_where_multicast_is_impossible_the_source_says_why_and_returns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Method: an address that is no interface of this machine."""
    environment = Environment(network=TcpNetwork(), folder=tmp_path, cache_folder=tmp_path)
    peer = Identity(b"z" * 32).peer_id
    source = MdnsSource(peer, list, environment, interfaces=["203.0.113.99"])

    with caplog.at_level(logging.WARNING), trio.fail_after(5):
        await source.run(lambda sighting: None)

    (record,) = [item for item in caplog.records if item.name == "swarmpy.discovery.mdns"]
    assert record.getMessage() == "mdns.unavailable"


async def test_a_starved_library_is_told_again_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Goal: a machine that is too busy for a moment costs a round, not the node."""
    told: list[str] = []

    class Link:
        def register_service(self, info: ServiceInfo, *, cooperating_responders: bool) -> None:
            told.append(info.name)
            if len(told) == 1:
                raise EventLoopBlocked

        def send(self, question: object) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(mdns, "_open_link", lambda *_: Link())
    monkeypatch.setattr(mdns, "ASK_PAUSE_S", 0.01)
    environment = Environment(network=TcpNetwork(), folder=tmp_path, cache_folder=tmp_path)
    address = Address("/ip4/127.0.0.1/tcp/4003")
    source = MdnsSource(Identity(b"w" * 32).peer_id, lambda: [address], environment)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run, lambda sighting: None)
        await until(lambda: len(told) == 2)
        nursery.cancel_scope.cancel()

    assert told[0] != told[1]
    assert [item.getMessage() for item in caplog.records] == ["mdns.stalled"]
