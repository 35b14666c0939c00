"""What may be set, and every bound that is not a protocol's own, each with its reason.

Settings come from `config.toml` in the data folder, then `SWARMPY_<SECTION>_<KEY>`, then flags; an
unknown key is an error that names it.
"""

from __future__ import annotations

import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from swarmpy.errors import ConfigError

# Bounds: connections (used by net/) ------------------------------------------

CONNECTIONS_MAX = 500
"""Open connections of a node; beyond it inbound ones are closed at accept."""

HANDSHAKES_MAX = 128
"""Connections before authentication, in total; the oldest is dropped first."""

HANDSHAKES_PER_SUBNET_MAX = 32
"""The same per IPv4 address or IPv6 /64, so that one flooder cannot take all places."""

HANDSHAKES_PER_SITE_MAX = 64
"""The same per IPv6 /48, of which one flooder may hold every /64."""

HANDSHAKES_PER_SECOND_MAX = 16.0
"""Inbound handshakes begun a second for one IPv4 address or IPv6 /64, on average: each costs 1 ms,
and 10,000 connections a minute from one place may cost the others a tenth of their rate. An IPv6
/48 has four times as many."""

HANDSHAKES_BURST_MAX = 256
"""The same at once: a swarm behind one address that comes back together, more than listeners keep
waiting."""

HANDSHAKE_TIMEOUT_S = 10.0
"""From accept to a proven peer. A slow mobile link needs about 2 s."""

INBOUND_STREAMS_MAX = 64
"""Inbound streams open at a time on one connection; times the window it is the buffer bound."""

STREAM_WINDOW_BYTES = 256 * 1024
"""Receive window of a stream at first: Yamux fixes it, and 64 x 256 KiB = 16 MiB a connection. How
windows grow is in proto/yamux.py."""

RESETS_PER_SECOND_MAX = 100
"""Streams refused in one second before the connection is closed: a flood, not a mistake."""

KEEPALIVE_INTERVAL_S = 5.0
"""Pause between two pings, which measure the round trip and keep the peer's own clock quiet."""

KEEPALIVE_TIMEOUT_S = 12.0
"""Silence after which a peer is gone; any byte counts as life. Under 15 s with the timer."""

STREAM_NEGOTIATION_TIMEOUT_S = 10.0
"""For multistream-select on one stream."""

CONNECTIONS_PER_PEER_MAX = 4
"""A simultaneous dial makes two, a redial of a path that died unnoticed a third."""

CONNECTION_AGE_S_MAX = 24 * 3600.0
"""Age from which a connection is replaced once it is idle: keys are not used for ever."""

DIALS_MAX = 64
"""Addresses dialled at a time; further ones wait. A flood of them must not take all sockets."""

DIAL_TIMEOUT_S = 5.0
"""For one address to accept the connection; the handshake has its own time."""

DIAL_STAGGER_S = 0.25
"""Head start of an address over the next one of the same peer (as RFC 8305 recommends)."""

DIAL_ADDRESSES_MAX = 16
"""Addresses of one peer that one dial tries."""

# Bounds: discovery and membership --------------------------------------------

PEER_CACHE_MAX = 200
"""Peers remembered on disk."""

RECORDS_MAX = 2000
"""Announcements of members kept in memory."""

INVITE_TTL_S = 24 * 3600.0
"""Default and longest life of an invite code."""

# Bounds: pipeline ------------------------------------------------------------

PREFILL_CHUNK = 64
"""Tokens of one prefill chunk, always cut at multiples from position 0 (exactness: the grid)."""

STEPS_IN_FLIGHT_MAX = 16
"""Steps of one session under way at a time; a stage reads no further ahead."""

SESSION_LEASE_S = 60.0
"""A stage keeps a silent session's state this long."""

SESSIONS_MAX = 256
"""Sessions a stage knows at a time, queued ones included."""

STAGES_MAX = 64
"""Longest ring."""

# Settings --------------------------------------------------------------------

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """[node]"""

    name: str = ""
    """Shown to peers; empty: the first characters of the PeerId."""
    log_level: str = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """[network]"""

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    """Multiaddrs to listen on."""
    mdns: bool = True
    """Find peers on the local network."""
    redial_interval_s: float = 1.0
    """First pause between two dials of a lost member; doubles up to a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """[engine]"""

    name: str = ""
    """Entry-point name of the engine; empty: the installed one, none without any."""
    memory_bytes_max: int = 0
    """Memory this node gives to shards; 0: three quarters of what is available at start."""
    threads: int = 0
    """Threads of each engine child; 0: shared out among the machine's children."""
    exact: bool = True
    """Bits of a reply do not depend on what else is computed (exactness class)."""
    slots: int = 4
    """Sessions whose state a shard holds at a time."""
    context: int = 4096
    """Most tokens of one session, capped by the model's own limit."""
    step_timeout_s: float = 120.0
    """Longest one engine step may take before the child counts as frozen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """[gateway]"""

    enabled: bool = True
    listen: str = "127.0.0.1:0"
    """Host and port of the HTTP endpoint; port 0: 8420 or the next free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Further Host header values accepted, needed when listening beyond loopback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsConfig:
    """[models]"""

    default: str = ""
    """Model of a request that names none; empty: what the swarm serves, else the largest here."""
    fetch: bool = True
    """Whether this node fetches layers it is to load of models that it has in part."""
    preload: tuple[str, ...] = ()
    """Models whose rings are assembled when the node starts, and again when they were lost."""
    single: bool = False
    """Whether rings of other models are given up before one is assembled: one model at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a node."""

    node: NodeConfig = field(default_factory=NodeConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    models: ModelsConfig = field(default_factory=ModelsConfig)

    def with_values(self, values: Mapping[str, Mapping[str, object]], *, origin: str) -> Config:
        """Return a copy with `values` by section and key set.

        Raises:
            ConfigError: A section or key is unknown, or a value is of another type or out of range.
        """
        sections = {item.name: item for item in fields(self)}
        config = self
        for section, entries in values.items():
            if section not in sections:
                raise ConfigError(f"{origin}: unknown section [{section}]")
            if not isinstance(entries, Mapping):
                raise ConfigError(f"{origin}: {section} must be a section")
            current = getattr(config, section)
            types_by_key = typing.get_type_hints(type(current))
            changes: dict[str, object] = {}
            for key, value in entries.items():
                if key not in types_by_key:
                    known = ", ".join(sorted(types_by_key))
                    raise ConfigError(f"{origin}: unknown key {section}.{key} (known: {known})")
                where = f"{origin}: {section}.{key}"
                changes[key] = _convert(value, types_by_key[key], where)
                _check(changes[key], f"{section}.{key}", where)
            config = replace(config, **{section: replace(current, **changes)})
        return config


def load_config(
    folder: Path,
    *,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Mapping[str, object]] | None = None,
) -> Config:
    """Read the settings of the node in `folder`.

    Raises:
        ConfigError: A file, variable or flag names an unknown key, or a value that cannot be.
    """
    config = Config()
    path = folder / "config.toml"
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        config = config.with_values(tomllib.loads(text), origin=str(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    config = config.with_values(
        _from_environ(os.environ if environ is None else environ), origin="environment"
    )
    return config.with_values(flags or {}, origin="flags")


RESERVED_VARIABLES = frozenset({"SWARMPY_HOME", "SWARMPY_CACHE"})
"""Variables with our prefix that name folders, not settings."""


def _from_environ(environ: Mapping[str, str]) -> dict[str, dict[str, object]]:
    values: dict[str, dict[str, object]] = {}
    for name, text in environ.items():
        if name.startswith("SWARMPY_") and name not in RESERVED_VARIABLES:
            section, _, key = name.removeprefix("SWARMPY_").lower().partition("_")
            values.setdefault(section, {})[key] = text
    return values


def _convert(value: object, kind: object, where: str) -> object:
    """Check a value against a field's type; text (environment, flags) is parsed for it."""
    try:
        if kind is bool:
            if isinstance(value, str):
                return {"1": True, "true": True, "0": False, "false": False}[value.lower()]
            if isinstance(value, bool):
                return value
        elif kind is int:
            if isinstance(value, (int, str)) and not isinstance(value, bool):
                return _parse_int(value)
        elif kind is float:
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                return float(value)
        elif kind is str:
            if isinstance(value, str):
                return value
        elif isinstance(kind, types.GenericAlias):
            items = value.split(",") if isinstance(value, str) else value
            if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
                return tuple(item.strip() for item in items if item.strip())
    except (KeyError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{where}: expected {_EXPECTED.get(kind, 'a list of texts')}, got {value!r}")


_EXPECTED: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number, sizes also as 500M or 8GiB",
    float: "a number",
    str: "text",
}


def _check(value: object, name: str, where: str) -> None:
    """Refuse a value out of its range: it would fail later, far from here, or never work."""
    if name == "node.log_level" and value not in LOG_LEVELS:
        raise ConfigError(f"{where}: expected {' or '.join(LOG_LEVELS)}, got {value!r}")
    if name in _RANGES and isinstance(value, (int, float)):
        least, most = _RANGES[name]
        if not least <= value <= most:
            raise ConfigError(f"{where}: expected {least} to {most}, got {value}")


_RANGES: Mapping[str, tuple[float, float]] = {
    "network.redial_interval_s": (0.1, 60.0),
    "engine.memory_bytes_max": (0, 2**53 - 1),
    "engine.threads": (0, 4096),
    "engine.slots": (1, 4096),
    "engine.context": (1, 2**31),
    "engine.step_timeout_s": (1.0, 86_400.0),
}
"""What messages to peers and engines can carry, and pauses that neither spin nor never end."""


_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def _parse_int(value: int | str) -> int:
    """Parse an integer, with a unit where it is text: "500M", "2GiB"."""
    if isinstance(value, int):
        return value
    text = value.strip().lower().removesuffix("b")
    for suffix in sorted(_UNITS, key=len, reverse=True):
        if text.endswith(suffix):
            return int(float(text.removesuffix(suffix)) * _UNITS[suffix])
    return int(text)
