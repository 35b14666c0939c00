"""Settings: where they come from, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmpy.config import Config, load_config
from swarmpy.errors import ConfigError


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert load_config(tmp_path, environ={}) == Config()


def test_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[node]\nname = "file"\n[engine]\nslots = 2\nthreads = 1')
    environ = {"SWARMPY_NODE_NAME": "environment", "SWARMPY_ENGINE_SLOTS": "3", "HOME": "/"}

    config = load_config(tmp_path, environ=environ, flags={"node": {"name": "flag"}})

    assert (config.node.name, config.engine.slots, config.engine.threads) == ("flag", 3, 1)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[engine]\nmemory = 1", "engine.memory"),
        ("[engin]\nslots = 1", "[engin]"),
        ("engine = 3", "engine must be a section"),
        ("[engine]\nslots = 'two'", "engine.slots"),
        ("[engine]\nslots = true", "engine.slots"),
        ("[network]\nmdns = 3", "network.mdns"),
        ("[engine", "config.toml"),
        ("[engine]\nslots = 0", "engine.slots"),
        ("[engine]\ncontext = -1", "engine.context"),
        ("[engine]\nthreads = -2", "engine.threads"),
        ("[engine]\nmemory_bytes_max = -5", "engine.memory_bytes_max"),
        ("[engine]\nmemory_bytes_max = 'infG'", "engine.memory_bytes_max"),
        ("[engine]\nstep_timeout_s = nan", "engine.step_timeout_s"),
        ("[network]\nredial_interval_s = 0", "network.redial_interval_s"),
        ("[node]\nlog_level = 'loud'", "node.log_level"),
    ],
)
def test_wrong_setting_is_an_error_that_names_it(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "config.toml").write_text(text)

    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path, environ={})

    assert named in str(caught.value)


def test_unknown_variable_with_our_prefix_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"environment: unknown key engine\.slot "):
        load_config(tmp_path, environ={"SWARMPY_ENGINE_SLOT": "1"})


def test_variables_that_name_folders_are_no_settings(tmp_path: Path) -> None:
    assert load_config(tmp_path, environ={"SWARMPY_HOME": "/x", "SWARMPY_CACHE": "/y"}) == Config()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1000", 1000), ("2GiB", 2 * 2**30), ("500M", 500_000_000), ("1.5g", 1_500_000_000)],
)
def test_sizes_may_carry_a_unit(tmp_path: Path, text: str, expected: int) -> None:
    config = load_config(tmp_path, environ={"SWARMPY_ENGINE_MEMORY_BYTES_MAX": text})

    assert config.engine.memory_bytes_max == expected


def test_list_and_switch_may_come_as_text(tmp_path: Path) -> None:
    environ = {
        "SWARMPY_NETWORK_LISTEN": "/ip4/127.0.0.1/tcp/0, /ip6/::1/tcp/0",
        "SWARMPY_NETWORK_MDNS": "false",
        "SWARMPY_NETWORK_REDIAL_INTERVAL_S": "2",
    }

    network = load_config(tmp_path, environ=environ).network

    assert network.listen == ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0")
    assert network.mdns is False
    assert network.redial_interval_s == 2.0
