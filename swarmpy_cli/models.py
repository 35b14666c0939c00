"""`swarmpy models`: list, pull and show; and which model is meant when none is named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from swarmpy.errors import ModelNotFound, SwarmError
from swarmpy.status import ModelStatus, PeerStatus
from swarmpy_cli.client import NodeClient, NoNodeRunning, ProgressShown, connect
from swarmpy_cli.console import Steps, print_table, show_bytes
from swarmpy_cli.context import Settings, json_option, print_json

if TYPE_CHECKING:
    from swarmpy.abc import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A model chosen for a user who named none, and why."""

    model: str
    why: str
    is_served: bool = False
    """Whether peers, or this node, hold it already."""


def choices(
    models: Sequence[ModelStatus], peers: Sequence[PeerStatus], *, configured: str = ""
) -> list[Choice]:
    """Return the models worth trying, best first: configured, served by the swarm, largest here.

    The caller takes the first that peers can hold; the list is empty where no model is known.
    """
    if configured:
        return [Choice(model=configured, why="the configuration names it (models.default)")]
    by_size = sorted(models, key=lambda model: (-model.size_bytes, model.name))
    held = {shard.rpartition(" ")[0] for peer in peers for shard in peer.shards}
    found = [
        Choice(model=model.name, why="its layers are loaded already", is_served=True)
        for model in by_size
        if model.is_ready or model.name in held
    ]
    found += [
        Choice(model=model.name, why=f"{model.peers[0]} has it", is_served=True)
        for model in by_size
        if model.peers
    ]
    found += [
        Choice(model=model.name, why="no peer has one; the largest here is tried first")
        for model in by_size
        if model.is_local
    ]
    first: dict[str, Choice] = {}
    for choice in found:
        first.setdefault(choice.model, choice)
    return list(first.values())


def served_choice(node: NodeClient) -> Choice:
    """Ask a running node for the model to use when none is named.

    Raises:
        ModelNotFound: Neither this machine nor a connected member has one.
    """
    known = node.get("/admin/models", list[ModelStatus])
    found = choices(known, node.get("/admin/peers", list[PeerStatus]))
    local = {model.name for model in known if model.is_local}
    for choice in found:
        if choice.model in local:
            return choice
    if found:
        raise ModelNotFound(
            f"the swarm has {found[0].model}, but its files are not on this machine",
            fix=f"Fetch them: swarmpy models pull {found[0].model}",
        )
    raise ModelNotFound("no model is known here")


def from_here(model: str) -> str:
    """Return a model's name unchanged, and a path as seen from this folder made absolute."""
    from swarmpy.shards.hub_names import parse_name

    path = Path(model).expanduser()
    is_path = model.startswith((".", "~", "/")) or model.lower().endswith(".gguf")
    is_path = is_path and parse_name(model) is None  # "owner/name:file.gguf" is of the Hub.
    return str(path.absolute()) if is_path else model


def known_models(settings: Settings) -> list[ModelStatus]:
    """Return the models of this machine, and of connected members while a node runs."""
    try:
        with connect(settings.folder) as node:
            return node.get("/admin/models", list[ModelStatus])
    except NoNodeRunning:
        from swarmpy.node_status import model_status
        from swarmpy.shards.catalog import Catalog

        return [model_status(entry) for entry in Catalog(settings.cache_folder).list()]


def pull_model(
    settings: Settings, model: str, layers: tuple[int, int] | None, progress: ProgressShown
) -> ModelStatus:
    """Fetch a model through the node that runs, which then offers it; else by ourselves.

    Args:
        layers: Only layers [start, end), of a hub's model; None: the whole.
    """
    try:
        with connect(settings.folder) as node:
            body = {"model": model, "layers": layers}
            return node.post_with_progress("/admin/models/pull", body, ModelStatus, progress)
    except NoNodeRunning:
        import trio

        from swarmpy.node_status import model_status
        from swarmpy.shards.catalog import Catalog

        def report(done: Progress) -> None:
            progress(done.step, done.done, done.total, done.unit)

        catalog = Catalog(settings.cache_folder)
        if layers is None:
            return model_status(trio.run(catalog.pull, model, report))
        start, end = layers
        work = partial(catalog.pull_layers, model, start=start, end=end, progress=report)
        return model_status(trio.run(work))


def rename_model(settings: Settings, model: str, name: str) -> ModelStatus:
    """Rename a model through the node that runs, which tells the members; else by ourselves."""
    try:
        with connect(settings.folder) as node:
            return node.post("/admin/models/rename", {"model": model, "name": name}, ModelStatus)
    except NoNodeRunning:
        import trio

        from swarmpy.node_status import model_status
        from swarmpy.shards.catalog import Catalog

        return model_status(trio.run(Catalog(settings.cache_folder).rename, model, name))


def parse_layers(
    context: click.Context, option: click.Parameter, text: str | None
) -> tuple[int, int] | None:
    """Return layers as people count them, "0-9", "9" or "none", as a range `[start, end)`.

    Raises:
        BadParameter: The text is of another form, or ends before it begins.
    """
    if text is None:
        return None
    if text == "none":
        return 0, 0
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is not of the form 0-9")
    start, last = int(found[1]), int(found[2] or found[1])
    if last < start:
        raise click.BadParameter(f"{text!r} ends before it begins")
    return start, last + 1


@click.group()
def models() -> None:
    """List, fetch and describe models; a node need not run."""


@models.command("list")
@json_option
@click.pass_obj
def list_models(settings: Settings, /, is_json: bool) -> None:
    """List the models this machine has or a connected member announces."""
    known = known_models(settings)
    if is_json:
        print_json({"models": list(map(_shown, known))})
        return
    if not known:
        click.echo("no models yet: `swarmpy models pull MODEL` fetches one")
        return
    print_table(
        ("name", "size", "layers", "here", "members", ""),
        [
            (
                model.name,
                show_bytes(model.size_bytes),
                str(model.layer_count),
                _here(model),
                ", ".join(model.peers),
                "ready" if model.is_ready else "",
            )
            for model in known
        ],
    )


@models.command()
@click.argument("model")
@click.option(
    "--layers",
    callback=parse_layers,
    metavar="FIRST-LAST",
    help="Only these layers, of a model of the Hub; counted from 0, the last one included. With "
    "'none' only the headers: a node then fetches the layers that a plan gives it.",
)
@click.option("--as", "name", metavar="NAME", help="The name requests know it by from now on.")
@json_option
@click.pass_obj
def pull(
    settings: Settings,
    /,
    model: str,
    layers: tuple[int, int] | None,
    name: str | None,
    is_json: bool,
) -> None:
    """Fetch MODEL (a name, owner/name[@revision][:file.gguf] of the Hub, or a path) and check it.

    A download that was interrupted goes on where it stopped.
    """
    steps = Steps(is_json=is_json)
    with steps.step(f"model {model}") as step:
        pulled = pull_model(settings, from_here(model), layers, step.progress)
    if name is not None:
        pulled = rename_model(settings, pulled.model_id, name)
    if is_json:
        print_json(_shown(pulled))
    elif pulled.layers is None:
        click.echo(f"{pulled.display_name or pulled.name}: {show_bytes(pulled.size_bytes)}")
    else:
        size = show_bytes(pulled.size_bytes)
        click.echo(f"{pulled.display_name}: {_here(pulled)} of {size}")


@models.command()
@click.argument("model")
@click.argument("name")
@json_option
@click.pass_obj
def rename(settings: Settings, /, model: str, name: str, is_json: bool) -> None:
    """Give MODEL, by its name or id, the name NAME, by which requests then know it."""
    renamed = rename_model(settings, model, name)
    if is_json:
        print_json(_shown(renamed))
    else:
        click.echo(f"{renamed.display_name} is {renamed.name} now")


@models.command()
@click.argument("model")
@json_option
@click.pass_obj
def show(settings: Settings, /, model: str, is_json: bool) -> None:
    """Describe MODEL: what it is, which engine runs it here and why, and the memory it takes."""
    known = known_models(settings)
    found = [item for item in known if model in (item.name, item.model_id, item.display_name)]
    if not found:
        names = ", ".join(item.name for item in known) or "none"
        raise ModelNotFound(f"no model {model!r} is known here (known: {names})")
    status = found[0]
    if status.is_local and not status.engine:
        status = _chosen_here(settings, status)
    described = _shown(status)
    if is_json:
        print_json(described)
        return
    described["layers"] = _here(status)
    told = {name: value for name, value in described.items() if value is False or value}
    for name, value in told.items():
        title = name.removesuffix("_bytes").replace("_", " ")
        click.echo(f"{title:<16}{_in_words(name, value)}")


def _in_words(name: str, value: object) -> str:
    if name == "memory_bytes" and isinstance(value, dict):
        sizes = (f"{show_bytes(size)} with {context} tokens" for context, size in value.items())
        return f"{', '.join(sizes)} (one session, the whole model)"
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{show_bytes(value)} ({value} bytes)"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _here(model: ModelStatus) -> str:
    """How much of a model this machine has, in words."""
    if model.layers is None:
        return "yes" if model.is_local else "no"
    from swarmpy.shards.ranges import show_layers

    held = f"layers {show_layers(model.layers)}" if model.layers else "headers"
    return f"{held}, {show_bytes(model.held_bytes)}"


def _chosen_here(settings: Settings, model: ModelStatus) -> ModelStatus:
    """Find out which engine runs a model, where no node has told."""
    from swarmpy.node_status import model_status
    from swarmpy.shards.catalog import Catalog
    from swarmpy_cli.inspecting import choose_engine

    try:
        choice = choose_engine(settings, Path(model.path))
    except SwarmError as error:
        return msgspec.structs.replace(model, engine_why=f"none: {error}")
    return model_status(Catalog(settings.cache_folder).find(model.model_id), choice=choice)


def _shown(model: ModelStatus) -> dict[str, object]:
    """A model as a JSON object."""
    shown: dict[str, object] = msgspec.to_builtins(model, enc_hook=str)
    return shown
