"""Rows for shards, and rings of shards, whole or split, in this process or in children."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from swarmpy.abc import Inspection, Output, Row, Shard, Want
from swarmpy.pipeline.engine_host import HostedShard
from swarmpy.proto.tensor import Hidden


def row(
    token_ids: Sequence[int] | None,
    position: int,
    *,
    want: Want = Want.LAST_LOGITS,
    slot: int = 0,
    hidden: Hidden | None = None,
    count: int | None = None,
) -> Row:
    ids = None if token_ids is None else np.array(token_ids, np.int32)
    return Row(
        slot=slot,
        position=position,
        count=len(token_ids or ()) if count is None else count,
        token_ids=ids,
        hidden=hidden,
        want=want,
    )


def logits_of(output: Output) -> npt.NDArray[np.float32]:
    assert not output.error, output.error
    assert output.logits is not None
    return np.frombuffer(output.logits.data, np.float32).reshape(output.logits.shape)


def run(
    shard: Shard, token_ids: Sequence[int], position: int, *, slot: int = 0
) -> npt.NDArray[np.float32]:
    """Run one row through a whole model and return the last position's logits."""
    return logits_of(shard.step([row(token_ids, position, slot=slot)])[0])


def ring_rows(
    inspection: Inspection, start: int, end: int, token_ids: Sequence[int], *, want: Want
) -> tuple[list[int] | None, Want]:
    """Return what a stage is given of the token ids, and asked for: ids only where they matter."""
    ids = list(token_ids) if start == 0 or inspection.needs_token_ids(start, end) else None
    return ids, want if end == inspection.layer_count else Want.HIDDEN


async def generate(
    inspection: Inspection, shards: Sequence[HostedShard], prompt: Sequence[int], *, count: int
) -> tuple[list[int], list[bytes]]:
    """Answer greedily with `count` tokens and return them and the logits of every step."""
    tokens: list[int] = []
    logits: list[bytes] = []
    ids, position = list(prompt), 0
    for _ in range(count):
        hidden = None
        for shard in shards:
            given, want = ring_rows(inspection, shard.start, shard.end, ids, want=Want.LAST_LOGITS)
            asked = row(given, position, want=want, hidden=hidden, count=len(ids))
            output = (await shard.step([asked])).outputs[0]
            hidden = output.hidden
        numbers = logits_of(output)
        logits.append(numbers.tobytes())
        tokens.append(int(numbers.argmax()))
        position += len(ids)
        ids = tokens[-1:]
    return tokens, logits
