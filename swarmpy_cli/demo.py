"""`swarmpy demo`: one model over several nodes on this machine, from nothing to a reply."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from swarmpy.errors import PeerTimeout, SwarmError
from swarmpy.status import InviteCreated, Joined, PeerStatus, PipelineView
from swarmpy_cli.client import connect_endpoint
from swarmpy_cli.console import Step, Steps, print_reply, show_bytes, show_seconds
from swarmpy_cli.context import Settings, json_option, print_json
from swarmpy_cli.demo_nodes import DemoNode, DemoNodes, demo_nodes
from swarmpy_cli.inspecting import choose_engine
from swarmpy_cli.replies import Question, Reply, stream_reply
from swarmpy_cli.run import program, run_async
from swarmpy_cli.status import print_pipeline

if TYPE_CHECKING:
    from swarmpy.abc import Progress
    from swarmpy.shards.catalog import ModelEntry

PROMPT = "Explain why birds fly in swarms."

SLOTS = 2
CONTEXT = 2048
"""What the demo's nodes hold state for: more would only raise the memory they ask for."""

MEET_TIMEOUT_S = 20.0
"""For all nodes to be connected to each other; they dial within a second."""

POLL_S = 0.05
"""Between two looks at who is connected."""


EXIT_DIFFERENT = 1
"""Exit code where --compare found other tokens: what shows a claim must be able to deny it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the demo found out about the model before it started a node."""

    model: str
    engine: str
    whole_weight_bytes: int
    """As computed in."""
    whole_budget: int
    """Memory of a node that shall hold everything, in bytes."""
    split_budget: int
    """Memory of each of the others."""
    threads: int


@click.command()
@click.option(
    "--nodes", "count", type=click.IntRange(1, 16), default=3, show_default=True, help="Nodes."
)
@click.option("--prompt", default=PROMPT, help="Question to ask.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest reply."
)
@click.option("--model", help="Model to run (default: the small one swarmpy comes with).")
@click.option("--engine", help="Engine by name, or module:Class.")
@click.option("--compare", is_flag=True, help="Ask the whole model in one process, too.")
@click.option("--keep", is_flag=True, help="Leave the nodes running until Ctrl-C.")
@json_option
@click.pass_obj
def demo(
    settings: Settings,
    /,
    count: int,
    prompt: str,
    max_tokens: int,
    model: str | None,
    engine: str | None,
    compare: bool,
    keep: bool,
    is_json: bool,
) -> int:
    """Run a model over several nodes on this machine.

    None of them is given the memory to hold it alone; together they answer.
    """
    # Either signal unwinds the blocks below, which end the nodes and remove their folder.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    story = _Story(
        settings=settings,
        steps=Steps(is_json=is_json),
        count=count,
        prompt=prompt,
        max_tokens=max_tokens,
        is_json=is_json,
    )
    plan = story.look_at(model, engine)
    # The folder's name is short: a Unix socket's path has a bound of about 100 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="swarmpy-", ignore_cleanup_errors=True) as folder,
        demo_nodes(Path(folder), settings) as nodes,
    ):
        split = story.start_split(nodes, plan)
        pipeline = story.load(nodes, split[0], plan)
        reply = story.ask(nodes, split[0], plan)
        story.explain(reply, split[0])
        result = story.result(split, pipeline, reply)
        if compare:
            if not keep:
                nodes.end()
            result |= story.compare(nodes, plan, reply)
        try:
            story.finish(result, split[0], is_kept=keep)
            if keep:
                _watch(nodes)
        except KeyboardInterrupt:
            click.echo("ending the nodes", err=True)
    return 0 if tokens_agree(result) else EXIT_DIFFERENT


def tokens_agree(result: Mapping[str, object]) -> bool:
    """Whether the whole model gave the same tokens, where it was asked."""
    return result.get("whole_token_ids", result["token_ids"]) == result["token_ids"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Story:
    """The demo's steps, in the order in which they are told."""

    settings: Settings
    steps: Steps
    count: int
    prompt: str
    max_tokens: int
    is_json: bool

    def look_at(self, model: str | None, engine: str | None) -> Plan:
        """Fetch the model, choose its engine, and find the budget that splits it."""
        from swarmpy.pipeline.engine_threads import core_count
        from swarmpy_cli.budget import split_budget, whole_budget

        with self.steps.step("model") as step:
            entry = run_async(partial(_fetch, self.settings, model, step))
            step.title = f"model {entry.name}, {show_bytes(entry.size_bytes)}"
        with self.steps.step("engine") as step:
            choice = choose_engine(self.settings, entry.path, engine=engine)
            step.title = f"engine {choice.inspection.engine}: {choice.why}"
        inspection = choice.inspection
        whole = inspection.weight_bytes(0, inspection.layer_count)
        budget = split_budget(inspection, self.count, slots=SLOTS, context=CONTEXT)
        fit_all = whole_budget(inspection, slots=SLOTS, context=CONTEXT)
        self.steps.line(
            f"  {inspection.layer_count} layers, {show_bytes(whole)} of weights as computed in; "
            f"each of {self.count} nodes may use {show_bytes(budget)} in all"
        )
        return Plan(
            model=entry.name,
            engine=choice.host.engine_name,
            split_budget=budget,
            whole_budget=fit_all,
            whole_weight_bytes=whole,
            threads=max(1, (core_count() - 1) // self.count),
        )

    def start_split(self, nodes: DemoNodes, plan: Plan) -> list[DemoNode]:
        """Start the nodes and join them into one network."""
        with self.steps.step(f"{self.count} nodes in {self.count} processes"):
            names = [f"node-{number}" for number in range(1, self.count + 1)]
            started = [nodes.start(name, self._flags(plan, plan.split_budget)) for name in names]
            for node in started:
                node.wait_ready()
        first, *others = started
        for node in others:
            with self.steps.step(f"{node.name} joins by an invite of {first.name}"):
                invite = nodes.client(first).post("/admin/invites", {}, InviteCreated)
                nodes.client(node).post("/admin/join", {"code": invite.code}, Joined)
        if others:
            with self.steps.step("every node is connected to every other") as step:
                _wait_met(nodes, started, step)
        return started

    def load(self, nodes: DemoNodes, node: DemoNode, plan: Plan) -> PipelineView:
        """Load the model over the swarm and show who holds which layers."""
        with self.steps.step(f"{node.name} plans and loads the layers") as step:
            pipeline = nodes.client(node).post_with_progress(
                "/admin/prepare", {"model": plan.model}, PipelineView, step.progress
            )
        if not self.is_json:
            print_pipeline(pipeline)
        return pipeline

    def ask(self, nodes: DemoNodes, node: DemoNode, plan: Plan) -> Reply:
        """Ask the question at the node's HTTP endpoint, and show the reply as it streams."""
        question = Question(
            model=plan.model,
            sampling={"temperature": 0, "max_tokens": self.max_tokens},
            has_details=True,
        )
        messages = [{"role": "user", "content": self.prompt}]
        reply = Reply()
        if not self.is_json:
            click.echo(f"\n> {self.prompt}")
        with connect_endpoint(node.wait_ready().base_url, node.read_api_key()) as client:
            try:
                for piece in stream_reply(client, question.body(messages), reply, _ignore):
                    if not self.is_json:
                        print_reply(piece)
            except SwarmError:
                nodes.check()
                raise
        if not self.is_json:
            click.echo("\n")
        return reply

    def explain(self, reply: Reply, asked: DemoNode) -> None:
        """Say who could read the prompt, and what limited the speed."""
        told = reply.details
        readers = [asked.name, *(name for name in told.sees_prompt if name != asked.name)]
        others = [stage.name for stage in told.stages if stage.name not in readers]
        self.steps.line(f"prompt: {_listed(readers)} could read it")
        if others:
            self.steps.line(
                f"        {_listed(others)} got hidden states only, which still give most of it "
                "away to a determined reader"
            )
        network_ms = max(0.0, told.loop_ms_p50 - told.engine_ms_p50)
        share = network_ms / told.loop_ms_p50 if told.loop_ms_p50 else 0.0
        self.steps.line(
            f"speed:  {told.tok_s:.1f} tokens/s, first after {show_seconds(told.ttft_s)}; a token "
            f"took {told.loop_ms_p50:.1f} ms, {1 - share:.0%} computing and {share:.0%} network"
        )

    def result(
        self, split: Sequence[DemoNode], pipeline: PipelineView, reply: Reply
    ) -> dict[str, object]:
        """Return the demo's JSON object."""
        told, stages = reply.details, reply.details.stages or pipeline.stages
        return {
            "model": pipeline.model,
            "nodes": [msgspec.to_builtins(node.wait_ready()) for node in split],
            "layers": [
                {"node": stage.name, "peer": stage.peer, "start": stage.start, "end": stage.end}
                for stage in stages
            ],
            "text": reply.text,
            "finish_reason": reply.finish_reason,
            "token_ids": list(told.token_ids),
            "ttft_s": told.ttft_s,
            "tok_s": told.tok_s,
            "hop_overhead_ms_p50": told.hop_overhead_ms_p50,
            "stage_weight_bytes": [stage.weight_bytes for stage in stages],
            "stage_planned_weight_bytes": [stage.planned_weight_bytes for stage in stages],
            "stage_rss_bytes": [stage.rss_bytes for stage in stages],
            "sees_prompt": list(told.sees_prompt),
        }

    def compare(self, nodes: DemoNodes, plan: Plan, reply: Reply) -> dict[str, object]:
        """Ask the whole model in one process, and say whether the tokens are the same."""
        with self.steps.step("the whole model in one process, for comparison"):
            node = nodes.start("whole", self._flags(plan, plan.whole_budget))
            node.wait_ready()
        pipeline = self.load(nodes, node, plan)
        whole = self.ask(nodes, node, plan)
        is_equal = whole.details.token_ids == reply.details.token_ids
        mark = click.style("✓", fg="green") if is_equal else click.style("✗", fg="red")
        self.steps.line(
            f"{mark} {'the same' if is_equal else 'not the same'} {len(whole.details.token_ids)} "
            f"tokens; {whole.details.tok_s:.1f} tokens/s whole, {reply.details.tok_s:.1f} split"
        )
        return {
            "whole_token_ids": list(whole.details.token_ids),
            "whole_tok_s": whole.details.tok_s,
            "whole_weight_bytes": sum(stage.weight_bytes for stage in pipeline.stages),
        }

    def finish(self, result: dict[str, object], node: DemoNode, *, is_kept: bool) -> None:
        """Print the JSON object, or what to do next."""
        if self.is_json:
            print_json(result)
        if is_kept:
            at = f"{program()} --data-dir {node.folder}"
            self.steps.line(f"talk to it:      {at} chat")
            self.steps.line(
                f"or by HTTP:      export OPENAI_BASE_URL={node.wait_ready().base_url} "
                f"OPENAI_API_KEY={node.read_api_key()}"
            )
            self.steps.line("The nodes run until Ctrl-C.")
        else:
            self.steps.line(
                f"next: `{program()} run` here, and `swarmpy join CODE` on another machine"
            )

    def _flags(self, plan: Plan, budget: int) -> list[str]:
        settings = {
            "engine.threads": plan.threads,
            "engine.slots": SLOTS,
            "engine.context": CONTEXT,
            "engine.exact": "true",
        }
        flags = ["--memory", str(budget), "--engine", plan.engine]
        for name, value in settings.items():
            flags += ["--set", f"{name}={value}"]
        return flags


async def _fetch(settings: Settings, model: str | None, step: Step) -> ModelEntry:
    from swarmpy.shards.catalog import Catalog
    from swarmpy.shards.sources import DEFAULT_MODEL

    def show(progress: Progress) -> None:
        step.progress(progress.step, progress.done, progress.total, progress.unit)

    return await Catalog(settings.cache_folder).pull(model or DEFAULT_MODEL, show)


def _wait_met(nodes: DemoNodes, started: Sequence[DemoNode], step: Step) -> None:
    """Wait until every node has every other as a connected member.

    Raises:
        PeerTimeout: Some do not find each other.
    """
    deadline = time.perf_counter() + MEET_TIMEOUT_S
    pause = threading.Event()
    while True:
        met = sum(
            peer.state == "member"
            for node in started
            for peer in nodes.client(node).get("/admin/peers", list[PeerStatus])
        )
        wanted = len(started) * (len(started) - 1)
        step.progress("", met, wanted, "links")
        if met >= wanted:
            return
        if time.perf_counter() > deadline:
            raise PeerTimeout(f"after {MEET_TIMEOUT_S:.0f} s {met} of {wanted} links were there")
        nodes.check()
        pause.wait(POLL_S)


def _watch(nodes: DemoNodes) -> None:
    """Wait for Ctrl-C, or raise when a node ends."""
    pause = threading.Event()
    while True:
        nodes.check()
        pause.wait(1.0)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _ignore(_: str) -> None:
    """Take a reply's waiting note that nobody shows."""
