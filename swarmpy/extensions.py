"""Finds what other packages add: engines by entry point, loaded only when asked for."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from swarmpy.abc import Engine
from swarmpy.errors import ExtensionNotFound

ENGINE_GROUP = "swarmpy.engines"


def engine_names() -> list[str]:
    """Names of the installed engines in alphabetical order; none is imported."""
    return sorted({point.name for point in entry_points(group=ENGINE_GROUP)})


def engine_class(name: str) -> type[Engine]:
    """Import an engine by its entry-point name or by "module:Class".

    Raises:
        ExtensionNotFound: No package provides it, or what it needs is not installed.
    """
    if ":" in name:
        point = EntryPoint(name=name, value=name, group=ENGINE_GROUP)
    else:
        found = {point.name: point for point in entry_points(group=ENGINE_GROUP)}
        if name not in found:
            have = ", ".join(sorted(found)) or "none"
            raise ExtensionNotFound(f"no engine {name!r} is installed (installed: {have})")
        point = found[name]
    try:
        loaded = point.load()
    except ImportError as error:
        raise ExtensionNotFound(
            f"engine {name!r} cannot be imported: {error}",
            fix=f"Install swarmpy with the extra '{name}'.",
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Engine)):
        raise ExtensionNotFound(f"{point.value} is no swarmpy engine")
    return loaded
