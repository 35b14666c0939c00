"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Return the memory left to the machine and to our control group, None if unknown."""
    limits = [limit for limit in (_machine_bytes(), _group_bytes()) if limit is not None]
    return min(limits, default=None)


def _machine_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None


def _group_bytes() -> int | None:
    """Return what is left in this process's own control group (version 2)."""
    try:
        group = Path("/proc/self/cgroup").read_text("ascii").strip().split("::", 1)[1]
        folder = CGROUP / group.lstrip("/")
        limit = (folder / "memory.max").read_text("ascii").strip()
        used = int((folder / "memory.current").read_text("ascii"))
    except (OSError, IndexError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used)
