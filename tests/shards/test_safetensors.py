"""Safetensors headers: correct ones are read, all others are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import safetensors_bytes, write_safetensors

from swarmpy.errors import ModelRefused
from swarmpy.shards import safetensors
from swarmpy.shards.safetensors import INDEX_NAME, parse_header, read_folder, read_header

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_a_file_of_the_reference_library_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Method: the safetensors package writes, our reader reads."""
    numpy_api = pytest.importorskip("safetensors.numpy")
    arrays = {
        "layers.0.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "layers.1.weight": np.arange(5, dtype=np.float16),
        "packed": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "scalar": np.array(7, dtype=np.int64),
    }
    numpy_api.save_file(arrays, tmp_path / "model.safetensors", {"format": "mlx"})

    header = read_header(tmp_path / "model.safetensors")

    assert header.metadata == {"format": "mlx"}
    assert set(header.tensors) == set(arrays)
    for name, array in arrays.items():
        entry = header.tensors[name]
        assert entry.shape == array.shape
        assert bytes(safetensors.tensor_bytes(entry)) == array.tobytes()


def test_a_tensor_is_read_without_the_rest_of_its_file(tmp_path: Path) -> None:
    """Method: the other tensor is a hole of 16 GiB, which a reader would choke on."""
    hole = 16 << 30
    header = {
        "hole": {"dtype": "U8", "shape": [hole], "data_offsets": [0, hole]},
        "end": {"dtype": "U8", "shape": [3], "data_offsets": [hole, hole + 3]},
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header))
    with path.open("r+b") as file:
        file.seek(path.stat().st_size + hole)
        file.write(b"end")

    assert bytes(safetensors.tensor_bytes(read_header(path).tensors["end"])) == b"end"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a": F32 | {"dtype": "F31"}}, "dtype 'F31'"),
        ({"a": F32 | {"dtype": None}}, "dtype None"),
        ({"a": F32 | {"shape": [3]}}, "needs 12 bytes, has 8"),
        ({"a": F32 | {"shape": [-2, -1]}}, "malformed shape"),
        ({"a": F32 | {"shape": [2.0]}}, "malformed shape"),
        ({"a": F32 | {"shape": [True, 2]}}, "malformed shape"),
        ({"a": F32 | {"shape": [1] * 8 + [2]}}, "malformed shape"),
        ({"a": F32 | {"shape": [1 << 62, 1 << 62]}}, "needs"),
        ({"a": F32 | {"data_offsets": [8, 0]}}, "malformed data_offsets"),
        ({"a": F32 | {"data_offsets": [0, 8, 16]}}, "malformed data_offsets"),
        ({"a": F32 | {"data_offsets": [4, 12]}}, "gap"),
        ({"a": F32, "b": F32}, "overlaps"),
        ({"a": F32 | {"shape": [1], "data_offsets": [0, 4]}}, "end at byte"),
        ({"a": F32 | {"shape": [4], "data_offsets": [0, 16]}}, "end at byte"),
        ({"a": F32 | {"more": 1}}, "expected dtype, shape and data_offsets"),
        ({"a": 1}, "expected dtype, shape and data_offsets"),
        ({"": F32}, "name of 0 characters"),
        ({"a" * 513: F32}, "name of 513 characters"),
        ({"a": F32, "__metadata__": {"x": 1}}, "__metadata__"),
        ({"a": F32, "__metadata__": []}, "__metadata__"),
    ],
)
def test_a_header_that_contradicts_itself_or_its_file_is_refused(
    tmp_path: Path, tensors: dict[str, object], reason: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(tensors, bytes(8)))

    with pytest.raises(ModelRefused, match=reason):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header of 0 bytes in a file of 0"),
        (b"\x02\0\0\0\0\0\0", "cut off"),
        (b"\xff" * 8, "cut off"),
        (safetensors_bytes(b"{"), "not JSON"),
        (safetensors_bytes(b"[]"), "no JSON object"),
        (safetensors_bytes(b'{"a":{},"a":{}}'), "twice"),
        (safetensors_bytes(b"[" * 100_000), "not JSON"),
        (safetensors_bytes(b"\xff\xfe"), "not JSON"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    with pytest.raises(ModelRefused, match=reason):
        read_header(path)


def test_a_header_beyond_its_bound_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 30).to_bytes(8, "little"))
    os.truncate(path, 2 << 30)

    with pytest.raises(ModelRefused, match="exceeds"):
        read_header(path)


def test_a_file_cut_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": ("U8", (100,), bytes(100))})
    entry = read_header(path).tensors["a"]
    os.truncate(path, entry.offset + 50)

    with pytest.raises(ModelRefused, match="ends inside tensor 'a'"):
        safetensors.tensor_bytes(entry)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_place_of_a_file_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")

    with pytest.raises(ModelRefused, match="not a regular file"):
        read_folder(tmp_path)


def test_a_model_in_two_files_is_read_through_its_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": ("U8", (1,), b"1")})
    write_safetensors(tmp_path / "two.safetensors", {"b": ("U8", (1,), b"2")})
    write_safetensors(tmp_path / "other.safetensors", {"c": ("U8", (1,), b"3")})
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))

    tensors = read_folder(tmp_path)

    assert {name: bytes(safetensors.tensor_bytes(entry)) for name, entry in tensors.items()} == {
        "a": b"1",
        "b": b"2",
    }


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/model.safetensors",
        "a\\model.safetensors",
        "C:model.safetensors",
        "..",
        ".model.safetensors",
        "-model.safetensors",
        "model.safetensors\n",
        "",
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_safetensors(tmp_path / "model.safetensors", {"a": ("U8", (1,), b"1")})
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))

    with pytest.raises(ModelRefused, match="is not a plain file name"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": {"a": 1}}, "text to text"),
        ({"weight_map": {"a": "model.bin"}}, "no \\*.safetensors"),
        ({"weight_map": {"a": "missing.safetensors"}}, "cannot read"),
        ({"weight_map": {"b": "model.safetensors"}}, "tensor 'b' is not in"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(
    tmp_path: Path, index: object, reason: str
) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": ("U8", (1,), b"1")})
    (tmp_path / "model.bin").write_bytes(b"")
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))

    with pytest.raises(ModelRefused, match=reason):
        read_folder(tmp_path)


def test_a_model_file_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    """Other loaders would read it, and nobody has verified it."""
    for name in ("model.safetensors", "model-extra.safetensors"):
        write_safetensors(tmp_path / name, {name: ("U8", (1,), b"1")})
    weight_map = {"model.safetensors": "model.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))

    with pytest.raises(ModelRefused, match=r"model-extra.safetensors is not in"):
        read_folder(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        write_safetensors(tmp_path / name, {"a": ("U8", (1,), b"1")})

    with pytest.raises(ModelRefused, match=r"'a' is in one.safetensors and in two.saf"):
        read_folder(tmp_path)


@given(st.binary(max_size=300), st.integers(0, 1000))
def test_any_bytes_are_a_header_or_refused(data: bytes, file_bytes: int) -> None:
    try:
        header = parse_header(data, path=Path("x"), file_bytes=file_bytes)
    except ModelRefused:
        return
    assert all(entry.offset + entry.size_bytes <= file_bytes for entry in header.tensors.values())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1 << 70) | st.floats() | st.text(max_size=5),
    lambda item: (
        st.lists(item, max_size=4) | st.dictionaries(st.text(max_size=5), item, max_size=4)
    ),
    max_leaves=8,
)
_TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "X"]) | _JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 99), min_size=2, max_size=2) | _JSON,
    }
)


@settings(max_examples=300)
@given(st.dictionaries(st.text(max_size=4), _TENSOR | _JSON, max_size=4), st.integers(0, 400))
def test_any_json_is_a_header_whose_tensors_fill_the_file_or_refused(
    value: dict[str, object], file_bytes: int
) -> None:
    data = json.dumps(value).encode()
    try:
        header = parse_header(data, path=Path("x"), file_bytes=file_bytes)
    except ModelRefused:
        return
    size = sum(entry.size_bytes for entry in header.tensors.values())
    assert 8 + len(data) + size == file_bytes
