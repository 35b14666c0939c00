"""A node's life from start-up to Ctrl-C, in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from swarmpy.errors import SwarmError
from swarmpy.status import NodeStatus
from swarmpy_cli.client import NodeClient, connect
from swarmpy_cli.replies import Question, Reply, stream_reply
from swarmpy_cli.run import program
from tests.cli.echo_model import write_echo_model
from tests.cli.processes import (
    ECHO,
    END_S_MAX,
    NODE_OPTIONS,
    SLOW,
    Process,
    command,
    document,
    environ,
    ran,
    started,
)

LONG = {"temperature": 0, "max_tokens": 100}
"""About a second of the slow engine's time."""


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_echo_model(tmp_path / "echo-model"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_start_up_ends_with_the_three_lines_to_copy(home: Path, model: str) -> None:
    with subprocess.Popen(
        command(home, "run", model, "--engine", ECHO, *NODE_OPTIONS),
        env=environ(),
        stdout=subprocess.PIPE,
        text=True,
    ) as node:
        assert node.stdout is not None
        for line in node.stdout:
            if line == "\n":
                break
        lines = [node.stdout.readline() for _ in range(3)]
        node.send_signal(signal.SIGINT)
    assert lines[0].startswith("export OPENAI_BASE_URL=http://127.0.0.1:")
    assert "/v1 OPENAI_API_KEY=sk-" in lines[0]
    assert lines[1].startswith("swarmpy join swarm://")
    assert lines[2].startswith(f"{program()} --data-dir {home} chat ")
    assert node.returncode == 0


def test_commands_to_copy_name_the_program_as_this_shell_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make demo` installs into a folder that is on nobody's PATH."""
    installed = tmp_path / ".venv" / "bin" / "swarmpy"
    installed.parent.mkdir(parents=True)
    installed.touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(installed.with_name("python")))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == str(installed)
    monkeypatch.chdir(tmp_path)
    assert program() == ".venv/bin/swarmpy"
    monkeypatch.setenv("PATH", str(installed.parent))
    assert program() == "swarmpy"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_node_stops_cleanly_at_once(home: Path, model: str, number: signal.Signals) -> None:
    with started(home, "run", model, "--engine", ECHO, *NODE_OPTIONS, "--json") as node:
        node.ready()
        code, seconds = node.signal_and_wait(number)
        errors = node.errors()
    assert code == 0
    assert seconds < END_S_MAX
    assert "Traceback" not in errors
    assert not (home / "node.json").exists()
    assert not (home / "admin.sock").exists()


def test_ctrl_c_during_start_up_stops_it(home: Path, model: str) -> None:
    with started(home, "run", model, "--engine", ECHO, *NODE_OPTIONS) as node:
        assert node.popen.stdout is not None
        assert node.popen.stdout.readline().startswith(b"node ")
        code, seconds = node.signal_and_wait(signal.SIGINT)
        errors = node.errors()
    assert (code, "Traceback" in errors) == (0, False)
    assert seconds < END_S_MAX


def test_a_reply_that_runs_finishes_after_ctrl_c(home: Path, model: str) -> None:
    """Goal: nobody's answer is cut by a restart. Method: interrupt at the first token."""
    with started(home, "run", model, "--engine", SLOW, *NODE_OPTIONS, "--json") as node:
        node.ready()
        reply = interrupted_reply(home, node, is_cut=False)
        code = node.popen.wait(timeout=30)
    assert reply.usage.completion_tokens == LONG["max_tokens"]
    assert code == 0


def test_a_second_ctrl_c_cuts_the_reply_and_ends_the_node(home: Path, model: str) -> None:
    with started(home, "run", model, "--engine", SLOW, *NODE_OPTIONS, "--json") as node:
        node.ready()
        with pytest.raises(SwarmError):
            interrupted_reply(home, node, is_cut=True)
        code, seconds = node.signal_and_wait()
        errors = node.errors()
    assert code == 130
    assert seconds < END_S_MAX
    assert "Traceback" not in errors


def interrupted_reply(home: Path, node: Process, *, is_cut: bool) -> Reply:
    """Ask for a long reply, and send a Ctrl-C at its first piece, two to cut it."""
    question = Question(model="echo-model", sampling=dict(LONG))
    reply = Reply()
    with connect(home) as client:
        body = question.body([{"role": "user", "content": "hello"}])
        is_first = True
        for _ in stream_reply(client, body, reply, lambda text: None):
            if is_first:
                node.popen.send_signal(signal.SIGINT)
                if is_cut:
                    wait_stopping(client)
                    node.popen.send_signal(signal.SIGINT)
                is_first = False
    return reply


def wait_stopping(client: NodeClient) -> None:
    """Wait until the node has taken a signal, so that two do not count as one."""
    while not client.get("/admin/status", NodeStatus).is_stopping:
        pass


def test_a_node_whose_parent_is_killed_ends(home: Path, model: str) -> None:
    """Goal: the demo leaves nothing behind even when killed -9. Method: close its pipe."""
    words = ("run", model, "--engine", ECHO, *NODE_OPTIONS, "--json", "--end-with-parent")
    with started(home, *words) as node:
        node.ready()
        assert node.popen.stdin is not None
        node.popen.stdin.close()
        assert node.popen.wait(timeout=30) == 0


def test_a_second_run_is_refused_with_the_pid_and_the_first_goes_on(home: Path, model: str) -> None:
    with started(home, "run", model, "--engine", ECHO, *NODE_OPTIONS, "--json") as node:
        pid = node.ready()["pid"]
        second = ran(home, "run", "--json")
        assert second.returncode == 1
        assert json.loads(second.stdout)["error"]["code"] == "node_running"
        assert f"(pid {pid})" in json.loads(second.stdout)["error"]["message"]
        assert document(home, "status")["is_stopping"] is False


def test_a_killed_nodes_folder_is_taken_over(home: Path, model: str) -> None:
    words = ("run", model, "--engine", ECHO, *NODE_OPTIONS, "--json")
    with started(home, *words) as node:
        first = node.ready()
        node.signal_and_wait(signal.SIGKILL)
    assert b"no node is running" in ran(home, "peers").stderr
    with started(home, *words) as node:
        second = node.ready()
    assert second["peer"] == first["peer"]


def test_a_model_nobody_can_hold_leaves_the_node_running(home: Path, model: str) -> None:
    small = ("--memory", "200M")
    with started(home, "run", model, "--engine", ECHO, *NODE_OPTIONS, *small, "--json") as node:
        assert node.ready()["model"] is None
        node.popen.send_signal(signal.SIGINT)
        errors = node.errors()
    assert "asked: " in errors
    assert "Invite another machine" in errors


def test_an_unknown_model_ends_start_up_with_its_error(home: Path) -> None:
    done = ran(home, "run", "no-such-model", "--engine", ECHO, *NODE_OPTIONS, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "model_not_found"
    assert b"Traceback" not in done.stderr


def test_a_default_model_that_cannot_be_fetched_leaves_the_node_running(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without internet can still be joined. Method: a package index that is not there."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with started(home, "run", "--engine", ECHO, *NODE_OPTIONS, "--json") as node:
        assert node.ready()["model"] is None
        node.popen.send_signal(signal.SIGINT)
        errors = node.errors()
    assert "not ready: pip could not fetch" in errors


def test_the_model_that_is_chosen_is_said_with_the_reason(home: Path, model: str) -> None:
    with started(home, "run", model, "--engine", ECHO, *NODE_OPTIONS, "--json") as node:
        node.ready()
        node.signal_and_wait(signal.SIGINT)
    with started(home, "run", "--engine", ECHO, *NODE_OPTIONS, "--json") as node:
        assert node.ready()["model"] == "echo-model"
        node.popen.send_signal(signal.SIGINT)
        errors = node.errors()
    assert "model echo-model: no peer has one; the largest here is tried first" in errors


def test_a_data_folder_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    done = ran(tmp_path / "home", "run")
    assert done.returncode in (1, 2)
    assert b"Traceback" not in done.stderr
    assert os.fsencode(tmp_path / "home") in done.stderr
