"""Token ids from text and text from token ids: special tokens, whole characters, stop texts."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scripted_node import byte_tokenizer, ids_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from swarmpy.errors import ModelRefused
from swarmpy.plugins.gateway.errors import RequestRefused
from swarmpy.plugins.gateway.text import StopTexts, TextCodec, TextStream, Written

CODEC = TextCodec(byte_tokenizer().to_str(), random.Random(1))


def template(text: str) -> Written:
    return Written(text, by_template=True)


def user(text: str) -> Written:
    return Written(text, by_template=False)


# Special tokens -------------------------------------------------------------------


def test_a_special_token_of_the_template_is_one_token() -> None:
    assert CODEC.encode([template("<|im_start|>")]) == [1]


def test_a_special_token_in_a_users_text_is_its_letters() -> None:
    ids = CODEC.encode([user("<|im_start|>")])
    assert len(ids) == len("<|im_start|>")
    assert CODEC.decode(ids) == "<|im_start|>"


def test_a_special_token_of_both_halves_is_text() -> None:
    ids = CODEC.encode([template("<|im_"), user("start|>")])
    assert CODEC.decode(ids) == "<|im_start|>"


@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_", "end|>", "x", "\n", "é"])))
def test_any_users_text_gives_no_special_token(parts: list[str]) -> None:
    text = "".join(parts)
    ids = CODEC.encode([template("<|im_start|>"), user(text), template("<|im_end|>")])
    assert (ids[0], ids[-1]) == (1, 2)
    assert not {0, 1, 2} & set(ids[1:-1])
    assert CODEC.decode(ids) == text


@given(st.text())
def test_any_ordinary_text_gives_the_tokenizers_own_ids(text: str) -> None:
    whole = f"<|im_start|>{text}<|im_end|>\n"
    ids = CODEC.encode([template("<|im_start|>"), user(text), template("<|im_end|>\n")])
    assert ids == byte_tokenizer().encode(whole, add_special_tokens=False).ids


def greedy_tokenizer() -> Tokenizer:
    """A vocabulary that makes its special token of plain letters, as ignore_merges can."""
    letters = {text: index for index, text in enumerate("</s>ab")}
    bpe = models.BPE(vocab={**letters, "</s>": 6}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return tokenizer


def test_a_vocabulary_that_merges_text_into_a_special_token_is_kept_from_it() -> None:
    codec = TextCodec(greedy_tokenizer().to_str(), random.Random(1))
    assert codec.encode([user("</s>"), template("</s>")]) == [0, 1, 2, 3, 6]


def test_a_text_that_cannot_be_kept_apart_is_refused() -> None:
    bpe = models.BPE(vocab={"X": 0}, merges=[])
    tokenizer = Tokenizer(bpe)
    tokenizer.add_special_tokens([AddedToken("X", special=True, normalized=False)])
    codec = TextCodec(tokenizer.to_str(), random.Random(1))
    with pytest.raises(RequestRefused) as caught:
        codec.encode([user("X")])
    assert caught.value.refusal.status == 400


def test_space_around_a_special_token_is_treated_as_the_tokenizer_does() -> None:
    """Phi's <|end|> takes the space after it along."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, rstrip=True)])
    codec = TextCodec(tokenizer.to_str(), random.Random(1))
    whole = tokenizer.encode("a<|end|> \n b", add_special_tokens=False).ids
    assert codec.encode([template("a<|end|> \n b")]) == whole


def test_truncation_and_padding_in_a_tokenizers_file_are_ignored() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=2)
    assert len(TextCodec(tokenizer.to_str(), random.Random(1)).encode([user("abc")])) == 3


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": {"type": "Nothing"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(ModelRefused, match=r"tokenizer\.json"):
        TextCodec(text, random.Random(1))


# Streaming ------------------------------------------------------------------------


@given(st.text())
def test_any_reply_streams_to_its_own_text(text: str) -> None:
    stream = TextStream(CODEC)
    assert "".join(map(stream.push, ids_of(text))) + stream.finish() == text


@given(st.text(min_size=1))
def test_any_reply_streams_without_half_characters(text: str) -> None:
    stream = TextStream(CODEC)
    pieces = [*map(stream.push, ids_of(text)), stream.finish()]
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


@given(st.lists(st.integers(3, 258)))
def test_any_tokens_at_all_stream(ids: list[int]) -> None:
    stream = TextStream(CODEC)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert all(isinstance(piece, str) for piece in pieces)


def test_bytes_that_are_no_character_are_not_held_back_for_ever() -> None:
    broken = ids_of("\u00ff")[0]
    stream = TextStream(CODEC)
    assert any(stream.push(broken) for _ in range(20))


def test_special_tokens_are_not_shown() -> None:
    stream = TextStream(CODEC)
    assert "".join(map(stream.push, [1, *ids_of("a"), 2])) + stream.finish() == "a"


def test_a_decoder_that_treats_a_texts_start_apart_keeps_the_spaces_between_words() -> None:
    vocabulary = {"<unk>": 0, "\u2581a": 1, "\u2581b": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    stream = TextStream(TextCodec(tokenizer.to_str(), random.Random(1)))
    assert [stream.push(1), stream.push(2), stream.push(1)] == ["a", " b", " a"]


def test_characters_of_byte_tokens_come_whole() -> None:
    vocabulary = {"<unk>": 0, "a": 1} | {f"<0x{b:02X}>": 2 + b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = TextStream(TextCodec(tokenizer.to_str(), random.Random(1)))
    ids = [1, *(2 + byte for byte in "€😀".encode()), 1]
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == ["a", "€", "😀", "a"]


# Stop texts -----------------------------------------------------------------------


def test_a_stop_text_over_several_pieces_is_cut() -> None:
    stops = StopTexts(["STOP"])
    assert [stops.push(piece) for piece in ("a S", "T", "OP b")] == ["a ", "", ""]
    assert stops.is_found


def test_what_only_began_like_a_stop_text_is_shown() -> None:
    stops = StopTexts(["STOP"])
    assert [stops.push("a ST"), stops.push("AR")] == ["a ", "STAR"]
    assert stops.push("S") + stops.finish() == "S"


@example(pieces=["b", "a", "a"], texts=["a", "baa"])
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
)
def test_any_pieces_are_cut_where_the_whole_would_be(pieces: list[str], texts: list[str]) -> None:
    stops = StopTexts(texts)
    shown = "".join(map(stops.push, pieces)) + stops.finish()
    whole = "".join(pieces)
    ends = [(whole.find(text) + len(text), whole.find(text)) for text in texts if text in whole]
    assert shown == (whole[: min(ends)[1]] if ends else whole)
    assert stops.is_found == bool(ends)


# Hostile tokenizers -----------------------------------------------------------------


def test_a_tokenizer_that_panics_as_it_is_read_is_refused() -> None:
    """A panic of Rust is no Exception: uncaught it would end the node."""
    files = json.loads(byte_tokenizer().to_str())
    files["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}

    with pytest.raises(ModelRefused, match="charsmap"):
        TextCodec(json.dumps(files), random.Random(1))


def test_a_tokenizer_that_panics_on_a_text_is_refused() -> None:
    files = json.loads(byte_tokenizer().to_str())
    files["normalizer"] = {"type": "Prepend", "prepend": ""}
    codec = TextCodec(json.dumps(files), random.Random(1))

    with pytest.raises(ModelRefused, match="out of bounds"):
        codec.encode([user("Hello")])
