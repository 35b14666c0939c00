"""`swarmpy run`: one node with its HTTP endpoint in the foreground, from start-up to Ctrl-C."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack

import click
import msgspec

from swarmpy.config import INVITE_TTL_S, Config
from swarmpy.errors import (
    DoesNotFit,
    ExtensionNotFound,
    MembershipError,
    ModelError,
    NoPipeline,
    SwarmError,
)
from swarmpy.store import write_file
from swarmpy_cli.client import NODE_FILE, NodeFile
from swarmpy_cli.console import Step, Steps, without_controls
from swarmpy_cli.context import (
    ConfigOptions,
    Settings,
    config_flags,
    config_options,
    default_folder,
    json_option,
    print_json,
)
from swarmpy_cli.lock import folder_lock
from swarmpy_cli.logs import set_up_logging
from swarmpy_cli.models import Choice, choices

if TYPE_CHECKING:
    import trio

    from swarmpy.abc import Progress
    from swarmpy.environment import Environment
    from swarmpy.node import Node
    from swarmpy.plugins.gateway import GatewayAddress
    from swarmpy_cli.stopping import Stopper

MEMBERS_KNOWN_S = 2.0
"""For members to be connected again after a restart, and to say what they have; 1 s is usual."""

MEMBERS_POLL_S = 0.05

NO_MEMBERS = ("self", "visible", "revoked")
"""States of peers that will tell of no models."""

Answer = TypeVar("Answer")

Startup = Callable[["Node", Steps], Awaitable[dict[str, object]]]
"""What one command does once its node runs; returns what it adds to the command's JSON."""

NOT_YET = (NoPipeline, DoesNotFit, ExtensionNotFound)
"""Why a model cannot be loaded yet: a machine that joins later may cure it, so the node goes on."""


@click.command()
@click.argument("model", required=False)
@config_options
@click.option("--no-model", is_flag=True, help="Prepare no model at start.")
@click.option("--end-with-parent", is_flag=True, hidden=True)
@json_option
@click.pass_obj
def run(
    settings: Settings,
    /,
    model: str | None,
    no_model: bool,
    end_with_parent: bool,
    is_json: bool,
    **options: Unpack[ConfigOptions],
) -> int:
    """Run a node, and prepare a model.

    Without a MODEL: the one the swarm serves, else the largest on this machine that fits, else the
    default model. Ctrl-C once lets running replies finish, twice ends them.
    """

    async def prepare(node: Node, steps: Steps) -> dict[str, object]:
        chosen = None if no_model else await prepare_model(node, steps, model)
        return {"model": chosen}

    return run_node(
        settings,
        settings.config(config_flags(**options)),
        prepare,
        is_json=is_json,
        end_with_parent=end_with_parent,
    )


def run_node(
    settings: Settings,
    config: Config,
    startup: Startup,
    *,
    is_json: bool,
    end_with_parent: bool = False,
) -> int:
    """Run a node until it is stopped, and return the process's exit code.

    Raises:
        NodeRunning: Another process runs one in the same folder.
        SwarmError: What the node could not start with.
    """
    set_up_logging(config.node.log_level)
    job = _Job(settings, config, startup, is_json, end_with_parent, Steps(is_json=is_json))
    with folder_lock(settings.folder):
        try:
            return run_async(job.serve)
        finally:
            (settings.folder / NODE_FILE).unlink(missing_ok=True)


def run_briefly(
    settings: Settings, config: Config, work: Callable[[Node], Awaitable[Answer]]
) -> Answer:
    """Open a node without an HTTP endpoint, do one thing with it, and close it; raises as above."""
    set_up_logging(config.node.log_level)

    async def do_work() -> Answer:
        from swarmpy.node import Node

        async with Node.open(config, make_environment(settings)) as node:
            return await work(node)

    with folder_lock(settings.folder):
        return run_async(do_work)


def make_environment(settings: Settings) -> Environment:
    """Return the real world for a node of these settings."""
    from swarmpy.node import local_environment

    return local_environment(settings.folder, cache_folder=settings.cache_folder)


def run_async(work: Callable[[], Awaitable[Answer]]) -> Answer:
    """Run one async function with trio; of a group of swarmpy's errors, raise the first alone.

    Ctrl-C comes out as itself, however deep it was heard.
    """
    import trio

    try:
        return trio.run(work)
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is not None:
            raise KeyboardInterrupt from group
        raise _first_cause(group) from None


@dataclass(frozen=True, slots=True)
class _Job:
    settings: Settings
    config: Config
    startup: Startup
    is_json: bool
    end_with_parent: bool
    steps: Steps

    async def serve(self) -> int:
        import trio

        from swarmpy_cli.stopping import EXIT_FORCED, Stopper

        stopper = Stopper(self.steps.line)
        with stopper.running:
            async with trio.open_nursery() as nursery:
                await nursery.start(stopper.watch_signals)
                if self.end_with_parent:
                    nursery.start_soon(stopper.watch_parent)
                await self._serve_node(stopper)
                nursery.cancel_scope.cancel()
        return EXIT_FORCED if stopper.is_forced else 0

    async def _serve_node(self, stopper: Stopper) -> None:
        import trio

        from swarmpy.node import Node

        environment = make_environment(self.settings)
        async with Node.open(self.config, environment) as node, trio.open_nursery() as nursery:
            self._show_node(node)
            address = None
            if self.config.gateway.enabled:
                address = await self._serve_gateway(node, nursery)
            self._leave_address(address, environment.wall_time())
            stopper.is_serving = True
            nursery.start_soon(self._follow_node, node, stopper)
            with stopper.starting:
                ready = await self.startup(node, self.steps)
                await self._show_ready(node, address, ready)
            await stopper.requested.wait()
            node.request_stop()
            await node.wait_idle()
            # The nursery ends with the gateway, once the last bytes of the last reply are sent.
        self.steps.line("stopped")

    def _show_node(self, node: Node) -> None:
        self.steps.line(f"node {node.name}  {node.peer_id}")
        for address in node.status().addresses:
            self.steps.line(f"  listening on {address}")

    async def _serve_gateway(self, node: Node, nursery: trio.Nursery) -> GatewayAddress:
        from swarmpy.plugins import gateway

        try:
            import swarmpy.plugins.gateway.server  # noqa: F401  (what `serve` imports)
        except ImportError as error:
            raise ExtensionNotFound(
                f"the HTTP endpoint needs packages that are not installed: {error}",
                fix="Install swarmpy with the extra 'gateway', or --set gateway.enabled=false.",
            ) from error
        address: GatewayAddress = await nursery.start(gateway.serve, node)
        self.steps.line(f"  endpoint {address.openai_url}")
        return address

    def _leave_address(self, address: GatewayAddress | None, wall_s: float) -> None:
        base_url = address.base_url if address else ""
        left = NodeFile(pid=os.getpid(), base_url=base_url, started_wall_s=wall_s)
        write_file(self.settings.folder / NODE_FILE, msgspec.json.encode(left))

    async def _follow_node(self, node: Node, stopper: Stopper) -> None:
        """Stop where somebody else asked the node to: the admin API, or a program."""
        await node.wait_stopping()
        if not stopper.requested.is_set():
            stopper.request()

    async def _show_ready(
        self, node: Node, address: GatewayAddress | None, ready: dict[str, object]
    ) -> None:
        """End start-up with the lines a user copies: the endpoint, an invite, a question."""
        base_url = address.openai_url if address else ""
        key = _read_api_key(address) if address else ""
        try:
            invite = (await node.create_invite(ttl_s=INVITE_TTL_S)).code
        except MembershipError:
            invite = ""
        if self.is_json:
            print_json(
                {
                    "pid": os.getpid(),
                    "peer": str(node.peer_id),
                    "name": node.name,
                    "addresses": list(node.status().addresses),
                    "base_url": base_url,
                    "api_key": key,
                    "invite": invite,
                    **ready,
                }
            )
            return
        self.steps.line()
        if base_url:
            self.steps.line(f"export OPENAI_BASE_URL={base_url} OPENAI_API_KEY={key}")
        if invite:
            self.steps.line(f"swarmpy join {invite}")
        else:
            self.steps.line("(this node may not invite others)")
        self.steps.line(f'{command_prefix(self.settings)} chat "What is a swarm?"')


async def prepare_model(node: Node, steps: Steps, model: str | None) -> str | None:
    """Fetch a model and load it over the swarm; return its name, None where nobody can hold it.

    Args:
        model: As the user named it; None: chosen here, the reason is shown, and one that cannot be
            fetched or used ends nothing.

    Raises:
        ModelNotFound: No source has the named model.
        SwarmError: It cannot be used.
    """
    if model is not None:
        return await _prepare(node, steps, Choice(model=model, why="you named it"))
    await _wait_members_known(node)
    for choice in _choices(node):
        steps.line(f"model {choice.model}: {choice.why}")
        if choice.is_served:
            return await _fetch_served(node, steps, choice.model)
        try:
            prepared = await _prepare(node, steps, choice)
        except ModelError as error:
            _show_not_ready(steps, error)
            continue
        if prepared is not None:
            return prepared
    return None


def program() -> str:
    """Return how a user calls swarmpy here: by name where the shell finds it, else by its path."""
    installed = Path(sys.executable).with_name("swarmpy")
    if shutil.which("swarmpy") or not installed.exists():
        return "swarmpy"
    here = Path.cwd()
    near = installed.relative_to(here) if installed.is_relative_to(here) else installed
    return shlex.quote(str(near))


def command_prefix(settings: Settings) -> str:
    """Return how a user calls swarmpy for this data folder."""
    if settings.folder == default_folder().absolute():
        return program()
    return f"{program()} --data-dir {shlex.quote(str(settings.folder))}"


async def _wait_members_known(node: Node) -> None:
    """Give members that this node knows a moment to say which models they have."""
    import trio

    with trio.move_on_after(MEMBERS_KNOWN_S):
        while True:
            others = [peer for peer in node.peers() if peer.state not in NO_MEMBERS]
            if not others or any(peer.models for peer in others):
                return
            await trio.sleep(MEMBERS_POLL_S)


async def _fetch_served(node: Node, steps: Steps, model: str) -> str:
    """Have the files of a model that the swarm serves: without them nobody here can ask it."""
    try:
        with steps.step(f"model {model}") as step:
            await node.pull(model, on_progress=_progress_of(step))
    except ModelError as error:
        _show_not_ready(steps, error)
    return model


def _choices(node: Node) -> list[Choice]:
    found = choices(node.models(), node.peers(), configured=node.config.models.default)
    if found:
        return found
    from swarmpy.shards.sources import DEFAULT_MODEL

    return [Choice(model=DEFAULT_MODEL, why="no other is known here; it is small and free")]


async def _prepare(node: Node, steps: Steps, choice: Choice) -> str | None:
    with steps.step(f"model {choice.model}") as step:
        name = await _pull(node, step, choice.model)
    try:
        with steps.step(f"loading {name}") as step:
            await node.prepare(name, on_progress=_progress_of(step))
    except NOT_YET as error:
        _show_not_ready(steps, error)
        return None
    return name


async def _pull(node: Node, step: Step, model: str) -> str:
    """Have a model's files, or of a hub's model the headers: what a plan gives is fetched then."""
    from swarmpy.shards.hub_names import parse_name

    held = [item for item in node.models() if item.is_local and model in (item.name, item.model_id)]
    if held and held[0].layers is not None:
        return held[0].name
    layers = (0, 0) if node.config.models.fetch and parse_name(model) is not None else None
    return (await node.pull(model, layers=layers, on_progress=_progress_of(step))).name


def _show_not_ready(steps: Steps, error: SwarmError) -> None:
    steps.line(f"  not ready: {without_controls(str(error))}")
    steps.line(f"  {without_controls(error.fix)}")


def _progress_of(step: Step) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        step.progress(progress.step, progress.done, progress.total, progress.unit)

    return show


def _read_api_key(address: GatewayAddress) -> str:
    from swarmpy.plugins.gateway.keys import read_key

    return read_key(address.api_key_path)


def _first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error to show a user: the first of the group if all are swarmpy's own."""
    _, others = group.split(SwarmError)
    if others is not None:
        return group
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause
