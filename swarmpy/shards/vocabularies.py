"""A GGUF's vocabulary: its tokens, their types, and what merges into what; every claim is checked.

Spec: protocols/manifest.md, section 4; the format is llama.cpp's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from swarmpy.errors import ModelRefused
from swarmpy.shards.gguf import GgufHeader
from swarmpy.shards.special_tokens import control_texts

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types of the format. User-defined ones are whole words that are never cut."""

ADDED_TOKENS_MAX = 65_536
"""Control and user-defined tokens, each looked for in every text. Models that speak have 30,000."""

PIECE_CHARS_MAX = 128
"""Longest token that is cut in two to see what merges into it; SentencePiece makes 16 or fewer."""

TOKENS_MAX = 1_000_000
"""Tokens of a vocabulary; the largest have 262 k."""

TOKENS_CHARS_MAX = 4_000_000
"""Characters of all tokens; those of 262 k tokens have about 2.3 million."""

MERGES_MAX = 1_000_000
"""Merges that a vocabulary lists, or that its scores come to. 262 k tokens have about 600 k."""

Merge = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model and their types, by id."""

    file: str
    """The file's name, for errors."""
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    ids: Mapping[str, int]

    def refused(self, reason: str) -> ModelRefused:
        """The error of a vocabulary that is not used."""
        return ModelRefused(f"{self.file}: {reason}")

    def of_types(self, *types: int) -> Iterator[int]:
        """The ids of tokens of some types, in order."""
        return (index for index, kind in enumerate(self.types) if kind in types)


def read_vocabulary(header: GgufHeader) -> Vocabulary:
    """Return a file's vocabulary.

    A token without text gets a name by its number; some texts are control tokens whatever the file
    says (`control_texts`): else a reply would not end, or a user's text could end it.

    Raises:
        ModelRefused: There are more tokens than `TOKENS_MAX`, or more characters in them than
            `TOKENS_CHARS_MAX`; a token is there twice, there are not as many types as tokens, or
            more tokens than `ADDED_TOKENS_MAX` would have to be looked for in every text.
    """
    file = header.path.name
    texts = header.texts("tokenizer.ggml.tokens")
    if len(texts) > TOKENS_MAX:
        raise ModelRefused(f"{file}: {len(texts)} tokens, at most {TOKENS_MAX} are read")
    if (characters := sum(map(len, texts))) > TOKENS_CHARS_MAX:
        raise ModelRefused(
            f"{file}: {characters} characters of tokens, at most {TOKENS_CHARS_MAX} are read"
        )
    tokens = tuple(token or f"[EMPTY_{index}]" for index, token in enumerate(texts))
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ModelRefused(f"{file}: a token is in the vocabulary twice")
    types = list(header.integers("tokenizer.ggml.token_type", (NORMAL,) * len(tokens)))
    if len(types) != len(tokens):
        raise ModelRefused(f"{file}: {len(tokens)} tokens but {len(types)} types")
    for text in control_texts(ids):
        types[ids[text]] = CONTROL
    vocabulary = Vocabulary(file, tokens, tuple(types), ids)
    added = sum(1 for _ in vocabulary.of_types(UNKNOWN, CONTROL, USER_DEFINED))
    if added > ADDED_TOKENS_MAX:
        raise ModelRefused(f"{file}: {added} special tokens, at most {ADDED_TOKENS_MAX} are read")
    return vocabulary


def listed_merges(header: GgufHeader, vocabulary: Vocabulary) -> list[Merge]:
    """Return the merges that a file lists, the first to be made first.

    Raises:
        ModelRefused: There are more than `MERGES_MAX`, or one does not make a token of two tokens.
    """
    listed = header.texts("tokenizer.ggml.merges")
    if len(listed) > MERGES_MAX:
        raise vocabulary.refused(f"{len(listed)} merges, at most {MERGES_MAX} are read")
    merges: dict[Merge, None] = {}
    for merge in listed:
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not vocabulary.ids.keys() >= {left, right, left + right}:
            raise vocabulary.refused(f"merge {merge!r:.80} is not of known tokens")
        merges.setdefault((left, right))
    return list(merges)


def scored_merges(header: GgufHeader, vocabulary: Vocabulary) -> list[Merge]:
    """Return the merges that a vocabulary with scores comes to, the first to be made first.

    SentencePiece joins the two neighbours whose token has the highest score, the leftmost where
    scores are equal; a list of merges can say the same if no two tokens of one score contend for a
    piece between them.

    Raises:
        ModelRefused: Scores are missing or no numbers, no list of merges would do the same, or it
            would have more than `MERGES_MAX`.
    """
    scores = header.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        raise vocabulary.refused(f"{len(vocabulary.tokens)} tokens but {len(scores)} scores")
    if not all(map(math.isfinite, scores)):
        raise vocabulary.refused("a token's score is no finite number")
    pieces = {vocabulary.tokens[index]: index for index in vocabulary.of_types(NORMAL, UNUSED)}
    merges: list[Merge] = []
    by_score: dict[float, list[Merge]] = defaultdict(list)
    for piece in sorted(pieces, key=lambda text: (-scores[pieces[text]], pieces[text])):
        if len(piece) > PIECE_CHARS_MAX:
            raise vocabulary.refused(f"a token has {len(piece)} characters")
        made = list(_cuts(piece, pieces, vocabulary))
        merges += made
        by_score[scores[pieces[piece]]] += made
        if len(merges) > MERGES_MAX:
            raise vocabulary.refused(f"more than {MERGES_MAX} merges")
    for rivals in by_score.values():
        _check_rivals(rivals, vocabulary)
    return merges


def _cuts(piece: str, pieces: Mapping[str, int], vocabulary: Vocabulary) -> Iterator[Merge]:
    """The ways to cut a piece into two others, the shortest left one first."""
    last = len(piece) - 1
    for cut in range(1, last + 1):
        left = piece[:cut]
        if left not in pieces and cut > 1:
            continue
        right = piece[cut:]
        if left in pieces and right in pieces:
            yield left, right
        elif right in pieces or cut == last:
            # SentencePiece would join it; tokenizers sees bytes where a character is no token.
            raise vocabulary.refused(f"token {piece!r:.80} has a character that is no token")


def _check_rivals(merges: Sequence[Merge], vocabulary: Vocabulary) -> None:
    """Refuse merges of one score that contend for a piece but make different tokens."""
    made_with: dict[str, set[str]] = defaultdict(set)
    for left, right in merges:
        made_with[right].add(left + right)
    for left, right in merges:
        rivals = made_with.get(left, set()) - {left + right}
        if rivals:
            raise vocabulary.refused(
                f"tokens {min(rivals)!r:.40} and {left + right!r:.40} have the same score"
            )
