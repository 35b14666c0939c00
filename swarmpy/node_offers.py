"""What a node offers: models with their engines, shards and speed; and what members offer it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from swarmpy.errors import ConfigError, SwarmError
from swarmpy.identity import PeerId
from swarmpy.pipeline.planner import Capacity
from swarmpy.proto.announce import (
    MODELS_MAX,
    RANGES_MAX,
    SHARDS_MAX,
    AnnouncedModel,
    AnnouncedShard,
    Announcement,
)
from swarmpy.store import read_json, write_file

if TYPE_CHECKING:
    from swarmpy.node import Node
    from swarmpy.shards.catalog import ModelEntry

logger = logging.getLogger(__name__)

CAPACITIES_MAX = 64
"""Members looked at for one plan: the connected ones first, then those with the most memory."""

SPEED_FILE = "speed.json"
"""Speeds measured in runs before, by engine: a first plan need not guess."""


def capacities(node: Node, model_id: str) -> list[Capacity]:
    """Return what each member that may take part offers for a model, this node included."""
    found = [_own_capacity(node, model_id)] if node.engines else []
    offering = [item for item in node.discovery.reachable() if item.engine]
    if len(offering) > CAPACITIES_MAX:
        members = set(node.membership.members())
        offering.sort(key=lambda it: (it.peer not in members, -it.memory_bytes_max))
    return found + [_capacity(item, model_id) for item in offering[:CAPACITIES_MAX]]


def _own_capacity(node: Node, model_id: str) -> Capacity:
    engine, entry = engine_of(node, model_id), node.catalog.by_id(model_id)
    return Capacity(
        peer=node.peer_id,
        name=node.name,
        memory_bytes=node.stages.memory_bytes_max,
        speed_bytes_s=speeds(node).get(engine, 0.0),
        rtt_s={
            connection.peer: connection.rtt_s
            for connection in node.host.connections
            if connection.rtt_s is not None
        },
        holds_model=entry is not None,
        files=entry.layers if entry is not None else None,
        fetches=entry is not None and fetches(node, entry),
        engine=engine,
        shards=tuple(
            (shard.start, shard.end) for shard in node.stages.shards if shard.model_id == model_id
        ),
    )


def _capacity(announcement: Announcement, model_id: str) -> Capacity:
    told = next((item for item in announcement.models if item.model_id == model_id), None)
    return Capacity(
        peer=PeerId(announcement.peer),
        name=announcement.name,
        memory_bytes=announcement.memory_bytes_max,
        speed_bytes_s=(told and told.speed_bytes_s) or announcement.speed_bytes_s,
        holds_model=told is not None,
        files=told.layers if told is not None else None,
        fetches=told is not None and told.fetches,
        engine=told.engine if told is not None else "",
        shards=tuple(
            (shard.start, shard.end) for shard in announcement.shards if shard.model_id == model_id
        ),
    )


def engine_of(node: Node, model_id: str) -> str:
    """The name of the engine that runs a model on a node; "" before it was chosen."""
    choice = node.stages.chosen(model_id)
    return choice.inspection.engine if choice is not None else ""


def fetches(node: Node, entry: ModelEntry) -> bool:
    """Whether a node fetches the layers that it lacks of a model and is to load."""
    return entry.layers is not None and node.config.models.fetch


def announce_models(node: Node) -> None:
    """Tell the members which models are here, whole or in part, and which engine runs each."""
    models = node.catalog.list() if node.engines else []
    node.discovery.announce(
        models=tuple(
            AnnouncedModel(
                model_id=entry.model_id,
                name=entry.name,
                display_name=entry.display_name[:64],
                size_bytes=entry.size_bytes,
                layer_count=entry.layer_count,
                engine=engine_of(node, entry.model_id),
                layers=_told_layers(entry),
                fetches=fetches(node, entry),
                speed_bytes_s=speeds(node).get(engine_of(node, entry.model_id), 0.0),
            )
            for entry in models[:MODELS_MAX]
        )
    )


def _told_layers(entry: ModelEntry) -> tuple[tuple[int, int], ...] | None:
    """The ranges of layers that are here, the longest of them where there are too many to tell."""
    if entry.layers is None:
        return None
    longest = sorted(entry.layers, key=lambda layers: layers[0] - layers[1])[:RANGES_MAX]
    return tuple(sorted(longest))


def announce_holdings(node: Node) -> None:
    """Tell the members what is loaded here, what memory is free and how fast this node is."""
    node.discovery.announce(
        memory_bytes_max=node.stages.memory_bytes_max,
        memory_bytes_free=node.stages.memory_bytes_free,
        speed_bytes_s=max(speeds(node).values(), default=0.0),
        shards=tuple(
            AnnouncedShard(model_id=shard.model_id, start=shard.start, end=shard.end)
            for shard in node.stages.shards[:SHARDS_MAX]
        ),
    )


async def choose_engines(node: Node) -> None:
    """Find out which engine runs each model here: members plan with what theirs need."""
    for entry in node.catalog.list()[:MODELS_MAX] if node.engines else ():
        try:
            await node.stages.choose(entry.model_id)
        except SwarmError as error:
            logger.info("model.not_run", extra={"model": entry.name, "error": str(error)})
    announce_models(node)


# Speeds -----------------------------------------------------------------------------


def speeds(node: Node) -> Mapping[str, float]:
    """Return weight bytes a second in decode, by engine: of this run's steps, else of before."""
    return {**node.speeds_before_bytes_s, **node.stages.speeds_bytes_s}


def read_speeds(folder: Path) -> Mapping[str, float]:
    """Return the speeds that a node measured in runs before."""
    return {
        name: float(speed)
        for name, speed in read_json(folder / SPEED_FILE).items()
        if isinstance(speed, (int, float)) and 0 < speed < math.inf
    }


def keep_speeds(node: Node) -> None:
    """Remember the speeds for the next run."""
    if not node.stages.speeds_bytes_s:
        return
    try:
        write_file(node.environment.folder / SPEED_FILE, json.dumps(speeds(node)).encode())
    except ConfigError as error:
        # A full disk: the next run measures anew.
        logger.warning("speed.not_kept", extra={"error": str(error)})
