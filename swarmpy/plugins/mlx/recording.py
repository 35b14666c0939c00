"""Finds how an architecture can be cut, from lazy forwards that are never evaluated.

Every layer object is re-classed so that its calls can be watched and replaced; the architecture's
own forward does the rest: embedding, masks, positions, norm and head. While recording, each layer's
outputs are replaced by fresh stand-ins, so that in MLX's graph everything a layer depends on is
either a parameter, the token ids, or some earlier layer's stand-in. There is no code for any single
architecture here. Spec: protocols/engine.md, section 4.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import cache as caches
from mlx_lm.models.cache import make_prompt_cache

from swarmpy.errors import ModelRefused
from swarmpy.plugins.mlx.arrays import wire_type
from swarmpy.plugins.mlx.state import flat_caches
from swarmpy.proto.tensor import DIMENSIONS_MAX, TENSORS_MAX, TensorSpec

RECORDED_COUNTS = ((3,), (5,), (3, 2))
"""Token counts of the recorded forwards; the last is two steps, to tell shapes that grow with the
sequence from shapes that grow with the step. Only the last step of each is looked at."""

Tree = object
"""What a layer returns: an array, or tuples, lists and dicts of arrays and constants."""


class LayerCalls(Protocol):
    """Decides what a call of a layer does; recording and running differ in this only."""

    def call(
        self, index: int, compute: Callable[[], Tree], arguments: Sequence[object]
    ) -> Tree: ...


class Layers:
    """A model's layer objects, re-classed so that their calls go through `calls`."""

    def __init__(self, module: nn.Module) -> None:
        """Re-class the layers.

        Raises:
            ModelRefused: The model shows no list of layers.
        """
        self.calls: LayerCalls | None = None
        self.objects: list[nn.Module] = list(getattr(module, "layers", ()) or ())
        if not self.objects or not all(isinstance(layer, nn.Module) for layer in self.objects):
            raise ModelRefused(f"{type(module).__module__} shows no list of layers to cut")
        if len({id(layer) for layer in self.objects}) != len(self.objects):
            raise ModelRefused("the model uses one layer in several places")
        for index, layer in enumerate(self.objects):
            layer.__class__ = _watched_class(type(layer))
            layer.__dict__["_watch"] = (self, index)

    def __len__(self) -> int:
        return len(self.objects)


_watched_classes: dict[type, type] = {}


def _watched_class(kind: type) -> type:
    """Return a subclass of a layer's class whose calls go through its `Layers`."""
    if kind in _watched_classes:
        return _watched_classes[kind]

    def __call__(self: nn.Module, *args: object, **kwargs: object) -> Tree:
        layers, index = self.__dict__["_watch"]
        return layers.calls.call(
            index, lambda: kind.__call__(self, *args, **kwargs), [*args, *kwargs.values()]
        )

    watched = type(f"Watched{kind.__name__}", (kind,), {"__call__": __call__})
    _watched_classes[kind] = watched
    return watched


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of a layer's output: its type, and its shape (-1 stands for the token count)."""

    dtype: mx.Dtype
    shape: tuple[int, ...] | None
    """None where it follows no rule of the step alone: such a leaf cannot cross a cut."""

    def shape_for(self, count: int) -> tuple[int, ...]:
        """Return the shape for a step of `count` tokens."""
        assert self.shape is not None
        return tuple(count if size == -1 else size for size in self.shape)

    @property
    def has_batch(self) -> bool:
        """Whether the first dimension is the batch of one, which the wire leaves out."""
        return self.shape is not None and len(self.shape) > 1 and self.shape[0] == 1

    @property
    def spec(self) -> TensorSpec | None:
        """What the wire carries of it, None where it cannot."""
        name = wire_type(self.dtype)
        if name is None or self.shape is None:
            return None
        shape = self.shape[1:] if self.has_batch else self.shape
        return TensorSpec(name, shape) if len(shape) <= DIMENSIONS_MAX else None


@dataclass(frozen=True, slots=True)
class Needs:
    """What some output depends on."""

    parameters: frozenset[str]
    leaves: frozenset[tuple[int, int]]
    """(layer, leaf) of earlier layers."""
    token_ids: bool

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.parameters | other.parameters,
            self.leaves | other.leaves,
            self.token_ids or other.token_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """How one architecture's layers hang together."""

    trees: tuple[Tree, ...]
    """By layer: its output, arrays replaced by leaves."""
    leaves: tuple[tuple[Leaf, ...], ...]
    """By layer: the leaves of that tree in order."""
    layer_needs: tuple[Needs, ...]
    head_needs: Needs
    own_parameters: tuple[frozenset[str], ...]
    """By layer: the parameters of the layer object itself."""
    caches: tuple[frozenset[int], ...]
    """By layer: indexes of the caches it uses."""
    cache_bytes: tuple[tuple[int, int], ...]
    """By cache: bytes a token, and bytes that do not grow."""
    cache_kinds: tuple[type, ...]
    """Every kind of cache in use, those inside lists included."""
    vocabulary_size: int
    keeps_state_itself: bool
    """Whether a forward changes the model object: then only one sequence can run at a time."""
    carried: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """By allowed cut: the leaves of the layer before it that cross."""

    @property
    def layer_count(self) -> int:
        return len(self.leaves)

    def wire_spec(self, cut: int) -> tuple[TensorSpec, ...]:
        """Return what crosses an allowed cut."""
        specs = (self.leaves[cut - 1][index].spec for index in self.carried[cut])
        return tuple(spec for spec in specs if spec is not None)

    def needs(self, start: int, end: int) -> Needs:
        """Return what the output and the state of layers [start, end) depend on."""
        needed = self.layer_needs[start]
        for index in range(start + 1, end):
            needed |= self.layer_needs[index]
        return needed | self.head_needs if end == self.layer_count else needed


def record(module: nn.Module, layers: Layers) -> Recording:
    """Run the model lazily a few times and note what each layer gets, gives and depends on.

    Raises:
        ModelRefused: The layers are not each called once and in order.
    """
    parameters = dict(tree_flatten(module.parameters()))
    first = _Forward(module, layers, parameters, RECORDED_COUNTS[0])
    # Compared from here on: what a module works out once and keeps is no session's state.
    before = _own_state(module)
    others = [_Forward(module, layers, parameters, counts) for counts in RECORDED_COUNTS[1:]]
    forwards = [first, *others]
    leaves = tuple(
        tuple(_leaf(arrays) for arrays in zip(*(f.outputs[index] for f in forwards), strict=True))
        for index in range(len(layers))
    )
    needs = [forward.needs for forward in forwards]
    layer_needs = tuple(needs[0][i] | needs[1][i] | needs[2][i] for i in range(len(layers)))
    names = {id(array): name for name, array in parameters.items()}
    own = tuple(
        frozenset(names[id(array)] for _, array in tree_flatten(layer.parameters()))
        for layer in layers.objects
    )
    recorded = Recording(
        trees=tuple(first.trees),
        leaves=leaves,
        layer_needs=layer_needs,
        head_needs=needs[0][-1] | needs[1][-1] | needs[2][-1],
        own_parameters=own,
        caches=tuple(frozenset(used) for used in first.caches),
        cache_bytes=tuple(_cache_bytes(item) for item in forwards[-1].prompt_cache),
        cache_kinds=tuple(
            {type(c): None for item in first.prompt_cache for c in flat_caches(item)}
        ),
        vocabulary_size=int(first.logits.shape[-1]),
        keeps_state_itself=_own_state(module) != before,
    )
    return replace(recorded, carried=_allowed_cuts(recorded))


class _Forward:
    """One recorded forward; `call` sees every layer's call in it."""

    def __init__(
        self,
        module: nn.Module,
        layers: Layers,
        parameters: Mapping[str, mx.array],
        counts: Sequence[int],
    ) -> None:
        layers.calls = self
        self.prompt_cache = make_prompt_cache(module)
        for count in counts:
            self.outputs: list[list[mx.array]] = []
            self.stand_ins: list[list[mx.array]] = []
            self.trees: list[Tree] = []
            self.caches: list[set[int]] = []
            token_ids = mx.zeros((1, count), mx.int32)
            self.logits: mx.array = module(token_ids, cache=self.prompt_cache)
        layers.calls = None
        if len(self.outputs) != len(layers):
            raise ModelRefused(f"{len(self.outputs)} calls of {len(layers)} layers")
        self.needs = self._find_needs(parameters, token_ids)

    def call(self, index: int, compute: Callable[[], Tree], arguments: Sequence[object]) -> Tree:
        if index != len(self.outputs):
            raise ModelRefused(f"layer {index} is called out of order")
        used = {
            number
            for number, item in enumerate(self.prompt_cache)
            if item is not None and any(argument is item for argument in arguments)
        }
        tree = compute()
        self.outputs.append(_arrays(tree))
        self.caches.append(used)
        stand_in = tree_map(_stand_in, tree)
        self.stand_ins.append(_arrays(stand_in))
        self.trees.append(stand_in)
        return stand_in

    def _find_needs(self, parameters: Mapping[str, mx.array], token_ids: mx.array) -> list[Needs]:
        """Return what each layer's output and caches, and then the logits, depend on."""
        sources: dict[str, mx.array] = {"t": token_ids}
        names = list(parameters)
        sources |= {f"p{number}": parameters[name] for number, name in enumerate(names)}
        for layer, arrays in enumerate(self.stand_ins):
            sources |= {f"s{layer}_{leaf}": array for leaf, array in enumerate(arrays)}
        targets = [
            [*arrays, *(a for number in used for a in _arrays(self.prompt_cache[number].state))]
            for arrays, used in zip(self.outputs, self.caches, strict=True)
        ]
        found = _reachable(sources, [*targets, [self.logits]])
        return [_needs(reached, names) for reached in found]


def _needs(reached: set[str], names: Sequence[str]) -> Needs:
    leaves = (name[1:].split("_") for name in reached if name[0] == "s")
    return Needs(
        frozenset(names[int(name[1:])] for name in reached if name[0] == "p"),
        frozenset((int(layer), int(leaf)) for layer, leaf in leaves),
        "t" in reached,
    )


def _reachable(
    sources: Mapping[str, mx.array], targets: Sequence[Sequence[mx.array]]
) -> list[set[str]]:
    """Return for each group of targets which sources it depends on; nothing is computed."""
    names = {
        f"o{group}_{n}": a for group, arrays in enumerate(targets) for n, a in enumerate(arrays)
    }
    # An array that is both (a layer that returns what it got) can have only one name.
    by_id = {id(array): name for name, array in sources.items()}
    text = io.StringIO()
    kept = {name: array for name, array in names.items() if id(array) not in by_id}
    mx.export_to_dot(text, list(kept.values()) or [mx.array(0)], **sources, **kept)
    inputs = _inputs_by_array(text.getvalue())
    found = []
    for group, arrays in enumerate(targets):
        todo = [by_id.get(id(array), f"o{group}_{n}") for n, array in enumerate(arrays)]
        seen: set[str] = set()
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += inputs.get(name, ())
        found.append({name for name in seen if name in sources})
    return found


def _inputs_by_array(dot: str) -> dict[str, list[str]]:
    """Return for each array in MLX's drawing of a graph the arrays it is computed from.

    An operation is drawn as a line with its label, then an edge from each input and one to each
    output. Its number is no name: calls of one compiled function share it.
    """
    inputs: dict[str, list[str]] = {}
    operation: list[str] = []
    for line in dot.splitlines():
        if "[label" in line:
            operation = []
        elif match := _EDGE.match(line):
            source, target = match.groups()
            if target.isdigit():
                operation.append(source)
            else:
                inputs[target] = operation
    return inputs


_EDGE = re.compile(r'^"?(\w+)"? -> "?(\w+)"?$')


def _allowed_cuts(recording: Recording) -> dict[int, tuple[int, ...]]:
    """Return the cuts at which only the leaves of the layer before cross, and which of them do."""
    count = recording.layer_count
    needs = (*recording.layer_needs, recording.head_needs)
    # A range is sent what the layer before it gave: whatever needs something older must not be
    # cut off from where that comes from.
    bad = {
        cut
        for index, needed in enumerate(needs)
        for source, _ in needed.leaves
        for cut in range(source + 2, index + 1)
    }
    allowed: dict[int, tuple[int, ...]] = {}
    for cut in range(1, count):
        used_before = frozenset[int]().union(*recording.caches[:cut])
        used_after = frozenset[int]().union(*recording.caches[cut:])
        if cut in bad or used_before & used_after:
            continue
        crossing = {leaf for needed in needs[cut:] for j, leaf in needed.leaves if j == cut - 1}
        is_known = all(recording.leaves[cut - 1][leaf].spec is not None for leaf in crossing)
        if crossing and is_known and len(crossing) <= TENSORS_MAX:
            allowed[cut] = tuple(sorted(crossing))
    return allowed


def _leaf(arrays: Sequence[mx.array]) -> Leaf:
    """Return the rule behind one leaf's shapes in the recorded forwards."""
    counts = tuple(steps[-1] for steps in RECORDED_COUNTS)
    shapes = [array.shape for array in arrays]
    if len({len(shape) for shape in shapes}) != 1:
        return Leaf(arrays[0].dtype, None)
    rule: list[int] = []
    for sizes in zip(*shapes, strict=True):
        if len(set(sizes)) == 1:
            rule.append(sizes[0])
        elif sizes == counts:
            rule.append(-1)
        else:
            return Leaf(arrays[0].dtype, None)
    return Leaf(arrays[0].dtype, tuple(rule))


def _stand_in(value: object) -> object:
    return mx.zeros(value.shape, value.dtype) if isinstance(value, mx.array) else value


def _arrays(tree: Tree) -> list[mx.array]:
    return [value for _, value in tree_flatten([tree]) if isinstance(value, mx.array)]


# State ----------------------------------------------------------------------


def _cache_bytes(item: object) -> tuple[int, int]:
    """Return a cache's bytes a token and the bytes that do not grow with tokens."""
    per_token = fixed = 0
    for part in flat_caches(item):
        if isinstance(part, (caches.KVCache, caches.RotatingKVCache, caches.ChunkedKVCache)):
            if part.keys is None:
                continue
            size = (part.keys.nbytes + part.values.nbytes) // max(1, part.keys.shape[2])
            window = getattr(part, "max_size", None) or getattr(part, "chunk_size", None)
            if window:
                fixed += size * window
            else:
                per_token += size
        else:
            fixed += sum(array.nbytes for array in _arrays(getattr(part, "state", None)))
    return per_token, fixed


def _own_state(module: nn.Module) -> dict[tuple[str, str], int]:
    """Return the identity of everything modules keep besides parameters and other modules."""
    return {
        (path, name): id(value)
        for path, part in module.named_modules()
        for name, value in {**part, **vars(part)}.items()
        if not isinstance(value, (nn.Module, list, dict, tuple)) and name != "_watch"
    }
