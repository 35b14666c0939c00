"""Cuts of a GGUF: layers renumbered, every byte where it belongs, holes for what is not used."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from cut_models import (
    VOCABULARY,
    WIDTH,
    Tensors,
    cut_metadata,
    header_of,
    metadata,
    model,
    raw,
    tensors,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import Value, gguf_header, gguf_tensor, llama_gguf

from swarmpy.errors import ModelRefused
from swarmpy.shards.gguf import GgmlType, GgufHeader, parse_header, read_header
from swarmpy.shards.gguf_cut import (
    UNUSED_ROWS,
    GgufCut,
    Piece,
    cut_layers,
    is_separable,
    layer_count,
    write_cut,
)
from swarmpy.shards.gguf_write import ALIGNMENT

# Tensors ----------------------------------------------------------------------


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_cut_of_all_layers_has_every_tensor_unchanged(tmp_path: Path, is_tied: bool) -> None:
    whole = model(metadata(3), tensors(3, is_tied=is_tied), tmp_path / "x.gguf")

    copy = written(whole, 0, 3, tmp_path / "cut.gguf")

    assert list(copy.tensors) == list(whole.tensors)
    for name, tensor in whole.tensors.items():
        assert copy.tensors[name].shape == tensor.shape
        assert raw(copy.tensors[name]) == raw(tensor)


@pytest.mark.parametrize("is_tied", [False, True])
def test_cuts_hold_each_layer_once_under_its_new_number(tmp_path: Path, is_tied: bool) -> None:
    whole = model(metadata(5), tensors(5, is_tied=is_tied), tmp_path / "x.gguf")

    for start, end in ((0, 2), (2, 3), (3, 5)):
        part = written(whole, start, end, tmp_path / "cut.gguf")
        layers = {name: raw(part.tensors[name]) for name in part.tensors if name[:3] == "blk"}
        assert layers == {
            f"blk.{layer - start}.{short}.weight": raw(whole.tensors[f"blk.{layer}.{short}.weight"])
            for layer in range(start, end)
            for short in ("attn_norm", "ffn_up")
        }


def bytes_from(header: GgufHeader, cut: GgufCut) -> set[str]:
    """The original's tensors whose bytes are in a cut, each whole or not at all."""
    fetched = set()
    for piece in cut.pieces:
        end = piece.source_offset + piece.size_bytes
        inside = [
            tensor
            for tensor in header.tensors.values()
            if piece.source_offset <= tensor.offset < end
        ]
        assert sum(tensor.size_bytes for tensor in inside) == piece.size_bytes
        fetched |= {tensor.name for tensor in inside}
    return fetched


@given(st.integers(1, 12), st.booleans(), st.data())
def test_any_cuts_fetch_each_tensor_once_and_only_shared_ones_more_often(
    layers: int, is_tied: bool, data: st.DataObject
) -> None:
    """Goal: a swarm downloads a model once, not once a shard."""
    whole = model(metadata(layers), tensors(layers, is_tied=is_tied))
    marks = sorted({0, layers, *data.draw(st.lists(st.integers(0, layers), max_size=4))})

    cuts = [cut_layers(whole, *marks[index : index + 2]) for index in range(len(marks) - 1)]

    fetched = [name for cut in cuts for name in sorted(bytes_from(whole, cut))]
    shared = {"rope_freqs.weight"} | ({"token_embd.weight"} if is_tied else set())
    assert set(fetched) == set(whole.tensors)
    assert {name for name in fetched if fetched.count(name) > 1} <= shared


def test_a_shard_in_the_middle_has_a_token_vocabulary_of_holes() -> None:
    cut = cut_layers(model(metadata(3), tensors(3)), 1, 2)

    part = header_of(cut)

    assert part.tensors["token_embd.weight"].shape == (UNUSED_ROWS, WIDTH)
    assert part.tensors["output.weight"].shape == (UNUSED_ROWS, WIDTH)
    assert part.tensors["output.bias"].shape == (UNUSED_ROWS,)
    assert part.integer("llama.vocab_size") == UNUSED_ROWS
    assert cut.fetched_bytes == 4 * (WIDTH + 3 + 5)


def test_the_first_shard_embeds_and_the_last_gives_logits_with_the_whole_vocabulary() -> None:
    whole = model(metadata(2), tensors(2))

    first, last = cut_layers(whole, 0, 1), cut_layers(whole, 1, 2)

    for cut in (first, last):
        part = header_of(cut)
        assert part.integer("llama.vocab_size") == VOCABULARY
        assert part.tensors["token_embd.weight"].shape == (VOCABULARY, WIDTH)
        assert part.tensors["output.weight"].shape == (VOCABULARY, WIDTH)
    assert "token_embd.weight" in bytes_from(whole, first) - bytes_from(whole, last)
    assert "output.weight" in bytes_from(whole, last) - bytes_from(whole, first)


def test_holes_take_no_room_on_disk_and_read_as_zeros(tmp_path: Path) -> None:
    whole = model(metadata(2), tensors(2, vocabulary=50_000), tmp_path / "x.gguf")
    cut = cut_layers(whole, 1, 2)
    target = tmp_path / "cut.gguf"

    write_cut(cut, target)

    status = target.stat()
    assert status.st_size == cut.size_bytes
    assert status.st_blocks * 512 < len(cut.header) + cut.fetched_bytes + 65536 < cut.size_bytes
    assert not any(raw(read_header(target).tensors["token_embd.weight"]))


@pytest.mark.parametrize(("start", "end"), [(0, 2), (1, 3), (3, 5), (0, 5)])
def test_holes_and_pieces_and_header_are_the_whole_file(start: int, end: int) -> None:
    cut = cut_layers(model(metadata(5), tensors(5)), start, end)

    pieces = [(it.target_offset, it.target_offset + it.size_bytes) for it in cut.pieces]
    edges = sorted([(0, len(cut.header)), *pieces, *cut.holes])

    assert [end for _, end in edges[:-1]] == [start for start, _ in edges[1:]]
    assert edges[-1][1] == cut.size_bytes


def test_a_hole_is_said_to_be_of_a_smaller_type_than_the_tensor_was() -> None:
    """Method: float32 rows of 64 become blocks of 32 numbers in 18 bytes."""
    part = header_of(cut_layers(model(metadata(2), tensors(2)), 1, 2))

    assert part.tensors["token_embd.weight"].type is GgmlType.Q4_0
    assert part.tensors["position_embd.weight"].type is GgmlType.F32


def test_tensors_that_follow_each_other_are_fetched_as_one_range() -> None:
    whole = model(
        metadata(4), {**tensors(4), "blk.0.ffn_up.weight": tensors(1)["token_embd.weight"]}
    )

    cut = cut_layers(whole, 0, 1)

    first = whole.tensors["token_embd.weight"]
    size = 2 * first.size_bytes + 4 * WIDTH
    assert cut.pieces[0] == Piece(
        target_offset=len(cut.header),
        source=whole.path,
        source_offset=first.offset,
        size_bytes=size,
    )


def test_tensors_are_aligned_for_the_library_whatever_the_original_says(tmp_path: Path) -> None:
    """Method: tensors of 8 bytes that follow each other, which 32 bytes of alignment tear apart."""
    names = ["token_embd.weight", "blk.0.a.weight", "blk.0.b.weight"]
    shapes = [(1, 2), (2,), (2,)]
    described = [
        gguf_tensor(name, 0, shape, 8 * index)
        for index, (name, shape) in enumerate(zip(names, shapes, strict=True))
    ]
    keys = {"general.architecture": "llama", "llama.block_count": 1, "general.alignment": 8}
    head = gguf_header(keys, described)
    path = tmp_path / "x.gguf"
    path.write_bytes(head + bytes(-len(head) % 8) + struct.pack("<6f", 1, 2, 3, 4, 5, 6))
    whole = read_header(path)

    part = written(whole, 0, 1, tmp_path / "cut.gguf")

    assert part.alignment == ALIGNMENT
    for name in names:
        assert part.tensors[name].offset % ALIGNMENT == 0
        assert raw(part.tensors[name]) == raw(whole.tensors[name])


def test_layers_for_predicting_further_tokens_are_left_out() -> None:
    whole = model(metadata(4, nextn_predict_layers=1, per__layer=[1, 2, 3, 4]), tensors(4))

    part = header_of(cut_layers(whole, 1, 3))

    assert layer_count(whole) == 3
    assert part.integer("llama.nextn_predict_layers") == 0
    assert part.integers("llama.per.layer") == (2, 3)


# Metadata ---------------------------------------------------------------------


def test_the_tokeniser_and_what_is_for_people_stay_behind() -> None:
    part = cut_metadata(2, 0, 1, context_length=512)

    assert part.text("tokenizer.ggml.model") == "none"
    assert part.integer("llama.context_length") == 512
    assert not {"general.name", "tokenizer.ggml.tokens"} & set(part.metadata)


def test_values_keep_the_type_they_had_in_the_file() -> None:
    entries = [
        struct.pack("<Q", len(key)) + key + value
        for key, value in (
            (b"general.architecture", struct.pack("<IQ", 8, 5) + b"llama"),
            (b"llama.block_count", struct.pack("<II", 4, 1)),
            (b"llama.small", struct.pack("<IB", 0, 7)),
            (b"llama.real", struct.pack("<If", 6, 0.1)),
            (b"llama.text", struct.pack("<IQ", 8, 2) + b"\xff\xfe"),
            (b"llama.items", struct.pack("<IIQ1h", 9, 3, 1, -5)),
        )
    ]
    described = [gguf_tensor("token_embd.weight", 0, (8, 8), 0)]
    described.append(gguf_tensor("blk.0.x.weight", 0, (8,), 256))
    data = gguf_header(entries, described)
    data += bytes(-len(data) % 32 + 288)
    whole = parse_header(io.BytesIO(data), path=Path("x.gguf"), file_bytes=len(data))

    part = header_of(cut_layers(whole, 0, 1))

    for key in ("llama.small", "llama.real", "llama.text", "llama.items"):
        assert part.encoded[key] == whole.encoded[key]


def test_arrays_of_an_item_a_layer_are_sliced() -> None:
    part = cut_metadata(
        4,
        1,
        3,
        feed_forward_length=[10, 11, 12, 13],
        flags=[True, False, True, True],
        rope__dimension_sections=[1, 2, 3, 4],
    )

    assert part.integers("llama.feed_forward_length") == (11, 12)
    assert part.metadata["llama.flags"] == (False, True)
    assert part.integers("llama.rope.dimension_sections") == (1, 2, 3, 4)


@pytest.mark.parametrize("items", [[1, 2, 3], [1, 2, 3, 4, 5], [], ["a", "b", "c", "d"]])
def test_an_array_nobody_knows_how_to_slice_is_refused(items: Value) -> None:
    with pytest.raises(ModelRefused, match="how to cut it is not known"):
        cut_metadata(4, 0, 2, odd=items)


@pytest.mark.parametrize(("start", "end", "expected"), [(0, 2, 2), (0, 4, 3), (2, 5, 1), (4, 6, 0)])
def test_leading_dense_layers_are_counted_from_the_shards_start(
    start: int, end: int, expected: int
) -> None:
    part = cut_metadata(6, start, end, leading_dense_block_count=3)

    assert part.integer("llama.leading_dense_block_count") == expected


def test_only_the_first_shard_scales_the_embedding() -> None:
    assert cut_metadata(2, 0, 1, embedding_scale=12.0).number("llama.embedding_scale") == 12.0
    assert cut_metadata(2, 1, 2, embedding_scale=12.0).number("llama.embedding_scale") == 1.0
    assert cut_metadata(2, 1, 2).number("llama.embedding_scale") == 1.0


@pytest.mark.parametrize(
    ("architecture", "own", "expected"),
    [
        ("gemma2", {}, (0, 1, 0, 1)),
        ("gemma3", {}, (1, 1, 0, 1)),
        ("gemma3", {"attention__sliding_window_pattern": 2}, (0, 1, 0, 1)),
        ("gemma3", {"attention__sliding_window_pattern": 0}, (1, 1, 1, 1)),
        ("gemma3", {"attention__sliding_window_pattern": 1}, (0, 0, 0, 0)),
        ("smallthinker", {}, (1, 0, 1, 1)),
        ("gemma3", {"attention__sliding_window_pattern": [0, 1, 1, 1, 0, 0, 0, 1]}, (1, 0, 0, 0)),
    ],
)
def test_which_layers_slide_is_written_out(
    architecture: str, own: Mapping[str, Value], expected: tuple[int, ...]
) -> None:
    """Goal: layer 3 stays layer 3 to the library, which counts windows from layer 0."""
    part = cut_metadata(8, 3, 7, architecture, **own)

    assert part.integers(f"{architecture}.attention.sliding_window_pattern") == expected


def test_an_architecture_without_windows_gets_no_pattern() -> None:
    assert "llama.attention.sliding_window_pattern" not in cut_metadata(2, 0, 1).metadata


# Refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "layers", "start", "end"),
    [
        ("gemma2", 46, 0, 20),
        ("gemma2", 50, 2, 48),
        ("gemma3", 62, 6, 12),
        ("exaone4", 64, 0, 32),
        ("command-r", 64, 0, 32),
        ("deepseek2", 27, 0, 9),
        ("deepseek2", 61, 0, 26),
        ("mistral4", 36, 9, 36),
        ("baichuan", 32, 0, 16),
        ("minicpm3", 5, 0, 2),
    ],
)
def test_a_model_known_by_its_depth_is_not_cut_across_it(
    architecture: str, layers: int, start: int, end: int
) -> None:
    with pytest.raises(ModelRefused, match=r"by their number"):
        cut_metadata(layers, start, end, architecture)
    whole = model(metadata(layers, architecture), tensors(layers))
    assert not is_separable(whole, end - start, layers=layers)


def test_a_model_known_by_its_depth_runs_whole() -> None:
    assert cut_metadata(46, 0, 46, "gemma2").integer("gemma2.block_count") == 46


def test_a_default_that_depends_on_the_depth_is_written_out() -> None:
    """Goal: 2 of 4 layers add with the scale of 4, 1.4 / 2."""
    part = cut_metadata(4, 0, 2, "minicpm")
    stated = cut_metadata(4, 0, 2, "minicpm", residual_scale=0.5)

    assert part.number("minicpm.residual_scale") == pytest.approx(0.7)
    assert stated.number("minicpm.residual_scale") == 0.5


@pytest.mark.parametrize(
    ("layers", "vocabulary", "own", "expected"),
    [
        (27, VOCABULARY, {}, 1),
        (47, VOCABULARY, {}, 1),
        (47, 154_880, {}, 2),
        (47, 154_880, {"expert_gating_func": 1}, 1),
    ],
)
def test_a_part_of_deepseek2_is_told_what_its_depth_would_not_say(
    layers: int, vocabulary: int, own: Mapping[str, Value], expected: int
) -> None:
    """Queries of no low rank, and how experts are chosen."""
    file = {
        **tensors(layers),
        "token_embd.weight": (GgmlType.F16, (vocabulary, 1), bytes(2 * vocabulary)),
    }
    file |= {"blk.0.attn_q.weight": (GgmlType.F32, (2,), bytes(8))}
    del file["output.weight"], file["output.bias"]
    whole = model(metadata(layers, "deepseek2", **own), file)

    part = header_of(cut_layers(whole, 0, 26))

    assert part.integer("deepseek2.attention.q_lora_rank") == 0
    assert part.integer("deepseek2.expert_gating_func") == expected


@pytest.mark.parametrize(
    "key", ["attention.shared_kv_layers", "embedding_length_per_layer_input", "decoder_block_count"]
)
def test_layers_that_need_other_layers_are_refused(key: str) -> None:
    with pytest.raises(ModelRefused, match=f"cannot be cut apart.*{key}"):
        cut_metadata(4, 0, 2, "llama", **{key: 1})

    assert cut_metadata(4, 0, 2, "llama", **{key: 0})


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (0, 0), (2, 1), (0, 5), (4, 5)])
def test_layers_that_are_not_there_are_refused(start: int, end: int) -> None:
    with pytest.raises(ModelRefused, match=r"no layers \[.* of 4"):
        cut_layers(model(metadata(4), tensors(4)), start, end)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"llama.block_count": 3}, "a tensor of layer 3, but 3 layers"),
        ({"llama.block_count": 5}, "layer 4 of 5 has no tensors"),
        ({"llama.block_count": 0}, "0 layers, expected 1 to"),
        ({"llama.block_count": 2**62}, "layers, expected 1 to"),
        ({"llama.block_count": -1}, "-1 layers, expected 1 to"),
        ({"llama.block_count": "4"}, "is str, expected int"),
        ({"llama.nextn_predict_layers": 4}, "4 of 4 layers predict"),
        ({"llama.nextn_predict_layers": -1}, "-1 of 4 layers predict"),
        ({"split.count": 2}, "several files"),
        ({"general.architecture": "qwen2"}, r"no metadata 'qwen2.block_count'"),
    ],
)
def test_metadata_that_contradicts_the_tensors_is_refused(
    changed: Mapping[str, Value], reason: str
) -> None:
    with pytest.raises(ModelRefused, match=reason):
        cut_layers(model({**metadata(4), **changed}, tensors(4)), 0, 2)


@pytest.mark.parametrize("period", [-1, 2**40])
def test_a_window_period_out_of_range_is_refused(period: int) -> None:
    with pytest.raises(ModelRefused, match="with a period of"):
        cut_metadata(4, 0, 2, "gemma3", attention__sliding_window_pattern=period)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("blk.01.attn_norm.weight", (8,), "may not be called"),
        ("blk.x.attn_norm.weight", (8,), "may not be called"),
        ("blk.0", (8,), "may not be called"),
        ("blk.99999.x", (8,), "may not be called"),
        ("blk.0.a b", (8,), "may not be called"),
        ("blk.0.a\0", (8,), "may not be called"),
        ("blk.0." + "a" * 60, (8,), "may not be called"),
        ("blk.0.a", (0,), "is empty"),
        ("token_embd.weight", (8,), "of two dimensions"),
        ("token_embd.weight", (0, 8), "a vocabulary of 0"),
        ("output.weight", (VOCABULARY - 1, WIDTH), "'output.weight' has shape"),
        ("output.bias", (8,), "'output.bias' has shape"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(name: str, shape: tuple[int, ...], reason: str) -> None:
    size = shape[0] * shape[-1] if len(shape) == 2 else shape[0]
    changed: Tensors = {name: (GgmlType.F32, shape, bytes(4 * size))}

    with pytest.raises(ModelRefused, match=reason):
        cut_layers(model(metadata(2), {**tensors(2), **changed}), 0, 1)


def test_a_model_without_an_embedding_is_refused() -> None:
    without = {name: item for name, item in tensors(1).items() if name != "token_embd.weight"}

    with pytest.raises(ModelRefused, match=r"no 'token_embd.weight'"):
        cut_layers(model(metadata(1), without), 0, 1)


VALID = llama_gguf()


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 8000), st.sampled_from([0, 1, 4, 9, 127, 255])),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_any_changed_bytes_give_a_cut_within_the_file_or_are_refused(
    changes: list[tuple[int, int]], start: int, end: int
) -> None:
    """Method: a true header with a few bytes changed; a cut must read back, and fetch no more."""
    data = bytearray(VALID)
    for offset, value in changes:
        data[offset] = value
    try:
        header = parse_header(io.BytesIO(data), path=Path("x.gguf"), file_bytes=len(data))
        cut = cut_layers(header, start, end)
    except ModelRefused:
        return
    part = header_of(cut)
    assert part.integer(f"{part.architecture}.block_count") == end - start
    for piece in cut.pieces:
        assert piece.source_offset + piece.size_bytes <= len(data)
        assert len(cut.header) <= piece.target_offset <= cut.size_bytes - piece.size_bytes
