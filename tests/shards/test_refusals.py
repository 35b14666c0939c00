"""Configurations: code and absurd sizes are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_files import write_model_folder

from swarmpy.errors import ModelRefused
from swarmpy.shards.refusals import check_config, check_folder, read_json


@pytest.mark.parametrize("key", ["model_file", "auto_map", "trust_remote_code"])
@pytest.mark.parametrize("value", ["x.py", None, False])
def test_a_key_that_names_code_is_refused_whatever_it_says(key: str, value: object) -> None:
    with pytest.raises(ModelRefused, match=f"has the key '{key}'"):
        check_config({key: value})


def test_a_key_that_names_code_is_found_at_any_depth() -> None:
    with pytest.raises(ModelRefused, match="'auto_map'"):
        check_config({"vision_config": [{"inner": {"auto_map": {}}}]})


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_every_configuration_file_of_a_folder_is_looked_into(tmp_path: Path, name: str) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / name).write_text(json.dumps({"trust_remote_code": True}))

    with pytest.raises(ModelRefused, match=f"{name} has the key 'trust_remote_code'"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_hidden_layers", 10**9, "expected 0 to 1024"),
        ("n_positions", 10**30, "expected 0 to"),
        ("n_ctx", 1 << 63, "expected 0 to"),
        ("hidden_size", -1, "expected 0 to"),
        ("vocab_size", "many", "expected a whole number"),
        ("vocab_size", True, "expected a whole number"),
        ("hidden_size", 4096.0, "expected a whole number"),
        ("num_key_value_heads", [8, 8, 1 << 40], "expected 0 to"),
    ],
)
def test_an_absurd_size_is_refused_by_name(key: str, value: object, reason: str) -> None:
    with pytest.raises(ModelRefused, match=f"{key} is .*{reason}"):
        check_config({"text_config": {key: value}})


def test_the_sizes_of_a_large_published_model_are_accepted() -> None:
    check_config(
        {
            "num_hidden_layers": 126,
            "hidden_size": 16384,
            "vocab_size": 262_144,
            "head_dim": None,
            "num_key_value_heads": [8, 16],
            "max_position_embeddings": 10_485_760,
        }
    )


def test_a_time_limit_of_infinity_is_read_as_other_readers_do(tmp_path: Path) -> None:
    """mamba2's published configurations hold one."""
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')

    assert read_json(tmp_path / "config.json", bytes_max=100)["time_step_limit"][1] == float("inf")


def test_a_configuration_nested_too_deep_is_refused() -> None:
    config: dict[str, object] = {}
    for _ in range(40):
        config = {"a": config}

    with pytest.raises(ModelRefused, match="nested deeper"):
        check_config(config)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1]", "holds list, expected an object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON|at most"),
        ('{"a": "' + "x" * 200_000 + '"}', "at most 100000 are accepted"),
    ],
)
def test_a_malformed_or_huge_file_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(content)

    with pytest.raises(ModelRefused, match=reason):
        read_json(tmp_path / "config.json", bytes_max=100_000)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"cannot read .*config.json"):
        check_folder(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda item: (
        st.lists(item, max_size=4)
        | st.dictionaries(st.sampled_from(["auto_map", "hidden_size", "a"]), item, max_size=3)
    ),
)


@given(st.dictionaries(st.sampled_from(["auto_map", "hidden_size", "a"]), _JSON, max_size=3))
def test_any_configuration_with_code_anywhere_is_refused(config: dict[str, object]) -> None:
    text = json.dumps(config)
    try:
        check_config(config)
    except ModelRefused:
        return
    assert '"auto_map"' not in text
