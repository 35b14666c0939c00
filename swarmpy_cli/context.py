"""What every command is given: the folders it works in, and how it was asked to answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack

import click

from swarmpy.config import Config, load_config
from swarmpy.errors import ConfigError
from swarmpy_cli.console import print_line

Command = TypeVar("Command", bound=Callable[..., object])

Flags = dict[str, dict[str, object]]
"""Settings by section and key, as `load_config` takes them."""


class ConfigOptions(TypedDict, total=False):
    """What `config_options` adds to a command's arguments."""

    name: str | None
    listen: Sequence[str]
    memory: str | None
    engine: str | None
    port: int | None
    no_mdns: bool
    settings_set: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of the `swarmpy` group itself."""

    folder: Path
    """The node's data folder."""
    cache_folder: Path
    """The machine-wide folder of model files."""
    log_level: str = ""
    """Level given by --log-level; empty: what the configuration says."""

    def config(self, flags: Flags | None = None) -> Config:
        """Read the node's configuration with `flags` laid over it.

        Raises:
            ConfigError: A file, variable or flag names an unknown key or a malformed value.
        """
        merged: Flags = {section: dict(entries) for section, entries in (flags or {}).items()}
        if self.log_level:
            merged.setdefault("node", {}).setdefault("log_level", self.log_level)
        return load_config(self.folder, flags=merged)

    def at(self, folder: Path) -> Settings:
        """Return the same settings for another data folder."""
        return replace(self, folder=folder)


def default_folder() -> Path:
    """Return $SWARMPY_HOME, else the platform's folder for swarmpy's data."""
    if home := os.environ.get("SWARMPY_HOME"):
        return Path(home).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("swarmpy", appauthor=False))


def default_cache_folder() -> Path:
    """Return $SWARMPY_CACHE, else the platform's folder for swarmpy's cache."""
    if cache := os.environ.get("SWARMPY_CACHE"):
        return Path(cache).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("swarmpy", appauthor=False))


def json_option(command: Command) -> Command:
    """Add --json to a command, as the argument `is_json`."""
    return click.option("--json", "is_json", is_flag=True, help="Print one JSON document.")(command)


def config_options(command: Command) -> Command:
    """Add the options that set a node's configuration, as the arguments `config_flags` reads."""
    options: Sequence[Callable[[Command], Command]] = (
        click.option("--name", metavar="TEXT", help="Name shown to peers."),
        click.option(
            "--listen",
            multiple=True,
            metavar="MULTIADDR",
            help="Address to listen on, /ip4/0.0.0.0/tcp/4001; may be repeated.",
        ),
        click.option(
            "--memory", metavar="BYTES", help="Memory given to models: 500M, 8GiB (default: 3/4)."
        ),
        click.option("--engine", metavar="NAME", help="Engine by name, or module:Class."),
        click.option(
            "--port",
            type=click.IntRange(0, 65535),
            help="Port of the HTTP endpoint (default: 8420 or the next free one).",
        ),
        click.option("--no-mdns", is_flag=True, help="Do not look for peers on the local network."),
        click.option(
            "--set",
            "settings_set",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="Any setting of config.toml; may be repeated.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def config_flags(**options: Unpack[ConfigOptions]) -> Flags:
    """Return the settings that a command's configuration options name.

    Raises:
        ConfigError: A --set is not SECTION.KEY=VALUE.
    """
    flags: Flags = {}

    def put(section: str, key: str, value: object) -> None:
        flags.setdefault(section, {})[key] = value

    for text in options.get("settings_set", ()):
        path, equals, value = text.partition("=")
        section, dot, key = path.strip().partition(".")
        if not (equals and dot and section and key):
            raise ConfigError(f"--set {text}: expected SECTION.KEY=VALUE, engine.context=2048")
        put(section, key, value.strip())
    if (name := options.get("name")) is not None:
        put("node", "name", name)
    if listen := options.get("listen"):
        put("network", "listen", list(listen))
    if (memory := options.get("memory")) is not None:
        put("engine", "memory_bytes_max", memory)
    if (engine := options.get("engine")) is not None:
        put("engine", "name", engine)
    if (port := options.get("port")) is not None:
        put("gateway", "listen", f"127.0.0.1:{port}")
    if options.get("no_mdns"):
        put("network", "mdns", False)
    return flags


def print_json(document: object) -> None:
    """Print one JSON document on standard output, on one line."""
    print_line(json.dumps(document, ensure_ascii=False), sys.stdout)
