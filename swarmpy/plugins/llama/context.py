"""One sub-model in the library: a file loaded, a context with sequences, batches through it.

A sub-model that does not hold the head must give its last layer's hidden state as it is, which the
library's interface has no call for: what `llama_get_embeddings` gives went through the final norm.
So a callback watches the graph for that state's node, copies it, and stops the graph there. What
comes in is given as embeddings; where an architecture would do something to those first, token ids
of 0 are given, and the callback puts the state over what was made of them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from swarmpy.config import PREFILL_CHUNK
from swarmpy.errors import ModelRefused, RowError
from swarmpy.plugins.llama.architectures import PLAIN, Architecture
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
        self,
        library: Library,
        path: Path,
        settings: ContextSettings,
        *,
        gives_hidden: bool,
        takes_hidden: bool = False,
        architecture: Architecture = PLAIN,
    ) -> None:
        """Load a GGUF that holds some layers of a model, numbered from 0.

        The file may be removed afterwards where the system keeps what is mapped.

        Args:
            gives_hidden: Whether the last layer's state is wanted instead of logits.
            takes_hidden: Whether hidden states come in, and never token ids.
            architecture: Where hidden states enter and leave its graphs.

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
        exit_node = architecture.exit_node.format(last_layer) if gives_hidden else ""
        self._gives_hidden = gives_hidden
        self._entry_node = architecture.entry_node if takes_hidden else ""
        self._gate = _Gate(library, entry_node=self._entry_node, exit_node=exit_node)
        params = self._context_params(settings)
        self._context = native.llama_init_from_model(self._model, params)
        if not self._context:
            native.llama_model_free(self._model)
            raise ModelRefused(f"llama.cpp makes no context: {library.last_errors():.500}")
        self._memory = native.llama_get_memory(self._context)
        self._batch = _BatchArrays(self.hidden_size)

    def _context_params(self, settings: ContextSettings) -> ContextParams:
        params: ContextParams = self._native.llama_context_default_params()
        params.n_ctx = settings.sequences * settings.tokens
        assert params.n_ctx == settings.sequences * settings.tokens, "more than the library counts"
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = settings.sequences
        # The library tries a batch with an output of every sequence, and ends the process over it.
        params.n_outputs_max = max(BATCH_TOKENS, settings.sequences)
        if not settings.gpu_layers:
            params.offload_kqv = params.op_offload = False
        params.n_threads = params.n_threads_batch = settings.threads
        # Each sequence has cells of its own, in order of position. In shared ones the cells that
        # neighbours left free would decide in which order attention adds up.
        params.kv_unified = False
        # A window's keys stay after it has moved on, so that a state can be cut back.
        params.swa_full = True
        params.no_perf = True
        if self._gate.is_needed:
            params.cb_eval = ctypes.cast(self._gate.callback, ctypes.c_void_p).value
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
        given: TokenIds | Floats = inputs
        entering: Floats | None = None
        if inputs.ndim == 2 and self._entry_node:
            given, entering = _NO_TOKENS[:count], inputs.astype(np.float32, copy=False)
        batch = self._batch.fill(given, positions, sequences)
        self._batch.wanted[:count] = True if self._gives_hidden else wanted
        self._gate.expect(entering, leaving=(count, self.hidden_size))
        code = self._native.llama_decode(self._context, batch)
        if code != 0:
            raise RowError(f"llama_decode failed ({code}): {self._library.last_errors():.500}")
        left = self._gate.left()
        if left is not None:
            return left
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
    """The arrays that a batch points into; made once, since they live as long as the context.

    Inputs are copied into them: to ask a numpy array for its address costs more.
    """

    def __init__(self, hidden_size: int) -> None:
        self.wanted = np.zeros(BATCH_TOKENS, np.bool_)
        self._tokens = np.zeros(BATCH_TOKENS, np.int32)
        self._hidden = np.zeros((BATCH_TOKENS, hidden_size), np.float32)
        self._tokens_address = self._tokens.ctypes.data
        self._hidden_address = self._hidden.ctypes.data
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
        sequences: Sequence[int],
    ) -> Batch:
        """Return the batch; it is valid until the next one."""
        count = len(inputs)
        is_hidden = inputs.ndim == 2
        if is_hidden:
            self._hidden[:count] = inputs
        else:
            self._tokens[:count] = inputs
        self._batch.n_tokens = count
        self._batch.token = None if is_hidden else self._tokens_address
        self._batch.embd = self._hidden_address if is_hidden else None
        self._positions[:count] = positions
        self._ids[:count] = sequences
        return self._batch


WORD_BYTES = 8
"""A tensor's name begins at a multiple of this."""

WORDS_MAX = 1 << 57
"""Longest ctypes array of such words; beyond any address."""

_NO_TOKENS = np.zeros(BATCH_TOKENS, np.int32)


class _Gate:
    """Puts hidden states into a running graph, takes them out, and ends the graph there.

    Asked of each of some 30 nodes a layer, so a name is compared in place: its offset in
    `struct ggml_tensor` is found once, from what `ggml_get_name` returns, and its first word is
    read before the rest, at a third of the price: 0.06 of 1.8 ms less for a step of ten layers.
    """

    def __init__(self, library: Library, *, entry_node: str, exit_node: str) -> None:
        self._native = library.native
        self._entry_node = entry_node
        self._exit_node = exit_node
        self._entering: Floats | None = None
        self._out: Floats = np.empty((0, 0), np.float32)
        self._filled = 0
        self.is_needed = bool(entry_node or exit_node)
        self.callback = EvalCallback(self._make_call())

    def expect(self, entering: Floats | None, *, leaving: tuple[int, int]) -> None:
        """Prepare for the next batch: what is put in, and the shape of what will come out."""
        self._entering = entering
        if self._exit_node:
            self._out = np.empty(leaving, np.float32)
            self._filled = 0

    def left(self) -> Floats | None:
        """Return the states that came out; None where logits are to come.

        Raises:
            RowError: The graph has no such node, or one of another size.
        """
        if self._entering is not None:
            raise RowError(f"no node {self._entry_node!r} of {self._entering.nbytes} bytes")
        if not self._exit_node:
            return None
        if self._filled != self._out.nbytes:
            raise RowError(
                f"node {self._exit_node!r} gave {self._filled} bytes, expected {self._out.nbytes}"
            )
        return self._out

    def _make_call(self) -> Callable[[int, bool, object], bool]:
        native, string_at = self._native, ctypes.string_at
        entry, leave = (f"{name}\0".encode() for name in (self._entry_node, self._exit_node))
        entry_bytes, leave_bytes = len(entry), len(leave)
        has_entry, has_exit = bool(self._entry_node), bool(self._exit_node)
        leave_word = int.from_bytes(leave[:WORD_BYTES].ljust(WORD_BYTES, b"\0"), sys.byteorder)
        words = (ctypes.c_uint64 * WORDS_MAX).from_address(0)  # this process's memory, by address
        name_offset = 0

        def call(tensor: int, is_asked: bool, _: object) -> bool:
            nonlocal name_offset
            if not name_offset:
                name_offset = native.ggml_get_name(tensor) - tensor
            name = tensor + name_offset
            if has_entry and self._entering is not None and string_at(name, entry_bytes) == entry:
                if not is_asked:
                    self._put(tensor)
                return True
            if not has_exit:
                return not is_asked
            if is_asked:
                is_likely = words[name // WORD_BYTES] == leave_word
                return is_likely and string_at(name, leave_bytes) == leave
            self._take(tensor)
            return False

        return call

    def _put(self, tensor: int) -> None:
        states = self._entering
        if states is not None and self._native.ggml_nbytes(tensor) == states.nbytes:
            self._native.ggml_backend_tensor_set(tensor, states.ctypes.data, 0, states.nbytes)
            self._entering = None

    def _take(self, tensor: int) -> None:
        size = self._native.ggml_nbytes(tensor)
        if self._filled + size <= self._out.nbytes:
            address = self._out.ctypes.data + self._filled
            self._native.ggml_backend_tensor_get(tensor, address, 0, size)
        # Too much is counted and not copied; an error raised here would go unheard.
        self._filled += size
