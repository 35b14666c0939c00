"""The tiny models that the tests of the Hub serve, as a folder's files and as a GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import FakeHub
from shard_files import gguf_bytes, write_safetensors

from swarmpy.abc import Progress
from swarmpy.shards.catalog import Catalog
from swarmpy.shards.gguf import GgmlType
from swarmpy.shards.hub import HubSource
from swarmpy.shards.sources import FolderSource

LAYERS = 4
LAYER_BYTES = 128 * 128 * 4
CONFIG = {"model_type": "llama", "num_hidden_layers": LAYERS, "max_position_embeddings": 512}
WEIGHTS = "model.safetensors"
RELEASE = "hub--ann--tiny--aaaaaaaaaaaa"


def ignore(progress: Progress) -> None:
    pass


def layer_tensors() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A model whose layer i is made of bytes i + 1."""
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {
        "model.embed_tokens.weight": ("F32", (64, 64), b"e" * 16384),
        "lm_head.weight": ("F32", (64, 64), b"h" * 16384),
        "model.norm.weight": ("F32", (64,), b"n" * 256),
    }
    for layer in range(LAYERS):
        raw = bytes([layer + 1]) * LAYER_BYTES
        tensors[f"model.layers.{layer}.mlp.weight"] = ("F32", (128, 128), raw)
    return tensors


def safetensors_file(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    path = folder / "written.safetensors"
    write_safetensors(path, tensors)
    return path.read_bytes()


def gguf_file() -> bytes:
    """The same model as a GGUF."""
    tensors: dict[str, tuple[GgmlType, tuple[int, ...], bytes]] = {
        "token_embd.weight": (GgmlType.F32, (64, 64), b"e" * 16384),
        "output_norm.weight": (GgmlType.F32, (64,), b"n" * 256),
        "output.weight": (GgmlType.F32, (64, 64), b"h" * 16384),
    }
    for layer in range(LAYERS):
        raw = bytes([layer + 1]) * LAYER_BYTES
        tensors[f"blk.{layer}.ffn_up.weight"] = (GgmlType.F32, (128, 128), raw)
    metadata = {"general.architecture": "llama", "llama.block_count": LAYERS}
    return gguf_bytes(metadata, tensors)


def tiny_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub with the model as a folder of one safetensors file; and files nobody should want.

    Whoever runs the tests may be known to the real Hub; here they are not.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no-token"))
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        WEIGHTS: safetensors_file(folder, layer_tensors()),
        "modeling_tiny.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80\x04.",
        "README.md": b"# Tiny",
    }
    return FakeHub(files, lfs=frozenset({WEIGHTS}))


def source_of(hub: FakeHub) -> HubSource:
    return HubSource(endpoint=hub.url)


def catalog_of(hub: FakeHub, cache: Path) -> Catalog:
    return Catalog(cache, sources=[source_of(hub), FolderSource()])


def asked_files(hub: FakeHub) -> set[str]:
    return {item.path.rpartition("/")[2] for item in hub.asked if "/resolve/" in item.path}
