"""The demo, from nothing to a reply, with the EchoEngine in real processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from swarmpy.testing.engine import EchoModel
from swarmpy_cli.demo import tokens_agree
from tests.cli.echo_model import write_echo_model
from tests.cli.processes import ECHO, END_S_MAX, ran, started


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_echo_model(tmp_path / "echo-model"))


def test_the_demo_is_one_document_with_every_promised_key(tmp_path: Path, model: str) -> None:
    options = ("--engine", ECHO, "--max-tokens", "20", "--compare")
    done = ran(tmp_path / "home", "demo", "--model", model, *options, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {
        "nodes",
        "layers",
        "text",
        "token_ids",
        "ttft_s",
        "tok_s",
        "hop_overhead_ms_p50",
        "stage_weight_bytes",
        "stage_rss_bytes",
        "whole_token_ids",
        "whole_tok_s",
        "whole_weight_bytes",
    } <= set(result)
    token_ids, layers = result["token_ids"], result["layers"]
    assert len(token_ids) == 20
    assert token_ids == result["whole_token_ids"]
    assert layers[0]["start"] == 0
    assert layers[-1]["end"] == 12
    assert [left["end"] for left in layers[:-1]] == [right["start"] for right in layers[1:]]
    assert sorted(layer["node"] for layer in layers) == ["node-1", "node-2", "node-3"]


def test_other_tokens_of_the_whole_model_are_a_failure() -> None:
    assert tokens_agree({"token_ids": [1, 2]})
    assert tokens_agree({"token_ids": [1, 2], "whole_token_ids": [1, 2]})
    assert not tokens_agree({"token_ids": [1, 2], "whole_token_ids": [1, 3]})


def test_the_demo_tells_its_story(tmp_path: Path, model: str) -> None:
    options = ("--engine", ECHO, "--max-tokens", "5", "--nodes", "2", "--prompt", "Why?")
    done = ran(tmp_path / "home", "demo", "--model", model, *options)
    assert done.returncode == 0, done.stderr
    told = done.stdout.decode()
    places = [
        told.index(part)
        for part in (
            "✓ model echo-model",
            "✓ 2 nodes in 2 processes",
            "✓ node-2 joins by an invite of node-1",
            "12 layers over 2 stages",
            "> Why?",
            "prompt: ",
            "speed: ",
            "next: ",
        )
    ]
    assert places == sorted(places)


def test_ctrl_c_ends_the_demo_and_every_process_of_it(tmp_path: Path, model: str) -> None:
    words = ("demo", "--model", model, "--engine", ECHO, "--keep", "--nodes", "2", "--json")
    with started(tmp_path / "home", *words) as demo:
        nodes = demo.ready()["nodes"]
        assert isinstance(nodes, list)
        pids = [int(node["pid"]) for node in nodes]
        assert alive(pids) == pids
        code, seconds = demo.signal_and_wait(signal.SIGINT)
        errors = demo.errors()
    assert alive(pids) == []
    assert seconds < END_S_MAX
    assert (code, "Traceback" in errors) == (0, False)


def test_a_killed_demo_leaves_no_process_behind(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what is killed cannot remove its folder
    words = ("demo", "--model", model, "--engine", ECHO, "--keep", "--nodes", "2", "--json")
    with started(tmp_path / "home", *words) as demo:
        nodes = demo.ready()["nodes"]
        assert isinstance(nodes, list)
        demo.signal_and_wait(signal.SIGKILL)
        # The nodes have inherited its standard error: it ends when the last of them has.
        demo.errors()
        for node in nodes:
            wait_ended(int(node["pid"]))


def test_ctrl_c_while_the_nodes_start_leaves_nothing_behind(tmp_path: Path, model: str) -> None:
    with started(tmp_path / "home", "demo", "--model", model, "--engine", ECHO) as demo:
        assert demo.popen.stdout is not None
        while b"layers, " not in demo.popen.stdout.readline():
            pass
        code, seconds = demo.signal_and_wait(signal.SIGINT)
        errors = demo.errors()
    assert (code, "Traceback" in errors) == (130, False)
    assert seconds < END_S_MAX


def test_a_node_that_fails_is_shown_with_its_last_lines(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "import sys\nif 'run' in sys.orig_argv:\n    raise SystemExit('out of luck')\n"
    (tmp_path / "sitecustomize.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = ran(tmp_path / "home", "demo", "--model", model, "--engine", ECHO)
    assert done.returncode == 1
    assert "✗ 3 nodes in 3 processes" in done.stdout.decode()
    assert b"node-1 did not start" in done.stderr
    assert b"SystemExit: out of luck" in done.stderr


def test_a_model_of_too_few_layers_is_refused_before_a_node_starts(tmp_path: Path) -> None:
    small = write_echo_model(tmp_path / "small", EchoModel(layers=2, vocabulary_size=256))
    done = ran(tmp_path / "home", "demo", "--model", str(small), "--engine", ECHO)
    assert done.returncode == 1
    assert b"exactly 3 nodes" in done.stderr
    assert b"--nodes" in done.stderr


def alive(pids: Sequence[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        found.append(pid)
    return found


def wait_ended(pid: int) -> None:
    """Wait until a process that is not our child is gone; pytest's timeout bounds it."""
    import psutil

    try:
        psutil.Process(pid).wait(timeout=10)
    except psutil.NoSuchProcess:
        return
