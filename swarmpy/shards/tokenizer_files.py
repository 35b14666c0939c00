"""A GGUF's vocabulary as tokenizer.json and tokenizer_config.json.

Only byte-level BPE vocabularies with a known way of splitting text are converted: a wrong split
gives other tokens, and so a silently wrong model. Anything else is refused by name.
Spec: protocols/manifest.md, section 4; the file formats are Hugging Face's and llama.cpp's.
"""

from __future__ import annotations

from swarmpy.errors import ModelRefused
from swarmpy.shards.gguf import GgufHeader

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How the Llama 3 vocabulary was trained to split text: numbers in groups of three digits."""

_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
"""The same with single digits."""


def _byte_level(*, use_regex: bool) -> dict[str, object]:
    """Bytes to printable characters; `use_regex` splits by GPT-2's pattern first."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": use_regex,
    }


def _split(pattern: str) -> dict[str, object]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


_DIGITS: dict[str, object] = {"type": "Digits", "individual_digits": True}

PRE_TOKENIZERS: dict[str, list[dict[str, object]]] = {
    "gpt2": [_byte_level(use_regex=True)],
    "gpt-2": [_byte_level(use_regex=True)],
    "smollm": [_DIGITS, _byte_level(use_regex=True)],
    "llama-bpe": [_split(_LLAMA3_WORDS), _byte_level(use_regex=False)],
    "llama3": [_split(_LLAMA3_WORDS), _byte_level(use_regex=False)],
    "qwen2": [_split(_QWEN2_WORDS), _byte_level(use_regex=False)],
}
"""How text is split before merging, by `tokenizer.ggml.pre`."""

_WITH_BOS = frozenset({"llama-bpe", "llama3"})
"""Vocabularies whose texts begin with the bos token unless the file says otherwise."""

_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3"})
"""Vocabularies in which a word that is a token itself is not merged from its parts."""

_COMPOSED = frozenset({"qwen2"})
"""Vocabularies whose texts are brought to Unicode's composed form (NFC) first."""

_CONTROL, _USER_DEFINED = 3, 4
"""Token types of the format that are never made of other tokens: special ones, and whole words."""


def tokenizer_json(header: GgufHeader) -> dict[str, object]:
    """Return the contents of tokenizer.json for a GGUF's vocabulary.

    Raises:
        ModelRefused: The vocabulary is of another kind or split, or contradicts itself.
    """
    pre = _pre_tokenizer(header)
    tokens = header.texts("tokenizer.ggml.tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelRefused(f"{header.path.name}: a token is in the vocabulary twice")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(header, tokens),
        "normalizer": {"type": "NFC"} if pre in _COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": _post_processor(header, tokens),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS_FIRST,
            "vocab": vocabulary,
            "merges": _merges(header, vocabulary),
        },
    }


def tokenizer_config(header: GgufHeader) -> dict[str, object]:
    """Return the contents of tokenizer_config.json: special tokens, chat template, context length.

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
    template = header.text("tokenizer.chat_template", "")
    if template:
        config["chat_template"] = template
    return config


def special_token_id(header: GgufHeader, role: str) -> int | None:
    """Return the id of the "bos", "eos", "eot", "unknown" or "padding" token, None where unset.

    Raises:
        ModelRefused: The id lies outside the vocabulary.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in header.metadata:
        return None
    token_id = header.integer(key)
    count = len(header.texts("tokenizer.ggml.tokens"))
    if not 0 <= token_id < count:
        raise ModelRefused(f"{header.path.name}: {key} is {token_id}, there are {count} tokens")
    return token_id


def _pre_tokenizer(header: GgufHeader) -> str:
    """The name of the vocabulary's way to split text, known to be one of ours."""
    model = header.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise ModelRefused(
            f"{header.path.name}: tokenizer {model!r:.40} cannot be converted (only 'gpt2', "
            "that is byte-level BPE); use the model's safetensors folder"
        )
    pre = header.text("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ModelRefused(
            f"{header.path.name}: text splitting {pre!r:.40} is unknown (known: "
            f"{', '.join(PRE_TOKENIZERS)}); use the model's safetensors folder"
        )
    return pre


def _added_tokens(header: GgufHeader, tokens: tuple[str, ...]) -> list[dict[str, object]]:
    types = header.integers("tokenizer.ggml.token_type", (1,) * len(tokens))
    if len(types) != len(tokens):
        raise ModelRefused(f"{header.path.name}: {len(tokens)} tokens but {len(types)} types")
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _merges(header: GgufHeader, vocabulary: dict[str, int]) -> list[list[str]]:
    """The merges as pairs; each must make a token of two tokens."""
    pairs: list[list[str]] = []
    for merge in header.texts("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelRefused(f"{header.path.name}: merge {merge!r:.80} is not of known tokens")
        pairs.append([left, right])
    return pairs


def _adds_bos(header: GgufHeader) -> bool:
    return header.flag("tokenizer.ggml.add_bos_token", _pre_tokenizer(header) in _WITH_BOS)


def _post_processor(header: GgufHeader, tokens: tuple[str, ...]) -> dict[str, object]:
    """Put the bos token first where the vocabulary wants it, else only restore offsets."""
    bos = special_token_id(header, "bos")
    if bos is None or not _adds_bos(header):
        return _byte_level(use_regex=True)
    first: dict[str, object] = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {
            tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]},
        },
    }
