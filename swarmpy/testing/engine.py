"""EchoEngine: a deterministic, instant engine whose tokens betray every lost or doubled step.

Each layer keeps a 64-bit state by slot and mixes into it what it receives; the hidden state is that
number. So the token at a position depends on every token before it, in order, through every layer,
and is the same however the layers are cut: `reply` says what must come out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec

from swarmpy.abc import Engine, Inspection, Output, Row, Shard, StateKind, Want
from swarmpy.errors import DoesNotFit, ModelRefused, RowError
from swarmpy.proto.tensor import Hidden, Tensor, TensorSpec

_MASK = (1 << 64) - 1
_WORDS = 4
"""Floats that carry one number: 16 bits each, which float32 holds exactly."""

_CONFIG_KEY = "echo"
"""Where config.json keeps the sizes, so that a model's id tells two sizes apart."""

_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]


class EchoModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model for the EchoEngine: sizes that no memory is used for, to make plans split.

    Its folder looks real to the catalog and the gateway: a configuration, one tensor, a tokenizer
    of one token a byte, a chat template. Any other folder or file is the default model.
    """

    layers: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 12
    hidden_size: Annotated[int, msgspec.Meta(ge=_WORDS, le=1 << 16)] = 64
    vocabulary_size: Annotated[int, msgspec.Meta(ge=16, le=1 << 20)] = 256
    context_max: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] = 8192
    layer_weight_bytes: Size = 100_000_000
    embedding_weight_bytes: Size = 50_000_000
    head_weight_bytes: Size = 50_000_000
    is_tied: bool = False
    kv_bytes_per_token: Size = 16
    head_cost_layers: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 1.0
    token_layers: Annotated[tuple[int, ...], msgspec.Meta(max_length=1024)] = (0,)
    slots_max: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 4096

    def write(self, folder: Path) -> Path:
        """Write the model into a folder and return the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "model_type": "echo",
            "num_hidden_layers": self.layers,
            "max_position_embeddings": self.context_max,
            _CONFIG_KEY: msgspec.to_builtins(self),
        }
        header = b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        files = {
            "config.json": msgspec.json.encode(config),
            "tokenizer.json": msgspec.json.encode(_byte_tokenizer()),
            "tokenizer_config.json": msgspec.json.encode({"chat_template": _TEMPLATE}),
            "model.safetensors": len(header).to_bytes(8, "little") + header + bytes(4),
        }
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder

    @classmethod
    def read(cls, path: Path) -> EchoModel:
        """Read the model in a folder.

        Raises:
            ModelRefused: The configuration is malformed.
        """
        try:
            config = msgspec.json.decode(
                (path / "config.json").read_bytes(), type=dict[str, object]
            )
            return msgspec.convert(config[_CONFIG_KEY], cls)
        except (FileNotFoundError, NotADirectoryError, KeyError):
            return cls()
        except msgspec.MsgspecError as error:
            raise ModelRefused(f"{path / 'config.json'}: {error}") from error


def _byte_tokenizer() -> dict[str, object]:
    """A tokenizer.json of 256 tokens: byte-level BPE without merges, ids in order of the bytes.

    Printable bytes stand for themselves, the others for characters from U+0100 on, as in GPT-2.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {letter: index for index, letter in enumerate(letters)},
            "merges": [],
        },
    }


def inspection_of(model: EchoModel) -> Inspection:
    """Describe an echo model as an engine would."""
    spec = (TensorSpec("float32", (-1, model.hidden_size)),)
    cuts = tuple(range(1, model.layers))
    return Inspection(
        engine="echo",
        build_id="echo-1",
        architecture="echo",
        layer_count=model.layers,
        hidden_size=model.hidden_size,
        vocabulary_size=model.vocabulary_size,
        context_max=model.context_max,
        cuts=cuts,
        wire_specs=dict.fromkeys(cuts, spec),
        token_layers=model.token_layers,
        layer_weight_bytes=(model.layer_weight_bytes,) * model.layers,
        embedding_weight_bytes=model.embedding_weight_bytes,
        head_weight_bytes=model.head_weight_bytes,
        is_tied=model.is_tied,
        kv_bytes_per_token=(model.kv_bytes_per_token,) * model.layers,
        state_bytes=(0,) * model.layers,
        state_kind=StateKind.KV,
        slots_max=model.slots_max,
        head_cost_layers=model.head_cost_layers,
    )


def reply(model: EchoModel, prompt: Sequence[int], count: int) -> list[int]:
    """The first `count` greedy tokens that any ring must answer a prompt with."""
    states = [0] * model.layers
    sequence = list(prompt)
    for position in range(len(prompt) + count - 1):
        number = 0
        for layer in range(model.layers):
            token = sequence[position] if layer in model.token_layers else 0
            number = states[layer] = _mix(layer, number, states[layer], token)
        if position >= len(prompt) - 1:
            sequence.append(number % model.vocabulary_size)
    return sequence[len(prompt) :]


def _mix(layer: int, received: int, state: int, token: int) -> int:
    number = (received ^ (state * 0x9E3779B97F4A7C15 + (token << 20) + layer + 1)) & _MASK
    number = (number ^ (number >> 29)) * 0xBF58476D1CE4E5B9 & _MASK
    return number ^ (number >> 32)


class EchoEngine(Engine):
    """Runs echo models in the node itself: it cannot crash, hang or use real memory."""

    name = "echo"
    in_process = True

    def inspect(self, folder: Path) -> Inspection:
        return inspection_of(EchoModel.read(folder))

    def load(
        self, folder: Path, *, start: int, end: int, slots: int, context: int, exact: bool
    ) -> Shard:
        model = EchoModel.read(folder)
        if not 0 <= start < end <= model.layers:
            raise DoesNotFit(f"layers [{start}, {end}) of a model with {model.layers}")
        return EchoShard(model, start=start, end=end, slots=slots, context=context)


@dataclass(slots=True)
class _Slot:
    states: list[tuple[int, ...]]
    """By position, the state of every layer after it."""


class EchoShard(Shard):
    """Layers [start, end) of an echo model."""

    def __init__(self, model: EchoModel, *, start: int, end: int, slots: int, context: int) -> None:
        self._model = model
        self._start, self._end, self._context = start, end, context
        self._slots = [_Slot([]) for _ in range(slots)]
        self._snapshots: dict[int, list[tuple[int, ...]]] = {}
        self._next_snapshot = 0
        self.weight_bytes = inspection_of(model).weight_bytes(start, end)
        self.exactness = "echo-1"

    @property
    def used_slots(self) -> list[int]:
        """Slots that hold state, for tests that ask whether all was freed."""
        return [index for index, slot in enumerate(self._slots) if slot.states]

    def step(self, rows: Sequence[Row]) -> Sequence[Output]:
        return [self._run(row) for row in rows]

    on_rewind: ClassVar[Callable[[str], None] | None] = None
    """Told of rows computed again where nobody had cut the slot back; a simulation sets it."""

    def _run(self, row: Row) -> Output:
        states = self._slots[row.slot].states
        if row.position < len(states) and EchoShard.on_rewind is not None:
            EchoShard.on_rewind(f"row at {row.position} of a slot that ends at {len(states)}")
        if row.position > len(states):
            return Output(
                slot=row.slot, error=f"row at {row.position}, the slot ends at {len(states)}"
            )
        if row.position + row.count > self._context:
            return Output(slot=row.slot, error=f"{row.count} tokens exceed {self._context}")
        del states[row.position :]
        received = [0] * row.count if row.hidden is None else _numbers(row.hidden)
        tokens = [0] * row.count if row.token_ids is None else row.token_ids.tolist()
        if len(received) != row.count or len(tokens) != row.count:
            return Output(slot=row.slot, error=f"{len(received)} rows for {row.count} tokens")
        sent = [
            self._advance(states, number, token)
            for number, token in zip(received, tokens, strict=True)
        ]
        return self._output(row, sent)

    def _advance(self, states: list[tuple[int, ...]], number: int, token: int) -> int:
        before = states[-1] if states else (0,) * (self._end - self._start)
        after = []
        for layer, state in zip(range(self._start, self._end), before, strict=True):
            number = _mix(layer, number, state, token if layer in self._model.token_layers else 0)
            after.append(number)
        states.append(tuple(after))
        return number

    def _output(self, row: Row, sent: list[int]) -> Output:
        match row.want:
            case Want.NOTHING:
                return Output(slot=row.slot)
            case Want.HIDDEN:
                return Output(slot=row.slot, hidden=_hidden(sent, self._model.hidden_size))
            case Want.LAST_LOGITS:
                logits = _logits(sent[-1:], self._model.vocabulary_size)
                shape: tuple[int, ...] = (self._model.vocabulary_size,)
            case Want.ALL_LOGITS:
                logits = _logits(sent, self._model.vocabulary_size)
                shape = (len(sent), self._model.vocabulary_size)
        return Output(slot=row.slot, logits=Tensor("float32", shape, logits))

    def truncate(self, slot: int, position: int) -> None:
        if position > len(self._slots[slot].states):
            raise RowError(f"slot {slot} ends before position {position}")
        del self._slots[slot].states[position:]

    def snapshot(self, slot: int) -> int:
        self._next_snapshot += 1
        self._snapshots[self._next_snapshot] = list(self._slots[slot].states)
        return self._next_snapshot

    def restore(self, slot: int, snapshot: int) -> None:
        if snapshot not in self._snapshots:
            raise RowError(f"there is no snapshot {snapshot}")
        self._slots[slot].states = self._snapshots.pop(snapshot)

    def export_state(self, slot: int, start: int, end: int) -> Mapping[str, Tensor]:
        import numpy as np

        states = self._slots[slot].states
        if not 0 <= start <= end <= len(states):
            raise RowError(f"slot {slot} has no positions [{start}, {end})")
        numbers = np.array(states[start:end], dtype=np.uint64)
        shape = (end - start, self._end - self._start, 2)
        return {"states": Tensor("uint32", shape, numbers.astype("<u8").tobytes())}

    def import_state(self, slot: int, start: int, end: int, state: Mapping[str, Tensor]) -> None:
        import numpy as np

        if len(self._slots[slot].states) != start:
            raise RowError(f"slot {slot} does not end at position {start}")
        numbers = np.frombuffer(state["states"].data, "<u8").reshape(end - start, -1)
        self._slots[slot].states.extend(tuple(row) for row in numbers.tolist())

    def free(self, slot: int) -> None:
        self._slots[slot].states.clear()

    def close(self) -> None:
        self._slots.clear()


def _hidden(numbers: Sequence[int], width: int) -> Hidden:
    import numpy as np

    words = np.array(numbers, dtype="<u8").view("<u2").reshape(len(numbers), _WORDS)
    floats = np.zeros((len(numbers), width), np.float32)
    floats[:, :_WORDS] = words
    return (Tensor("float32", floats.shape, floats.tobytes()),)


def _numbers(hidden: Hidden) -> list[int]:
    import numpy as np

    floats = np.frombuffer(hidden[0].data, np.float32).reshape(hidden[0].shape)
    words = floats[:, :_WORDS].astype("<u2")
    return [int(number) for number in np.ascontiguousarray(words).view("<u8")[:, 0]]


def _logits(numbers: Sequence[int], width: int) -> bytes:
    """Seven likely tokens a row, the number's remainder the likeliest."""
    import numpy as np

    logits = np.full((len(numbers), width), -20.0, np.float32)
    for row, number in zip(logits, numbers, strict=True):
        for index in range(7):
            row[(number + index) % width] = -index
    return logits.tobytes()
