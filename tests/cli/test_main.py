"""The command line itself: errors, exit codes, folders and settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarmpy_cli.context import Settings, config_flags, default_folder
from swarmpy_cli.lock import folder_lock
from swarmpy_cli.main import cli, main
from tests.cli.processes import Swarmpy

NEEDS_A_NODE = (
    ("peers",),
    ("status",),
    ("invite",),
    ("chat", "hello"),
)


@pytest.mark.parametrize("words", NEEDS_A_NODE)
def test_a_command_without_a_node_says_how_to_start_one(
    swarmpy: Swarmpy, words: tuple[str, ...]
) -> None:
    ran = swarmpy(*words)
    assert ran.code == 1
    assert ran.output == ""
    assert "error: no node is running in " in ran.errors
    assert "fix: Start one with `swarmpy run`" in ran.errors


@pytest.mark.parametrize("words", NEEDS_A_NODE)
def test_an_error_with_json_is_one_document_on_standard_output(
    swarmpy: Swarmpy, words: tuple[str, ...]
) -> None:
    ran = swarmpy(*words, "--json")
    assert ran.code == 1
    error = ran.document["error"]
    assert isinstance(error, dict)
    assert error["code"] == "no_node_running"
    assert set(error) == {"code", "message", "fix"}


def test_a_usage_error_is_exit_code_two_and_json_on_request(swarmpy: Swarmpy) -> None:
    assert swarmpy("peers", "--unknown").code == 2
    ran = swarmpy("peers", "--unknown", "--json")
    assert ran.code == 2
    assert "error" in ran.document


def test_an_unknown_config_key_is_named(swarmpy: Swarmpy, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text("[engine]\nthread = 2\n")
    ran = swarmpy("run")
    assert ran.code == 1
    assert "unknown key engine.thread" in ran.errors


def test_an_unknown_setting_in_the_environment_is_named(
    swarmpy: Swarmpy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMPY_ENGINE_COLOUR", "blue")
    assert "unknown key engine.colour" in swarmpy("run").errors


def test_a_malformed_set_option_says_what_was_expected(swarmpy: Swarmpy) -> None:
    assert "expected SECTION.KEY=VALUE" in swarmpy("run", "--set", "engine").errors


def test_a_second_run_in_a_folder_is_refused_with_the_pid(swarmpy: Swarmpy, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "home"):
        ran = swarmpy("run", "--no-model")
    assert ran.code == 1
    assert f"(pid {os.getpid()})" in ran.errors


def test_join_without_a_terminal_wants_yes(swarmpy: Swarmpy) -> None:
    ran = swarmpy("join", "swarm://whatever")
    assert ran.code == 1
    assert "add --yes" in ran.errors


def test_the_data_folder_option_is_stronger_than_the_variable(
    swarmpy: Swarmpy, tmp_path: Path
) -> None:
    assert f"no node is running in {tmp_path / 'home'}" in swarmpy("peers").errors
    other = tmp_path / "other"
    assert f"no node is running in {other}" in swarmpy("--data-dir", str(other), "peers").errors


def test_the_default_folder_is_the_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWARMPY_HOME", raising=False)
    assert default_folder().name == "swarmpy"


def test_flags_are_stronger_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[engine]\nslots = 7\n[node]\nname = "file"\n')
    settings = Settings(folder=tmp_path, cache_folder=tmp_path, log_level="info")
    flags = config_flags(
        name="flag", memory="500M", listen=["/ip4/127.0.0.1/tcp/0"], port=0, no_mdns=True
    )
    config = settings.config(flags)
    assert config.node.name == "flag"
    assert config.node.log_level == "info"
    assert config.engine.slots == 7
    assert config.engine.memory_bytes_max == 500_000_000
    assert config.network.listen == ("/ip4/127.0.0.1/tcp/0",)
    assert config.network.mdns is False
    assert config.gateway.listen == "127.0.0.1:0"


def test_every_command_answers_in_json() -> None:
    for command in (*cli.commands.values(), *cli.commands["models"].commands.values()):  # type: ignore[attr-defined]
        if command.name != "models":
            assert "is_json" in [parameter.name for parameter in command.params], command.name


def test_version_is_one_json_document(swarmpy: Swarmpy) -> None:
    ran = swarmpy("version", "--json")
    assert ran.code == 0
    assert ran.document["swarmpy"]
    assert ran.document["python"]


def test_the_version_can_be_asked_for_as_of_other_programs(swarmpy: Swarmpy) -> None:
    ran = swarmpy("--version")
    assert (ran.code, ran.output.split()[0]) == (0, "swarmpy")


def test_starting_imports_nothing_heavy() -> None:
    """Goal: `swarmpy version` and `--help` start fast. Method: the modules they may not import."""
    code = (
        "import sys, swarmpy_cli.main; "
        "print(*{'trio', 'numpy', 'httpx', 'rich', 'cryptography', 'fastapi', 'zeroconf'}"
        ".intersection(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.split() == []


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "swarmpy_cli", "version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("swarmpy ")


def test_main_returns_interrupted_for_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("swarmpy_cli.network.connect", interrupt)
    assert main(["peers"]) == 130
    assert "Traceback" not in capsys.readouterr().err
