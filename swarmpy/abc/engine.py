"""Engines: layer ranges of models in memory, rows and slots.

Spec: protocols/engine.md.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from swarmpy.abc.models import Progress
from swarmpy.proto.tensor import Hidden, Tensor, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    TokenIds = npt.NDArray[np.int32]


class StateKind(enum.StrEnum):
    """What a layer range keeps between steps, and so whether it can be cut back."""

    KV = "kv"
    """Keys and values by position: `truncate` to any position works."""
    ROLLING = "rolling"
    """A window over the last positions: cut back only while nothing was overwritten."""
    RECURRENT = "recurrent"
    """A state that only goes forward: use `snapshot` and `restore`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What an engine knows of a model before it loads any of it. Sizes in bytes, as computed in."""

    engine: str
    build_id: str
    """Engine's part of the exactness class: library versions, dtype, BLAS kernel."""
    architecture: str
    layer_count: int
    hidden_size: int
    vocabulary_size: int
    context_max: int
    cuts: tuple[int, ...]
    """Allowed cuts k, 0 < k < layer_count: one shard ends before layer k, another starts there."""
    wire_specs: Mapping[int, tuple[TensorSpec, ...]]
    """By cut: the tensors that cross it."""
    token_layers: tuple[int, ...]
    """Layers whose output depends on the token ids themselves; layer 0 always."""
    layer_weight_bytes: tuple[int, ...]
    embedding_weight_bytes: int
    head_weight_bytes: int
    """Weights only the last stage needs, final norm included; with tied embeddings they are the
    embedding's, held again by the last stage unless it is also the first."""
    is_tied: bool
    kv_bytes_per_token: tuple[int, ...]
    """By layer."""
    state_bytes: tuple[int, ...]
    """By layer: state that does not grow with tokens, per slot."""
    state_kind: StateKind
    slots_max: int
    """1 where the architecture's state cannot live in slots: it runs one session at a time."""
    head_cost_layers: float
    """Cost of final norm and head in units of one average layer, for balancing."""

    def needs_token_ids(self, start: int, end: int) -> bool:
        """Whether what layers [start, end) give depends on token ids beyond the hidden state."""
        return any(start <= layer < end for layer in self.token_layers)

    def weight_bytes(self, start: int, end: int) -> int:
        """Bytes of weights that layers [start, end) keep resident, embedding and head included."""
        size = sum(self.layer_weight_bytes[start:end])
        if start == 0:
            size += self.embedding_weight_bytes
        if end == self.layer_count:
            size += self.head_weight_bytes
            if self.is_tied and start == 0:
                size -= min(self.embedding_weight_bytes, self.head_weight_bytes)
        return size


class Want(enum.StrEnum):
    """What a row's sender needs back."""

    NOTHING = "nothing"
    HIDDEN = "hidden"
    LAST_LOGITS = "last_logits"
    ALL_LOGITS = "all_logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One chunk of one slot: `count` tokens from `position` (index in the sequence, from 0).

    `token_ids` (T,) int32 where the range needs them, else None; `hidden` the state before layer
    `start`, None at the first stage. Both come only where an architecture needs both.
    """

    slot: int
    position: int
    count: int
    token_ids: TokenIds | None
    hidden: Hidden | None
    want: Want


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a row gave: hidden state, logits (V,) or (T, V) float32, nothing, or an error's text."""

    slot: int
    hidden: Hidden | None = None
    logits: Tensor | None = None
    error: str = ""


class Shard(ABC):
    """Layers [start, end) of a model in memory, with a fixed number of slots.

    All methods are synchronous and called from one thread.
    """

    weight_bytes: int
    """Resident bytes of weights as computed in."""
    exactness: str
    """The full exactness class: two shards with equal range and class give equal bits."""

    @abstractmethod
    def step(self, rows: Sequence[Row]) -> Sequence[Output]:
        """Run one batch of rows, one chunk of one slot each, and return one output a row, in order.

        A row whose position lies before the slot's end cuts the slot back first; a gap is an error.
        An error in one row leaves the others untouched.
        """

    @abstractmethod
    def truncate(self, slot: int, position: int) -> None:
        """Forget the slot's state from `position` on.

        Raises:
            RowError: The state cannot be cut back there.
        """

    @abstractmethod
    def snapshot(self, slot: int) -> int:
        """Keep the slot's present state, where `truncate` cannot work; return a number for it."""

    @abstractmethod
    def restore(self, slot: int, snapshot: int) -> None:
        """Return the slot to a snapshot, and forget the snapshot."""

    @abstractmethod
    def export_state(self, slot: int, start: int, end: int) -> Mapping[str, Tensor]:
        """Return the slot's state of positions [start, end) as named tensors."""

    @abstractmethod
    def import_state(self, slot: int, start: int, end: int, state: Mapping[str, Tensor]) -> None:
        """Put an exported state into a slot that ends at `start`."""

    @abstractmethod
    def free(self, slot: int) -> None:
        """Forget everything the slot holds."""

    @abstractmethod
    def close(self) -> None:
        """Release the memory."""


Format = Literal["gguf", "safetensors"]
"""What an engine is given: one GGUF, or a folder of safetensors in Hugging Face layout."""


@dataclass(frozen=True, slots=True)
class Suitability:
    """How well an engine suits a format on this machine."""

    rank: int
    """The engines with higher ranks are asked first whether they run a model; 1 is the least."""
    why: str
    """In words that say what this engine has over others here."""


class Engine(ABC):
    """Runs layer ranges of models. Found through the entry-point group `swarmpy.engines`."""

    name: str
    in_process: bool = False
    """True only for engines that cannot crash, hang or use real memory (the test engine): they run
    in the node itself. All others run in a child process."""
    progress: Callable[[Progress], None] | None = None
    """Set by whoever wants to hear how far a `load` is; an engine may call it from there."""

    @classmethod
    def suits(cls, model_format: Format) -> Suitability | None:
        """Say how well this engine suits models of a format on this machine; None: not at all.

        Called in the node's own process, where nothing of the engine's library may be loaded.
        """
        return Suitability(1, "it is installed")

    @abstractmethod
    def inspect(self, folder: Path) -> Inspection:
        """Read a model's headers, and only those.

        Args:
            folder: The model's source files (safetensors folder or one GGUF), already verified.

        Raises:
            ModelRefused: The files ask for what a model must not do, or contradict themselves.
        """

    @abstractmethod
    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        """Load layers [start, end), reading only their tensors.

        Args:
            slots: Sessions whose state the shard can hold at a time.
            context: Most tokens of one slot.
            exact: Make a sequence's bits independent of its neighbours (design: exactness classes).

        Raises:
            DoesNotFit: The weights and slots exceed the memory that is left.
            ModelRefused: As for `inspect`.
        """
