"""The tokenizers made of a GGUF against llama.cpp's own: the same ids for every text.

The vocabularies are trained here, with merges that cross every edge a text could be cut at, so that
a cut in another place gives other ids. Where our split leaves llama.cpp's on purpose, both get
texts without what the two see differently, and it is shown that they do.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from gguf_architectures import Value
from gguf_vocabularies import (
    NASTY,
    byte_level_metadata,
    phi_metadata,
    random_texts,
    scored_metadata,
    spaced_metadata,
    unigram_metadata,
    write_vocabulary,
)
from llama_tokenizer import LlamaTokens, llama_tokens
from tokenizers import Tokenizer

from swarmpy.errors import ExtensionNotFound
from swarmpy.plugins.llama.library import find_library
from swarmpy.shards.gguf import read_header
from swarmpy.shards.special_tokens import END_TEXTS, end_ids
from swarmpy.shards.text_splits import SPLITS
from swarmpy.shards.tokenizer_files import tokenizer_json


def has_library() -> bool:
    try:
        find_library()
    except ExtensionNotFound:
        return False
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_library(), reason="no llama.cpp library is installed"),
]

TEXTS = [*NASTY, *random_texts(400, seed=2)]


# What llama.cpp sees differently ---------------------------------------------


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def without_marks(text: str) -> str:
    return "".join(letter for letter in text if not unicodedata.category(letter).startswith("M"))


def without_case(text: str) -> str:
    """Without upper-case letters; those that become two are left."""
    return "".join(letter.lower() if len(letter.lower()) == 1 else "i" for letter in text)


def without_foreign_case(text: str) -> str:
    """The same, but ASCII's stay; and without marks."""
    return without_marks(
        "".join(letter if letter.isascii() else without_case(letter) for letter in text)
    )


def with_plain_spaces(text: str) -> str:
    return re.sub(r"[^\S\x00-\x7f]", " ", text)


def with_ascii_digits(text: str) -> str:
    return re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text)


def with_numbers_apart(text: str) -> str:
    """One space at most before a number and a space behind it; without case and marks."""
    apart = re.sub(r"[^\S\r\n]{2,}", " ", without_marks(without_case(text)))
    return re.sub(r"(\d)(?=[^\W\d])", r"\1 ", apart)


def with_plain_han(text: str) -> str:
    """Without the signs of repetition and zero that llama.cpp does not count among Han."""
    return re.sub("[\u3005\u3007]", "", without_marks(without_case(text)))


ALIKE: Mapping[str, Callable[[str], str]] = {
    **dict.fromkeys(("gpt-4o", "kanana2", "llama4", "minimax-m2"), without_foreign_case),
    **dict.fromkeys(("talkie", "tekken"), without_foreign_case),
    **dict.fromkeys(("qwen2", "qwen35"), composed),
    **dict.fromkeys(("deepseek-coder", "deepseek-llm"), with_plain_spaces),
    **dict.fromkeys(("cohere2moe", "tiny_aya"), with_numbers_apart),
    "kimi-k2": with_plain_han,
    "superbpe": with_ascii_digits,
    "youtu": without_case,
}
"""By split, what a text becomes so that llama.cpp reads it as the original tokenizer does."""


# The vocabularies ------------------------------------------------------------


def vocabularies() -> dict[str, dict[str, Value]]:
    """Metadata by name: a split, or another kind of vocabulary."""
    byte_level = byte_level_metadata()
    spaced = spaced_metadata()
    # The library does not know "gpt2" by this name; it is "gpt-2".
    names = [name for name in SPLITS if name != "gpt2"]
    return {
        **{name: {**byte_level, "tokenizer.ggml.pre": name} for name in names},
        "scores": scored_metadata(),
        "scores, no prefix": {**scored_metadata(), "tokenizer.ggml.add_space_prefix": False},
        "scores, with eos": {**scored_metadata(), "tokenizer.ggml.add_eos_token": True},
        "scores, no bos": {**scored_metadata(), "tokenizer.ggml.add_bos_token": False},
        "scores, spaces taken": phi_metadata(),
        "unigram": unigram_metadata(),
        "gemma4": spaced,
        "gemma4 that says no": {**spaced, "tokenizer.ggml.add_bos_token": False},
        "gemma4 by split": {**spaced, **_gpt2("gemma4")},
        "sarvam-moe": {**spaced, **_gpt2("sarvam-moe")},
    }


def _gpt2(pre: str) -> dict[str, Value]:
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}


@dataclass(frozen=True, slots=True)
class Pair:
    """One vocabulary as llama.cpp and as `tokenizers` has it, and the texts both were given."""

    theirs: LlamaTokens
    ours: Tokenizer
    texts: Sequence[str]

    def our_ids(self, text: str) -> list[int]:
        ids: list[int] = self.ours.encode(text, add_special_tokens=False).ids
        return ids

    def differing(self) -> list[str]:
        """The texts that come to other ids, the shortest first."""
        pairs = zip(self.texts, self.theirs.ids, strict=True)
        return sorted((text for text, ids in pairs if self.our_ids(text) != ids), key=len)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocabularies")
    return {
        name: write_vocabulary(folder / f"{name}.gguf", metadata)
        for name, metadata in vocabularies().items()
    }


@pytest.fixture(scope="module")
def pairs(paths: dict[str, Path]) -> dict[str, Pair]:
    """Every vocabulary, with texts that both see alike; fewer for a second name of a split."""
    firsts = {id(split): name for name, split in reversed(SPLITS.items())}
    seconds = SPLITS.keys() - firsts.values()
    return paired(
        paths,
        {
            name: [
                ALIKE.get(name, str)(text)
                for text in TEXTS[: len(NASTY) + 60 if name in seconds else None]
            ]
            for name in paths
        },
    )


def paired(paths: Mapping[str, Path], texts: Mapping[str, Sequence[str]]) -> dict[str, Pair]:
    answers = llama_tokens([(paths[name], texts[name]) for name in texts])
    return {
        name: Pair(theirs, loaded(paths[name]), texts[name])
        for name, theirs in zip(texts, answers, strict=True)
    }


def loaded(path: Path) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(read_header(path))))


NAMES = list(vocabularies())


# The same ids ----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_text_comes_to_llama_cpps_ids(pairs: dict[str, Pair], name: str) -> None:
    assert pairs[name].differing() == []


def test_what_is_taken_out_of_texts_is_what_llama_cpp_sees_differently(
    paths: dict[str, Path],
) -> None:
    """An exception that is not needed any more is to go."""
    for name, pair in paired(paths, dict.fromkeys(ALIKE, TEXTS)).items():
        assert pair.differing(), name


def test_the_texts_tell_every_split_from_every_other(pairs: dict[str, Pair]) -> None:
    """Else equal ids would prove little. Splits that differ in nothing but bos are one."""
    names_by_ids: dict[str, list[str]] = {}
    for name in sorted(SPLITS.keys() & pairs.keys()):
        ids = [pairs[name].our_ids(text) for text in TEXTS]
        names_by_ids.setdefault(json.dumps(ids), []).append(name)

    for alike in names_by_ids.values():
        first, *others = (SPLITS[name] for name in alike)
        assert all(
            (split.steps, split.takes_whole_words) == (first.steps, first.takes_whole_words)
            for split in others
        ), alike


@pytest.mark.parametrize("name", NAMES)
def test_what_a_vocabulary_adds_to_a_text_is_added(pairs: dict[str, Pair], name: str) -> None:
    assert pairs[name].ours.encode("x").ids == pairs[name].theirs.begun


@pytest.mark.parametrize("name", ["gpt-2", "scores", "scores, no prefix", "unigram", "gemma4"])
def test_ids_become_the_text_of_llama_cpps_pieces(pairs: dict[str, Pair], name: str) -> None:
    """A decoder leaves out the space that a vocabulary puts before a text."""
    pair = pairs[name]
    has_prefix = name in ("scores", "unigram")
    for ids in pair.theirs.ids:
        expected = b"".join(pair.theirs.pieces[token_id] for token_id in ids).decode()
        if has_prefix:
            expected = expected.removeprefix(" ")
        assert pair.ours.decode(ids) == expected


# The end of a reply ----------------------------------------------------------

SPECIAL_TEXTS = """
    <|eot_id|> <|eom_id|> <|begin_of_text|> <|start_header_id|> <|im_start|> <|im_end|> <|end|>
    <|user|> <|assistant|> <|system|> <|endoftext|> <|end_of_text|> <|startoftext|> <s> </s> <bos>
    <eos> <pad> <unk> <start_of_turn> <end_of_turn> <|turn> <turn|> <|tool_response> <EOT> _<EOT>
    [EOT] [EOS] [BOS] [PAD] [INST] [/INST] <PAD> <MASK> <end_of_utterance> <|return|> <|call|>
    <|calls|> <|flush|> <|channel|> <|message|> <|start|> <|fim_prefix|> <|fim_suffix|>
    <|fim_middle|> <|fim_pad|> <|fim_repo|> <|file_sep|> <|repo_name|> <reponame> <file_sep>
    <fim-pad> <fim_pad> <fim-repo> <REPO> <|prefix|> <|suffix|> <think> </think> [e~[ ]~b]
    <|plamo:eos|> <|plamo:file_separator|> <|ifm|im_end|> <|ifm|im_start|> <|END_OF_TURN_TOKEN|>
    <|User|> <|Assistant|> <end_of_image> <|eos|> <|eod|> <|observation|> <|diff_marker|>
    <\uff5cend\u2581of\u2581sentence\uff5c> <\uff5cbegin\u2581of\u2581sentence\uff5c>
    <\uff5cUser\uff5c>
"""
"""Well-known ones, of which some end a reply."""

END_CASES: dict[str, dict[str, Value]] = {
    **{text: {"tokens": [text]} for text in SPECIAL_TEXTS.split()},
    "several": {"tokens": ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "</s>", "<|im_start|>"]},
    "messages": {"tokens": ["<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>"]},
    "messages by id": {"tokens": ["<|end|>", "<|return|>", "<|call|>"], "eot": 0},
    "one of a pair": {"tokens": ["<|end|>", "<|return|>"]},
    "other messages": {"tokens": ["<|end|>", "<|calls|>", "<|flush|>"]},
    "a tag": {"tokens": ["</s>", "<turn|>", "<|tool_response>"]},
    "by id": {"tokens": ["a1", "b1", "c1", "d1"], "eot": 1, "eom": 2},
    "code by id": {"tokens": ["a1", "b1", "c1", "<|fim_pad|>"], "fim_pad": 1, "fim_sep": 2},
}


def end_metadata(tokens: Sequence[str], **ids: int) -> dict[str, Value]:
    """The tokens first, as plain ones, then the one that is named as eos."""
    base = byte_level_metadata()
    old = base["tokenizer.ggml.tokens"]
    assert isinstance(old, Sequence)
    return {
        **base,
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, *old[1:]],
        "tokenizer.ggml.token_type": [1] * (len(tokens) + len(old) - 1),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        **{f"tokenizer.ggml.{role}_token_id": token_id for role, token_id in ids.items()},
    }


@pytest.fixture(scope="module")
def end_pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, LlamaTokens]]:
    folder = tmp_path_factory.mktemp("ends")
    paths = {
        name: write_vocabulary(folder / f"{number}.gguf", end_metadata(**case))
        for number, (name, case) in enumerate(END_CASES.items())
    }
    answers = llama_tokens([(path, []) for path in paths.values()])
    return {name: (paths[name], theirs) for name, theirs in zip(paths, answers, strict=True)}


def test_every_text_that_ends_a_reply_is_tried() -> None:
    assert not END_TEXTS - END_CASES.keys()


@pytest.mark.parametrize("name", END_CASES)
def test_a_reply_ends_at_llama_cpps_tokens(
    end_pairs: dict[str, tuple[Path, LlamaTokens]], name: str
) -> None:
    path, theirs = end_pairs[name]

    assert sorted(end_ids(read_header(path))) == theirs.end_ids
