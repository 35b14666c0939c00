"""The main job, seen from outside: real processes, the real model, the CLI and the endpoint.

Each test is one line of what "done" means for three peers, one model and one reply.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import platformdirs
import psutil
import pytest

from swarmpy.shards.sources import DEFAULT_MODEL

pytestmark = pytest.mark.model

CACHE = Path(os.environ.get("SWARMPY_CACHE") or platformdirs.user_cache_path("swarmpy"))
NODE_OPTIONS = ("--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0")
SETTINGS = ("--set", "engine.context=1024", "--set", "engine.slots=2", "--set", "engine.threads=1")
SPLIT = "225MB"
"""A budget under which three nodes hold the default model at this context, and two do not."""

MEMORY_GROWTH_BYTES_MAX = 16 * 2**20
"""What a process may gain over thirty requests: a leaked slot or reply would show as more."""


@dataclass
class Running:
    """A node started by `swarmpy run --json`, and what it said when it was ready."""

    process: subprocess.Popen[bytes]
    folder: Path
    base_url: str
    api_key: str
    invite: str

    def ask(self, text: str, **options: object) -> httpx.Response:
        """Ask the endpoint for a chat completion."""
        return httpx.post(
            f"{self.base_url}/chat/completions",
            headers={"authorization": f"Bearer {self.api_key}"},
            json={"messages": [{"role": "user", "content": text}], "temperature": 0, **options},
            timeout=120,
        )

    def children(self) -> list[psutil.Process]:
        """The engine children of the node."""
        return psutil.Process(self.process.pid).children()


def command(folder: Path, *words: str) -> list[str]:
    places = ("--data-dir", str(folder), "--cache-dir", str(CACHE))
    return [sys.executable, "-m", "swarmpy_cli", *places, *words]


def start(folder: Path, *words: str) -> Running:
    """Start a node and wait until it is ready."""
    process = subprocess.Popen(
        command(folder, *words, "--json"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    return Running(process, folder, ready["base_url"], ready["api_key"], ready["invite"])


def swarmpy(folder: Path, *words: str) -> object:
    done = subprocess.run(
        command(folder, *words, "--json"), capture_output=True, check=True, timeout=120
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Running]]:
    """Three nodes in three processes, two joined by invite, the model split over all."""
    folder = tmp_path_factory.mktemp("ring")
    with ExitStack() as stack:
        options = (*NODE_OPTIONS, *SETTINGS, "--memory", SPLIT)
        nodes = [start(folder / "1", "run", *options)]
        stack.callback(end, nodes)
        for number in (2, 3):
            invite = swarmpy(nodes[0].folder, "invite")
            assert isinstance(invite, dict)
            words = ("join", invite["code"], "--yes", *options)
            nodes.append(start(folder / str(number), *words))
        yield nodes


def end(nodes: list[Running]) -> None:
    for node in nodes:
        node.process.send_signal(signal.SIGINT)
    for node in nodes:
        with node.process:
            node.process.wait(timeout=10)


def test_the_demo_gives_the_tokens_that_one_process_gives(tmp_path: Path) -> None:
    """`make demo ARGS=--compare`: budgets force a split, and no bit of the reply shows it."""
    demo = swarmpy(tmp_path, "demo", "--compare", "--max-tokens", "24")

    assert isinstance(demo, dict)
    assert demo["token_ids"] == demo["whole_token_ids"]
    assert len(demo["token_ids"]) > 5
    planned = demo["stage_planned_weight_bytes"]
    assert all(
        held <= 1.05 * plan for held, plan in zip(demo["stage_weight_bytes"], planned, strict=True)
    )
    layers = [(stage["start"], stage["end"]) for stage in demo["layers"]]
    assert layers[0][0] == 0
    assert layers[-1][1] == 30
    assert all(left[1] == right[0] for left, right in itertools.pairwise(layers))
    assert max(demo["stage_weight_bytes"]) < demo["whole_weight_bytes"]


def test_every_member_answers_and_the_official_client_works(ring: list[Running]) -> None:
    from openai import OpenAI

    for node in ring:
        client = OpenAI(base_url=node.base_url, api_key=node.api_key)
        question = [{"role": "user", "content": "Name the capital of France."}]
        with client.chat.completions.create(
            model=DEFAULT_MODEL,
            messages=question,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=12,
            stream=True,
        ) as stream:
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "Paris" in "".join(pieces)
        assert len(pieces) > 3


def test_thirty_requests_leave_the_memory_of_nodes_and_engines_flat(ring: list[Running]) -> None:
    """Goal: nothing of a reply is kept. Method: resident bytes after ten requests and forty."""
    processes = [psutil.Process(node.process.pid) for node in ring]
    processes += [child for node in ring for child in node.children()]
    assert len(processes) == 6

    def ask(count: int) -> list[int]:
        for number in range(count):
            answer = ring[0].ask(f"Say the number {number}.", max_tokens=6)
            assert answer.status_code == 200
        return [process.memory_info().rss for process in processes]

    before = ask(10)
    after = ask(30)

    assert all(new - old < MEMORY_GROWTH_BYTES_MAX for old, new in zip(before, after, strict=True))


def test_client_that_hangs_up_frees_its_slots(ring: list[Running]) -> None:
    """Two slots: three replies that are hung up on must leave room for another."""
    headers = {"authorization": f"Bearer {ring[0].api_key}"}
    body = {"messages": [{"role": "user", "content": "Count up."}], "stream": True}
    for _ in range(3):
        url = f"{ring[0].base_url}/chat/completions"
        with httpx.stream("POST", url, headers=headers, json=body, timeout=60) as response:
            next(response.iter_lines())

    assert ring[0].ask("Hello", max_tokens=3).status_code == 200


@pytest.mark.parametrize("index", [0, 1, 2])
def test_engine_that_is_killed_costs_a_reply_and_no_node(ring: list[Running], index: int) -> None:
    assert ring[0].ask("Hello", max_tokens=2).status_code == 200
    headers = {"authorization": f"Bearer {ring[0].api_key}"}
    body = {
        "messages": [{"role": "user", "content": "Tell me a long story."}],
        "stream": True,
        "max_tokens": 400,
    }
    url = f"{ring[0].base_url}/chat/completions"
    with httpx.stream("POST", url, headers=headers, json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        ring[index].children()[0].kill()
        events = [line for line in lines if line.startswith("data:")]

    assert "error" in json.loads(events[-1].removeprefix("data:"))
    assert all(node.process.poll() is None for node in ring)
    assert ring[0].ask("Hello again", max_tokens=3).status_code == 200


def test_node_that_is_killed_leaves_no_orphan_and_the_others_say_what_is_missing(
    ring: list[Running],
) -> None:
    """Last in this file: it takes a node away from the ring."""
    children = ring[2].children()
    ring[2].process.kill()
    ring[2].process.wait()

    _, alive = psutil.wait_procs(children, timeout=2)
    ring[0].ask("Hello", max_tokens=3)  # may still have been sent to the lost stage
    answer = ring[0].ask("Hello", max_tokens=3)

    assert alive == []
    assert answer.status_code == 503
    assert "bytes" in answer.json()["error"]["message"]
