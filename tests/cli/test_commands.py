"""The commands that talk to a running node, as a user types them, with two real nodes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmpy.testing.engine import EchoModel
from tests.cli.echo_model import write_echo_model
from tests.cli.processes import (
    ECHO,
    NODE_OPTIONS,
    SLOW,
    asked,
    command,
    document,
    environ,
    ran,
    started,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def home(place: Path) -> Iterator[Path]:
    """The data folder of a node that runs, with a model loaded."""
    model = str(write_echo_model(place / "echo-model"))
    home = place / "home"
    words = ("run", model, "--name", "ann", "--engine", ECHO, *NODE_OPTIONS, "--json")
    with started(home, *words) as node:
        node.ready()
        yield home
        node.signal_and_wait(signal.SIGINT)


def test_status_tells_who_holds_which_layers(home: Path) -> None:
    status = document(home, "status")
    assert status["name"] == "ann"
    assert status["shards"] == ["echo-model 0-11"]
    shown = asked(home, "status").output
    assert "echo-model: 12 layers over 1 stage" in shown
    assert "holds echo-model 0-11" in shown


def test_models_are_listed_and_shown(home: Path) -> None:
    listed = document(home, "models", "list")["models"]
    assert isinstance(listed, list)
    shown = document(home, "models", "show", "echo-model")
    assert [shown[key] for key in ("model_id", "engine")] == [listed[0]["model_id"], "echo"]
    assert (shown["layer_count"], shown["is_ready"]) == (12, True)
    assert shown["engine_why"] == "the settings name it (engine.name)"
    assert list(shown["memory_bytes"]) == ["2048", "8192"]
    assert "echo-model" in asked(home, "models", "list").output
    assert "layer count     12" in asked(home, "models", "show", "echo-model").output


def test_an_unknown_model_is_refused_with_those_that_are_known(home: Path) -> None:
    done = asked(home, "models", "show", "other")
    assert done.code == 1
    assert "no model 'other' is known here (known: echo-model" in done.errors


def test_pulling_a_folder_from_where_the_user_stands(home: Path, place: Path) -> None:
    write_echo_model(place / "second-model", EchoModel(layers=3, vocabulary_size=256))
    done = subprocess.run(
        command(home, "models", "pull", "./second-model", "--json"),
        env=environ(),
        cwd=place,
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["path"] == str(place / "second-model")


def test_pulling_what_nobody_has_is_the_nodes_own_error(home: Path) -> None:
    done = asked(home, "models", "pull", "no-such-model", "--json")
    assert done.code == 1
    error = json.loads(done.output)["error"]
    assert error["code"] == "model_not_found"
    assert error["fix"]


def test_an_invite_stands_alone_on_its_line_with_a_warning_below(home: Path) -> None:
    lines = asked(home, "invite", "--ttl", "30m").output.splitlines()
    assert lines[0].startswith("swarm://")
    assert " " not in lines[0]
    assert lines[1] == ""
    assert any("Anyone who holds this code can join" in line for line in lines)


def test_an_invite_for_longer_than_a_day_is_refused(home: Path) -> None:
    done = asked(home, "invite", "--ttl", "2d")
    assert done.code == 2
    assert "expected up to 24h" in done.errors


def test_peers_lists_this_node(home: Path) -> None:
    peers = document(home, "peers")["peers"]
    assert isinstance(peers, list)
    assert [(peer["name"], peer["state"]) for peer in peers] == [("ann", "self")]
    assert "ann" in asked(home, "peers").output


def test_a_chat_prints_the_reply_and_says_why_it_chose_the_model(home: Path) -> None:
    done = asked(home, "chat", "hello", "--max-tokens", "5", "--temperature", "0")
    assert done.code == 0
    assert "echo-model: its layers are loaded already" in done.errors
    answer = document(home, "chat", "hello", "--max-tokens", "5", "--temperature", "0")
    assert done.output == f"{answer['text']}\n"
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11}


def test_a_prompt_can_come_from_a_pipe(home: Path) -> None:
    words = command(home, "chat", "--max-tokens", "5", "--temperature", "0", "--json")
    piped = subprocess.run(words, env=environ(), input=b"hello\n", capture_output=True, check=True)
    typed = document(home, "chat", "hello", "--max-tokens", "5", "--temperature", "0")
    assert json.loads(piped.stdout)["text"] == typed["text"]


def test_a_bad_sampling_value_is_the_endpoints_error(home: Path) -> None:
    done = asked(home, "chat", "hello", "--temperature", "-1", "--json")
    assert done.code == 1
    assert "temperature" in json.loads(done.output)["error"]["message"]


def test_joining_starts_a_node_where_none_runs_and_a_restart_needs_no_code(
    home: Path, place: Path
) -> None:
    code = str(document(home, "invite")["code"])
    words = ("--name", "ben", "--engine", ECHO, *NODE_OPTIONS, "--json")
    with started(place / "ben", "join", code, "--yes", *words) as ben:
        ready = ben.ready()
        joined = ready["joined"]
        assert isinstance(joined, dict)
        assert joined["issuer"] == "ann"
        assert ready["model"] == "echo-model"
        ben.signal_and_wait(signal.SIGINT)
        shown = ben.errors()
    assert f"words    {joined['words']}" in shown
    assert "serves   layers of models" in shown
    assert "  It may ask members to do the same; a member that computes on a prompt" in shown

    with started(place / "ben", "run", "--no-model", *words) as ben:
        ben.ready()
        assert document(place / "ben", "chat", "hello", "--max-tokens", "2")["text"]
        ben.signal_and_wait(signal.SIGINT)


def test_joining_through_the_node_that_runs(home: Path, place: Path) -> None:
    code = str(document(home, "invite")["code"])
    words = ("run", "--no-model", "--engine", ECHO, *NODE_OPTIONS, "--json")
    with started(place / "cleo", *words) as cleo:
        cleo.ready()
        assert document(place / "cleo", "join", code, "--yes")["issuer"] == "ann"
        cleo.signal_and_wait(signal.SIGINT)


def test_a_member_that_was_let_in_is_revoked(home: Path, place: Path) -> None:
    code = str(document(home, "invite")["code"])
    words = ("run", "--no-model", "--name", "dora", "--engine", ECHO, *NODE_OPTIONS, "--json")
    with started(place / "dora", *words) as dora:
        dora.ready()
        document(place / "dora", "join", code, "--yes")
        unable = ran(place / "dora", "revoke", "ann", "--yes", "--json")
        unasked = ran(home, "revoke", "dora", "--json")
        elsewhere = ran(home, "revoke", "dora", "--network", "other", "--yes", "--json")
        revoked = document(home, "revoke", "dora", "--yes")
        dora.signal_and_wait(signal.SIGINT)

    assert json.loads(unable.stdout)["error"]["code"] == "not_a_member"
    assert json.loads(unasked.stdout)["error"]["code"] == "not_confirmed"
    assert json.loads(elsewhere.stdout)["error"]["code"] == "not_a_member"
    assert revoked["name"] == "dora"
    assert isinstance(revoked["networks"], list)
    assert len(revoked["networks"]) == 1
    peers = document(home, "peers")["peers"]
    assert isinstance(peers, list)
    assert {peer["name"]: peer["state"] for peer in peers}["dora"] == "revoked"
    again = ran(home, "revoke", "nobody", "--yes", "--json")
    assert json.loads(again.stdout)["error"]["code"] == "not_a_member"


def test_a_used_code_is_refused_and_no_node_stays(home: Path, place: Path) -> None:
    code = str(document(home, "invite")["code"])
    words = ("--yes", "--engine", ECHO, *NODE_OPTIONS, "--json")
    with started(place / "first", "join", code, *words) as first:
        first.ready()
        first.signal_and_wait(signal.SIGINT)
    second = ran(place / "second", "join", code, *words)
    assert second.returncode == 1
    assert json.loads(second.stdout)["error"]["code"] == "invite_used"
    assert b"Traceback" not in second.stderr


def test_a_changed_code_is_refused_before_anything_is_asked(home: Path, place: Path) -> None:
    done = ran(place / "other", "join", "swarm://abc", "--yes", "--json", *NODE_OPTIONS)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "invite_malformed"


class Terminal:
    """A command whose standard input is a terminal."""

    def __init__(self, words: list[str]) -> None:
        self.keyboard, screen = pty.openpty()
        self.popen = subprocess.Popen(
            words, env=environ(), stdin=screen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        os.close(screen)
        self.shown = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        with self.popen:
            os.close(self.keyboard)

    def type(self, text: str) -> None:
        os.write(self.keyboard, text.encode())

    def read_until(self, text: bytes) -> bytes:
        """Read until `text` comes, and return what came before it."""
        assert self.popen.stdout is not None
        while text not in self.shown:
            data = os.read(self.popen.stdout.fileno(), 4096)
            assert data, self.shown
            self.shown += data
        before, _, self.shown = self.shown.partition(text)
        return before


def test_a_joiner_at_a_terminal_is_asked_once_and_may_decline(home: Path, place: Path) -> None:
    code = str(document(home, "invite")["code"])
    words = command(place / "shy", "join", code, "--engine", ECHO, *NODE_OPTIONS)
    with Terminal(words) as terminal:
        shown = terminal.read_until(b"Join? [y/N]")
        assert b"words    " in shown
        terminal.type("n\n")
        assert terminal.popen.wait(timeout=30) == 130
    assert not (place / "shy" / "node.json").exists()


def test_ctrl_c_in_a_conversation_cancels_that_reply_only(tmp_path: Path) -> None:
    model = str(write_echo_model(tmp_path / "echo-model"))
    words = ("run", model, "--engine", SLOW, *NODE_OPTIONS, "--json")
    with started(tmp_path / "home", *words) as node:
        node.ready()
        options = ("--temperature", "0", "--max-tokens", "200")
        with Terminal(command(tmp_path / "home", "chat", *options)) as terminal:
            terminal.read_until(b"> ")
            terminal.type("hello\n")
            wait_busy(tmp_path / "home")
            terminal.popen.send_signal(signal.SIGINT)
            terminal.read_until(b"(cancelled)")
            terminal.read_until(b"> ")
            terminal.type("hello\n")
            terminal.read_until(b"(cut at --max-tokens)")
            terminal.read_until(b"> ")
            terminal.type("\x04")
            assert terminal.popen.wait(timeout=30) == 0


def wait_busy(home: Path) -> None:
    """Wait until the node has a session."""
    while True:
        pipelines = document(home, "status")["pipelines"]
        assert isinstance(pipelines, list)
        if any(pipeline["sessions"] for pipeline in pipelines):
            return
