"""A GGUF's tokenizer files: the tokenizers library loads them; unknown vocabularies are refused."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import Value, byte_letters, gguf_bytes, vocabulary
from tokenizers import Tokenizer

from swarmpy.errors import ModelRefused
from swarmpy.shards.gguf import GgufHeader, parse_header
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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama' cannot be converted"),
        ({"tokenizer.ggml.pre": "tekken"}, "text splitting 'tekken' is unknown"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "in the vocabulary twice"),
        ({"tokenizer.ggml.token_type": [1]}, "262 tokens but 1 types"),
        ({"tokenizer.ggml.merges": ["h z"]}, "merge 'h z' is not of known tokens"),
        ({"tokenizer.ggml.merges": ["hello"]}, "merge 'hello' is not of known tokens"),
        ({"tokenizer.ggml.bos_token_id": 262}, "bos_token_id is 262, there are 262 tokens"),
        ({"tokenizer.ggml.bos_token_id": -1}, "bos_token_id is -1"),
    ],
)
def test_a_vocabulary_that_would_be_converted_wrongly_is_refused(
    change: dict[str, Value], reason: str
) -> None:
    with pytest.raises(ModelRefused, match=reason):
        tokenizer_json(header_of(vocabulary() | change))


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
