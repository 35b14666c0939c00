"""Which tokens of a GGUF's vocabulary have a part to play: begin a text, end a reply, are control.

Files name some by key; others are known by their text alone, as llama.cpp knows them
(tests/shards/test_tokenizer_llama.py holds the two against each other, token by token).
Spec: protocols/manifest.md, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from swarmpy.errors import ModelRefused
from swarmpy.shards.gguf import GgufHeader

_END_TEXTS = """
    <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <end_of_turn>
    <|endoftext|> <|end_of_text|> <end_of_utterance> </s> <eos> <EOT> _<EOT> [EOT] [EOS] <turn|>
    <|tool_response> <\uff5cend\u2581of\u2581sentence\uff5c> [e~[ <|ifm|im_end|>
"""
_INFILL_TEXTS = """
    <|fim_prefix|> <fim-prefix> <fim_prefix> <\uff5cfim\u2581begin\uff5c> <PRE> \u2581<PRE>
    <|code_prefix|> <|prefix|> <|plamo:fim_prefix|>
    <|fim_suffix|> <fim-suffix> <fim_suffix> <\uff5cfim\u2581hole\uff5c> <SUF> \u2581<SUF>
    <|code_suffix|> <|suffix|> <|plamo:fim_suffix|>
    <|fim_middle|> <fim-middle> <fim_middle> <\uff5cfim\u2581end\uff5c> <MID> \u2581<MID>
    <|code_middle|> <|middle|> <|plamo:fim_middle|>
"""

END_TEXTS = frozenset(_END_TEXTS.split())
"""Tokens that end a reply wherever they are in the vocabulary."""

_OTHER_WORK: Mapping[str, frozenset[str]] = {
    "fim_pad": frozenset({"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}),
    "fim_rep": frozenset({"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}),
    "fim_sep": frozenset({"<|file_sep|>", "<|plamo:file_separator|>"}),
}
"""Tokens by which a model of code goes on to another file; a reply ends there too."""

_CONTROL_TEXTS = END_TEXTS.union(_INFILL_TEXTS.split(), *_OTHER_WORK.values())

_TURN_NOT_REPLY = "<|end|>", ("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>")
"""With either pair in the vocabulary, a reply is several messages, each ended by the first."""

_TAG_NOT_END = "</s>", "<|tool_response>"
"""With the second in the vocabulary, the first is a tag of HTML."""

_DEFAULTS: Mapping[str, Mapping[str, int]] = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}
"""Ids that a file of this `tokenizer.ggml.model` need not spell out."""


def special_token_id(header: GgufHeader, role: str) -> int | None:
    """Return the id of the "bos", "eos", "eot", "eom", "unknown" or "padding" token, None if unset.

    Raises:
        ModelRefused: The id lies outside the vocabulary.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    count = len(header.texts("tokenizer.ggml.tokens"))
    if key not in header.metadata:
        default = _DEFAULTS.get(header.text("tokenizer.ggml.model", ""), {}).get(role)
        return default if default is not None and default < count else None
    token_id = header.integer(key)
    if not 0 <= token_id < count:
        raise ModelRefused(f"{header.path.name}: {key} is {token_id}, there are {count} tokens")
    return token_id


def control_texts(ids: Mapping[str, int]) -> frozenset[str]:
    """Return the tokens of a vocabulary that are control tokens whatever type the file gives them.

    Args:
        ids: The vocabulary, ids by text.
    """
    tag, only_with = _TAG_NOT_END
    return frozenset(
        text for text in _CONTROL_TEXTS if text in ids and not (text == tag and only_with in ids)
    )


def end_ids(header: GgufHeader) -> frozenset[int]:
    """Return the tokens that end a reply.

    Raises:
        ModelRefused: The vocabulary or an id in it is malformed.
    """
    ids = {text: index for index, text in enumerate(header.texts("tokenizer.ggml.tokens"))}
    return frozenset(_end_ids(header, ids))


def _end_ids(header: GgufHeader, ids: Mapping[str, int]) -> Iterator[int]:
    spared = {ids[text] for text in _spared(ids)}
    for text in (control_texts(ids) & END_TEXTS) - _spared(ids):
        yield ids[text]
    for role in ("eos", "eot", "eom", *_OTHER_WORK):
        token_id = special_token_id(header, role)
        if token_id is not None and token_id not in spared:
            yield token_id
    for role, texts in _OTHER_WORK.items():
        if f"tokenizer.ggml.{role}_token_id" not in header.metadata:
            yield from (ids[text] for text in texts if text in ids)
    count = len(header.texts("tokenizer.ggml.tokens"))
    for token_id in header.integers("tokenizer.ggml.eos_token_ids", ()):
        if not 0 <= token_id < count:
            raise ModelRefused(
                f"{header.path.name}: end token {token_id} of {count} tokens is out of range"
            )
        yield token_id


def _spared(ids: Mapping[str, int]) -> frozenset[str]:
    """The texts that end no reply in this vocabulary, though they do in others."""
    tag, only_with = _TAG_NOT_END
    message, *pairs = _TURN_NOT_REPLY
    spared = {tag} if only_with in ids else set()
    if any(all(text in ids for text in pair) for pair in pairs):
        spared.add(message)
    return frozenset(spared & ids.keys())
