"""`swarmpy invite`, `swarmpy peers` and `swarmpy revoke`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from datetime import datetime

import click
import msgspec

from swarmpy.config import INVITE_TTL_S
from swarmpy.status import InviteCreated, PeerStatus, Revoked
from swarmpy_cli.client import connect
from swarmpy_cli.console import NotConfirmed, print_table, show_bytes
from swarmpy_cli.context import Settings, json_option, print_json

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(context: click.Context, parameter: click.Parameter, text: str) -> float:
    """Return a time span as people write it (90s, 30m, 24h, 1d) in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip().lower())
    if match is None:
        raise click.BadParameter(f"{text!r} is no time span: expected 90s, 30m, 24h or 1d")
    return float(match[1]) * _UNIT_SECONDS[match[2] or "s"]


@click.command()
@click.option(
    "--ttl",
    callback=parse_duration,
    metavar="TIME",
    default="24h",
    show_default=True,
    help="How long the code is valid, at most 24h.",
)
@click.option(
    "--uses",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Machines the code admits.",
)
@click.option("--no-invite", is_flag=True, help="Whoever joins with it cannot invite others.")
@json_option
@click.pass_obj
def invite(settings: Settings, /, ttl: float, uses: int, no_invite: bool, is_json: bool) -> None:
    """Make a code with which another machine joins this network."""
    if not 0 < ttl <= INVITE_TTL_S:
        raise click.BadParameter(f"expected up to {INVITE_TTL_S / 3600:.0f}h", param_hint="--ttl")
    body = {"ttl_s": ttl, "uses": uses, "can_invite": not no_invite}
    with connect(settings.folder) as node:
        created = node.post("/admin/invites", body, InviteCreated)
    if is_json:
        print_json(msgspec.to_builtins(created))
        return
    click.echo(created.code)
    click.echo()
    admits = "one machine" if created.uses == 1 else f"{created.uses} machines"
    click.echo(f"network  {created.network}")
    click.echo(f"words    {created.words}   (the joiner must see the same)")
    click.echo(f"expires  {show_wall_time(created.expires_wall_s)}")
    click.echo(f"Anyone who holds this code can join: it admits {admits}. Send it privately.")
    click.echo("There: swarmpy join CODE")


@click.command()
@json_option
@click.pass_obj
def peers(settings: Settings, /, is_json: bool) -> None:
    """List the peers this node knows, members first."""
    with connect(settings.folder) as node:
        answer = node.get("/admin/peers", list[PeerStatus])
    if is_json:
        print_json({"peers": msgspec.to_builtins(answer)})
        return
    if not answer:
        click.echo("no peers yet: `swarmpy invite` makes a code for another machine")
        return
    order = ("self", "member", "known", "connecting", "visible", "lost", "revoked")
    rank = {state: number for number, state in enumerate(order)}
    answer.sort(key=lambda peer: (rank.get(peer.state, len(order)), peer.name))
    print_table(
        ("name", "peer", "state", "address", "rtt", "path", "memory", "holds"),
        [_peer_row(peer) for peer in answer],
    )


@click.command()
@click.argument("peer")
@click.option("--network", default="", metavar="NAME", help="Of one network only; else of all.")
@click.option("--yes", is_flag=True, help="Do not ask; needed without a terminal.")
@json_option
@click.pass_obj
def revoke(settings: Settings, /, peer: str, network: str, yes: bool, is_json: bool) -> None:
    """End a member's membership, and that of whoever it invited.

    PEER is a PeerId, the end of one as `swarmpy peers` shows it, or a name. This node must hold the
    network's key, or have let the member in. It cannot be undone: by the network's key the machine
    can join again with a new identity only, else by the invite of a member that let it in too.
    """
    if not yes and not sys.stdin.isatty():
        raise NotConfirmed("revoking must be confirmed, and there is no terminal to ask on")
    with connect(settings.folder) as node:
        asked = {"peer": peer, "network": network}
        if not yes:
            _show_revoked(node.post("/admin/revoke", {**asked, "is_rehearsal": True}, Revoked))
            if not click.confirm("Revoke? It cannot be undone.", default=False, err=True):
                raise click.Abort
        answer = node.post("/admin/revoke", asked, Revoked)
    if is_json:
        print_json(msgspec.to_builtins(answer))
        return
    name = answer.name or short_peer(answer.peer)
    click.echo(
        f"{name} ({short_peer(answer.peer)}) is no member of {', '.join(answer.networks)} any more"
    )
    for line in _consequences(answer):
        click.echo(line)


def _show_revoked(answer: Revoked) -> None:
    """Show what somebody must see before they revoke."""
    click.echo(f"member   {answer.name or 'not known here by name'}", err=True)
    click.echo(f"peer     {answer.peer}", err=True)
    click.echo(f"networks {', '.join(answer.networks)}", err=True)
    falling = ", ".join(answer.falling) or "nobody in view"
    click.echo(f"with it  {falling}", err=True)


def _consequences(answer: Revoked) -> Iterator[str]:
    if answer.falling:
        yield f"Out with it: {', '.join(answer.falling)}. Another invite lets them in again."
    if answer.neighbours_told:
        yield "The other members hear of it within seconds."
    else:
        yield "No other member is connected: they hear of it when one is, while this node runs."
    yield "Codes that it was given admit other machines still: they end within a day, or with"
    yield "whoever issued them. Codes that it issued admit nobody."


def _peer_row(peer: PeerStatus) -> tuple[str, ...]:
    state = "visible, not joined" if peer.state == "visible" else peer.state
    memory = ""
    if peer.memory_bytes_max:
        memory = f"{show_bytes(peer.memory_bytes_free)} of {show_bytes(peer.memory_bytes_max)} free"
    return (
        peer.name,
        short_peer(peer.peer),
        state,
        peer.addresses[0] if peer.addresses else "",
        "" if peer.rtt_ms is None or peer.state == "self" else f"{peer.rtt_ms:.1f} ms",
        peer.path,
        memory,
        ", ".join(peer.shards),
    )


def short_peer(peer: str) -> str:
    """Return the end of a PeerId, where two of them differ."""
    return f"…{peer[-8:]}" if len(peer) > 8 else peer


def show_wall_time(wall_s: float) -> str:
    """Return a Unix time in this machine's time zone: "2026-03-01 14:05 CET"."""
    return datetime.fromtimestamp(wall_s).astimezone().strftime("%Y-%m-%d %H:%M %Z")
