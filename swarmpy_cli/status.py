"""`swarmpy status` and `swarmpy version`."""

from __future__ import annotations

import platform

import click
import msgspec

from swarmpy.status import NodeStatus, PipelineView
from swarmpy_cli.client import connect
from swarmpy_cli.console import print_table, show_bytes, show_seconds
from swarmpy_cli.context import Settings, json_option, print_json

PARTS = ("swarmpy", "trio", "cryptography", "msgspec", "numpy", "mlx", "mlx-lm", "fastapi")
"""Packages whose versions matter when two machines disagree."""


@click.command()
@json_option
@click.pass_obj
def status(settings: Settings, /, is_json: bool) -> None:
    """Show the running node.

    Its networks, memory and layers, and who else holds which layers of its models.
    """
    with connect(settings.folder) as node:
        answer = node.get("/admin/status", NodeStatus)
    if is_json:
        print_json(msgspec.to_builtins(answer))
        return
    click.echo(f"{answer.name}  {answer.peer}")
    click.echo(f"up {show_seconds(answer.uptime_s)}, swarmpy {answer.version}, {_engine(answer)}")
    for address in answer.addresses:
        click.echo(f"listening on {address}/p2p/{answer.peer}")
    for network in answer.networks:
        count = network.members_connected
        others = f"{count} other {'member' if count == 1 else 'members'} connected"
        click.echo(f"network {network.name} ({network.words}): {others}")
    for name in answer.revoked:
        click.echo(f"revoked in {name}: this machine, or who let it in, is no member any more")
    for shard in answer.shards:
        click.echo(f"holds {shard}")
    for pipeline in answer.pipelines:
        click.echo()
        print_pipeline(pipeline)
    if answer.is_stopping:
        click.echo("stopping: running replies finish")


@click.command()
@json_option
def version(is_json: bool) -> None:
    """Show the versions of swarmpy and of what it runs on."""
    parts = {name: _version_of(name) for name in PARTS}
    if is_json:
        print_json({**parts, "python": platform.python_version(), "platform": platform.platform()})
        return
    click.echo(f"swarmpy {parts.pop('swarmpy')}")
    click.echo(f"python {platform.python_version()} on {platform.platform()}")
    for name, number in parts.items():
        click.echo(f"{name} {number or 'not installed'}")


def print_pipeline(pipeline: PipelineView, *, indent: str = "") -> None:
    """Print a pipeline: the model, then one line a stage."""
    click.echo(
        f"{indent}{pipeline.model}: {pipeline.layer_count} layers over "
        f"{len(pipeline.stages)} {'stage' if len(pipeline.stages) == 1 else 'stages'}"
    )
    print_table(
        ("stage", "peer", "layers", "engine", "weights", "fetched", "reads the prompt"),
        [
            (
                str(number),
                stage.name,
                show_layers(stage.start, stage.end),
                stage.engine,
                show_bytes(stage.weight_bytes),
                show_bytes(stage.fetch_bytes) if stage.fetch_bytes else "",
                "yes" if stage.sees_prompt else "no",
            )
            for number, stage in enumerate(pipeline.stages, 1)
        ],
    )


def show_layers(start: int, end: int) -> str:
    """Return layers [start, end) as people count them, both ends included: "10-19"."""
    return str(start) if end == start + 1 else f"{start}-{end - 1}"


def _engine(answer: NodeStatus) -> str:
    if not answer.engine:
        return "no engine"
    free, most = show_bytes(answer.memory_bytes_free), show_bytes(answer.memory_bytes_max)
    return f"engine {answer.engine} with {free} of {most} free"


def _version_of(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
