"""Invariants: what must hold at every moment of a simulation, whatever faults happen.

A checker says what is broken, or nothing. They look at nodes from outside, by what is public, and
hold them against what the simulation itself knows.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from swarmpy import config
from swarmpy.abc import Connection, Host, ProtocolId
from swarmpy.identity import PeerId
from swarmpy.net.connection import NativeConnection
from swarmpy.proto.announce import ANNOUNCEMENT_TTL_S
from swarmpy.proto.invite import decode_invite
from swarmpy.proto.membership import CLOCK_SKEW_S
from swarmpy.proto.yamux import WINDOW_BYTES_MAX
from swarmpy.testing.engine import EchoShard
from swarmpy.testing.host_connection import HostConnection
from swarmpy.trust.gate import OPEN_PROTOCOLS

if TYPE_CHECKING:
    from swarmpy.testing.nodes import SimNode
    from swarmpy.testing.simulation import Simulation


class Checker:
    """One invariant; the base holds always."""

    name = "invariant"

    def begin(self) -> None:
        """Get ready for a run."""

    def end(self) -> None:
        """Leave nothing behind of it."""

    def check(self, simulation: Simulation) -> str:
        """Return what is broken now, "" if nothing is."""
        return ""

    def served(
        self, simulation: Simulation, node: SimNode, peer: PeerId, protocol: ProtocolId
    ) -> str:
        """Return what is wrong with a node serving a peer, "" if nothing is."""
        return ""


class GateServesMembers(Checker):
    """Strangers are served nothing but what makes members of them."""

    name = "gate"

    def served(
        self, simulation: Simulation, node: SimNode, peer: PeerId, protocol: ProtocolId
    ) -> str:
        if protocol in OPEN_PROTOCOLS:
            return ""
        node.note_networks()
        for other in simulation.nodes:
            if other.peer == peer:
                other.note_networks()
                if node.networks & other.networks:
                    return ""
        return f"{node.name} served {protocol} to {peer}, who is in no network of its"


class InvitesAdmitOnce(Checker):
    """No invite admits more machines than it was made for."""

    name = "invite"

    def check(self, simulation: Simulation) -> str:
        for code, nodes in simulation.redeemed.items():
            uses = decode_invite(code).invite.uses
            if len(nodes) > uses:
                names = ", ".join(simulation.nodes[index].name for index in sorted(nodes))
                return f"an invite for {uses} admitted {names}"
        return ""


class StepsRunOnce(Checker):
    """No stage computes a step of a session twice."""

    name = "steps"

    def __init__(self) -> None:
        self._broken = ""

    def begin(self) -> None:
        EchoShard.on_rewind = self._note

    def end(self) -> None:
        EchoShard.on_rewind = None

    def check(self, simulation: Simulation) -> str:
        return self._broken

    def _note(self, what: str) -> None:
        self._broken = self._broken or f"computed twice: {what}"


class QueuesAreBounded(Checker):
    """Nothing that peers or faults can fill grows beyond its bound."""

    name = "bounds"

    def check(self, simulation: Simulation) -> str:
        for node in simulation.up:
            for what, count, bound in _bounded(node):
                if count > bound:
                    return f"{node.name} has {count} {what}, {bound} at most"
        return ""


class RecordsAreFresh(Checker):
    """Announcements are no older and no more than they may be, and go back to no older one."""

    name = "records"

    def __init__(self) -> None:
        self._newest: dict[tuple[int, int, str], int] = {}

    def check(self, simulation: Simulation) -> str:
        for node in simulation.up:
            oldest_wall_s = node.wall_time() - ANNOUNCEMENT_TTL_S - CLOCK_SKEW_S
            announcements = node.node.discovery.announcements()
            if len(announcements) > config.RECORDS_MAX:
                return f"{node.name} keeps {len(announcements)} announcements"
            for item in announcements:
                if item.issued_wall_s < oldest_wall_s:
                    return f"{node.name} keeps what {item.name} announced over an hour ago"
                key = (node.index, node.boots, item.peer)
                if item.seq < self._newest.get(key, 0):
                    return f"{node.name} went back to an older announcement of {item.name}"
                self._newest[key] = item.seq
        return ""


def standard_checkers() -> list[Checker]:
    """Return the invariants that every simulated swarm is held to."""
    return [
        GateServesMembers(),
        InvitesAdmitOnce(),
        StepsRunOnce(),
        QueuesAreBounded(),
        RecordsAreFresh(),
    ]


# Agreement: not always true, but true some time after the last fault -----------------


def views_agree(simulation: Simulation) -> bool:
    """Whether every node that runs knows of all others that run, newest word and no ghost."""
    up = simulation.up
    newest = {node.peer: node.node.discovery.announcement(node.peer) for node in up}
    for node in up:
        known = {PeerId(item.peer): item.seq for item in node.node.discovery.announcements()}
        known[node.peer] = 0
        if set(known) != set(newest):
            return False
        for peer, item in newest.items():
            if peer != node.peer and item is not None and known[peer] < item.seq:
                return False
    return True


def members_missing(simulation: Simulation) -> float:
    """Return which part of all pairs of running nodes do not know each other, 0 to 1."""
    peers = {node.peer for node in simulation.up}
    wanted = len(peers) * (len(peers) - 1)
    known = sum(
        len(peers & {PeerId(item.peer) for item in node.node.discovery.announcements()})
        for node in simulation.up
    )
    return 1 - known / wanted if wanted else 0.0


def _bounded(node: SimNode) -> list[tuple[str, int, int]]:
    host: Host = node.node.host
    connections = host.connections
    per_peer = Counter(connection.peer for connection in connections)
    found = [
        ("connections", len(connections), config.CONNECTIONS_MAX),
        (
            "connections to one peer",
            max(per_peer.values(), default=0),
            config.CONNECTIONS_PER_PEER_MAX,
        ),
        ("sessions", node.node.stages.session_count, config.SESSIONS_MAX),
    ]
    unread_bytes = max(map(_unread_bytes, connections), default=0)
    found.append(("unread bytes of one stream", unread_bytes, WINDOW_BYTES_MAX))
    return found


def _unread_bytes(connection: Connection) -> int:
    """Return what the stream with the most unread bytes holds; hosts of ours tell, others need not.

    Counted where the bytes lie: what Yamux believes of them is what is checked.
    """
    if isinstance(connection, HostConnection):
        return max((stream.unread_bytes for stream in connection.streams), default=0)
    if isinstance(connection, NativeConnection):
        streams = connection._streams.values()
        return max((sum(map(len, stream._pieces)) for stream in streams), default=0)
    return 0
