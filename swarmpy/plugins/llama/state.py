"""A sequence's state as named tensors, from and to the library's own form.

The library parses what `llama_state_seq_set_data` is given. A state that came from a peer is
therefore never handed on: its numbers are put into bytes of which everything else is written here,
after a state the library itself gave.

Layout, in 32-bit words: a mark and the slot, then one part for each of the context's memories. That
of a cache: the number of slots, and for each slot its number of cells, 0 for all others; behind
that of this one, each cell's position, a 1, where the model rotates by them its row and column
(which are its position, of text) and its token's id, and the slot; then four words, keys layer by
layer and values layer by layer, each with its type, its bytes a position (64 bits) and its numbers.
A second cache is that of the layers with a window, of which the library gives only the positions
that a next token can see, or that of an indexer. The part of recurrent layers: a 1, the last
position, a 0, two words, and blocks as of one position.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarmpy.errors import RowError
from swarmpy.pipeline.finite import is_finite
from swarmpy.proto.tensor import TENSOR_BYTES_MAX, DType, Tensor

MARK_BYTES = 4
WORD_BYTES = 4
MIDDLE_WORDS = 4
BLOCK_HEAD = struct.Struct("<IQ")
TRANSPOSED_HEAD = struct.Struct("<III")
"""Type, bytes of a number, numbers a position: of values where attention is not computed at once,
which the first of the four words says."""

CELL_WORDS = (3, 6)
"""Words of a cell: its position, or with what the model rotates by beside it."""

TOKEN_ID_WORD = 4
"""Where a cell of six words has its token's id. No model of ours reads it, and it is not moved."""

F32_TYPE, F16_TYPE = 0, 1
"""ggml's numbers of the types that recurrent states, and keys and values, are kept in."""

Numbers = npt.NDArray[np.floating]

_DTYPES: Mapping[int, type[np.float16] | type[np.float32]] = {
    F32_TYPE: np.float32,
    F16_TYPE: np.float16,
}


@dataclass(frozen=True, slots=True)
class Block:
    """One tensor of a state: keys or values of a layer, or what a recurrent layer keeps."""

    name: str
    kind: int
    row_bytes: int
    """Of one position; all there is, of a recurrent layer."""
    is_transposed: bool = False
    """Whether it lies number by number, and not position by position."""

    @property
    def width(self) -> int:
        """Numbers a position."""
        return self.row_bytes // np.dtype(self.dtype).itemsize

    @property
    def dtype(self) -> type[np.float16] | type[np.float32]:
        return _DTYPES[self.kind]

    def head(self) -> bytes:
        """Return what precedes the numbers."""
        if self.is_transposed:
            return TRANSPOSED_HEAD.pack(self.kind, self.row_bytes // self.width, self.width)
        return BLOCK_HEAD.pack(self.kind, self.row_bytes)

    def read(self, state: bytes, at: int, count: int) -> Numbers:
        """Return the numbers (T, W) of `count` positions."""
        if at + count * self.row_bytes > len(state):
            raise RowError(f"a state of {len(state)} bytes is cut off")
        items: Numbers = np.frombuffer(state, self.dtype, count * self.width, at)
        if self.is_transposed:
            return items.reshape(self.width, count).T
        return items.reshape(count, self.width)

    def write(self, numbers: Mapping[str, Numbers], count: int) -> bytes:
        """Return the bytes of `count` positions, those missing at the front as zeros."""
        if not self.row_bytes:
            return b""
        given = numbers[self.name]
        rows = np.concatenate([np.zeros((count - len(given), self.width), self.dtype), given])
        return (rows.T if self.is_transposed else rows).tobytes()


@dataclass(frozen=True, slots=True)
class _Cache:
    """The part of a state that keeps keys and values."""

    cell_words: int
    middle: bytes
    blocks: tuple[Block, ...]

    def counts(self, slot: int, slots: int, count: int) -> bytes:
        """Return how many cells there are of each slot, up to this one."""
        return struct.pack("<I", slots) + bytes(WORD_BYTES * slot) + struct.pack("<I", count)

    def cells(self, slot: int, positions: range) -> bytes:
        """Return the cells of these positions, with no token's id, and the words behind them."""
        table = np.zeros((len(positions), self.cell_words), "<u4")
        table[:, :] = np.arange(positions.start, positions.stop, dtype="<u4")[:, None]
        table[:, 1], table[:, TOKEN_ID_WORD:], table[:, -1] = 1, 0, slot
        return table.tobytes() + self.middle

    def check(self, state: bytes, at: int, slot: int, positions: range) -> int:
        """Return where the numbers of these positions begin, in a state whose cells begin here."""
        end = at + len(positions) * self.cell_words * WORD_BYTES
        table = np.frombuffer(state[at:end], "<u4").reshape(-1, self.cell_words).copy()
        table[:, TOKEN_ID_WORD:-1] = 0
        _expect(
            table.tobytes() + state[end : end + len(self.middle)], 0, self.cells(slot, positions)
        )
        return end + len(self.middle)

    def after(self, slot: int, slots: int) -> bytes:
        return bytes(WORD_BYTES * (slots - 1 - slot))


@dataclass(frozen=True, slots=True)
class StateLayout:
    """What surrounds the numbers in the states of one context, learned from one of them."""

    _slots: int
    _mark: bytes
    _caches: tuple[_Cache, ...]
    _recurrent: _Cache | None
    """Of one cell, that of the last position."""

    @classmethod
    def learn(cls, state: bytes, slots: int, *, is_recurrent: bool) -> StateLayout | None:
        """Return the layout, from a state of one position in slot 0; None if that is unknown.

        Args:
            is_recurrent: Whether there are recurrent layers, whose part ends the state.
        """
        mark, at = state[:MARK_BYTES], MARK_BYTES + WORD_BYTES
        if state[MARK_BYTES:at] != bytes(WORD_BYTES):
            return None
        for caches, recurrent in _read(state, at, slots, ()):
            if is_recurrent is (recurrent is not None):
                return cls(slots, mark, caches, recurrent)
        return None

    @property
    def is_by_position(self) -> bool:
        """Whether any range of positions can be taken out; else a state is moved whole."""
        return len(self._caches) == 1 and self._recurrent is None

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the context keeps of each position."""
        return sum(block.row_bytes for cache in self._caches for block in cache.blocks)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that the context keeps of a sequence, whatever its length."""
        return sum(block.row_bytes for block in self._recurrent.blocks) if self._recurrent else 0

    def blocks(self) -> Iterator[tuple[Block, bool]]:
        """Yield each tensor that holds anything, and whether it has a row a position."""
        for cache in self._caches:
            yield from ((block, True) for block in cache.blocks if block.row_bytes)
        if self._recurrent:
            yield from ((block, False) for block in self._recurrent.blocks if block.row_bytes)

    def split(self, state: bytes, slot: int, end: int) -> dict[str, Numbers]:
        """Return the numbers of a slot's state of positions [0, end).

        Returns:
            By name: (T, W), the last T positions, T = end but in windows; (1, W) of recurrent ones.

        Raises:
            RowError: The state holds other positions, or in another order.
        """
        found: dict[str, Numbers] = {}
        at = _expect(state, 0, self._mark + struct.pack("<I", slot))
        for cache in self._caches:
            count_at = at + WORD_BYTES * (1 + slot)
            count = int.from_bytes(state[count_at : count_at + WORD_BYTES], "little")
            if count > end:
                raise RowError(f"a state of {count} positions in a slot of {end}")
            at = _expect(state, at, cache.counts(slot, self._slots, count))
            at = cache.check(state, at, slot, range(end - count, end))
            at = _take(state, at, cache.blocks, count, found)
            at = _expect(state, at, cache.after(slot, self._slots))
        if self._recurrent:
            at = _expect(state, at, self._recurrent_head(end))
            at = _take(state, at, self._recurrent.blocks, 1, found)
        if at != len(state):
            raise RowError(f"a state of {len(state)} bytes, expected {at}")
        return found

    def join(self, numbers: Mapping[str, Numbers], slot: int, end: int) -> bytes:
        """Return the state of a slot of which `split` gives these numbers.

        Positions that are missing before them are there as zeros, which no token sees: the others
        lie in the cells they were in, and attention adds them up in the same order.
        """
        parts = [self._mark, struct.pack("<I", slot)]
        for cache in self._caches:
            parts += [cache.counts(slot, self._slots, end), cache.cells(slot, range(end))]
            for block in cache.blocks:
                parts += [block.head(), block.write(numbers, end)]
            parts.append(cache.after(slot, self._slots))
        if self._recurrent:
            parts.append(self._recurrent_head(end))
            for block in self._recurrent.blocks:
                parts += [block.head(), block.write(numbers, 1)]
        return b"".join(parts)

    def zeros(self) -> dict[str, Numbers]:
        """Return the numbers of one position that say nothing."""
        return {block.name: np.zeros((1, block.width), block.dtype) for block, _ in self.blocks()}

    def _recurrent_head(self, end: int) -> bytes:
        assert self._recurrent is not None
        return struct.pack("<III", 1, end - 1, 0) + self._recurrent.middle


def first_position(numbers: Mapping[str, Numbers], layout: StateLayout, end: int) -> int:
    """Return the first position that all of a state's caches hold; 0 where nothing is missing."""
    rows = [len(numbers[block.name]) for block, is_row in layout.blocks() if is_row]
    return end - min(rows, default=end)


# Reading ----------------------------------------------------------------------


def _read(
    state: bytes, at: int, slots: int, caches: tuple[_Cache, ...]
) -> Iterator[tuple[tuple[_Cache, ...], _Cache | None]]:
    """Yield every way to read the rest of a state of one position in slot 0."""
    if at == len(state) and caches:
        yield caches, None
        return
    for cache, end in _caches_at(state, at, slots, len(caches)):
        yield from _read(state, end, slots, (*caches, cache))
    head = struct.pack("<III", 1, 0, 0)
    if state.startswith(head, at):
        at += len(head)
        middle = state[at : at + 2 * WORD_BYTES]
        blocks, end = _blocks_at(state, at + len(middle), "recurrent", len(state))
        if end == len(state) and blocks:
            yield caches, _Cache(0, middle, blocks)


def _caches_at(state: bytes, at: int, slots: int, number: int) -> Iterator[tuple[_Cache, int]]:
    """Yield every cache that may begin here, and where it ends."""
    prefix = "second." if number else ""
    for cell_words in CELL_WORDS:
        start = at + WORD_BYTES * (2 + cell_words)
        middle = state[start : start + MIDDLE_WORDS * WORD_BYTES]
        empty = _Cache(cell_words, middle, ())
        if len(middle) < MIDDLE_WORDS * WORD_BYTES:
            continue
        if not state.startswith(empty.counts(0, slots, 1) + empty.cells(0, range(1)), at):
            continue
        layers = int.from_bytes(middle[WORD_BYTES : 2 * WORD_BYTES], "little")
        keys, middle_end = _blocks_at(state, start + len(middle), f"{prefix}keys", layers)
        is_transposed = middle[:WORD_BYTES] != bytes(WORD_BYTES)
        values, end = _blocks_at(
            state, middle_end, f"{prefix}values", layers, is_transposed=is_transposed
        )
        after = empty.after(0, slots)
        for blocks, stop in ((keys + values, end), (keys, middle_end)):
            is_whole = len(keys) == layers and len(blocks) in (layers, 2 * layers)
            are_halves = all(block.kind == F16_TYPE for block in blocks)
            if is_whole and are_halves and state.startswith(after, stop):
                yield _Cache(cell_words, middle, blocks), stop + len(after)


def _blocks_at(
    state: bytes, at: int, name: str, most: int, *, is_transposed: bool = False
) -> tuple[tuple[Block, ...], int]:
    """Return blocks of one position, as many as there are, and where they end."""
    blocks: list[Block] = []
    while len(blocks) < most and at + BLOCK_HEAD.size <= len(state):
        if is_transposed:
            kind, item_bytes, width = TRANSPOSED_HEAD.unpack_from(state, at)
            row_bytes = item_bytes * width
        else:
            kind, row_bytes = BLOCK_HEAD.unpack_from(state, at)
        end = at + BLOCK_HEAD.size + row_bytes
        if kind not in _DTYPES or row_bytes % np.dtype(_DTYPES[kind]).itemsize or end > len(state):
            break
        blocks.append(Block(_block_name(name, len(blocks)), kind, row_bytes, is_transposed))
        at = end
    return tuple(blocks), at


def _block_name(name: str, index: int) -> str:
    prefix, _, kind = name.rpartition(".")
    return f"{prefix}.{index}.{kind}".lstrip(".")


def _expect(state: bytes, at: int, expected: bytes) -> int:
    """Return where a state goes on behind bytes that are known."""
    if not state.startswith(expected, at):
        raise RowError("the slot's positions are not in order: its state cannot be moved")
    return at + len(expected)


def _take(
    state: bytes, at: int, blocks: tuple[Block, ...], count: int, found: dict[str, Numbers]
) -> int:
    """Put blocks' numbers to those found, and return where the state goes on."""
    for block in blocks:
        at = _expect(state, at, block.head())
        if block.row_bytes:
            found[block.name] = block.read(state, at, count)
            at += count * block.row_bytes
    return at


# Tensors ----------------------------------------------------------------------


def to_tensors(
    layout: StateLayout, numbers: Mapping[str, Numbers], start: int, end: int
) -> dict[str, Tensor]:
    """Return positions [start, end) as tensors; a state that is not by position, whole.

    Raises:
        RowError: One would be too large for a frame.
    """
    tensors = {}
    for name, array in numbers.items():
        part = np.ascontiguousarray(array[start:end] if layout.is_by_position else array)
        if part.nbytes > TENSOR_BYTES_MAX:
            raise RowError("the state is too large for one frame: export fewer positions at a time")
        dtype: DType = "float16" if part.dtype == np.float16 else "float32"
        tensors[name] = Tensor(dtype, part.shape, part.reshape(-1).view(np.uint8).data)
    return tensors


def from_tensors(
    layout: StateLayout,
    count: int,
    state: Mapping[str, Tensor],
    *,
    window_rows: Callable[[int], int] | None = None,
) -> dict[str, Numbers]:
    """Return the numbers of `count` positions, checked; of fewer, the last, where a window ends.

    Args:
        window_rows: How many positions of so many the second cache holds; None: any number will do.

    Raises:
        RowError: The tensors are none of these layers', or not finite.
    """
    expected = list(layout.blocks())
    if state.keys() != {block.name for block, _ in expected}:
        raise RowError(f"a state of {len(state)} tensors, expected {len(expected)}")
    found: dict[str, Numbers] = {}
    for block, is_row in expected:
        tensor, rows = state[block.name], count if is_row else 1
        if is_row and block.name.startswith("second.") and len(tensor.shape) == 2:
            rows = window_rows(count) if window_rows else min(max(1, tensor.shape[0]), count)
        shape = (rows, block.width)
        dtype = np.dtype(block.dtype)
        if tensor.dtype != dtype.name or tensor.shape != shape:
            raise RowError(f"state {block.name} is {tensor.dtype} {tensor.shape}, expected {shape}")
        if len(tensor.data) != rows * block.row_bytes or not is_finite(tensor):
            raise RowError(f"imported state {block.name} is cut off, or not finite")
        found[block.name] = np.frombuffer(tensor.data, dtype).reshape(shape)
    return found
