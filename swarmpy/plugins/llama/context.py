"""One sub-model in the library: a file loaded, a context with sequences, batches through it.

A sub-model that does not hold the head must give its last layer's hidden state as it is, which the
library's interface has no call for: what `llama_get_embeddings` gives went through the final norm.
So a callback watches the graph for that state's node, copies it, and stops the graph there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from swarmpy.config import PREFILL_CHUNK
from swarmpy.errors import ModelRefused, RowError
from swarmpy.plugins.llama.library import Library
from swarmpy.plugins.llama.structs import (
    LOAD_MODE_MMAP,
    Batch,
    ContextParams,
    EvalCallback,
    ModelParams,
)

if TYPE_CHECKING:
    from swarmpy.abc.engine import TokenIds

Floats = npt.NDArray[np.float32]

BATCH_TOKENS = PREFILL_CHUNK
"""Tokens of one batch, and of the library's own smaller ones: no batch is ever cut by it. More
would also reserve more: the logits of 512 tokens of a 262 k vocabulary are 0.5 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSettings:
    """What a context is made for."""

    sequences: int
    tokens: int
    """Of one sequence."""
    threads: int
    gpu_layers: int


class NativeContext:
    """A loaded sub-model and the states of its sequences."""

    def __init__(
        self, library: Library, path: Path, settings: ContextSettings, *, gives_hidden: bool
    ) -> None:
        """Load a GGUF that holds some layers of a model, numbered from 0.

        The file may be removed afterwards where the system keeps what is mapped.

        Args:
            gives_hidden: Whether the last layer's state is wanted instead of logits.

        Raises:
            ModelRefused: The library does not take the file.
        """
        self._library = library
        self._native = native = library.native
        library.errors.clear()
        model_params: ModelParams = native.llama_model_default_params()
        model_params.load_mode = LOAD_MODE_MMAP
        model_params.n_gpu_layers = settings.gpu_layers
        self._model = native.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise ModelRefused(f"llama.cpp does not load this model: {library.last_errors():.500}")
        self.hidden_size: int = native.llama_model_n_embd(self._model)
        vocabulary = native.llama_model_get_vocab(self._model)
        self.vocabulary_size: int = native.llama_vocab_n_tokens(vocabulary)
        last_layer = native.llama_model_n_layer(self._model) - 1
        self._tap = _Tap(library, f"l_out-{last_layer}") if gives_hidden else None
        params = self._context_params(settings)
        self._context = native.llama_init_from_model(self._model, params)
        if not self._context:
            native.llama_model_free(self._model)
            raise ModelRefused(f"llama.cpp makes no context: {library.last_errors():.500}")
        self._memory = native.llama_get_memory(self._context)
        self._sequence_ids = np.arange(settings.sequences, dtype=np.int32)
        self._batch = _BatchArrays()

    def _context_params(self, settings: ContextSettings) -> ContextParams:
        params: ContextParams = self._native.llama_context_default_params()
        params.n_ctx = settings.sequences * settings.tokens
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = settings.sequences
        params.n_threads = params.n_threads_batch = settings.threads
        # Each sequence has cells of its own, in order of position. In shared ones the cells that
        # neighbours left free would decide in which order attention adds up.
        params.kv_unified = False
        # A window's keys stay after it has moved on, so that a state can be cut back.
        params.swa_full = True
        params.no_perf = True
        if self._tap is not None:
            params.cb_eval = ctypes.cast(self._tap.callback, ctypes.c_void_p).value
        return params

    def decode(
        self,
        inputs: TokenIds | Floats,
        positions: npt.NDArray[np.int32],
        sequences: Sequence[int],
        wanted: npt.NDArray[np.bool_],
    ) -> Floats:
        """Run one batch and return hidden states (T, D), or the logits (W, V) of wanted tokens.

        Args:
            inputs: Token ids (T,) int32, or hidden states (T, D) float32, T up to `BATCH_TOKENS`.
            positions: (T,), going on where each sequence ends.
            sequences: (T,), in groups and ascending.
            wanted: (T,), which tokens' logits are wanted; hidden states come of all.

        Raises:
            RowError: It failed; the sequences of the batch are in no known state.
        """
        count = len(inputs)
        assert 0 < count <= BATCH_TOKENS, count
        batch = self._batch.fill(inputs, positions, self._sequence_ids[sequences])
        self._batch.wanted[:count] = True if self._tap is not None else wanted
        if self._tap is not None:
            self._tap.expect(count, self.hidden_size)
        code = self._native.llama_decode(self._context, batch)
        if code != 0:
            raise RowError(f"llama_decode failed ({code}): {self._library.last_errors():.500}")
        if self._tap is not None:
            return self._tap.taken()
        return self._logits(np.flatnonzero(wanted))

    def _logits(self, indexes: npt.NDArray[np.intp]) -> Floats:
        logits = np.empty((len(indexes), self.vocabulary_size), np.float32)
        for row, index in zip(logits, indexes, strict=True):
            source = self._native.llama_get_logits_ith(self._context, int(index))
            if not source:
                raise RowError(f"no logits: {self._library.last_errors():.500}")
            ctypes.memmove(row.ctypes.data, source, row.nbytes)
        return logits

    # States -----------------------------------------------------------------

    def cut(self, sequence: int, position: int) -> bool:
        """Forget a sequence from `position` on; False where its state cannot be cut there."""
        return bool(self._native.llama_memory_seq_rm(self._memory, sequence, position, -1))

    def end(self, sequence: int) -> int:
        """Return the position behind the sequence's last."""
        last: int = self._native.llama_memory_seq_pos_max(self._memory, sequence)
        return last + 1

    def state(self, sequence: int) -> bytes:
        """Return a sequence's whole state, in the library's own form."""
        size = self._native.llama_state_seq_get_size(self._context, sequence)
        data = ctypes.create_string_buffer(size)
        read = self._native.llama_state_seq_get_data(self._context, data, size, sequence)
        if not 0 < read <= size:
            raise RowError(f"llama.cpp gives no state: {self._library.last_errors():.500}")
        return data.raw[:read]

    def set_state(self, sequence: int, state: bytes) -> bool:
        """Replace a sequence's state by one that `state` gave; False where it does not fit.

        The library parses the bytes: give it nothing that it, or code of ours, has not written.
        """
        read = self._native.llama_state_seq_set_data(self._context, state, len(state), sequence)
        return int(read) == len(state)

    def close(self) -> None:
        """Release everything; the context cannot be used any more."""
        if self._context:
            self._native.llama_free(self._context)
            self._native.llama_model_free(self._model)
        self._context = self._model = None


class _BatchArrays:
    """The arrays that a batch points into; made once, since they live as long as the context."""

    def __init__(self) -> None:
        self.wanted = np.zeros(BATCH_TOKENS, np.bool_)
        self._positions = np.zeros(BATCH_TOKENS, np.int32)
        self._ids = np.zeros(BATCH_TOKENS, np.int32)
        self._counts = np.ones(BATCH_TOKENS, np.int32)
        base, step = self._ids.ctypes.data, self._ids.itemsize
        self._id_pointers = np.arange(BATCH_TOKENS, dtype=np.uintp) * step + base
        self._batch = Batch(
            pos=self._positions.ctypes.data,
            n_seq_id=self._counts.ctypes.data,
            seq_id=self._id_pointers.ctypes.data,
            logits=self.wanted.ctypes.data,
        )

    def fill(
        self,
        inputs: TokenIds | Floats,
        positions: npt.NDArray[np.int32],
        ids: npt.NDArray[np.int32],
    ) -> Batch:
        """Return the batch; `inputs` must be contiguous, and stay alive until it has run."""
        count = len(inputs)
        address = inputs.ctypes.data
        is_hidden = inputs.ndim == 2
        self._batch.n_tokens = count
        self._batch.token = None if is_hidden else address
        self._batch.embd = address if is_hidden else None
        self._positions[:count] = positions
        self._ids[:count] = ids
        return self._batch


class _Tap:
    """Takes the hidden state out of a running graph, and ends the graph there.

    Called twice for each of some 30 nodes a layer, so a name is compared in place: its offset in
    `struct ggml_tensor` is found once, from what `ggml_get_name` returns.
    """

    def __init__(self, library: Library, node: str) -> None:
        self._native = library.native
        self._node = node
        self._out: Floats = np.empty((0, 0), np.float32)
        self._filled = 0
        self._is_short = False
        self.callback = EvalCallback(self._make_call(node.encode() + b"\0"))

    def expect(self, count: int, width: int) -> None:
        """Make room for the states of the next batch."""
        self._out = np.empty((count, width), np.float32)
        self._filled = 0

    def taken(self) -> Floats:
        """Return the states.

        Raises:
            RowError: The graph gave none, or not of that size.
        """
        if self._filled != self._out.nbytes:
            raise RowError(
                f"node {self._node!r} gave {self._filled} bytes, expected {self._out.nbytes}"
            )
        return self._out

    def _make_call(self, target: bytes) -> Callable[[int, bool, object], bool]:
        native, string_at, length = self._native, ctypes.string_at, len(target)
        name_offset = 0

        def call(tensor: int, is_asked: bool, _: object) -> bool:
            nonlocal name_offset
            if is_asked:
                if not name_offset:
                    name_offset = native.ggml_get_name(tensor) - tensor
                return string_at(tensor + name_offset, length) == target
            self._take(tensor)
            return False

        return call

    def _take(self, tensor: int) -> None:
        size = self._native.ggml_nbytes(tensor)
        if self._filled + size <= self._out.nbytes:
            address = self._out.ctypes.data + self._filled
            self._native.ggml_backend_tensor_get(tensor, address, 0, size)
        # Too much is counted and not copied; an error raised here would go unheard.
        self._filled += size
