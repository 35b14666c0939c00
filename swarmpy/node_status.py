"""What a node shows of itself and its peers: the records of `swarmpy.status`, from its services."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import version
from typing import TYPE_CHECKING

from swarmpy.abc import Inspection
from swarmpy.discovery.service import PeerView
from swarmpy.identity import PeerId
from swarmpy.pipeline.engines import Choice
from swarmpy.pipeline.fit import fit
from swarmpy.proto.invite import words_of
from swarmpy.shards.catalog import ModelEntry
from swarmpy.status import ModelStatus, NetworkStatus, NodeStatus, PeerStatus

if TYPE_CHECKING:
    from swarmpy.node import Node

VERSION = version("swarmpy")
AGENT = f"swarmpy/{VERSION}"

CONTEXTS_SHOWN = (2048, 8192, 32768)
"""Tokens for which the memory that a model takes is told, besides the longest it can."""


def model_statuses(node: Node) -> list[ModelStatus]:
    """Return the models that this machine has or that members announce, by name."""
    ready = {view.model_id for view in node.pipelines()}
    found = {
        entry.model_id: model_status(
            entry,
            is_ready=entry.model_id in ready,
            peers=_holders(node, entry.model_id),
            choice=node.stages.chosen(entry.model_id),
        )
        for entry in node.catalog.list()
    }
    for announcement in node.discovery.reachable():
        for model in announcement.models:
            if model.model_id not in found:
                found[model.model_id] = ModelStatus(
                    model_id=model.model_id,
                    name=model.name,
                    display_name=model.display_name,
                    size_bytes=model.size_bytes,
                    layer_count=model.layer_count,
                    is_local=False,
                    is_ready=False,
                    peers=_holders(node, model.model_id),
                )
    return sorted(found.values(), key=lambda status: status.name)


def model_status(
    entry: ModelEntry,
    *,
    is_ready: bool = False,
    peers: tuple[str, ...] = (),
    choice: Choice | None = None,
) -> ModelStatus:
    """Return what there is to say of a model on this machine."""
    return ModelStatus(
        model_id=entry.model_id,
        name=entry.name,
        display_name=entry.display_name,
        size_bytes=entry.size_bytes,
        layer_count=entry.layer_count,
        is_local=True,
        is_ready=is_ready,
        peers=peers,
        path=str(entry.path),
        license=entry.license,
        source=entry.source,
        architecture=entry.architecture,
        quantization=entry.quantization,
        context_max=entry.context_max,
        parameter_count=entry.parameter_count,
        layers=entry.layers,
        held_bytes=entry.held_bytes,
        engine=choice.inspection.engine if choice else "",
        engine_why=choice.why if choice else "",
        memory_bytes=_memory_by_context(choice.inspection) if choice else {},
        derived_from=entry.derived_from,
    )


def _memory_by_context(inspection: Inspection) -> dict[int, int]:
    longest = inspection.context_max
    contexts = sorted({*(size for size in CONTEXTS_SHOWN if size < longest), longest})
    return {
        size: fit(inspection, 0, inspection.layer_count, slots=1, context=size).sum_bytes
        for size in contexts
    }


def _holders(node: Node, model_id: str) -> tuple[str, ...]:
    return tuple(
        announcement.name
        for announcement in node.discovery.reachable()
        if any(model.model_id == model_id for model in announcement.models)
    )


def peer_statuses(node: Node) -> list[PeerStatus]:
    """Return every peer known, this node first, then in PeerId order."""
    revoked = _revoked(node)
    others = [_peer_status(node, view, revoked) for view in node.discovery.peers()]
    return [_own_status(node), *others]


def status_of(node: Node) -> NodeStatus:
    """Return what the node is doing."""
    return NodeStatus(
        peer=node.peer_id,
        name=node.name,
        version=VERSION,
        addresses=tuple(node.host.addresses),
        networks=tuple(_network_statuses(node)),
        engine=node.engine_names,
        memory_bytes_max=node.stages.memory_bytes_max,
        memory_bytes_free=node.stages.memory_bytes_free,
        peers_connected=len(node.membership.members()),
        pipelines=tuple(node.pipelines()),
        shards=_own_shards(node),
        uptime_s=node.uptime_s,
        is_stopping=node.is_stopping,
        revoked=tuple(node.membership.revoked_names()),
    )


def _network_statuses(node: Node) -> list[NetworkStatus]:
    members = node.membership.members()
    return [
        NetworkStatus(
            id=network.id,
            name=network.name,
            words=" ".join(words_of(network.id)),
            is_founder=network.is_founder,
            can_invite=network.can_invite,
            members_connected=sum(
                network.id in node.membership.shared_networks(peer) for peer in members
            ),
            expires_wall_s=network.not_after_wall_s,
        )
        for network in node.membership.networks()
    ]


def _own_shards(node: Node) -> tuple[str, ...]:
    return tuple(
        f"{node.model_name(shard.model_id)} {shard.start}-{shard.end - 1}"
        for shard in node.stages.shards
    )


def _own_status(node: Node) -> PeerStatus:
    return PeerStatus(
        peer=node.peer_id,
        name=node.name,
        state="self",
        addresses=tuple(node.host.addresses),
        source="",
        path="",
        rtt_ms=0.0,
        networks=tuple(network.name for network in node.membership.networks()),
        engine=node.engine_names,
        memory_bytes_max=node.stages.memory_bytes_max,
        memory_bytes_free=node.stages.memory_bytes_free,
        models=tuple(entry.name for entry in node.catalog.list()),
        shards=_own_shards(node),
        agent=AGENT,
    )


def _revoked(node: Node) -> set[PeerId]:
    """Return who was let go from a network of this node; some may be members by other records."""
    own = node.membership.own_memberships()
    return {item.peer for item in node.membership.revocations() if item.network_id in own}


def _peer_status(node: Node, view: PeerView, revoked: Collection[PeerId]) -> PeerStatus:
    told = node.discovery.announcement(view.peer)
    connection = node.host.connection_to(view.peer)
    names = {network.id: network.name for network in node.membership.networks()}
    shared = node.membership.shared_networks(view.peer)
    shards = told.shards if told else ()
    return PeerStatus(
        peer=view.peer,
        name=view.name,
        state="revoked" if view.state == "visible" and view.peer in revoked else view.state,
        addresses=tuple(view.addresses),
        source=view.source,
        path=connection.path if connection else "",
        rtt_ms=view.rtt_ms,
        networks=tuple(names[network] for network in names if network in shared),
        engine=told.engine if told else "",
        memory_bytes_max=told.memory_bytes_max if told else 0,
        memory_bytes_free=told.memory_bytes_free if told else 0,
        models=tuple(model.name for model in told.models) if told else (),
        shards=tuple(
            f"{node.model_name(shard.model_id)} {shard.start}-{shard.end - 1}" for shard in shards
        ),
        agent=told.agent if told else "",
    )
