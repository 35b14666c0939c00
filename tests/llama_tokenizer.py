"""llama.cpp's own tokenizer, in a child process: ids of texts, and which tokens end a reply."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmpy.plugins.llama.library import Library, find_library, open_library

CHILD_S_MAX = 300.0


@dataclass(frozen=True, slots=True)
class LlamaTokens:
    """What llama.cpp makes of one vocabulary."""

    ids: list[list[int]]
    """Of each text, special tokens in it read as such, none added."""
    begun: list[int]
    """The ids of "x" with what the vocabulary adds."""
    end_ids: list[int]
    """Tokens at which it ends a reply."""
    pieces: list[bytes]
    """Each token's bytes, those of special tokens left out."""


def llama_tokens(requests: Sequence[tuple[Path, Sequence[str]]]) -> list[LlamaTokens]:
    """Ask llama.cpp about texts in the vocabularies of GGUF files, which need no weights."""
    finished = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([(str(path), list(texts)) for path, texts in requests]),
        capture_output=True,
        text=True,
        timeout=CHILD_S_MAX,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return [
        LlamaTokens(ids, begun, end_ids, [bytes.fromhex(piece) for piece in pieces])
        for ids, begun, end_ids, pieces in json.loads(finished.stdout)
    ]


def _declared() -> Library:
    library = open_library(find_library())
    for name, result, arguments in (
        ("llama_tokenize", ctypes.c_int32, "vocabulary text int ids int bool bool"),
        ("llama_vocab_is_eog", ctypes.c_bool, "vocabulary int"),
        ("llama_token_to_piece", ctypes.c_int32, "vocabulary int text int int bool"),
    ):
        function = getattr(library.native, name)
        function.restype, function.argtypes = result, [_TYPES[word] for word in arguments.split()]
    return library


def _answer(library: Library, path: str, texts: Sequence[str]) -> list[object]:
    native = library.native
    params = native.llama_model_default_params()
    params.vocab_only = True
    model = native.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise SystemExit(f"{path}: {library.last_errors()}")
    vocabulary = native.llama_model_get_vocab(model)

    def encode(text: str, *, is_begun: bool = False) -> list[int]:
        raw = text.encode()
        ids = (ctypes.c_int32 * (2 * len(raw) + 8))()
        count = native.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), is_begun, True)
        assert count >= 0, text
        return list(ids[:count])

    def piece(token_id: int) -> str:
        buffer = ctypes.create_string_buffer(4096)
        size = native.llama_token_to_piece(vocabulary, token_id, buffer, 4096, 0, False)
        assert size >= 0, token_id
        return buffer.raw[:size].hex()

    count = native.llama_vocab_n_tokens(vocabulary)
    answer: list[object] = [
        [encode(text) for text in texts],
        encode("x", is_begun=True),
        [token_id for token_id in range(count) if native.llama_vocab_is_eog(vocabulary, token_id)],
        [piece(token_id) for token_id in range(count)],
    ]
    native.llama_model_free(model)
    return answer


_TYPES: dict[str, type] = {
    "vocabulary": ctypes.c_void_p,
    "text": ctypes.c_char_p,
    "int": ctypes.c_int32,
    "ids": ctypes.c_void_p,
    "bool": ctypes.c_bool,
}


if __name__ == "__main__":
    opened = _declared()
    answers = [_answer(opened, path, texts) for path, texts in json.load(sys.stdin)]
    sys.stdout.write(json.dumps(answers))
