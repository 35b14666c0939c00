"""llama.cpp as it is, in a process of its own: the file itself, whole, by the library's defaults.

Only its threads and the context's length are set. Args (one JSON object): path, threads, context.
Prints one JSON line when it is ready. Commands, each answered by one JSON line:
{"do": "generate", "token_ids", "max_tokens"} -> {"token_ids", "tok_s", "ttft_s"}.
"""

from __future__ import annotations

import ctypes
import json
import sys
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmpy.plugins.llama.library import find_library, open_library
from swarmpy.plugins.llama.structs import Batch


class Whole:
    """A model, and a context with one sequence."""

    def __init__(self, path: str, *, threads: int, context: int) -> None:
        self.native = native = open_library(find_library()).native
        model = native.llama_model_load_from_file(
            path.encode(), native.llama_model_default_params()
        )
        assert model, "llama.cpp does not load the file"
        params = native.llama_context_default_params()
        params.n_ctx = context
        params.n_threads = params.n_threads_batch = threads
        self.context = native.llama_init_from_model(model, params)
        assert self.context, "llama.cpp makes no context"
        self.tokens_max: int = params.n_batch
        self.vocabulary_size: int = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))

    def generate(self, prompt: list[int], count: int) -> dict[str, Any]:
        """A greedy reply: the prompt in one call of the library, then token by token."""
        assert len(prompt) <= self.tokens_max
        began = perf_counter()
        tokens = [self.decode(prompt, 0)]
        first = perf_counter()
        while len(tokens) < count:
            tokens.append(self.decode(tokens[-1:], len(prompt) + len(tokens) - 1))
        took = perf_counter() - first
        self.native.llama_memory_seq_rm(self.native.llama_get_memory(self.context), 0, 0, -1)
        return {"token_ids": tokens, "tok_s": (count - 1) / took, "ttft_s": first - began}

    def decode(self, token_ids: list[int], position: int) -> int:
        """Run tokens from `position` on, and return the likeliest to follow the last."""
        count = len(token_ids)
        ids = np.array(token_ids, np.int32)
        positions = np.arange(position, position + count, dtype=np.int32)
        counts, sequence = np.ones(count, np.int32), np.zeros(1, np.int32)
        sequences = np.full(count, sequence.ctypes.data, np.uintp)
        wanted = np.zeros(count, np.int8)
        wanted[-1] = 1
        batch = Batch(
            n_tokens=count,
            token=_address(ids),
            pos=_address(positions),
            n_seq_id=_address(counts),
            seq_id=_address(sequences),
            logits=_address(wanted),
        )
        code = self.native.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode failed ({code})"
        row = self.native.llama_get_logits_ith(self.context, count - 1)
        logits = (ctypes.c_float * self.vocabulary_size).from_address(row)
        return int(np.frombuffer(logits, np.float32).argmax())


def _address(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data


def main(arguments: dict[str, Any]) -> None:
    whole = Whole(arguments["path"], threads=arguments["threads"], context=arguments["context"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        assert command["do"] == "generate", command["do"]
        print(json.dumps(whole.generate(command["token_ids"], command["max_tokens"])), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
