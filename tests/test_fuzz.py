"""The fuzz contract: any bytes give a message or the decoder's own error, whatever they are.

The corpus and all inputs that ever broke something are replayed, Hypothesis adds bytes of its own,
and the table of `fuzz/decoders.py` must name every decoder there is. `make fuzz` goes further.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import swarmpy.proto
from fuzz.decoders import DECODERS, Decoder, holds
from fuzz.examples import structs_within
from fuzz.mutation import with_hostile_value
from swarmpy import identity, public_keys

FUZZ = Path(__file__).parent.parent / "fuzz"
CORPUS_BYTES_MAX = 1024 * 1024
CHANGES = 200
"""Changed messages tried of each target, always the same ones."""

DECODING = (
    *("check_", "decode", "from_bytes", "open_", "parse_", "public_key_of", "split"),
    *("unpack", "verify"),
)
"""What functions that read what others wrote begin with."""

FEEDING = ("receive", "received", "open")
"""Methods that take bytes as they come."""

INNER = {
    # Checks of decoded values, run by the decoders around them.
    "membership.check_printable",
    "membership.check_version",
    "public_keys.check_ed25519",
    # Local: the answer to our own handshake's end, not bytes.
    "noise.split",
}


def inputs(target: str) -> Iterator[Path]:
    """All inputs kept of a target: its corpus, that of all, and what once broke it."""
    for folder in ("corpus/every", f"corpus/{target}", f"crashes/{target}"):
        yield from sorted((FUZZ / folder).glob("*"))


@pytest.mark.parametrize("target", DECODERS)
def test_every_kept_input_holds_the_contract(target: str) -> None:
    files = list(inputs(target))
    assert files
    for file in files:
        holds(DECODERS[target], file.read_bytes())


@pytest.mark.parametrize("target", DECODERS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.binary(max_size=300))
def test_any_bytes_hold_the_contract(target: str, data: bytes) -> None:
    holds(DECODERS[target], data)


@pytest.mark.parametrize("target", [name for name in DECODERS if DECODERS[name].kinds])
def test_any_message_with_one_wrong_value_holds_the_contract(target: str) -> None:
    """Wrong types, numbers and texts beyond every bound, nesting beyond recursion."""
    generator = random.Random(target)
    seeds = [file.read_bytes() for file in inputs(target)]
    for _ in range(CHANGES):
        changed = with_hostile_value(generator.choice(seeds), generator)
        holds(DECODERS[target], changed or b"")


def test_a_decoder_that_raises_anything_else_breaks_the_contract() -> None:
    def careless(data: bytes) -> None:
        raise RecursionError

    with pytest.raises(RecursionError):
        holds(Decoder(run=careless), b"")


def test_the_corpus_is_small() -> None:
    files = [file for folder in ("corpus", "crashes") for file in (FUZZ / folder).rglob("*")]
    assert 0 < sum(file.stat().st_size for file in files) < CORPUS_BYTES_MAX


def test_no_input_is_kept_of_a_target_that_is_gone() -> None:
    folders = {path.name for path in [*FUZZ.glob("corpus/*"), *FUZZ.glob("crashes/*")]}
    assert folders <= {*DECODERS, "every"}


def decoding_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions and classes that read bytes or text of others, by module and name."""
    names = [module.name for module in pkgutil.iter_modules(swarmpy.proto.__path__)]
    modules = [importlib.import_module(f"swarmpy.proto.{name}") for name in names]
    for module in (*modules, identity, public_keys):
        for name, value in vars(module).items():
            if getattr(value, "__module__", "") != module.__name__ or name.startswith("_"):
                continue
            reads = inspect.isfunction(value) and name.startswith(DECODING)
            feeds = inspect.isclass(value) and any(map(inspect.isfunction, _feeding(value)))
            if reads or feeds:
                yield f"{module.__name__.rpartition('.')[2]}.{name}", value


def _feeding(kind: type) -> Iterator[object]:
    return (vars(kind).get(name) for name in FEEDING)


@pytest.mark.parametrize(
    ("where", "function"),
    [item for item in decoding_functions() if item[0] not in INNER],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_decoder_has_a_target(where: str, function: Callable[..., Any]) -> None:
    assert any(function in decoder.covers for decoder in DECODERS.values())


def messages() -> Iterator[type[msgspec.Struct]]:
    """Every Struct type of `swarmpy.proto`; Yamux's are events, decoded by no type."""
    for module in pkgutil.iter_modules(swarmpy.proto.__path__, "swarmpy.proto."):
        if module.name == "swarmpy.proto.yamux":
            continue
        for value in vars(importlib.import_module(module.name)).values():
            is_struct = inspect.isclass(value) and issubclass(value, msgspec.Struct)
            if is_struct and value.__module__ == module.name:
                yield value


@pytest.mark.parametrize("message", list(messages()), ids=lambda message: message.__qualname__)
def test_every_message_has_a_target(message: type[msgspec.Struct]) -> None:
    kinds = [kind for decoder in DECODERS.values() for kind in decoder.kinds]
    assert any(message in structs_within(kind) for kind in kinds)
