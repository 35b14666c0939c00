"""A sequence's keys and values as named tensors, from and to the library's own form.

The library parses what `llama_state_seq_set_data` is given. A state that came from a peer is
therefore never handed on: its numbers are put into bytes of which everything else is written here,
after a state the library itself gave. So also any range of positions can be taken out.
Layout, in 32-bit words: a mark, the slot, the number of slots, and for each slot its number of
cells, 0 for all others. Behind that of this one: three words a cell (position, 1, slot), four more,
then keys layer by layer and values layer by layer, each with its type, its bytes a position (64
bits) and its numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarmpy.errors import RowError
from swarmpy.pipeline.finite import is_finite
from swarmpy.proto.tensor import TENSOR_BYTES_MAX, Tensor

MARK_BYTES = 4
WORD_BYTES = 4
MIDDLE_BYTES = 16
BLOCK_HEAD = struct.Struct("<IQ")

F16_TYPE = 1
"""ggml's number of the type keys and values are kept in."""

Numbers = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What surrounds the numbers in the states of one context, learned from one of them."""

    _slots: int
    _mark: bytes
    _middle: bytes
    _row_bytes: tuple[int, ...]
    """Bytes a position, of each layer's keys and then of each layer's values."""

    @classmethod
    def learn(cls, state: bytes, slots: int) -> KvLayout | None:
        """Return the layout, from a state of one position in slot 0; None if it is of another form.

        Windows and recurrent layers have others.
        """
        layout = cls(slots, state[:MARK_BYTES], b"", ())
        middle = len(layout._before(0, 1))
        at, end = middle + MIDDLE_BYTES, len(state) - len(layout._after(0))
        rows: list[int] = []
        while at + BLOCK_HEAD.size <= end:
            kind, row_bytes = BLOCK_HEAD.unpack_from(state, at)
            if kind != F16_TYPE or row_bytes % 2:
                return None
            at += BLOCK_HEAD.size + row_bytes
            rows.append(row_bytes)
        if at != end or len(rows) % 2:
            return None
        layout = cls(slots, layout._mark, state[middle : middle + MIDDLE_BYTES], tuple(rows))
        return layout if layout._is_of(state, 0, 1) else None

    def names(self) -> Iterator[tuple[str, int]]:
        """Yield each tensor's name and numbers a position, in order."""
        layers = len(self._row_bytes) // 2
        for index, row_bytes in enumerate(self._row_bytes):
            kind = "keys" if index < layers else "values"
            yield f"{index % layers}.{kind}", row_bytes // 2

    def split(self, state: bytes, slot: int, count: int) -> dict[str, Numbers]:
        """Return the numbers (T, W) of a slot's state of `count` positions from 0.

        Raises:
            RowError: The state holds other positions, or in another order.
        """
        if not self._is_of(state, slot, count):
            raise RowError("the slot's positions are not in order: its state cannot be moved")
        at = len(self._before(slot, count)) + MIDDLE_BYTES
        found = {}
        for name, width in self.names():
            at += BLOCK_HEAD.size
            numbers = np.frombuffer(state, np.float16, count * width, at)
            found[name] = numbers.reshape(count, width)
            at += numbers.nbytes
        return found

    def join(self, numbers: Mapping[str, Numbers], slot: int) -> bytes:
        """Return the state of a slot of which `split` gives these numbers."""
        count = len(next(iter(numbers.values())))
        parts = [self._before(slot, count), self._middle]
        for (name, _), row_bytes in zip(self.names(), self._row_bytes, strict=True):
            parts += [BLOCK_HEAD.pack(F16_TYPE, row_bytes), numbers[name].tobytes()]
        return b"".join([*parts, self._after(slot)])

    def _is_of(self, state: bytes, slot: int, count: int) -> bool:
        """Whether a state is of this slot and holds positions [0, count) in order."""
        before, after = self._before(slot, count) + self._middle, self._after(slot)
        numbers = sum(BLOCK_HEAD.size + count * row_bytes for row_bytes in self._row_bytes)
        is_long = len(state) == len(before) + numbers + len(after)
        return is_long and state.startswith(before) and state.endswith(after)

    def _before(self, slot: int, count: int) -> bytes:
        cells = b"".join(struct.pack("<iII", position, 1, slot) for position in range(count))
        begin = struct.pack("<II", slot, self._slots) + bytes(WORD_BYTES * slot)
        return b"".join([self._mark, begin, struct.pack("<I", count), cells])

    def _after(self, slot: int) -> bytes:
        return bytes(WORD_BYTES * (self._slots - 1 - slot))


def to_tensors(numbers: Mapping[str, Numbers], start: int, end: int) -> dict[str, Tensor]:
    """Return positions [start, end) as tensors.

    Raises:
        RowError: One would be too large for a frame.
    """
    tensors = {}
    for name, array in numbers.items():
        part = np.ascontiguousarray(array[start:end])
        if part.nbytes > TENSOR_BYTES_MAX:
            raise RowError("the state is too large for one frame: export fewer positions at a time")
        tensors[name] = Tensor("float16", part.shape, part.reshape(-1).view(np.uint8).data)
    return tensors


def from_tensors(layout: KvLayout, count: int, state: Mapping[str, Tensor]) -> dict[str, Numbers]:
    """Return the numbers of `count` positions, checked.

    Raises:
        RowError: The tensors are none of these layers', or not finite.
    """
    expected = dict(layout.names())
    if state.keys() != expected.keys():
        raise RowError(f"a state of {len(state)} tensors, expected {len(expected)}")
    found = {}
    for name, width in expected.items():
        tensor, shape = state[name], (count, width)
        if tensor.dtype != "float16" or tensor.shape != shape:
            raise RowError(f"state {name} is {tensor.dtype} {tensor.shape}, expected {shape}")
        if len(tensor.data) != 2 * count * width or not is_finite(tensor):
            raise RowError(f"imported state {name} is cut off, or not finite")
        found[name] = np.frombuffer(tensor.data, np.float16).reshape(shape)
    return found
