"""GGUF headers: correct ones are read, all others are refused; blocks become the right numbers."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import (
    gguf_bytes,
    gguf_header,
    gguf_string,
    gguf_tensor,
    gguf_value,
    llama_gguf,
)

from swarmpy.errors import ModelRefused
from swarmpy.shards import gguf
from swarmpy.shards.gguf import GgmlType, GgufHeader, dequantize, parse_header
from swarmpy.shards.safetensors import tensor_bytes


def parse(data: bytes) -> GgufHeader:
    return parse_header(io.BytesIO(data), path=Path("x.gguf"), file_bytes=len(data))


def test_metadata_of_every_kind_is_read_as_it_was_written() -> None:
    metadata = {
        "text": "a 🦙",
        "flag": True,
        "number": -5,
        "real": 0.5,
        "texts": ("a", "b"),
        "flags": (True, False),
        "numbers": (1, -2, 3),
        "nested": ((1, 2), (3,)),
        "none": (),
    }

    assert parse(gguf_bytes(metadata, {})).metadata == metadata


@pytest.mark.parametrize(
    ("kind", "raw", "expected"),
    [
        (0, b"\xff", 255),
        (1, b"\xff", -1),
        (2, b"\xff\xff", 65535),
        (3, b"\xff\xff", -1),
        (4, b"\xff" * 4, 2**32 - 1),
        (5, b"\xff" * 4, -1),
        (6, struct.pack("<f", 0.25), 0.25),
        (10, b"\xff" * 8, 2**64 - 1),
    ],
)
def test_a_number_of_every_width_is_read(kind: int, raw: bytes, expected: object) -> None:
    entry = gguf_string("key") + struct.pack("<I", kind) + raw

    assert parse(gguf_header([entry], [])).metadata["key"] == expected


def test_tensors_are_found_at_their_aligned_offsets_in_row_major_shape(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    first, second = np.arange(6, dtype="<f4"), np.arange(5, dtype="<i4")
    path.write_bytes(
        gguf_bytes(
            {},
            {
                "first": (GgmlType.F32, (2, 3), first.tobytes()),
                "second": (GgmlType.I32, (5,), second.tobytes()),
            },
        )
    )

    tensors = gguf.read_header(path).tensors

    assert tensors["first"].shape == (2, 3)
    assert bytes(tensor_bytes(tensors["first"])) == first.tobytes()
    assert bytes(tensor_bytes(tensors["second"])) == second.tobytes()


def f32(name: str, offset: int) -> bytes:
    return gguf_tensor(name, 0, (8,), offset)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut off"),
        (b"GGML" + bytes(60), "no GGUF"),
        (gguf_header({}, [], version=1), "version 1"),
        (gguf_header({}, [], version=4), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
        (gguf_header({}, [], tensor_count=1 << 63), "tensors, at most"),
        (gguf_header({}, [], metadata_count=1 << 63), "metadata keys, at most"),
        (gguf_header({}, [], metadata_count=1), "cut off"),
        (gguf_header([gguf_string("k") + gguf_value(1)] * 2, []), "'k' is there twice"),
        (gguf_header([struct.pack("<Q", 1 << 63)], []), "bytes of text, at most"),
        (gguf_header([gguf_string("k") + struct.pack("<I", 13)], []), "unknown type 13"),
        (
            gguf_header([gguf_string("k") + struct.pack("<IIQ", 9, 0, 1 << 62)], []),
            "array items, at most",
        ),
        (gguf_header([gguf_string("k") + struct.pack("<IIQ", 9, 0, 1000)], []), "cut off"),
        (gguf_header({"k": [[[1]]]}, []), "nested deeper"),
        (gguf_header({"general.alignment": 0}, []), "alignment 0"),
        (gguf_header({"general.alignment": 12}, []), "alignment 12"),
        (gguf_header({"general.alignment": "x"}, []), "alignment 'x'"),
        (gguf_header({}, [gguf_tensor("a", 0, (1,) * 5, 0)]), "5 dimensions"),
        (gguf_header({}, [gguf_tensor("a", 4, (32,), 0)]), "unknown type 4"),
        (gguf_header({}, [gguf_tensor("a", 2, (2, 33), 0)]), "blocks of 32, a row has 33"),
        (gguf_header({}, [f32("a", 0)]), "ends at byte"),
        (gguf_header({}, [gguf_tensor("a", 0, (1 << 62, 1 << 62), 0)]), "ends at byte"),
        (gguf_header({}, [f32("a", 8)]) + bytes(99), "not aligned"),
        (gguf_header({}, [f32("a", 0), f32("a", 32)]) + bytes(99), "'a' is there twice"),
        (gguf_header({}, [f32("a", 0), f32("b", 0)]) + bytes(99), "overlaps"),
    ],
)
def test_a_header_that_lies_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ModelRefused, match=reason):
        parse(data)


def test_array_items_are_bounded_in_all_not_only_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many arrays just under the bound would add up to any memory."""
    monkeypatch.setattr(gguf, "ITEMS_MAX", 10)

    with pytest.raises(ModelRefused, match="6 array items, at most 4"):
        parse(gguf_header({"a": [1] * 6, "b": [1] * 6}, []))


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda header: header.text("absent"), "no metadata 'absent'"),
        (lambda header: header.text("number"), "'number' is int, expected str"),
        (lambda header: header.integer("flag"), "'flag' is bool, expected int"),
        (lambda header: header.number("text"), "'text' is str, expected float"),
        (lambda header: header.flag("number"), "'number' is int, expected bool"),
        (lambda header: header.texts("numbers"), "expected array of str"),
        (lambda header: header.integers("number"), "expected array of int"),
    ],
)
def test_metadata_of_another_kind_than_needed_is_refused(
    read: Callable[[GgufHeader], object], reason: str
) -> None:
    header = parse(gguf_bytes({"number": 1, "flag": True, "text": "a", "numbers": [1]}, {}))

    with pytest.raises(ModelRefused, match=reason):
        read(header)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_header_or_refused(data: bytes) -> None:
    try:
        parse(b"GGUF\x03\0\0\0" + data)
    except ModelRefused:
        return


VALID = llama_gguf()


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.integers(0, 8000), st.sampled_from([0, 1, 4, 9, 127, 255])),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, len(VALID)),
)
def test_any_changed_bytes_give_tensors_within_the_file_or_are_refused(
    changes: list[tuple[int, int]], length: int
) -> None:
    """Method: a true header with a few bytes changed and its end cut off."""
    data = bytearray(VALID)
    for offset, value in changes:
        data[offset] = value
    data = data[: max(length, 8000)]
    try:
        header = parse(bytes(data))
    except ModelRefused:
        return
    assert all(item.offset + item.size_bytes <= len(data) for item in header.tensors.values())


# Numbers ---------------------------------------------------------------------


def blocks(kind: GgmlType, count: int) -> bytes:
    """Random blocks with finite scales."""
    random = np.random.default_rng(kind)
    size = gguf.BLOCKS[kind][1]
    raw = random.integers(0, 256, (count, size), dtype=np.uint8)
    halves = 2 if kind is GgmlType.Q4_1 else 1
    scales = random.normal(size=(count, halves)).astype("<f2")
    raw[:, : 2 * halves] = scales.view(np.uint8)
    return raw.tobytes()


def reference(kind: GgmlType, raw: bytes) -> list[float]:
    """The format's definition, one number at a time."""
    size, numbers = gguf.BLOCKS[kind][1], []
    for start in range(0, len(raw), size):
        block = raw[start : start + size]
        (scale,) = struct.unpack_from("<e", block)
        if kind is GgmlType.Q8_0:
            numbers += [item * scale for item in struct.unpack_from("<32b", block, 2)]
            continue
        packed = block[-16:]
        nibbles = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
        if kind is GgmlType.Q4_0:
            numbers += [(nibble - 8) * scale for nibble in nibbles]
        else:
            (minimum,) = struct.unpack_from("<e", block, 2)
            numbers += [nibble * scale + minimum for nibble in nibbles]
    return numbers


@pytest.mark.parametrize("kind", [GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q8_0])
def test_blocks_become_the_numbers_of_their_definition(kind: GgmlType) -> None:
    raw = blocks(kind, 50)

    numbers = dequantize(memoryview(raw), kind, (10, 160))

    assert numbers.dtype == np.float32
    assert numbers.shape == (10, 160)
    np.testing.assert_array_equal(numbers.ravel(), np.array(reference(kind, raw), np.float32))


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        (GgmlType.F32, np.array([1.5, -2.0], "<f4").tobytes()),
        (GgmlType.F16, np.array([1.5, -2.0], "<f2").tobytes()),
        (GgmlType.BF16, b"\xc0\x3f\x00\xc0"),
    ],
)
def test_plain_numbers_become_float32(kind: GgmlType, raw: bytes) -> None:
    assert dequantize(raw, kind, (2,)).tolist() == [1.5, -2.0]


def test_a_type_without_conversion_is_refused_by_name() -> None:
    with pytest.raises(ModelRefused, match="Q4_K weights cannot be converted"):
        dequantize(bytes(144), GgmlType.Q4_K, (256,))


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(ModelRefused, match="came with 17 bytes"):
        dequantize(bytes(17), GgmlType.Q4_0, (32,))


@pytest.mark.model
def test_the_default_model_is_read_as_mlx_reads_it(default_model: GgufHeader) -> None:
    """Goal: same names, shapes and numbers as an independent reader, one tensor of each type."""
    mx = pytest.importorskip("mlx.core")
    arrays = mx.load(str(default_model.path))

    for name in ("token_embd.weight", "blk.7.ffn_down.weight", "blk.29.attn_norm.weight"):
        tensor = default_model.tensors[name]
        expected = arrays[name]
        if tensor.type is not GgmlType.F32:
            bits = {GgmlType.Q8_0: 8, GgmlType.Q4_1: 4}[tensor.type]
            prefix = name.removesuffix(".weight")
            scales, biases = (
                arrays[f"{prefix}.{part}"].astype(mx.float32) for part in ("scales", "biases")
            )
            expected = mx.dequantize(expected, scales, biases, group_size=32, bits=bits)
        numbers = dequantize(tensor_bytes(tensor), tensor.type, tensor.shape)
        np.testing.assert_array_equal(numbers, np.array(expected))
    assert len(default_model.tensors) == 272
