"""What a model's configuration must not ask for: code of its own, or absurd sizes.

mlx-lm runs the file named by `model_file`, and transformers runs what `auto_map` names, once
somebody trusts remote code. A model is data here, so these keys are refused by name anywhere.
Spec: protocols/manifest.md, section 3.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from swarmpy.errors import ModelRefused

FORBIDDEN_KEYS = frozenset({"model_file", "auto_map", "trust_remote_code"})
"""Keys that name code to run or ask for trust in it; their value does not matter."""

CONFIG_BYTES_MAX = 1024 * 1024
"""config.json and generation_config.json: the longest published ones (per-layer quantisation) have
about 100 KB."""

TOKENIZER_CONFIG_BYTES_MAX = 16 * 1024 * 1024
"""tokenizer_config.json repeats every added token; about 1.2 MB with 6,000 of them."""

NESTING_MAX = 32
"""Depth of lists and objects in a configuration; real ones have five levels."""

SIZES_MAX: Mapping[str, int] = {
    "num_hidden_layers": 1024,
    "num_layers": 1024,
    "n_layers": 1024,
    "n_layer": 1024,
    "hidden_size": 1 << 17,
    "d_model": 1 << 17,
    "n_embd": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 13,
    "num_key_value_heads": 1 << 13,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 22,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "n_routed_experts": 1 << 14,
    "max_position_embeddings": 1 << 28,
    "n_positions": 1 << 28,
    "max_seq_len": 1 << 28,
    "seq_length": 1 << 28,
    "n_ctx": 1 << 28,
}
"""Largest sizes accepted, by key. About eight times the largest published models (126 layers,
width 16,384, 262 k tokens); beyond them a loader would ask for memory no tensor stands for."""


def check_config(config: Mapping[str, object], *, where: str = "config.json") -> None:
    """Refuse a configuration that asks for code to be run or states absurd sizes.

    Args:
        config: The parsed JSON object; nested objects and lists are looked into.
        where: The file's name, for the message.

    Raises:
        ModelRefused: A forbidden key, a size out of range, or too deep a nesting.
    """
    for key, value in _entries(config, where, depth=0):
        if key in FORBIDDEN_KEYS:
            raise ModelRefused(f"{where} has the key {key!r}, which would run the model's own code")
        if key in SIZES_MAX:
            _check_size(key, value, where)


def read_json(path: Path, *, bytes_max: int) -> dict[str, object]:
    """Read a JSON object from a regular file of at most `bytes_max` bytes.

    Raises:
        ModelRefused: Missing, too large, no JSON, or no object.
    """
    data = read_bytes(path, bytes_max=bytes_max)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelRefused(f"{path.name} holds {type(value).__name__}, expected an object")
    return value


def read_bytes(path: Path, *, bytes_max: int) -> bytes:
    """Read a whole small file of a model.

    Raises:
        ModelRefused: Missing, unreadable, no regular file, or more than `bytes_max` bytes.
    """
    size = file_size(path)
    if size > bytes_max:
        raise ModelRefused(f"{path.name} has {size} bytes, at most {bytes_max} are accepted")
    try:
        with path.open("rb") as file:
            return file.read(bytes_max)
    except OSError as error:
        raise ModelRefused(f"cannot read {path}: {error.strerror}") from error


def file_size(path: Path) -> int:
    """Return a regular file's size in bytes; opening a pipe, say, could block for ever.

    Raises:
        ModelRefused: Missing, or not a regular file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ModelRefused(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelRefused(f"{path} is not a regular file")
    return status.st_size


def check_folder(folder: Path) -> dict[str, object]:
    """Check every configuration file of a Hugging Face layout folder.

    Returns:
        The parsed config.json.

    Raises:
        ModelRefused: config.json is missing, or a file is malformed or asks for what is refused.
    """
    config = read_json(folder / "config.json", bytes_max=CONFIG_BYTES_MAX)
    check_config(config)
    for name, bytes_max in (
        ("generation_config.json", CONFIG_BYTES_MAX),
        ("tokenizer_config.json", TOKENIZER_CONFIG_BYTES_MAX),
    ):
        if (folder / name).exists():
            check_config(read_json(folder / name, bytes_max=bytes_max), where=name)
    return config


def _entries(value: object, where: str, *, depth: int) -> Iterator[tuple[str, object]]:
    """Yield every (key, value) of every object inside."""
    if depth > NESTING_MAX:
        raise ModelRefused(f"{where} is nested deeper than {NESTING_MAX} levels")
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), item
            yield from _entries(item, where, depth=depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item, where, depth=depth + 1)


def _check_size(key: str, value: object, where: str) -> None:
    """Check one size, or a list of them (some architectures state one a layer); null is no size."""
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            continue
        if not isinstance(item, int) or isinstance(item, bool):
            raise ModelRefused(f"{where}: {key} is {item!r:.40}, expected a whole number")
        if not 0 <= item <= SIZES_MAX[key]:
            raise ModelRefused(f"{where}: {key} is {item}, expected 0 to {SIZES_MAX[key]}")
