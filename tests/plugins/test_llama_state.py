"""States of llama.cpp taken apart and put together, without the library.

Method: states written here as the library writes them, of two layers each and three slots.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpy.errors import RowError
from swarmpy.plugins.llama.state import StateLayout, first_position, from_tensors, to_tensors

SLOTS = 3
MARK = struct.pack("<I", 0xAF143CD8)


@dataclass(frozen=True, slots=True)
class Form:
    """What a state's parts are like."""

    is_rotated: bool = False
    is_transposed: bool = False
    has_window: bool = False
    is_recurrent: bool = False
    has_values: bool = True

    def state(self, slot: int, end: int, *, window: int = 4, id_step: int = 77) -> bytes:
        """Return a slot's state; the ids of its tokens are multiples of `id_step`."""
        parts = [MARK, words(slot), self._cache(slot, range(end), width=3, id_step=id_step)]
        if self.has_window:
            left = range(max(0, end - window), end)
            parts.append(self._cache(slot, left, width=2, id_step=id_step))
        if self.is_recurrent:
            parts.append(words(1, end - 1, 0, 0, 2))
            parts += [struct.pack("<IQ3f", 0, 12, 1, 2, layer) for layer in range(2)]
        return b"".join(parts)

    def _cache(self, slot: int, positions: range, *, width: int, id_step: int) -> bytes:
        parts = [words(SLOTS, *[0] * slot, len(positions))]
        for position in positions:
            beside = (position, position, id_step * position) if self.is_rotated else ()
            parts.append(words(position, 1, *beside, slot))
        parts.append(words(int(self.is_transposed), 2, 0, 0))
        count = len(positions)
        for layer in range(2):
            numbers = numbers_of(positions, width, layer)
            parts.append(struct.pack("<IQ", 1, 2 * width) + numbers.tobytes())
        for layer in range(2, 4 if self.has_values else 2):
            numbers = numbers_of(positions, width, layer)
            if self.is_transposed:
                parts.append(words(1, 2, width) + numbers.T.tobytes())
            else:
                parts.append(struct.pack("<IQ", 1, 2 * width) + numbers.tobytes())
        assert count == len(numbers)
        return b"".join([*parts, words(*[0] * (SLOTS - 1 - slot))])

    def layout(self) -> StateLayout:
        found = StateLayout.learn(self.state(0, 1), SLOTS, is_recurrent=self.is_recurrent)
        assert found is not None
        return found


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def numbers_of(
    positions: range, width: int, layer: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    columns = np.arange(width) * 0.25 + 100 * layer
    return (np.array(positions)[:, None] + columns).astype(np.float16)


PLAIN = Form()
FORMS = {
    "plain": PLAIN,
    "rotated": Form(is_rotated=True),
    "transposed": Form(is_transposed=True),
    "latent": Form(has_values=False),
    "window": Form(has_window=True),
    "recurrent": Form(is_recurrent=True),
    "rotated, with windows and recurrent": Form(
        is_rotated=True, has_window=True, is_recurrent=True
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("slot", range(SLOTS))
def test_a_state_is_put_together_as_it_was(name: str, slot: int) -> None:
    """But for tokens' ids, which are left out."""
    form = FORMS[name]
    layout, state = form.layout(), form.state(slot, 4)

    again = layout.join(layout.split(state, slot, 4), slot, 4)

    assert again == form.state(slot, 4, id_step=0)
    assert layout.split(again, slot, 4).keys() == layout.split(state, slot, 4).keys()
    assert len(again) == len(state)
    assert words(77) not in again


@pytest.mark.parametrize("name", FORMS)
def test_numbers_are_those_of_the_layers(name: str) -> None:
    found = FORMS[name].layout().split(FORMS[name].state(1, 7), 1, 7)

    assert found["1.keys"].tolist() == numbers_of(range(7), 3, 1).tolist()
    if FORMS[name].has_values:
        assert found["0.values"].tolist() == numbers_of(range(7), 3, 2).tolist()
    if FORMS[name].has_window:
        assert found["second.0.keys"].tolist() == numbers_of(range(3, 7), 2, 0).tolist()
    if FORMS[name].is_recurrent:
        assert found["1.recurrent"].tolist() == [[1, 2, 1]]


def test_what_a_window_no_longer_has_is_put_back_as_zeros() -> None:
    """So the rest lies in the cells it lay in."""
    layout, form = FORMS["window"].layout(), FORMS["window"]
    numbers = layout.split(form.state(0, 9), 0, 9)

    whole = layout.split(layout.join(numbers, 2, 9), 2, 9)

    assert first_position(numbers, layout, 9) == 5
    assert first_position(whole, layout, 9) == 0
    assert not whole["second.1.values"][:5].any()
    assert whole["second.1.values"][5:].tolist() == numbers["second.1.values"].tolist()


@pytest.mark.parametrize("name", FORMS)
def test_sizes_are_those_of_a_position_and_of_the_rest(name: str) -> None:
    form = FORMS[name]
    per_layer = 6 + 6 * form.has_values + form.has_window * (4 + 4 * form.has_values)

    assert form.layout().bytes_per_token == 2 * per_layer
    assert form.layout().fixed_bytes == 24 * form.is_recurrent
    assert form.layout().is_by_position is (not form.has_window and not form.is_recurrent)


@pytest.mark.parametrize("name", FORMS)
def test_a_state_goes_through_tensors(name: str) -> None:
    layout = FORMS[name].layout()
    numbers = layout.split(FORMS[name].state(0, 6), 0, 6)

    moved = from_tensors(layout, 6, to_tensors(layout, numbers, 0, 6))

    assert moved.keys() == numbers.keys()
    assert all(moved[key].tobytes() == numbers[key].tobytes() for key in numbers)


def test_positions_out_of_order_are_refused() -> None:
    state = bytearray(PLAIN.state(0, 4))
    at = state.index(words(2, 1, 0))
    state[at : at + 4] = words(3)

    with pytest.raises(RowError, match="not in order"):
        PLAIN.layout().split(bytes(state), 0, 4)


def test_a_state_of_another_slot_or_end_is_refused() -> None:
    layout, state = PLAIN.layout(), PLAIN.state(1, 4)

    for slot, end in ((0, 4), (1, 5), (1, 3)):
        with pytest.raises(RowError):
            layout.split(state, slot, end)


@pytest.mark.parametrize(
    "state", [b"", MARK, MARK + words(0), PLAIN.state(0, 1)[:-1], PLAIN.state(1, 1)]
)
def test_a_state_of_no_known_form_has_no_layout(state: bytes) -> None:
    assert StateLayout.learn(state, SLOTS, is_recurrent=False) is None


def test_a_form_with_recurrent_layers_is_not_taken_for_one_without() -> None:
    assert StateLayout.learn(PLAIN.state(0, 1), SLOTS, is_recurrent=True) is None
    recurrent = FORMS["recurrent"].state(0, 1)
    assert StateLayout.learn(recurrent, SLOTS, is_recurrent=False) is None


@given(
    st.sampled_from(sorted(FORMS)),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    st.integers(0, 40),
)
def test_any_changed_state_is_split_or_refused(
    name: str, changes: list[tuple[int, int]], cut: int
) -> None:
    state = bytearray(FORMS[name].state(1, 5))
    for at, value in changes:
        state[at % len(state)] = value
    try:
        numbers = FORMS[name].layout().split(bytes(state[: len(state) - cut]), 1, 5)
    except RowError:
        return
    assert not cut
    assert {len(rows) for rows in numbers.values()} <= {1, 4, 5}
