"""Text to token ids and back: special tokens only where the template put them.

A user's text that spells a special token is text. The template's own special tokens are written as
unguessable stand-ins, which a copy of the tokenizer knows as added tokens while it reads the real
ones as text; so one pass over the whole prompt gives the ids, and ordinary text gets exactly those
that the unchanged tokenizer gives it. Page: docs/http-api.md, "Special tokens".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from tokenizers import AddedToken, Tokenizer

from swarmpy.errors import ModelRefused
from swarmpy.identity import RandomBytes
from swarmpy.plugins.gateway.errors import refuse

P = ParamSpec("P")
T = TypeVar("T")

REPLACEMENT = "\ufffd"
"""What a decoder makes of bytes that are no character (yet)."""

PENDING_TOKENS_MAX = 8
"""Tokens held back for the rest of a character: more than UTF-8's four are garbage."""


@dataclass(frozen=True, slots=True)
class Written:
    """A piece of a prompt: by the template, whose special tokens count, or by a user."""

    text: str
    by_template: bool


class TextCodec:
    """A model's vocabulary. Encoding belongs in a worker thread; decoding takes microseconds."""

    def __init__(self, tokenizer_json: str, random: RandomBytes) -> None:
        """Args: tokenizer_json: The text of tokenizer.json.

        Raises:
            ModelRefused: It describes no tokenizer.
        """
        self._tokenizer = _tokenizer(tokenizer_json)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids: Mapping[str, int] = {
            token.content: token_id for token_id, token in added.items() if token.special
        }
        """Ids of the special tokens, by their text."""
        self._real_ids = frozenset(self.special_ids.values())
        self._special = _pattern(self.special_ids)
        self._special_any_case = re.compile(self._special.pattern, re.IGNORECASE)
        self._stand_ins = {
            text: f"\ue000{random.randbytes(16).hex()}\ue001" for text in self.special_ids
        }
        self.divider = f"\ue000{random.randbytes(16).hex()}\ue001"
        """A text that encodes to nothing and keeps its two sides apart."""
        self._plain = _tokenizer(tokenizer_json)
        self._plain.encode_special_tokens = True
        flags = {token.content: token for token in added.values()}
        _foreign(
            self._plain.add_tokens,
            [_stand_in(stand_in, flags[text]) for text, stand_in in self._stand_ins.items()]
            + [AddedToken(self.divider, special=False, normalized=False)],
        )
        self._ids_of_stand_ins = {
            self._plain.token_to_id(stand_in): self.special_ids[text]
            for text, stand_in in self._stand_ins.items()
        }
        self._divider_id = self._plain.token_to_id(self.divider)

    def encode(self, prompt: Sequence[Written]) -> list[int]:
        """Return a prompt's token ids, special ones only where the template wrote them.

        Raises:
            RequestRefused: The vocabulary makes a special token of a user's text in any way.
        """
        ids, has_special = self._encode("".join(map(self._marked, prompt)))
        if has_special:  # a vocabulary may merge plain text into a special token: keep it apart
            ids, has_special = self._encode(
                "".join(
                    self._marked(part) if part.by_template else self.divided(part.text)
                    for part in prompt
                )
            )
        if has_special:
            raise refuse(
                400,
                "special_token_in_text",
                "a message spells a special token of this model, which reads it as one",
                param="messages",
            )
        return ids

    def divided(self, text: str) -> str:
        """Return a user's text with every special token in it broken in two, in any case."""
        return self._special_any_case.sub(
            lambda found: found[0][:1] + self.divider + found[0][1:], text
        )

    def decode(self, ids: Sequence[int], *, with_special: bool = False) -> str:
        """Return the text of token ids; bytes that are no character become U+FFFD."""
        return _foreign(self._tokenizer.decode, ids, skip_special_tokens=not with_special)

    def _marked(self, part: Written) -> str:
        if not part.by_template:
            return part.text
        return self._special.sub(lambda found: self._stand_ins[found[0]], part.text)

    def _encode(self, text: str) -> tuple[list[int], bool]:
        """Encode marked text; whether real special ids came out of it too, by way of the text."""
        # The batch call, other than the single one, lets other threads run meanwhile.
        encoding = _foreign(self._plain.encode_batch_fast, [text], add_special_tokens=False)[0]
        encoded: list[int] = encoding.ids
        ids = [
            self._ids_of_stand_ins.get(token_id, token_id)
            for token_id in encoded
            if token_id != self._divider_id
        ]
        return ids, not self._real_ids.isdisjoint(encoded)


class TextStream:
    """Turns tokens into text as they come, never half a character."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        """Some shown ones as context (decoders treat a text's start apart), then the others."""
        self._shown_tokens = 0
        self._shown_chars = 0

    def push(self, token_id: int) -> str:
        """Return the text that is complete with this token, "" while a character is not."""
        self._ids.append(token_id)
        text = self._codec.decode(self._ids)
        pending = len(self._ids) - self._shown_tokens
        if text.endswith(REPLACEMENT) and pending < PENDING_TOKENS_MAX:
            return ""
        return self._show(text)

    def finish(self) -> str:
        """Return what was held back; what is no character by now becomes U+FFFD."""
        return self._show(self._codec.decode(self._ids))

    def _show(self, text: str) -> str:
        fresh = text[self._shown_chars :]
        del self._ids[: self._shown_tokens]
        self._shown_tokens = len(self._ids)
        self._shown_chars = len(self._codec.decode(self._ids))
        return fresh


class StopTexts:
    """Finds the stop text that is complete first, however a reply is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Args: stops: The texts that end the reply, none of them empty."""
        self._stops = tuple(stops)
        self._starts = {stop[:size] for stop in stops for size in range(1, len(stop))}
        self._longest = max(map(len, stops), default=1)
        self._held = ""
        self.is_found = False
        """Whether a stop text has come; the reply ends before it."""

    def push(self, text: str) -> str:
        """Return what can be shown by now: all that cannot be the beginning of a stop text."""
        if not self._stops:
            return text
        if self.is_found:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_found, self._held = True, ""
            return text[: min(found)[1]]
        held = next(
            (
                size
                for size in range(min(self._longest - 1, len(text)), 0, -1)
                if text[-size:] in self._starts
            ),
            0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back: the reply has ended without the rest of the stop text."""
        held, self._held = self._held, ""
        return held


def _foreign(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the tokenizers library with what a model's files say.

    Raises:
        ModelRefused: It fails, or panics: a panic of Rust is no Exception and would end the node.
    """
    try:
        return call(*args, **kwargs)
    except BaseException as error:  # the border to a foreign library, which raises nothing narrower
        if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
            raise ModelRefused(f"tokenizer.json: {error!s:.300}") from error
        raise


def _tokenizer(tokenizer_json: str) -> Tokenizer:
    tokenizer = _foreign(Tokenizer.from_str, tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _pattern(texts: Mapping[str, int]) -> re.Pattern[str]:
    """Match the longest of the texts at the first place where one is, as tokenizers does."""
    longest_first = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _stand_in(text: str, token: AddedToken) -> AddedToken:
    """An added token that strips the space around it as the special token does."""
    return AddedToken(
        text,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=False,
    )
