"""Model files: only data is taken from them, and it is computed in the right type."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from shard_rows import run
from tiny_models import LAYERS, save_model

from swarmpy.abc import Shard
from swarmpy.errors import ModelRefused
from swarmpy.plugins.mlx import MlxEngine


def load(folder: Path) -> Shard:
    return MlxEngine().load(folder, start=0, end=LAYERS, slots=1, context=64, exact=True)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_file": "evil.py"},
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"text_config": {"trust_remote_code": True}},
        {"model_type": "evil"},
        {"model_type": "../evil"},
        {"model_type": "..utils"},
        {"model_type": "__init__"},
        {"model_type": "base"},
        {"model_type": None},
        {"model_type": "phi3small"},
        {"model_type": "bitnet"},
        {"hidden_size": 65},
        {"num_hidden_layers": 7},
        {"num_hidden_layers": -1},
        {"hidden_size": "large"},
        {"rope_scaling": {"type": "evil", "factor": []}},
    ],
)
def test_a_hostile_config_is_refused_and_runs_nothing(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", "utf-8")
    change_config(folder, **changes)

    with pytest.raises(ModelRefused):
        load(folder)

    assert not (tmp_path / "ran").exists()


def test_offsets_beyond_the_file_are_refused_before_mlx_sees_them(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(ModelRefused):
        MlxEngine().inspect(folder)


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    del weights["model.norm.weight"]
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, {"format": "mlx"})

    with pytest.raises(ModelRefused, match=r"model\.norm\.weight"):
        MlxEngine().inspect(folder)


@pytest.mark.parametrize("is_replaced", [True, False])
def test_files_that_changed_since_they_were_inspected_are_read_anew(
    tmp_path: Path, is_replaced: bool
) -> None:
    """A child that inspected a model waits for a load; meanwhile another model may take its place.

    Method: new weights of the same shapes, by a new file or written into the old one.
    """
    folder, engine = save_model(tmp_path / "model", "llama"), MlxEngine()
    engine.inspect(folder)
    path, new = folder / "model.safetensors", tmp_path / "new.safetensors"
    weights = {name: array * 2 for name, array in mx.load(str(path)).items()}
    mx.save_safetensors(str(new), weights, {"format": "mlx"})
    if is_replaced:
        new.replace(path)
    else:
        path.write_bytes(new.read_bytes())

    shard = engine.load(folder, start=0, end=LAYERS, slots=1, context=64, exact=True)

    np.testing.assert_array_equal(run(shard, [1, 2, 3], 0), run(load(folder), [1, 2, 3], 0))


def test_half_precision_weights_are_computed_in_float32_on_a_cpu(tmp_path: Path) -> None:
    """Method: the same numbers stored as bfloat16 and as float32 must give the same bits."""
    folders = [save_model(tmp_path / name, "llama") for name in ("bf16", "f32")]
    weights = mx.load(str(folders[0] / "model.safetensors"))
    half = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    full = {name: array.astype(mx.float32) for name, array in half.items()}
    mx.eval(half, full)
    mx.save_safetensors(str(folders[0] / "model.safetensors"), half, {"format": "mlx"})
    mx.save_safetensors(str(folders[1] / "model.safetensors"), full, {"format": "mlx"})

    shards = [load(folder) for folder in folders]

    assert shards[0].weight_bytes == shards[1].weight_bytes
    assert run(shards[0], [1, 2, 3], 0).tobytes() == run(shards[1], [1, 2, 3], 0).tobytes()


def test_quantised_weights_are_computed_in_float32_on_a_cpu(tmp_path: Path) -> None:
    """Method: quantise, save as mlx-lm does; compare with the dequantised numbers saved plain."""
    folders = [save_model(tmp_path / name, "llama") for name in ("q4", "plain")]
    config = json.loads((folders[0] / "config.json").read_text("utf-8"))
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.load_weights(str(folders[0] / "model.safetensors"))
    nn.quantize(model, group_size=32, bits=4)
    packed = dict(tree_flatten(model.parameters()))
    mx.eval(packed)
    mx.save_safetensors(str(folders[0] / "model.safetensors"), packed, {"format": "mlx"})
    change_config(folders[0], quantization={"group_size": 32, "bits": 4})
    plain = {
        name: mx.dequantize(
            array, packed[_near(name, "scales")], packed[_near(name, "biases")], 32, 4
        )
        if _near(name, "scales") in packed
        else array
        for name, array in packed.items()
        if name.endswith("weight")
    }
    mx.eval(plain)
    mx.save_safetensors(str(folders[1] / "model.safetensors"), plain, {"format": "mlx"})

    shards = [load(folder) for folder in folders]

    assert shards[0].weight_bytes == shards[1].weight_bytes
    assert run(shards[0], [1, 2, 3], 0).tobytes() == run(shards[1], [1, 2, 3], 0).tobytes()


def _near(name: str, part: str) -> str:
    return f"{name.rsplit('.', 1)[0]}.{part}"


def test_a_gguf_gives_the_numbers_of_the_folder_it_was_made_from(tmp_path: Path) -> None:
    """Names, shapes and the order of rotary rows. Method: write a GGUF as llama.cpp would."""
    folder = save_model(tmp_path / "folder", "llama")
    weights = mx.load(str(folder / "model.safetensors"))
    arrays = {name: np.array(array.astype(mx.float32)) for name, array in weights.items()}
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_of(arrays))

    from_folder, from_gguf = load(folder), load(path)

    np.testing.assert_array_equal(run(from_gguf, [1, 2, 3], 0), run(from_folder, [1, 2, 3], 0))


def gguf_of(arrays: dict[str, np.ndarray]) -> bytes:
    """Write a llama of the tiny size as GGUF version 3, all tensors float32."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    tensors: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:  # llama.cpp interleaves the two rotary halves of each head.
                halves = array.reshape(heads, 2, -1, array.shape[1])
                array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = array.astype(np.float32)
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "llama.context_length": 4096,
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(160)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += _text(key) + _value(value)
    offset = 0
    for name, array in tensors.items():
        out += _text(name) + struct.pack("<I", array.ndim)
        out += struct.pack(f"<{array.ndim}Q", *array.shape[::-1]) + struct.pack("<IQ", 0, offset)
        offset += -(-array.nbytes // 32) * 32
    out += bytes(-len(out) % 32)
    return out + b"".join(array.tobytes() + bytes(-array.nbytes % 32) for array in tensors.values())


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: object) -> bytes:
    match value:
        case str():
            return struct.pack("<I", 8) + _text(value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case list():
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_text(item) for item in value)
    raise TypeError(value)
