"""`swarmpy join CODE`: into a network by invite, through the running node or a new one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Unpack

import click
import msgspec

from swarmpy.config import Config
from swarmpy.status import InviteShown, Joined, NodeStatus
from swarmpy_cli.client import NodeClient, NoNodeRunning, connect
from swarmpy_cli.console import NotConfirmed, Steps, show_bytes, show_seconds
from swarmpy_cli.context import (
    ConfigOptions,
    Settings,
    config_flags,
    config_options,
    json_option,
    print_json,
)
from swarmpy_cli.network import short_peer, show_wall_time
from swarmpy_cli.run import prepare_model, run_briefly, run_node

if TYPE_CHECKING:
    from swarmpy.node import Node


@click.command()
@click.argument("code")
@click.option("--yes", is_flag=True, help="Do not ask; needed without a terminal.")
@config_options
@click.option("--end-with-parent", is_flag=True, hidden=True)
@json_option
@click.pass_obj
def join(
    settings: Settings,
    /,
    code: str,
    yes: bool,
    end_with_parent: bool,
    is_json: bool,
    **options: Unpack[ConfigOptions],
) -> int:
    """Join a network by an invite.

    Joins through the node that runs here; where none does, one starts and stays, as with `run`.
    """
    if not yes and not sys.stdin.isatty():
        raise NotConfirmed("joining must be confirmed, and there is no terminal to ask on")
    config = settings.config(config_flags(**options))
    try:
        with connect(settings.folder) as client:
            return _join_through(client, code, yes=yes, is_json=is_json)
    except NoNodeRunning:
        pass

    if not yes:
        shown, offer = _inspect(settings, config, code)
        show_invite(shown, offer, Steps(is_json=is_json))
        _confirm()

    async def join_first(node: Node, steps: Steps) -> dict[str, object]:
        if yes:
            show_invite(await node.inspect_invite(code), _offer(node.status()), steps)
        with steps.step("joining"):
            joined = await node.join(code)
        show_joined(joined, steps)
        model = await prepare_model(node, steps, None)
        return {"joined": msgspec.to_builtins(joined), "model": model}

    return run_node(settings, config, join_first, is_json=is_json, end_with_parent=end_with_parent)


def show_invite(invite: InviteShown, offer: str, steps: Steps) -> None:
    """Show what somebody must see before they join."""
    steps.line()
    steps.line(f"network  {invite.network}")
    steps.line(f"issuer   {invite.issuer} ({short_peer(invite.issuer_peer)})")
    steps.line(f"words    {invite.words}   (the issuer sees the same: compare them)")
    steps.line(f"serves   {offer}")
    steps.line(f"expires  {show_wall_time(invite.expires_wall_s)}")
    steps.line("This machine, once it has joined:")
    for sentence in invite.scope.split(".; "):
        steps.line(f"  {sentence.removesuffix('.')}.")


def show_joined(joined: Joined, steps: Steps) -> None:
    """Show that the network was joined."""
    steps.line(f"joined {joined.network} through {joined.issuer} in {show_seconds(joined.seconds)}")


def _join_through(client: NodeClient, code: str, *, yes: bool, is_json: bool) -> int:
    steps = Steps(is_json=is_json)
    shown = client.post("/admin/invites/inspect", {"code": code}, InviteShown)
    show_invite(shown, _offer(client.get("/admin/status", NodeStatus)), steps)
    if not yes:
        _confirm()
    joined = client.post("/admin/join", {"code": code}, Joined)
    if is_json:
        print_json(msgspec.to_builtins(joined))
    else:
        show_joined(joined, steps)
    return 0


def _inspect(settings: Settings, config: Config, code: str) -> tuple[InviteShown, str]:
    """Read the code with a node that serves nobody yet: people are asked before anything starts."""

    async def inspect(node: Node) -> tuple[InviteShown, str]:
        return await node.inspect_invite(code), _offer(node.status())

    return run_briefly(settings, config, inspect)


def _offer(status: NodeStatus) -> str:
    """Say what this machine will do for the network's members."""
    if not status.engine:
        return "nothing: no engine is installed here; you can ask, not compute"
    memory = show_bytes(status.memory_bytes_max)
    return f"layers of models that are on this machine, in up to {memory} of memory"


def _confirm() -> None:
    if not click.confirm("Join?", default=False, err=True):
        raise click.Abort
