"""Replies that the pipeline's benchmarks time: by rings of node processes, and by one engine child.

Each node is a process of its own (`../node_process.py`) on loopback; "whole" is an engine child
with all layers and no node around it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import trio

from swarmpy.abc import Row, Want
from swarmpy.config import PREFILL_CHUNK
from swarmpy.pipeline import sampling
from swarmpy.pipeline.engine_host import HostedShard
from swarmpy.proto.pipeline import Sampling

NODE_START_TIMEOUT_S = 60.0
NODE_END_TIMEOUT_S = 2.0


@dataclass
class LineProcess:
    """A process that answers each JSON line on its standard input by one on its output."""

    process: trio.Process
    lines: AsyncIterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self.lines = self._read_lines()

    @classmethod
    async def start(cls, script: Path, arguments: dict[str, object]) -> LineProcess:
        """Start a Python script with one JSON object as its argument."""
        command = [sys.executable, str(script), json.dumps(arguments)]
        return cls(await trio.lowlevel.open_process(command, stdin=-1, stdout=-1))

    async def _read_lines(self) -> AsyncIterator[str]:
        assert self.process.stdout is not None
        buffer = b""
        async for chunk in self.process.stdout:
            buffer += chunk
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                yield line.decode()

    async def read(self) -> Any:
        return json.loads(await anext(self.lines))

    async def do(self, command: str, **arguments: object) -> Any:
        assert self.process.stdin is not None
        line = json.dumps({"do": command, **arguments}) + "\n"
        await self.process.stdin.send_all(line.encode())
        return await self.read()


@dataclass(frozen=True)
class Ring:
    """Nodes that have assembled a pipeline; the first one coordinates."""

    nodes: list[LineProcess]
    stages: list[dict[str, Any]]
    """As `swarmpy.status.StageView`."""

    def node_of(self, stage: dict[str, Any]) -> LineProcess:
        """The node that is a stage."""
        return self.nodes[int(stage["name"].rpartition("-")[2]) - 1]


@asynccontextmanager
async def ring(
    budgets: Sequence[int],
    *,
    engine: str,
    model: str,
    cache: Path,
    threads: int,
) -> AsyncIterator[Ring]:
    """Nodes in processes of their own that have joined one network and assembled a ring.

    Args:
        budgets: What each node may use, in bytes; together they must force a stage on each.
    """
    count = len(budgets)
    nodes: list[LineProcess] = []
    with tempfile.TemporaryDirectory(prefix="swarmpy-bench-") as folder:
        try:
            for number, budget in enumerate(budgets, 1):
                arguments: dict[str, object] = {
                    "folder": str(Path(folder) / f"node-{number}"),
                    "cache": str(cache),
                    "memory_bytes": budget,
                    "engine": engine,
                    "threads": threads,
                    "model": model,
                }
                script = Path(__file__).parent.parent / "node_process.py"
                nodes.append(await LineProcess.start(script, arguments))
            with trio.fail_after(NODE_START_TIMEOUT_S):
                for node in nodes:
                    await node.read()
                for node in nodes[1:]:
                    await node.do("join", code=await nodes[0].do("invite"))
                for node in nodes:
                    await node.do("wait_members", count=count - 1)
                view = await nodes[0].do("prepare")
            assert len(view["stages"]) == count, f"{len(view['stages'])} stages, expected {count}"
            yield Ring(nodes, view["stages"])
        finally:
            with trio.CancelScope(shield=True):
                await end(nodes)


async def end(processes: Sequence[LineProcess]) -> None:
    """Let processes end by themselves, and after a while by force."""
    for each in processes:
        assert each.process.stdin is not None
        await each.process.stdin.aclose()
    for each in processes:
        with trio.move_on_after(NODE_END_TIMEOUT_S):
            await each.process.wait()
        each.process.kill()
        await each.process.wait()


def engine_children(pid: int) -> list[psutil.Process]:
    """The engine children of a process."""
    return [
        child
        for child in psutil.Process(pid).children()
        if "swarmpy.pipeline.engine_child" in child.cmdline()
    ]


@dataclass(frozen=True)
class Reply:
    """One measured reply."""

    token_ids: list[int]
    tok_s: float
    """Tokens a second after the first."""
    ttft_s: float
    """Seconds until the first token: the prompt's prefill, and in a ring the session's opening."""
    hop_overhead_ms: float = 0.0
    engine_ms: float = 0.0
    node_cpu_ms_per_token: float = 0.0


async def reply_of_ring(nodes: Sequence[LineProcess], prompt: list[int], count: int) -> Reply:
    """A reply of nodes that have assembled a ring."""
    before = [await node.do("cpu") for node in nodes]
    answer = await nodes[0].do("generate", token_ids=prompt, max_tokens=count)
    after = [await node.do("cpu") for node in nodes]
    report = answer["report"]
    return Reply(
        token_ids=answer["token_ids"],
        tok_s=report["tok_s"],
        ttft_s=report["ttft_s"],
        hop_overhead_ms=report["hop_overhead_ms_p50"],
        engine_ms=report["engine_ms_p50"],
        node_cpu_ms_per_token=(sum(after) - sum(before)) * 1e3 / len(answer["token_ids"]),
    )


async def reply_of_whole(shard: HostedShard, prompt: list[int], count: int) -> Reply:
    """The same reply by one engine child: chunks on the grid, then token by token."""
    began = time.perf_counter()
    ids = np.array(prompt, np.int32)
    engines_s: list[float] = []
    for start in range(0, len(ids), PREFILL_CHUNK):
        chunk = ids[start : start + PREFILL_CHUNK]
        is_last = start + len(chunk) == len(ids)
        want = Want.LAST_LOGITS if is_last else Want.NOTHING
        logits, _ = await step(shard, start, chunk, want)
    tokens = [choose(logits, prompt, [])]
    first = time.perf_counter()
    while len(tokens) < count:
        position = len(prompt) + len(tokens) - 1
        last = np.array(tokens[-1:], np.int32)
        logits, engine_s = await step(shard, position, last, Want.LAST_LOGITS)
        engines_s.append(engine_s)
        tokens.append(choose(logits, prompt, tokens))
    took = time.perf_counter() - first
    await shard.free(0)
    return Reply(
        token_ids=tokens,
        tok_s=(count - 1) / took,
        ttft_s=first - began,
        engine_ms=float(np.median(engines_s)) * 1e3,
    )


async def step(shard: HostedShard, position: int, ids: Any, want: Want) -> tuple[Any, float]:
    """Run one row of slot 0; return its logits, if any, and the seconds inside the engine."""
    row = Row(slot=0, position=position, count=len(ids), token_ids=ids, hidden=None, want=want)
    outcome = await shard.step((row,))
    output = outcome.outputs[0]
    assert not output.error, output.error
    logits = None if output.logits is None else np.frombuffer(output.logits.data, np.float32)
    return logits, outcome.engine_s


def choose(logits: Any, prompt: Sequence[int], tokens: Sequence[int]) -> int:
    """The greedy token, as a ring's last stage samples it."""
    position = len(prompt) + len(tokens)
    return sampling.sample(logits, Sampling(), position=position, history=()).token
