"""A GGUF's tokenizer files: the tokenizers library loads them; unknown vocabularies are refused."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import Value, byte_letters, gguf_bytes, vocabulary
from tokenizers import Tokenizer

from swarmpy.errors import ModelRefused
from swarmpy.shards import vocabularies
from swarmpy.shards.gguf import GgufHeader, parse_header
from swarmpy.shards.special_tokens import end_ids
from swarmpy.shards.text_splits import SPLITS
from swarmpy.shards.tokenizer_files import tokenizer_config, tokenizer_json


def header_of(metadata: Mapping[str, Value]) -> GgufHeader:
    base = {"general.architecture": "llama", "llama.context_length": 512}
    data = gguf_bytes({**base, **metadata}, {})
    return parse_header(io.BytesIO(data), path=Path("x.gguf"), file_bytes=len(data))


def load(header: GgufHeader) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(header)))


SMALL = load(header_of(vocabulary()))


@given(st.text(max_size=40))
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    assert SMALL.decode(SMALL.encode(text).ids, skip_special_tokens=False) == text


def test_merges_are_applied_and_special_tokens_found() -> None:
    assert SMALL.encode("<|start|>hello<|end|>").tokens == ["<|start|>", "hello", "<|end|>"]


def test_special_tokens_can_be_read_as_plain_text() -> None:
    """What a user types must not end a turn."""
    tokenizer = load(header_of(vocabulary()))
    tokenizer.encode_special_tokens = True

    assert 1 not in tokenizer.encode("<|end|>").ids


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "hello 1234", ["hello", "Ġ1234"]),
        ("smollm", "hello 1234", ["hello", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", "HELLO'LL 1234!\n\nx", ["HELLO", "'LL", "Ġ", "123", "4", "!ĊĊ", "x"]),
        ("qwen2", "hello 1234", ["hello", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_text_is_split_as_the_vocabulary_was_trained(pre: str, text: str, words: list[str]) -> None:
    splitter = load(header_of(vocabulary(pre))).pre_tokenizer

    assert [word for word, _ in splitter.pre_tokenize_str(text)] == words


@pytest.mark.parametrize(("pre", "count"), [("llama-bpe", 1), ("smollm", 5)])
def test_only_some_vocabularies_take_a_word_that_no_merge_makes(pre: str, count: int) -> None:
    tokenizer = load(header_of(vocabulary(pre) | {"tokenizer.ggml.merges": []}))

    assert len(tokenizer.encode("hello", add_special_tokens=False).ids) == count


@pytest.mark.parametrize(("pre", "is_composed"), [("qwen2", True), ("smollm", False)])
def test_only_some_vocabularies_compose_characters_first(pre: str, is_composed: bool) -> None:
    tokenizer = load(header_of(vocabulary(pre)))

    assert (tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids) is is_composed


def test_a_vocabulary_that_begins_texts_with_its_bos_token_does_so() -> None:
    tokenizer = load(header_of(vocabulary("llama-bpe")))

    assert tokenizer.encode("hello").tokens == ["<|start|>", "hello"]
    assert tokenizer.encode("hello", add_special_tokens=False).tokens == ["hello"]


def test_the_file_decides_whether_texts_begin_with_bos() -> None:
    metadata = vocabulary("llama-bpe") | {"tokenizer.ggml.add_bos_token": False}

    assert load(header_of(metadata)).encode("hello").tokens == ["hello"]


def test_the_configuration_names_special_tokens_and_template() -> None:
    assert tokenizer_config(header_of(vocabulary())) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }


def scored() -> dict[str, Value]:
    """Metadata of a SentencePiece vocabulary: "<unk>", bos, eos, bytes, and words of a and b."""
    pieces = ["\u2581", "a", "b", "\u2581a", "ab", "\u2581ab", "aba"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-50.0, -51.0, -52.0, -1.0, -2.0, -3.0, -4.0],
    }


def test_pieces_are_joined_in_the_order_of_their_scores() -> None:
    tokenizer = load(header_of(scored()))

    assert tokenizer.encode("aba").tokens == ["<s>", "\u2581ab", "a"]
    assert tokenizer.encode("b aba", add_special_tokens=False).tokens == [
        "\u2581",
        "b",
        "\u2581ab",
        "a",
    ]


def test_a_character_that_is_no_piece_becomes_its_bytes_and_comes_back() -> None:
    tokenizer = load(header_of(scored()))
    ids = tokenizer.encode("a\u00e9").ids

    assert tokenizer.encode("a\u00e9").tokens == ["<s>", "\u2581a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "a\u00e9"


def test_a_vocabulary_of_scores_has_the_formats_own_bos_eos_and_unknown() -> None:
    config = tokenizer_config(header_of(scored()))

    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<s>",
        "</s>",
        "<unk>",
    )


def test_templates_with_names_are_listed_beside_the_default_one() -> None:
    metadata = vocabulary() | {"tokenizer.chat_template.tool_use": "tools"}

    assert tokenizer_config(header_of(metadata))["chat_template"] == [
        {"name": "default", "template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
        {"name": "tool_use", "template": "tools"},
    ]


def test_only_a_model_that_was_trained_so_loses_spaces_after_special_tokens() -> None:
    metadata = vocabulary() | {"general.name": "Phi-3 mini"}

    assert load(header_of(metadata)).encode("<|end|>\n hello").ids == [1, 261]
    assert load(header_of(vocabulary())).encode("<|end|>\n hello").ids != [1, 261]


def test_a_token_without_text_is_no_obstacle() -> None:
    metadata = vocabulary()
    tokens = [*metadata["tokenizer.ggml.tokens"], ""]  # type: ignore[misc]
    metadata |= {"tokenizer.ggml.tokens": tokens}
    metadata |= {"tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2)}

    assert load(header_of(metadata)).id_to_token(262) == "[EMPTY_262]"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' cannot be converted"),
        ({"tokenizer.ggml.pre": "afmoe"}, "text splitting 'afmoe' is unknown"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "in the vocabulary twice"),
        ({"tokenizer.ggml.tokens": [["a"], ["b"]]}, "expected array of str"),
        ({"tokenizer.ggml.tokens": []}, "0 tokens but 262 types"),
        ({"tokenizer.ggml.token_type": [1]}, "262 tokens but 1 types"),
        ({"tokenizer.ggml.token_type": [1.5] * 262}, "expected array of int"),
        ({"tokenizer.ggml.merges": ["h z"]}, "merge 'h z' is not of known tokens"),
        ({"tokenizer.ggml.merges": ["hello"]}, "merge 'hello' is not of known tokens"),
        ({"tokenizer.ggml.merges": [" hello"]}, "merge ' hello' is not of known tokens"),
        ({"tokenizer.ggml.merges": [""]}, "merge '' is not of known tokens"),
        ({"tokenizer.ggml.merges": [["h", "e"]]}, "expected array of str"),
        ({"tokenizer.ggml.bos_token_id": 262}, "bos_token_id is 262, there are 262 tokens"),
        ({"tokenizer.ggml.bos_token_id": -1}, "bos_token_id is -1"),
        ({"tokenizer.ggml.eos_token_id": 1 << 40}, "eos_token_id is 1099511627776"),
    ],
)
def test_a_vocabulary_that_would_be_converted_wrongly_is_refused(
    change: dict[str, Value], reason: str
) -> None:
    with pytest.raises(ModelRefused, match=reason):
        tokenizer_json(header_of(vocabulary() | change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.scores": [0.0]}, "266 tokens but 1 scores"),
        ({"tokenizer.ggml.scores": ["0"] * 266}, "expected array of float"),
        ({"tokenizer.ggml.scores": [0.0] * 265 + [math.nan]}, "no finite number"),
        ({"tokenizer.ggml.scores": [0.0] * 265 + [-math.inf]}, "no finite number"),
        ({"tokenizer.ggml.scores": [-1000] * 266}, "have the same score"),
        ({"tokenizer.ggml.unknown_token_id": 266}, "unknown_token_id is 266"),
        ({"tokenizer.ggml.add_space_prefix": 1}, "expected bool"),
    ],
)
def test_scores_that_say_no_order_are_refused(change: dict[str, Value], reason: str) -> None:
    with pytest.raises(ModelRefused, match=reason):
        tokenizer_json(header_of(scored() | change))


def with_piece(piece: str) -> dict[str, Value]:
    """The scored vocabulary with one more piece."""
    metadata = scored()
    tokens, types, scores = (
        list(metadata[f"tokenizer.ggml.{key}"])  # type: ignore[arg-type]
        for key in ("tokens", "token_type", "scores")
    )
    return metadata | {
        "tokenizer.ggml.tokens": [*tokens, piece],
        "tokenizer.ggml.token_type": [*types, 1],
        "tokenizer.ggml.scores": [*scores, -9.0],
    }


def test_a_piece_of_a_character_that_is_no_piece_is_refused() -> None:
    """SentencePiece would join it; the tokenizers library sees bytes there."""
    with pytest.raises(ModelRefused, match="token 'ax' has a character that is no token"):
        tokenizer_json(header_of(with_piece("ax")))


def test_a_piece_that_would_take_long_to_cut_is_refused() -> None:
    with pytest.raises(ModelRefused, match="a token has 1000 characters"):
        tokenizer_json(header_of(with_piece("a" * 1000)))


def test_pieces_that_cut_in_too_many_ways_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabularies, "MERGES_MAX", 4)

    with pytest.raises(ModelRefused, match="more than 4 merges"):
        tokenizer_json(header_of(scored()))


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("TOKENS_MAX", "262 tokens, at most 4 are read"),
        ("TOKENS_CHARS_MAX", "[0-9]+ characters of tokens, at most 4 are read"),
        ("MERGES_MAX", "[0-9]+ merges, at most 4 are read"),
    ],
)
def test_a_vocabulary_that_would_take_long_to_read_is_refused(
    limit: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabularies, limit, 4)
    metadata = vocabulary() | {"tokenizer.ggml.merges": ["h e"] * 5}

    with pytest.raises(ModelRefused, match=reason):
        tokenizer_json(header_of(metadata))


def test_more_special_tokens_than_can_be_looked_for_are_refused() -> None:
    count = vocabularies.ADDED_TOKENS_MAX + 1
    metadata = vocabulary() | {
        "tokenizer.ggml.tokens": [f"<{index}>" for index in range(count)],
        "tokenizer.ggml.token_type": [3] * count,
    }

    with pytest.raises(ModelRefused, match="65537 special tokens, at most 65536"):
        tokenizer_json(header_of(metadata))


def test_a_text_that_ends_replies_is_a_special_token_whatever_its_type() -> None:
    """Else a user's text could end the reply, and the model's own end would be shown."""
    metadata = vocabulary() | {"tokenizer.ggml.token_type": [1] * 262}

    added = load(header_of(metadata)).get_added_tokens_decoder()

    assert {token_id: token.special for token_id, token in added.items()} == {1: True}


def test_a_file_may_name_several_end_tokens() -> None:
    header = header_of(vocabulary() | {"tokenizer.ggml.eos_token_ids": [0, 5]})

    assert end_ids(header) == {0, 1, 5}


def test_an_end_token_is_one_of_the_tokens_though_two_have_the_same_text() -> None:
    header = header_of(vocabulary())
    twice = [*header.texts("tokenizer.ggml.tokens"), "x", "x"]
    named = {"tokenizer.ggml.tokens": twice, "tokenizer.ggml.eos_token_ids": [len(twice) - 1]}

    assert len(twice) - 1 in end_ids(header_of(vocabulary() | named))


@pytest.mark.parametrize("ids", [[262], [-1]])
def test_an_end_token_outside_the_vocabulary_is_refused(ids: list[int]) -> None:
    with pytest.raises(ModelRefused, match="out of range"):
        end_ids(header_of(vocabulary() | {"tokenizer.ggml.eos_token_ids": ids}))


def test_every_split_stands_in_the_spec() -> None:
    spec = Path(__file__).parents[2] / "protocols" / "manifest.md"
    text = spec.read_text(encoding="utf-8")

    assert [name for name in SPLITS if f"`{name}`" not in text] == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "name", sorted({id(split): name for name, split in SPLITS.items()}.values())
)
def test_a_long_run_of_anything_is_cut_in_linear_time(name: str) -> None:
    """A pattern that looks far ahead from each place would take hours for what a user may send.

    Method: runs that take a second, and with a quadratic pattern minutes.
    """
    splitter = load(header_of(vocabulary(name))).pre_tokenizer

    for unit in " aA1\u0661.\n'\u4e2d\u0301\u3000":
        text = unit * 50_000 + "x1"
        words = splitter.pre_tokenize_str(text)
        assert sum(end - start for _, (start, end) in words) == len(text)


def test_a_missing_word_on_how_to_split_text_is_refused() -> None:
    metadata = vocabulary()
    del metadata["tokenizer.ggml.pre"]

    with pytest.raises(ModelRefused, match=r"no metadata 'tokenizer.ggml.pre'"):
        tokenizer_json(header_of(metadata))


# The default model -----------------------------------------------------------

TEXTS = [
    "The capital of France is Paris.",
    "  leading, trailing and   inner spaces  ",
    "tabs\tand\nlines\r\n\n\nend",
    "1234567890 3.14159 1,000,000 0x1F",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # comment",
    "naïve café œuvre Straße ÅÄÖ",
    "日本語のテキスト 中文文本 한국어",
    "Привет, мир! مرحبا بالعالم שלום",
    "🦙🔥👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 vs \u00e9, \u00a0nbsp, \u200bzero width, \ufeffbom",
    "can't won't I'll they've HE'S",
    "",
]


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_the_default_model_gives_every_text_back(default_model: GgufHeader, text: str) -> None:
    tokenizer = load(default_model)

    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.model
def test_the_default_model_gives_any_text_of_known_bytes_back(default_model: GgufHeader) -> None:
    """Its vocabulary was trained without a few rare bytes (lead bytes of unassigned planes)."""
    tokenizer = load(default_model)
    known = {byte for byte, letter in enumerate(byte_letters()) if tokenizer.token_to_id(letter)}

    @settings(max_examples=200)
    @given(st.text(max_size=60).filter(lambda text: known.issuperset(text.encode())))
    def round_trip(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text

    round_trip()


@pytest.mark.model
def test_the_default_models_chat_template_gives_the_known_prompt(
    default_model: GgufHeader,
) -> None:
    """Ids as published for this model's prompt: the system turn it adds, then the user's."""
    jinja2_sandbox = pytest.importorskip("jinja2.sandbox")
    template = tokenizer_config(default_model)["chat_template"]
    prompt = (
        jinja2_sandbox.ImmutableSandboxedEnvironment()
        .from_string(template)
        .render(messages=[{"role": "user", "content": "Hi 12"}], add_generation_prompt=True)
    )

    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n"
    )
    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018]
    system += [411, 407, 19712, 8182, 2, 198]
    user = [1, 4093, 198, 26843, 216, 33, 34, 2, 198, 1, 520, 9531, 198]
    assert load(default_model).encode(prompt).ids == system + user
