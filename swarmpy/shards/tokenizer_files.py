"""A GGUF's vocabulary as tokenizer.json and tokenizer_config.json.

Three kinds are converted: byte-level BPE, SentencePiece's with scores, and Gemma 4's, which is BPE
over text with spaces as characters. A wrong split gives other tokens, and so a silently wrong
model: anything else is refused by name.
Spec: protocols/manifest.md, section 4; the file formats are Hugging Face's and llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from swarmpy.errors import ModelRefused
from swarmpy.shards.gguf import GgufHeader
from swarmpy.shards.special_tokens import special_token_id
from swarmpy.shards.text_splits import SPLITS, Step, byte_level, cut_at
from swarmpy.shards.vocabularies import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Merge,
    Vocabulary,
    listed_merges,
    read_vocabulary,
    scored_merges,
)

_SPACE = "\u2581"
"""What stands for a space in vocabularies that are not byte-level."""

_SPACED_BPE = frozenset({"gemma4", "sarvam-moe"})
"""`tokenizer.ggml.pre` of BPE vocabularies that are not byte-level."""

_TEMPLATE = "tokenizer.chat_template"


def tokenizer_json(header: GgufHeader) -> dict[str, object]:
    """Return the contents of tokenizer.json for a GGUF's vocabulary.

    Raises:
        ModelRefused: The vocabulary is of another kind or split, or contradicts itself.
    """
    kind = _kind(header)
    vocabulary = read_vocabulary(header)
    match kind:
        case "llama":
            parts = _scored(header, vocabulary)
        case "gemma4":
            parts = _spaced(header, vocabulary)
        case _:
            parts = _byte_level(header, vocabulary)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(header, vocabulary)),
        "post_processor": _post_processor(header, vocabulary),
        **parts,
    }


def tokenizer_config(header: GgufHeader) -> dict[str, object]:
    """Return the contents of tokenizer_config.json: special tokens, templates, context length.

    Raises:
        ModelRefused: As for `tokenizer_json`, or a special token lies outside the vocabulary.
    """
    tokens = header.texts("tokenizer.ggml.tokens")
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(header),
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.integer(f"{header.architecture}.context_length"),
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = special_token_id(header, theirs)
        if token_id is not None:
            config[f"{ours}_token"] = tokens[token_id]
    template = header.text(_TEMPLATE, "")
    named = [
        {"name": key.removeprefix(f"{_TEMPLATE}."), "template": header.text(key)}
        for key in header.metadata
        if key.startswith(f"{_TEMPLATE}.")
    ]
    if named:
        default = [{"name": "default", "template": template}] if template else []
        config["chat_template"] = default + named
    elif template:
        config["chat_template"] = template
    return config


def _kind(header: GgufHeader) -> str:
    """How the vocabulary works: "gpt2" (byte-level BPE), "llama" (scores) or "gemma4"."""
    model = header.text("tokenizer.ggml.model")
    if model not in ("gpt2", "llama", "gemma4"):
        raise ModelRefused(
            f"{header.path.name}: tokenizer {model!r:.40} cannot be converted (only 'gpt2', "
            "'llama' and 'gemma4'); use the model's safetensors folder"
        )
    if model != "gpt2":
        return model
    pre = header.text("tokenizer.ggml.pre")
    if pre in _SPACED_BPE:
        return "gemma4"
    if pre not in SPLITS:
        raise ModelRefused(
            f"{header.path.name}: text splitting {pre!r:.40} is unknown (known: "
            f"{', '.join(sorted(SPLITS))}); use the model's safetensors folder"
        )
    return model


def _byte_level(header: GgufHeader, vocabulary: Vocabulary) -> dict[str, object]:
    split = SPLITS[header.text("tokenizer.ggml.pre")]
    return {
        "normalizer": {"type": "NFC"} if split.is_composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(split.steps)},
        "decoder": byte_level(use_regex=True),
        "model": _bpe(
            vocabulary, listed_merges(header, vocabulary), takes_whole_words=split.takes_whole_words
        ),
    }


def _scored(header: GgufHeader, vocabulary: Vocabulary) -> dict[str, object]:
    """SentencePiece's: text after a special token begins with a space, as llama.cpp has it too."""
    has_prefix = header.flag("tokenizer.ggml.add_space_prefix", True)
    prefix: list[Step] = [{"type": "Prepend", "prepend": _SPACE}] if has_prefix else []
    strip: list[Step] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, _replace(" ", _SPACE)]},
        "pre_tokenizer": None,
        "decoder": _spaced_decoder(*(strip if has_prefix else [])),
        "model": _bpe(
            vocabulary,
            scored_merges(header, vocabulary),
            unknown=special_token_id(header, "unknown"),
            falls_back_to_bytes=True,
        ),
    }


def _spaced(header: GgufHeader, vocabulary: Vocabulary) -> dict[str, object]:
    return {
        "normalizer": _replace(" ", _SPACE),
        "pre_tokenizer": cut_at(r"[^\n]+|[\n]+"),
        "decoder": _spaced_decoder(),
        "model": _bpe(
            vocabulary,
            listed_merges(header, vocabulary),
            unknown=special_token_id(header, "unknown"),
            falls_back_to_bytes=True,
        ),
    }


def _replace(old: str, new: str) -> Step:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _spaced_decoder(*more: Step) -> Step:
    steps = [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *more]
    return {"type": "Sequence", "decoders": steps}


def _bpe(
    vocabulary: Vocabulary,
    merges: Sequence[Merge],
    *,
    takes_whole_words: bool = False,
    unknown: int | None = None,
    falls_back_to_bytes: bool = False,
) -> dict[str, object]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else vocabulary.tokens[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": falls_back_to_bytes,
        "byte_fallback": falls_back_to_bytes,
        "ignore_merges": takes_whole_words,
        "vocab": dict(vocabulary.ids),
        "merges": merges,
    }


def _added_tokens(header: GgufHeader, vocabulary: Vocabulary) -> Iterator[dict[str, object]]:
    """The tokens that are looked for in a text before it is cut, by id."""
    name = header.text("general.name", "").lower()
    # Phi 3's template ends a turn's first line after its role; the model never saw that line's end.
    takes_spaces = "phi-3" in name or "phi3" in name
    # Gemma 4's runs of newlines are tokens that no merges come to: one of each length up to 31.
    runs_of_lines = (
        [index for text, index in vocabulary.ids.items() if text[1:] and not text.strip("\n")]
        if _kind(header) == "gemma4" and header.text("tokenizer.ggml.pre", "") != "sarvam-moe"
        else []
    )
    wanted = {*vocabulary.of_types(UNKNOWN, CONTROL, USER_DEFINED), *runs_of_lines}
    for index in sorted(wanted):
        text = vocabulary.tokens[index]
        yield {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": takes_spaces and text not in ("<unk>", "<s>", "<|endoftext|>"),
            "normalized": False,
            "special": vocabulary.types[index] in (UNKNOWN, CONTROL),
        }


def _adds_bos(header: GgufHeader) -> bool:
    key = "tokenizer.ggml.add_bos_token"
    pre = header.text("tokenizer.ggml.pre", "")
    match _kind(header):
        case "gemma4":
            # Gemma 4's files say no and mean yes, as llama.cpp has it.
            return pre != "sarvam-moe" or header.flag(key, False)
        case "llama":
            return header.flag(key, True)
        case _:
            return header.flag(key, SPLITS[pre].begins_with_bos)


def _post_processor(header: GgufHeader, vocabulary: Vocabulary) -> Step | None:
    """Put bos and eos tokens where the vocabulary wants them."""
    bos, eos = special_token_id(header, "bos"), special_token_id(header, "eos")
    ends = (
        bos if _adds_bos(header) else None,
        eos if header.flag("tokenizer.ggml.add_eos_token", False) else None,
    )
    if ends == (None, None):
        return byte_level(use_regex=True) if _kind(header) == "gpt2" else None
    before, after = (
        []
        if token_id is None
        else [{"SpecialToken": {"id": vocabulary.tokens[token_id], "type_id": 0}}]
        for token_id in ends
    )
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    named = {vocabulary.tokens[token_id]: token_id for token_id in ends if token_id is not None}
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, *after],
        "pair": [*before, first, second, *after],
        "special_tokens": {
            text: {"id": text, "ids": [token_id], "tokens": [text]}
            for text, token_id in named.items()
        },
    }
