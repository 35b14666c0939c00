"""What a node tells its members of its models: real nodes over real TCP on loopback."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from swarmpy import node_offers
from swarmpy.errors import ModelNotFound
from swarmpy.node import Node
from swarmpy.proto.announce import RANGES_MAX
from swarmpy.shards.catalog import ModelEntry
from swarmpy.testing.engine import EchoModel
from tests.swarms import config, environment, tcp_swarm

Ranges = tuple[tuple[int, int], ...]

SHORT = tuple((start, start + 1) for start in range(0, 2 * RANGES_MAX, 2))
"""As many ranges as may be told, of a layer each."""


def hold(monkeypatch: pytest.MonkeyPatch, node: Node, layers: Ranges) -> ModelEntry:
    """Let a node's model be one of forty layers of which it has some."""
    entry = replace(node.catalog.list()[0], layer_count=40, layers=layers)
    monkeypatch.setattr(node.catalog, "list", lambda: [entry])
    return entry


async def heard(listener: Node, teller: Node) -> Ranges | None:
    """Wait for the layers that a member tells it has of its only model."""
    with trio.fail_after(10):
        while True:
            told = listener.discovery.announcement(teller.peer_id)
            if told is not None and told.models and told.models[0].layers is not None:
                return told.models[0].layers
            await listener.wait_members_changed()


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (SHORT, SHORT),
        (((0, 1),), ((0, 1),)),
        ((*SHORT, (36, 40)), (*SHORT[:-1], (36, 40))),
        (((0, 3), *((start + 4, end + 4) for start, end in SHORT)), None),
    ],
    ids=["sixteen", "one", "the last is long", "the first is long"],
)
async def test_the_longest_of_too_many_ranges_are_told_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: Ranges, told: Ranges | None
) -> None:
    async with tcp_swarm(tmp_path, ("a", "b")) as (teller, listener):
        hold(monkeypatch, teller, layers)
        node_offers.announce_models(teller)

        assert await heard(listener, teller) == (layers[:RANGES_MAX] if told is None else told)
        assert listener.membership.is_member(teller.peer_id)


async def test_layers_that_may_not_be_fetched_are_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(config("a"), models=replace(config("a").models, fetch=False))
    async with Node.open(settings, environment(tmp_path, "a")) as node:
        await node.pull(str(EchoModel().write(tmp_path / "model")))
        entry = hold(monkeypatch, node, ((0, 2), (4, 6)))

        assert await node._check_files(entry.model_id, 4, 6) == 0
        with pytest.raises(ModelNotFound, match="layers 2-3 are not on this machine"):
            await node._check_files(entry.model_id, 0, 6)
