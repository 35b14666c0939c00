"""Shards of a GGUF one after the other, or the whole in one, and sessions in their slots."""

from __future__ import annotations

from collections.abc import Sequence

from shard_rows import logits_of, row

from swarmpy.abc import Output, Shard, Want
from swarmpy.config import PREFILL_CHUNK


class Ring:
    """A prompt a slot, each answered with the same tokens."""

    def __init__(
        self,
        shards: Sequence[Shard],
        prompts: Sequence[Sequence[int]],
        answer: Sequence[int],
        *,
        chunk: int = PREFILL_CHUNK,
    ) -> None:
        self.shards = shards
        self.prompts = [list(prompt) for prompt in prompts]
        self.answer = list(answer)
        self._chunk = chunk

    def step(self, token_ids: dict[int, list[int]], ends: dict[int, int]) -> dict[int, Output]:
        """Run one row a slot through all shards, and return the outputs by slot."""
        hidden: dict[int, Output] = {}
        for number, shard in enumerate(self.shards):
            rows = [
                row(
                    None if number else ids,
                    ends[slot],
                    slot=slot,
                    count=len(ids),
                    hidden=hidden[slot].hidden if number else None,
                    want=Want.LAST_LOGITS if shard is self.shards[-1] else Want.HIDDEN,
                )
                for slot, ids in token_ids.items()
            ]
            hidden = {output.slot: output for output in shard.step(rows)}
            assert not any(output.error for output in hidden.values()), hidden
        for slot, ids in token_ids.items():
            ends[slot] += len(ids)
        return hidden

    def prompt(self, slot: int, *, tokens: list[int] | None = None, position: int = 0) -> bytes:
        """Free a slot, or go back in it, run a prompt from there and return the logits after it."""
        tokens = self.prompts[slot] if tokens is None else tokens
        for shard in self.shards:
            if not position:
                shard.free(slot)
        ends = {slot: position}
        for at in range(position, len(tokens), self._chunk):
            outputs = self.step({slot: tokens[at : at + self._chunk]}, ends)
        return logits_of(outputs[slot]).tobytes()

    def reply(self, slot: int, *, position: int | None = None) -> list[bytes]:
        """Run the answer token by token and return each step's logits."""
        return self.replies({slot: len(self.prompts[slot]) if position is None else position})[slot]

    def replies(self, ends: dict[int, int]) -> dict[int, list[bytes]]:
        """Run the answer in several slots at once, and return each step's logits by slot."""
        found: dict[int, list[bytes]] = {slot: [] for slot in ends}
        for token in self.answer:
            outputs = self.step({slot: [token] for slot in found}, ends)
            for slot, output in outputs.items():
                found[slot].append(logits_of(output).tobytes())
        return found
