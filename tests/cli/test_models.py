"""Which model is meant when none is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmpy.status import ModelStatus, PeerStatus
from swarmpy_cli.models import choices, from_here
from tests.cli.echo_model import write_echo_model
from tests.cli.processes import Swarmpy


def model(
    name: str,
    size_bytes: int,
    *,
    is_local: bool = True,
    is_ready: bool = False,
    peers: tuple[str, ...] = (),
) -> ModelStatus:
    return ModelStatus(
        model_id=name * 8,
        name=name,
        display_name=name,
        size_bytes=size_bytes,
        layer_count=12,
        is_local=is_local,
        is_ready=is_ready,
        peers=peers,
    )


def peer(name: str, *, shards: tuple[str, ...]) -> PeerStatus:
    return PeerStatus(
        peer=name,
        name=name,
        state="member",
        addresses=(),
        source="invite",
        path="direct",
        rtt_ms=1.0,
        networks=(),
        engine="mlx",
        memory_bytes_max=0,
        memory_bytes_free=0,
        models=(),
        shards=shards,
        agent="",
    )


def test_what_is_configured_is_the_only_choice() -> None:
    found = choices([model("large", 9)], [], configured="wanted")
    assert [choice.model for choice in found] == ["wanted"]


def test_a_model_whose_layers_are_loaded_comes_before_a_larger_one() -> None:
    known = [model("large", 9, peers=("ann",)), model("small", 1, is_ready=True)]
    first = choices(known, [])[0]
    assert (first.model, first.is_served) == ("small", True)


def test_layers_that_a_member_holds_count_as_loaded() -> None:
    known = [model("large", 9), model("small", 1)]
    first = choices(known, [peer("ann", shards=("small 0-5",))])[0]
    assert (first.model, first.is_served) == ("small", True)


def test_what_members_have_comes_before_what_is_only_here() -> None:
    known = [model("here", 9), model("theirs", 1, is_local=False, peers=("ann",))]
    found = choices(known, [])
    assert [(choice.model, choice.is_served) for choice in found] == [
        ("theirs", True),
        ("here", False),
    ]


def test_local_models_are_tried_from_the_largest_down_each_once() -> None:
    known = [model("small", 1), model("large", 9), model("middle", 5)]
    assert [choice.model for choice in choices(known, [])] == ["large", "middle", "small"]


def test_nothing_is_chosen_where_nothing_is_known() -> None:
    assert choices([], []) == []


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "owner/model"])
def test_a_models_name_goes_to_the_node_unchanged(name: str) -> None:
    assert from_here(name) == name


@pytest.mark.parametrize("path", ["./folder", "../folder", "file.gguf"])
def test_a_path_is_made_absolute_because_the_node_runs_elsewhere(path: str) -> None:
    assert Path(from_here(path)).is_absolute()


def test_a_model_gets_a_name_of_ones_own(swarmpy: Swarmpy, tmp_path: Path) -> None:
    model = write_echo_model(tmp_path / "echo")

    pulled = swarmpy("models", "pull", str(model), "--as", "house", "--json").document
    renamed = swarmpy("models", "rename", "house", "home")
    refused = swarmpy("models", "rename", "home", "Not A Name")

    assert pulled["name"] == "house"
    assert (renamed.code, renamed.output) == (0, "Echo (F32) is home now\n")
    assert refused.code == 1
    assert "not-a-name" in refused.errors
    assert swarmpy("models", "show", "home", "--json").document["model_id"] == pulled["model_id"]


def test_models_are_pulled_listed_and_shown_without_a_node(
    swarmpy: Swarmpy, tmp_path: Path
) -> None:
    model = write_echo_model(tmp_path / "echo")

    pulled = swarmpy("models", "pull", str(model), "--json").document
    listed = swarmpy("models", "list", "--json").document["models"]
    shown = swarmpy("models", "show", "echo", "--json").document

    assert listed == [pulled]
    assert shown["model_id"] == pulled["model_id"]
    assert (shown["engine"], shown["memory_bytes"]) == ("", {})
    assert shown["engine_why"].startswith("none: ")
    assert shown["is_local"]
    assert not shown["is_ready"]
