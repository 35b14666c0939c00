"""The protocols' pages have their parts, and their limits are those of the code.

A page's limits are rows "| `NAME` | value | ..." under "Limits"; the names are the code's, with
their module ("gguf.NAME") where two modules of a page use one name for different numbers.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

import swarmpy.proto

PROTOCOLS = Path(__file__).parents[2] / "protocols"
PAGES = sorted(path.stem for path in PROTOCOLS.glob("*.md"))

MODULES: Mapping[str, tuple[str, ...]] = {
    "README": ("proto.wire", "proto.protobuf"),
    "announce": ("proto.announce", "proto.summary", "discovery.limits"),
    "engine": ("proto.engine",),
    "envelope": ("proto.envelope",),
    "identify": ("proto.identify",),
    "identity": ("identity", "public_keys"),
    "invite": ("proto.invite",),
    "manifest": ("shards.vocabularies", "shards.gguf", "shards.safetensors", "shards.refusals"),
    "mdns": ("proto.mdns",),
    "membership": ("proto.membership", "proto.revocation"),
    "multistream": ("proto.multistream", "proto.multiaddr"),
    "noise": ("proto.noise",),
    "ping": ("proto.ping",),
    "pipeline": ("proto.pipeline",),
    "swim": ("proto.swim",),
    "tensor": ("proto.tensor",),
    "yamux": ("proto.yamux", "proto.receive_budget"),
}
"""By page: modules of `swarmpy` all of whose public numbers the page must name."""

MORE: Mapping[str, tuple[str, ...]] = {
    "announce": (
        "config",
        "discovery.catchup",
        "discovery.gossip",
        "discovery.link",
        "discovery.neighbourhood",
        "discovery.service",
        "discovery.spreading",
        "proto.membership",
    ),
    "engine": ("pipeline.engine_host", "pipeline.engine_process", "proto.wire"),
    "identify": ("net.peer_info", "net.host", "net.addresses"),
    "invite": ("config", "trust.attempts", "trust.exchange", "trust.invites", "trust.issuing"),
    "manifest": ("shards.manifest", "shards.sources"),
    "mdns": ("discovery.mdns",),
    "membership": (
        "config",
        "trust.attempts",
        "trust.exchange",
        "trust.membership",
        "trust.revocations",
        "trust.renewing",
    ),
    "multistream": ("config", "net.host", "net.paths"),
    "noise": ("config",),
    "ping": ("net.peer_info",),
    "pipeline": ("config", "pipeline.links", "pipeline.session", "pipeline.stage"),
    "yamux": ("config", "net.connection", "net.keepalive", "net.pace", "net.secured", "net.stream"),
}
"""By page: further modules whose numbers it may name."""

LOCAL = {
    "engine.MAPPED_BYTES_MIN": "how a frame is read, not what it may be",
    "engine.SCRATCH_BYTES": "how a frame is read, not what it may be",
    "announce.ANNOUNCEMENTS_CACHED": "a cache",
    "membership.CHAINS_CACHED": "a cache",
    "revocation.REVOCATIONS_CACHED": "a cache",
    "summary.KEYS_CACHED": "a cache",
    "swim.STATEMENTS_CACHED": "a cache",
}
"""Numbers that no peer can notice, and why."""

WORDS = {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "ms": 1e-3,
    "minute": 60,
    "minutes": 60,
    "hour": 3600,
    "hours": 3600,
    "day": 86400,
    "days": 86400,
}
"""What a unit multiplies by; all others count as they are."""

PARTS = ("Limits", "Errors", "Security")
CONVERSATIONS = ("announce", "engine", "invite", "membership", "ping", "pipeline")
"""Pages of protocols with messages of our own, which also have states."""


def rows(page: str) -> dict[str, float]:
    """Return a page's limits by name."""
    text = section(page, "Limits")
    found = re.findall(r"^\| `((?:\w+\.)?[A-Z][A-Z0-9_]*)` \| ([^|]+?) \|", text, re.MULTILINE)
    assert len(dict(found)) == len(found), f"{page}.md names a limit twice"
    return {name: number(value) for name, value in found}


def number(text: str) -> float:
    """Return what a cell says: "65,536 bytes", "64 KiB", "30 days", "2^63 - 1"."""
    match = re.fullmatch(r"(?:(\d+)\^(\d+)(?: - (\d+))?|([\d,]+(?:\.\d+)?))(?: (\w+).*)?", text)
    assert match is not None, text
    base, exponent, less, plain, unit = match.groups()
    if plain is None:
        return int(base) ** int(exponent) - int(less or 0)
    return float(plain.replace(",", "")) * WORDS.get(unit or "", 1)


def section(page: str, title: str) -> str:
    """Return a section's text, "" where there is none of this title."""
    text = (PROTOCOLS / f"{page}.md").read_text("utf-8")
    found = re.search(rf"^## (?:\d+\. )?{title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def module(name: str) -> ModuleType:
    return importlib.import_module(f"swarmpy.{name}")


def numbers(name: str) -> Iterator[tuple[str, float]]:
    """Yield the public numbers a module defines itself."""
    source = Path(module(name).__file__ or "").read_text("utf-8")
    for constant in re.findall(r"^([A-Z][A-Z0-9_]*)(?:: [\w\[\], ]+)? = ", source, re.MULTILINE):
        value = getattr(module(name), constant)
        if isinstance(value, (int, float)) and constant != "VERSION":
            yield constant, value


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_its_parts(page: str) -> None:
    parts = [*PARTS, *(("States", "Messages") if page in CONVERSATIONS else ())]
    assert [part for part in parts if not section(page, part).strip()] == []


def known(page: str) -> dict[str, set[float]]:
    """Return what each name may mean in a page, alone and with its module."""
    found: dict[str, set[float]] = {}
    for name in (*MORE.get(page, ()), *MODULES[page]):
        for constant, value in numbers(name):
            found.setdefault(constant, set()).add(value)
            found.setdefault(f"{name.rpartition('.')[2]}.{constant}", set()).add(value)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_limits_of_a_page_are_those_of_the_code(page: str) -> None:
    meant = known(page)

    said = rows(page)

    assert {name: {value} for name, value in said.items()} == {
        name: meant.get(name) for name in said
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_public_limit_of_the_code_is_in_its_page(page: str) -> None:
    named = rows(page).keys() | LOCAL.keys()
    missing = [
        f"{name}.{constant}"
        for name in MODULES[page]
        for constant, _ in numbers(name)
        if not named & {constant, f"{name.rpartition('.')[2]}.{constant}"}
    ]
    assert missing == []


def test_the_envelopes_page_lists_what_is_signed() -> None:
    """A domain that two payloads shared would let a signature for one pass for the other."""
    modules = [
        module(f"proto.{info.name}") for info in pkgutil.iter_modules(swarmpy.proto.__path__)
    ]
    signed = [
        (item.DOMAIN, item.PAYLOAD_TYPE.decode()) for item in modules if hasattr(item, "DOMAIN")
    ]

    text = (PROTOCOLS / "envelope.md").read_text("utf-8")
    listed = re.findall(r"^\| `(swarmpy-[a-z]+)` \| `(\w)` \|", text, re.MULTILINE)

    assert sorted(listed) == sorted(signed)
    assert len(dict(signed)) == len(signed)


def test_every_module_of_proto_has_a_page() -> None:
    """A module without public numbers may be part of another's page."""
    names = [f"proto.{info.name}" for info in pkgutil.iter_modules(swarmpy.proto.__path__)]
    paged = {name for page in PAGES for name in MODULES[page]}
    assert [name for name in names if name not in paged and list(numbers(name))] == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("65,536 bytes", 65536),
        ("64 KiB", 65536),
        ("0.5 s", 0.5),
        ("50 ms", 0.05),
        ("30 days", 2592000),
        ("2^63 - 1", 2**63 - 1),
        ("12", 12),
    ],
)
def test_numbers_read_as_written(text: str, value: float) -> None:
    assert number(text) == value
