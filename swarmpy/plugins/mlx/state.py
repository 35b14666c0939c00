"""What a slot keeps between steps: one list of mlx-lm caches, and what may be done to it.

Every slot has caches of its own, so a session that joins or leaves never copies anybody else's, and
every architecture can have several slots. Spec: protocols/engine.md, section 3.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cache as caches
from mlx_lm.models.cache import make_prompt_cache

from swarmpy.abc import StateKind
from swarmpy.errors import RowError
from swarmpy.pipeline.finite import is_finite
from swarmpy.plugins.mlx.arrays import to_mlx, to_tensor, wire_type
from swarmpy.proto.tensor import Tensor

SNAPSHOTS_MAX = 8
"""Snapshots of one slot; each keeps a whole state alive."""

CONSTANTS_BYTES_MAX = 64 * 1024
"""JSON of the numbers and names in an exported state: about 100 bytes a layer."""

CONSTANTS_NAME = "constants"

_WINDOWS = (caches.RotatingKVCache, caches.ChunkedKVCache)
_GROWING = (caches.KVCache, caches.ConcatenateKVCache)


def flat_caches(item: object) -> Iterator[object]:
    """Iterate over a cache, or over the caches inside a list of them."""
    if isinstance(item, caches.CacheList):
        for part in item.caches:
            yield from flat_caches(part)
    elif item is not None:
        yield item


def state_kind(kinds: Sequence[type]) -> StateKind:
    """Return what can be done to a state of these kinds of caches."""
    if all(issubclass(kind, _GROWING) for kind in kinds):
        return StateKind.KV
    if all(issubclass(kind, _GROWING + _WINDOWS) for kind in kinds):
        return StateKind.ROLLING
    return StateKind.RECURRENT


@dataclass(slots=True)
class Slot:
    """One session's state in one shard."""

    caches: list[object]
    """As the architecture's forward wants them: also for layers that are elsewhere."""
    end: int = 0
    """Tokens of the sequence the state holds."""
    snapshots: dict[int, tuple[list[object], int]] = field(default_factory=dict)


class SlotStates:
    """Makes and changes the slots of layers that use the caches numbered in `local`."""

    def __init__(self, module: nn.Module, local: Sequence[int]) -> None:
        self._module = module
        self._local = tuple(local)
        self._template: list[object] = self._new_caches()
        self._next_snapshot = 1

    def new(self) -> Slot:
        """Return an empty slot."""
        return Slot(self._new_caches())

    def learn(self, slot: Slot) -> None:
        """Take a used slot as the pattern that imported states must fit."""
        self._template = slot.caches

    def arrays(self, slot: Slot) -> list[mx.array]:
        """Return the state's arrays: what a step must have computed before it ends."""
        return [
            array
            for number in self._local
            for _, array in tree_flatten([slot.caches[number].state])  # type: ignore[attr-defined]
            if isinstance(array, mx.array)
        ]

    def advance(self, slot: Slot, count: int) -> None:
        """Note `count` computed tokens, in the caches of layers elsewhere too: masks read them."""
        slot.end += count
        for part in self._shadows(slot.caches):
            part.offset += count  # type: ignore[attr-defined]

    def truncate(self, slot: Slot, position: int) -> None:
        """Cut the state back to `position`; on an error it is unchanged.

        Raises:
            RowError: The position lies ahead, or what it needs was overwritten.
        """
        if position > slot.end:
            raise RowError(f"position {position} lies beyond the slot's end {slot.end}")
        if position == slot.end:
            return
        if position == 0:
            slot.caches, slot.end = self._new_caches(), 0
            return
        # Cheap: the copies share their arrays' memory.
        cut = copy.deepcopy(slot.caches)
        parts = [part for number in self._local for part in flat_caches(cut[number])]
        if not all(part.is_trimmable() for part in parts):  # type: ignore[attr-defined]
            raise RowError(
                f"this state cannot be cut back to position {position}: restore a snapshot"
            )
        for part in parts:
            part.trim(slot.end - position)  # type: ignore[attr-defined]
            if part.offset != position:  # type: ignore[attr-defined]
                raise RowError(f"position {position} has left the window of this state")
        for part in self._shadows(cut):
            part.offset = position  # type: ignore[attr-defined]
        slot.caches, slot.end = cut, position

    def snapshot(self, slot: Slot) -> int:
        """Keep the present state.

        Raises:
            RowError: The slot has `SNAPSHOTS_MAX` already.
        """
        if len(slot.snapshots) >= SNAPSHOTS_MAX:
            raise RowError(f"the slot already has {SNAPSHOTS_MAX} snapshots")
        number = self._next_snapshot
        self._next_snapshot += 1
        slot.snapshots[number] = (copy.deepcopy(slot.caches), slot.end)
        return number

    def restore(self, slot: Slot, number: int) -> None:
        """Return to a snapshot and forget it.

        Raises:
            RowError: The slot has no such snapshot.
        """
        if number not in slot.snapshots:
            raise RowError(f"the slot has no snapshot {number}")
        slot.caches, slot.end = slot.snapshots.pop(number)

    # Export and import ------------------------------------------------------

    def export(self, slot: Slot, start: int, end: int) -> dict[str, Tensor]:
        """Return the state of positions [start, end) as named tensors.

        Raises:
            RowError: The slot does not hold these positions, or its state is only whole.
        """
        if not 0 <= start < end <= slot.end:
            raise RowError(f"positions [{start}, {end}) of a slot that holds [0, {slot.end})")
        if self._is_growing(slot.caches):
            arrays = {
                name: array[..., start:end, :] for name, array in self._keys_and_values(slot.caches)
            }
            return _tensors(arrays)
        if (start, end) != (0, slot.end):
            raise RowError(f"this state can only be exported whole: [0, {slot.end})")
        arrays, constants = self._split_state(slot.caches)
        tensors = _tensors(arrays)
        text = json.dumps(constants).encode()
        tensors[CONSTANTS_NAME] = Tensor("uint8", (len(text),), text)
        return tensors

    def import_(self, slot: Slot, start: int, end: int, state: Mapping[str, Tensor]) -> None:
        """Put an exported state into a slot that ends at `start`; on an error it is unchanged.

        Raises:
            RowError: The slot ends elsewhere, or the state is none of these layers'.
        """
        if slot.end != start or end <= start:
            raise RowError(f"a state of [{start}, {end}) for a slot that ends at {slot.end}")
        if not all(is_finite(tensor) for tensor in state.values()):
            raise RowError("imported state not finite")
        changed = Slot(copy.deepcopy(slot.caches), slot.end)
        if self._is_growing(self._template):
            self._append(changed.caches, end - start, state)
        elif start:
            raise RowError("this state can only be imported whole, from position 0")
        else:
            self._set_state(changed.caches, end, state)
        mx.eval(self.arrays(changed))
        self.advance(changed, end - start)
        slot.caches, slot.end = changed.caches, changed.end

    def _append(self, prompt_cache: list[object], count: int, state: Mapping[str, Tensor]) -> None:
        expected = dict(self._keys_and_values(self._template))
        if set(state) != set(expected):
            raise RowError(f"a state of {len(state)} tensors, expected {len(expected)}")
        arrays: dict[str, mx.array] = {}
        for name, like in expected.items():
            shape = (*like.shape[:2], count, like.shape[3])
            arrays[name] = _array(name, state[name], like.dtype, shape)
        for number in self._local:
            for index, part in enumerate(flat_caches(prompt_cache[number])):
                name = f"{number}.{index}"
                part.update_and_fetch(arrays[f"{name}.keys"], arrays[f"{name}.values"])  # type: ignore[attr-defined]

    def _set_state(self, prompt_cache: list[object], end: int, state: Mapping[str, Tensor]) -> None:
        arrays, constants = self._split_state(self._template)
        constants = _checked_constants(state.get(CONSTANTS_NAME), constants, end)
        values: dict[str, object] = dict(constants)
        for name, tensor in state.items():
            if name == CONSTANTS_NAME:
                continue
            like = arrays.get(name)
            if like is None:
                raise RowError(f"a state with a tensor {name:.80}, which these layers do not have")
            values[name] = _array(name, tensor, like.dtype, _shape_like(like, tensor.shape))
        if values.keys() != arrays.keys() | constants.keys():
            raise RowError(f"a state of {len(state)} tensors, expected {len(arrays) + 1}")
        for number in self._local:
            prefix = f"{number}."
            items = [(n.removeprefix(prefix), v) for n, v in values.items() if n.startswith(prefix)]
            prompt_cache[number].state = tree_unflatten(items)  # type: ignore[attr-defined]

    def _split_state(
        self, prompt_cache: list[object]
    ) -> tuple[dict[str, mx.array], dict[str, object]]:
        """Return the arrays of a state by name, and everything else in it by name."""
        arrays: dict[str, mx.array] = {}
        constants: dict[str, object] = {}
        for number in self._local:
            for path, value in tree_flatten(prompt_cache[number].state):  # type: ignore[attr-defined]
                if isinstance(value, mx.array):
                    arrays[f"{number}.{path}"] = value
                else:
                    constants[f"{number}.{path}"] = value
        return arrays, constants

    def _keys_and_values(self, prompt_cache: list[object]) -> Iterator[tuple[str, mx.array]]:
        for number in self._local:
            for index, part in enumerate(flat_caches(prompt_cache[number])):
                yield f"{number}.{index}.keys", part.keys  # type: ignore[attr-defined]
                yield f"{number}.{index}.values", part.values  # type: ignore[attr-defined]

    def _is_growing(self, prompt_cache: list[object]) -> bool:
        parts = [part for number in self._local for part in flat_caches(prompt_cache[number])]
        return all(type(part) is caches.KVCache for part in parts)

    # Caches of layers elsewhere ---------------------------------------------

    def _new_caches(self) -> list[object]:
        """Return empty caches, each of a layer elsewhere replaced by a local one of its kind.

        A model may make its mask from a cache whose layer is elsewhere; a local one of its kind has
        the same offset. Where there is none, the empty cache is a shadow: its offset is advanced.
        """
        made: list[object] = list(make_prompt_cache(self._module))
        by_kind: dict[object, object] = {}
        for number in self._local:
            by_kind.setdefault(_kind(made[number]), made[number])
        return [
            item if number in self._local else by_kind.get(_kind(item), item)
            for number, item in enumerate(made)
        ]

    def _shadows(self, prompt_cache: list[object]) -> list[object]:
        local = {id(prompt_cache[number]) for number in self._local}
        return [
            part
            for item in prompt_cache
            if id(item) not in local
            for part in flat_caches(item)
            if isinstance(getattr(part, "offset", None), int)
        ]


def _kind(item: object) -> object:
    """Return what two caches must share for one to stand in for the other in masks."""
    if isinstance(item, caches.CacheList):
        return tuple(_kind(part) for part in item.caches)
    return type(item), getattr(item, "max_size", None), getattr(item, "chunk_size", None)


def _tensors(arrays: Mapping[str, mx.array]) -> dict[str, Tensor]:
    for name, array in arrays.items():
        if wire_type(array.dtype) is None:
            raise RowError(f"state {name} is {array.dtype}, which cannot be exported")
    mx.eval(list(arrays.values()))
    return {name: to_tensor(array, tuple(array.shape)) for name, array in arrays.items()}


def _array(name: str, tensor: Tensor, dtype: mx.Dtype, shape: tuple[int, ...]) -> mx.array:
    if tensor.shape != shape or tensor.dtype != wire_type(dtype):
        expected = f"{wire_type(dtype)} {shape}"
        raise RowError(f"state {name:.80} is {tensor.dtype} {tensor.shape}, expected {expected}")
    return to_mlx(tensor, shape)


def _shape_like(like: mx.array, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape a state must have; keys and values (B, H, T, D) may hold any positions."""
    if like.ndim == 4 and len(shape) == 4:
        return (*like.shape[:2], shape[2], like.shape[3])
    return tuple(like.shape)


def _checked_constants(
    tensor: Tensor | None, template: Mapping[str, object], end: int
) -> dict[str, object]:
    """Return an exported state's numbers; names of classes must be the ones of this model.

    Raises:
        RowError: They are not, or a number is outside what `end` positions can give.
    """
    if tensor is None or len(tensor.data) > CONSTANTS_BYTES_MAX:
        raise RowError("a state without its constants, or with too many")
    try:
        constants = json.loads(bytes(tensor.data))
    except (ValueError, RecursionError) as error:
        raise RowError(f"a state whose constants are not JSON: {error}") from error
    if not isinstance(constants, dict) or constants.keys() != template.keys():
        raise RowError("a state of other layers: its constants have other names")
    for name, own in template.items():
        value: object = constants[name]
        if type(value) is not type(own):
            raise RowError(f"state {name} is {type(value).__name__}, not {type(own).__name__}")
        if isinstance(own, int) and isinstance(value, int):
            if not 0 <= value <= max(own, end):
                raise RowError(f"state {name} is {value}, at most {max(own, end)} is possible")
        elif value != own:
            raise RowError(f"state {name} is {value!r:.40}, expected {own!r:.40}")
    return constants
